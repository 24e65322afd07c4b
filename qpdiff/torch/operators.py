"""The two functions as operators of torch's, for programs that are traced.

A program has no place for a linearization: the second operator makes the factors again from what the first returns.
Names of operands are in one string each, as lists of strings are no arguments that torch traces.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import solver
from ..backend import choose_backend
from ..engines.base import Linearization
from ..engines.choice import choose_engine
from ..problem import Problem, make_layout
from ..validation import symmetrized
from .functions import Layer
from .mapped import batch_of, joined, kkt_vmap, solution_vmap
from .rules import (
    Settings,
    constants_of,
    fill_of,
    kkt_backward,
    or_zeros,
    point_of,
    problem_at,
    solution_backward,
    tangents_given,
)
from .tensors import as_tensors

DEFAULTS: dict[str, Any] = {
    "tol": None, "rtol": None, "max_iterations": solver.MAX_ITERATIONS, "check": True, "verbose": False,
    "engine": "auto", "smoothing": None,
}  # fmt: skip
OPTIONS = "float? tol, float? rtol, int max_iterations, bool check, bool verbose, str engine, float? smoothing"


class Operators:
    """Both functions for tensors that may have no numbers yet: calls of the operators, which have the same rules."""

    linearization = None

    def __init__(self, backend, settings: Settings, point=()):
        self.backend: Any = backend
        self.settings, self.names, self.unsolved = settings, settings.names, settings.unsolved
        self.smoothing, self.fill = settings.options.get("smoothing"), fill_of(settings.unsolved)
        self.kappa = self.smoothing or 0.0
        self.point = point
        """Slacks of all rows (B, rows), status (B), equilibration (B, n + rows), for the second function."""

    def solution(self, batch_shape, operands, warm):
        """Call the first function, whose last results are slacks of all rows and equilibration here."""
        names, rounding, unsolved, options, _ = self.settings
        return OPERATORS.solve(
            list(operands), " ".join(names), batch_shape, list(warm), rounding, unsolved, *in_order(options)
        )

    def kkt_solve(self, wanted, r_x, r_v, x, v, operands):
        """Call the second function."""
        names, rounding, unsolved, options, _ = self.settings
        return OPERATORS.solve_kkt(
            r_x, r_v, x, v, list(operands), " ".join(names), " ".join(wanted), *self.point, rounding, unsolved,
            options.get("engine", "auto"), self.smoothing,
        )  # fmt: skip

    def gradients(self, wanted, r_x, r_v, x, v, operands):
        """Return the gradients alone; None is zero."""
        return self.kkt_solve(wanted, or_zeros(r_x, x), or_zeros(r_v, v), x, v, operands)[2:]

    def problem(self, x, operands) -> Problem:
        """Return the problem in torch's operands and operations."""
        return problem_at(self.backend, x, self.operands(self.names, operands))

    def operands(self, names, tensors) -> dict[str, Any]:
        """Return operands, or tangents of them, by name."""
        return dict(zip(names, tensors, strict=False))


def in_order(options):
    """Return the values of all options of the operators."""
    if unknown := options.keys() - DEFAULTS.keys():
        raise TypeError(f"solve_qp got {', '.join(sorted(unknown))}, which torch.compile and torch.export do not take")
    return (DEFAULTS | options).values()


def not_in_programs(name: str) -> TypeError:
    return TypeError(f"{name} is sparse, which torch.compile and torch.export do not take; pass a dense tensor")


def _settings(names, rounding, unsolved, *values, **options) -> Settings:
    options |= zip(DEFAULTS, values, strict=False)
    return Settings(tuple(names.split()), rounding, unsolved, options, {})


def _backend_of(operands):
    return choose_backend({"q": operands[1]}, "torch")[0]


def _returned(tensors) -> list:
    """Return tensors as an operator has to: contiguous, and each in memory of its own."""
    known, out = set(), []
    for tensor in tensors:
        address = tensor.untyped_storage().data_ptr()
        out.append(tensor.clone() if address in known else tensor.contiguous())
        known.add(address)
    return out


# ---- the first function


def _solve_op(operands, names, batch_shape, warm, *settings):
    layer = Layer(_backend_of(operands), _settings(names, *settings))
    tensors = layer.solve(batch_shape, operands, warm)
    lin = layer.linearization
    return _returned([*tensors, *as_tensors([lin.s, lin.factors.scaling(lin.problem)])])


def _solve_fake(operands, names, batch_shape, warm, *settings):
    q, batch = operands[1], math.prod(batch_shape)
    named = dict(zip(names.split(), operands, strict=True))
    problem = make_layout(_backend_of(operands), batch_shape, named).problem(named)
    x, v = q.new_empty(batch, problem.n), q.new_empty(batch, problem.rows)
    counts = [q.new_empty(batch_shape, dtype=torch.int32) for _ in range(2)]
    exact = [q.new_empty(batch_shape, dtype=torch.float64) for _ in range(4)]
    scaling = q.new_empty(batch, problem.n + problem.rows)
    relaxed = []
    if settings[-1] is not None:
        relaxed = [torch.empty_like(x), torch.empty_like(v), q.new_empty(batch, 1, dtype=torch.int32)]
    return [x, v, q.new_empty(*batch_shape, problem.m), *counts, *exact, *relaxed, torch.empty_like(v), scaling]


