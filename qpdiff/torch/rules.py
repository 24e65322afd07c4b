"""The rules of the two functions, made of the second function and of torch's operations.

They are those of both forms of the functions: `Layer` for tensors that have numbers, `Operators` for programs. Operands
and solutions have one batch axis, of length 1 where an operand is shared.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from ..adjoint import (
    filled,
    gradients_vjp,
    kkt_vjp,
    masked,
    objective_vjp,
    price_gradients,
    relaxed_price_slopes,
)
from ..differentiation import FILL
from ..problem import Problem, make_layout
from ..solution import FIELDS, Status
from ..sparse import Pattern, stored

WARM = ("x", "y", "z", "z_lb", "z_ub", "status")
OTHERS = tuple(name for name in FIELDS if name not in WARM[:-1])
STATUS, OBJECTIVE = (2 + OTHERS.index(name) for name in ("status", "objective"))
LAST = 2 + len(OTHERS)
"""The number of the first function's results; with `smoothing` x, v and status of the relaxed point follow."""


class Settings(NamedTuple):
    """The arguments of both functions beside tensors."""

    names: tuple[str, ...]
    """Of the operands."""
    rounding: float
    unsolved: str
    options: dict[str, Any]
    patterns: dict[str, Pattern]
    """Of the sparse operands, of which the functions take the values."""


def fill_of(unsolved: str) -> str:
    """Return what problems that are not SOLVED contribute; with "raise" there are none."""
    return "zero" if unsolved == "raise" else unsolved


def problem_at(backend, x, operands: dict[str, Any]) -> Problem:
    return make_layout(backend, (x.shape[0],), operands).problem(operands)


def point_of(layer, output):
    """Return x, v and status of the point at which the solution differentiates, from the first function's results."""
    return (*output[:2], output[STATUS]) if layer.smoothing is None else output[LAST : LAST + 3]


def constants_of(layer, output):
    """Return those results that do not differentiate."""
    moving = (0, 1, OBJECTIVE) if layer.smoothing is None else (0, 1, OBJECTIVE, LAST, LAST + 1)
    return [value for i, value in enumerate(output) if i not in moving]


def solution_backward(layer, needed, cotangents, x, v, status, operands):
    """Return the gradients of the operands from the cotangents of the first function's results."""
    wanted, gradients = names_wanted(layer.names, needed), dict[str, Any]()
    (g_x, g_v), g = cotangents[:2], cotangents[OBJECTIVE]
    records = may_record()
    if g is not None and layer.linearization is not None and layer.smoothing is None and not records:
        gradients, g = dict(zip(wanted, layer.objective_gradients(wanted, g), strict=True)), None
    if g is not None or records:
        solved = solved_mask(x, status)
        x, v = masked(torch, solved, x, v)
    if layer.smoothing is not None:
        g_x, g_v = sum_of(g_x, cotangents[LAST]), sum_of(g_v, cotangents[LAST + 1])
    if g is not None:
        with layer.backend.in_full_precision():
            problem = layer.problem(x, operands)
            g = filled(torch, solved, g.reshape(x.shape[0], 1).to(x.dtype), FILL[layer.fill])
            at_v = v if layer.smoothing is None else torch.zeros_like(v)
            gradients = gradients_by(objective_vjp, problem, x, at_v, g, wanted)
            if layer.smoothing is not None:  # the relaxed point is no minimum, so the value moves with it
                g_x = sum_of(g_x, g * (problem.hessian(x) + problem.q))
                if problem.is_elastic:
                    by_v, *by_prices = relaxed_price_slopes(problem, x, v, layer.kappa)
                    g_v = sum_of(g_v, g * by_v)
                    gradients |= price_gradients(problem, *(g * by for by in by_prices), wanted)
    if g_x is not None or g_v is not None:
        if records:
            r_x, r_v = or_zeros(g_x, x), or_zeros(g_v, v)
            _, _, *of_solution = layer.kkt_solve(wanted, r_x, r_v, x, v, operands)
        else:  # which spares a part of the time of a small problem
            of_solution = layer.gradients(wanted, g_x, g_v, x, v, operands)
        gradients = {name: sum_of(gradients.get(name), value) for name, value in zip(wanted, of_solution, strict=True)}
    return map(gradients.get, layer.names)


def solved_mask(x, status):
    """Return the mask (B, 1) of the problems that are SOLVED."""
    return status.reshape(x.shape[0], 1) == int(Status.SOLVED)


def kkt_backward(layer, needed, g_x, g_v, of_gradients, x, v, operands, u_x, u_v):
    """Return the gradients of r, x and v, and those of the operands, from the cotangents of u and of gradients."""
    with layer.backend.in_full_precision():
        problem = layer.problem(x, operands)
        s_x, s_v, x_moved, v_moved = gradients_vjp(problem, x, v, u_x, u_v, of_gradients, layer.kappa)
    s_x, s_v = sum_of(g_x, s_x), sum_of(g_v, s_v)
    t_x, t_v, *_ = layer.kkt_solve((), s_x, s_v, x, v, operands)
    with layer.backend.in_full_precision():
        wanted = names_wanted(layer.names, needed)
        x_bar, v_bar, gradients = kkt_vjp(problem, x, v, u_x, u_v, t_x, t_v, wanted, layer.kappa, of_gradients)
    gradients = {name: stored(value) for name, value in gradients.items()}
    return (t_x, t_v, x_bar + x_moved, v_bar + v_moved), map(gradients.get, layer.names)


def may_record() -> bool:
    """Return whether torch may record or transform what is computed now, for further derivatives or a mapped axis."""
    return torch.is_grad_enabled() or may_transform()


def may_transform() -> bool:
    """Return whether a transform of torch.func or forward mode may be under way."""
    return getattr(forward_ad, "_current_level", 0) >= 0 or has_transforms()


has_transforms = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def names_wanted(names, needed) -> tuple[str, ...]:
    """Return the names of the operands whose gradients are needed."""
    return tuple([name for name, flag in zip(names, needed, strict=False) if flag])


def tangents_given(layer, names, tangents) -> dict[str, Any]:
    given = {name: t for name, t in zip(names, tangents, strict=False) if t is not None}
    return layer.operands(given.keys(), given.values())


def gradients_by(vjp, *args) -> dict[str, Any]:
    """Return the tensors of the gradients that a function of `adjoint` computes: of sparse operands the values."""
    return {name: stored(value) for name, value in vjp(*args).items()}


def sum_of(one, other):
    """Return the sum of two tangents, either of which may be None for zero."""
    return one if other is None else other if one is None else one + other


def or_zeros(tangent, value):
    return torch.zeros_like(value) if tangent is None else tangent