def _solve_context(ctx, inputs, output):
    operands, names, batch_shape, warm, *settings = inputs
    ctx.settings, ctx.axes, ctx.warm = _settings(names, *settings), len(batch_shape), len(warm)
    layer = Operators(_backend_of(operands), ctx.settings)
    ctx.mark_non_differentiable(*constants_of(layer, output))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, *point_of(layer, output), *output[-2:])


def _solve_backward(ctx, cotangents):
    *operands, x, v, status, s, scaling = ctx.saved_tensors
    layer = Operators(_backend_of(operands), ctx.settings, (s, status.reshape(-1), scaling))
    gradients = solution_backward(layer, ctx.needs_input_grad[0], cotangents, x, v, status, operands)
    of_axes = None if ctx.axes else []  # torch takes an empty list of sizes for one of tensors
    return list(gradients), None, of_axes, [None] * ctx.warm, *[None] * (2 + len(DEFAULTS))


def _solve_vmap(info, in_dims, operands, names, batch_shape, warm, *settings):
    layer = Operators(_backend_of(operands), _settings(names, *settings))
    pairs = [list(zip(*each, strict=True)) for each in ((operands, in_dims[0]), (warm, in_dims[3] or ()))]
    output, out_dims = solution_vmap(layer, info.batch_size, batch_shape, *pairs)
    return list(output), list(out_dims)


# ---- the second function


def _kkt_op(r_x, r_v, x, v, operands, names, wanted, s, status, scaling, rounding, unsolved, engine, smoothing):
    layer = Layer(_backend_of(operands), _settings(names, rounding, unsolved, smoothing=smoothing))
    arrays = dict(zip(layer.names, layer.arrays(operands), strict=True))
    layout = make_layout(layer.solver_backend, (x.shape[0],), arrays, rounding)
    problem = symmetrized(layout.problem(arrays))
    x, v, s, status, scaling = layer.arrays([each.contiguous() for each in (x, v, s, status[:, None], scaling)])
    factors = choose_engine(engine, problem, False).without_factor(problem, scaling)
    layer.linearization = Linearization(problem, factors, x, v, s, status)
    return _returned(layer.solve_adjoint(tuple(wanted.split()), r_x, r_v))


def _kkt_fake(r_x, r_v, x, v, operands, names, wanted, *_):
    named = dict(zip(names.split(), operands, strict=True))
    shapes = [x.shape, v.shape, *[named[name].shape for name in wanted.split()]]
    return [x.new_empty(shape) for shape in shapes]


def _kkt_context(ctx, inputs, output):
    _, _, x, v, operands, names, wanted, s, status, scaling, rounding, unsolved, engine, smoothing = inputs
    ctx.settings = _settings(names, rounding, unsolved, engine=engine, smoothing=smoothing)
    ctx.wanted = tuple(wanted.split())
    ctx.save_for_backward(x, v, s, status, scaling, *operands, *output[:2])


def _kkt_backward_op(ctx, cotangents):
    x, v, *point = ctx.saved_tensors[:5]
    *operands, u_x, u_v = ctx.saved_tensors[5:]
    layer = Operators(_backend_of(operands), ctx.settings, tuple(point))
    g_x, g_v, *of_gradients = cotangents
    of_gradients = tangents_given(layer, ctx.wanted, of_gradients)
    of_vectors, of_operands = kkt_backward(
        layer, ctx.needs_input_grad[4], g_x, g_v, of_gradients, x, v, operands, u_x, u_v
    )
    return *of_vectors, list(of_operands), *[None] * 9


def _kkt_vmap_op(info, in_dims, r_x, r_v, x, v, operands, names, wanted, s, status, scaling, *settings):
    size, point = info.batch_size, (s, status, scaling)
    if in_dims[2] is not None:
        batch = batch_of(x, in_dims[2])
        s, status, scaling = map(joined, point, in_dims[7:10], [size] * 3, [batch] * 3)
    rounding, unsolved, engine, smoothing = settings
    settings = _settings(names, rounding, unsolved, engine=engine, smoothing=smoothing)
    layer = Operators(_backend_of(operands), settings, (s, status, scaling))
    vectors, dims = [r_x, r_v, x, v, *operands], [*in_dims[:4], *in_dims[4]]
    output, out_dims = kkt_vmap(layer, size, tuple(wanted.split()), list(zip(vectors, dims, strict=True)))
    return list(output), list(out_dims)


torch.library.define(
    "qpdiff::solve",
    "(Tensor[] operands, str names, SymInt[] batch_shape, Tensor[] warm, float rounding, str unsolved, "
    f"{OPTIONS}) -> Tensor[]",
)
torch.library.define(
    "qpdiff::solve_kkt",
    "(Tensor r_x, Tensor r_v, Tensor x, Tensor v, Tensor[] operands, str names, str wanted, Tensor s, Tensor status, "
    "Tensor scaling, float rounding, str unsolved, str engine, float? smoothing) -> Tensor[]",
)
for _name, _run, _fake, _context, _backward, _vmap in (
    ("qpdiff::solve", _solve_op, _solve_fake, _solve_context, _solve_backward, _solve_vmap),
    ("qpdiff::solve_kkt", _kkt_op, _kkt_fake, _kkt_context, _kkt_backward_op, _kkt_vmap_op),
):
    torch.library.impl(_name, "CompositeExplicitAutograd", _run)
    torch.library.register_fake(_name, _fake)
    torch.library.register_autograd(_name, _backward, setup_context=_context)
    torch.library.register_vmap(_name, _vmap)

OPERATORS: Any = torch.ops.qpdiff
