"""The two functions for tensors that have numbers: two `torch.autograd.Function`, and what calls the solver."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd import Function, forward_ad

from .. import solver
from ..adjoint import cost_jvp, filled, kkt_jvp, masked, objective_jvp, right_hand_sides
from ..backend import choose_backend
from ..differentiation import FILL, objective_gradients, smoothed, solve_adjoint
from ..problem import Problem, make_layout
from ..solution import Solution, raise_if_unsolved
from ..sparse import Pattern, Sparse, stored
from .mapped import kkt_vmap, solution_vmap
from .rules import (
    OBJECTIVE,
    OTHERS,
    WARM,
    Settings,
    constants_of,
    fill_of,
    has_transforms,
    kkt_backward,
    or_zeros,
    point_of,
    problem_at,
    solution_backward,
    solved_mask,
    tangents_given,
)
from .tensors import as_array, as_tensors, on_host


class Layer:
    """Both functions for tensors that have numbers, and the linearization that the first leaves for the second."""

    def __init__(self, backend, settings: Settings):
        self.backend: Any = backend
        self.names, self.rounding, self.unsolved, self.options, self.patterns = settings
        # Of the engines for NumPy arrays one takes sparse problems; there is none on a GPU.
        self.solver_backend = _host_backend() if self.patterns or on_host(backend.device) else backend
        self.smoothing = self.options.get("smoothing")
        self.fill, self.kappa = fill_of(self.unsolved), self.smoothing or 0.0
        self.linearization: Any = None

    def solution(self, batch_shape, operands, warm):
        """Call the first function."""
        return _Solution.apply(self, batch_shape, *operands, *warm)

    def kkt_solve(self, wanted, r_x, r_v, x, v, operands):
        """Call the second function."""
        return _KKTSolve.apply(self, wanted, r_x, r_v, x, v, *operands)

    def solve(self, batch_shape, operands, warm):
        """Return the variables (B, n), the multipliers of all rows (B, rows), and the others (*batch_shape, ·)."""
        options = {name: value for name, value in self.options.items() if name != "smoothing"}
        arrays = self.operands(self.names, self.arrays(operands))
        if warm:
            known = dict.fromkeys(OTHERS) | dict(zip(WARM, self.arrays(warm), strict=True))
            options = options | {"warm_start": Solution(**known)}
        layout = make_layout(self.solver_backend, batch_shape, arrays, self.rounding)
        sol = solver.solve_problem(layout.problem(arrays), **options)
        self._refuse(sol.status)
        lin = sol.linearization
        arrays = [lin.x, lin.v, *[getattr(sol, name) for name in OTHERS]]
        if self.smoothing is not None:
            with self.solver_backend.no_grad():
                lin = smoothed(sol, self.smoothing).linearization
            self._refuse(lin.status.reshape(sol.status.shape), relaxed=True)
            arrays += [lin.x, lin.v, lin.status]
        self.linearization = lin
        return tuple(self.tensors(arrays))

    def _refuse(self, status, relaxed=False):
        if self.unsolved == "raise":
            raise_if_unsolved(status if isinstance(status, np.ndarray) else status.cpu().numpy(), relaxed=relaxed)

    def solve_adjoint(self, wanted, r_x, r_v, *_):
        """Return the solution of the KKT system, and the gradients of the operands that are wanted."""
        u_x, u_v, gradients = self._solve_adjoint(r_x, r_v, wanted)
        u_x, u_v, *gradients = self.tensors([u_x, u_v, *gradients])
        # Those of h, b and ub may be slices of u: a change of them in place must not change u.
        pairs = zip(wanted, gradients, strict=True)
        return u_x, u_v, *[value.clone() if name in ("h", "b", "ub") else value for name, value in pairs]

    def gradients(self, wanted, r_x, r_v, x, v, operands):
        """Return those gradients alone; None is zero."""
        return self.tensors(self._solve_adjoint(r_x, r_v, wanted)[2])

    def _solve_adjoint(self, r_x, r_v, wanted):
        problem = self.linearization.problem
        pairs = (r_x, problem.n), (r_v, problem.rows)
        r_x, r_v = (
            self.solver_backend.zeros_of_all(problem.batch, size, problem.dtype) if r is None else self.arrays([r])[0]
            for r, size in pairs
        )
        with self.solver_backend.no_grad():
            u_x, u_v, gradients = solve_adjoint(
                self.linearization, r_x, r_v, wanted, unsolved=self.fill, kappa=self.kappa
            )
        return u_x, u_v, [stored(gradients[name]) for name in wanted]

    def operands(self, names, arrays) -> dict[str, Any]:
        """Return operands, or tangents of them, by name, those that are sparse with their patterns."""
        return _with_patterns(dict(zip(names, arrays, strict=False)), self.patterns)

    def tensors(self, arrays) -> list:
        """Return the tensors of arrays of the solver, on the device of the operands."""
        tensors = as_tensors(arrays)
        return [tensor.to(self.backend.device) for tensor in tensors] if self.patterns else tensors

    def objective_gradients(self, wanted, g):
        """Return the gradients of the operands that are wanted from cotangents of the optimal values."""
        (g,) = self.arrays((g.reshape(-1, 1),))
        with self.solver_backend.no_grad():
            g = self.solver_backend.asarray(g, dtype=self.linearization.problem.dtype)
            gradients = objective_gradients(self.linearization, g, wanted, unsolved=self.fill)
        return self.tensors([stored(gradients[name]) for name in wanted])

    def arrays(self, tensors) -> list:
        """Return what the solver takes for tensors: on the CPU, the NumPy arrays in the same memory."""
        if self.solver_backend is self.backend:
            return [tensor.detach() for tensor in tensors]
        return [as_array(tensor) for tensor in tensors]

    def problem(self, x, operands) -> Problem:
        """Return the problem in torch's operands and operations."""
        return problem_at(self.backend, x, self.operands(self.names, operands))


def _with_patterns(arrays: dict[str, Any], patterns: dict[str, Pattern]) -> dict[str, Any]:
    if not patterns:
        return arrays
    return {k: Sparse.of_pattern(v, patterns[k]) if k in patterns and v is not None else v for k, v in arrays.items()}


@functools.cache
def _host_backend():
    return choose_backend({}, "numpy")[0]


class _Bound(NamedTuple):
    """`inspect.BoundArguments` as they were given."""

    args: tuple
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None:
        """Do nothing: there are none."""


class _AsGiven(inspect.Signature):
    """The signature of a function that has no defaults."""

    def bind(self, /, *args, **kwargs):
        return _Bound(args, kwargs)


def _bound_as_given(forward):
    """Spare `Function.apply` to inspect and bind the arguments, which takes as long as a small problem does."""
    forward.__signature__ = _AsGiven()
    return forward


def _pushed_forward(jvp):
    """Let outer transforms of forward mode differentiate a rule of forward mode, for which torch turns them all off."""

    @functools.wraps(jvp)
    def rule(*args):
        if not has_transforms():
            return jvp(*args)
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(*args)

    return rule


def _primals(tensors):
    """Return saved tensors without the tangents of the transform whose rule is being computed."""
    if not has_transforms():
        return tensors
    return [forward_ad.unpack_dual(tensor).primal for tensor in tensors]


def _save(ctx, *tensors) -> None:
    """Save tensors for derivatives in either mode."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


class _Solution(Function):
    """The variables (B, n), the multipliers of all rows (B, rows), and the other fields of a Solution.

    With `smoothing` the variables and multipliers of the relaxed point follow, whose derivatives those of the solution
    are too: the rules of both take the relaxed point, so that higher derivatives are right.
    """

    @staticmethod
    @_bound_as_given
    def forward(layer, batch_shape, *tensors):
        count = len(layer.names)
        return layer.solve(batch_shape, tensors[:count], tensors[count:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.layer, ctx.others = inputs[0], len(inputs) - 2 - len(inputs[0].names)
        ctx.batch_shape = output[OBJECTIVE].shape
        ctx.mark_non_differentiable(*constants_of(ctx.layer, output))
        ctx.set_materialize_grads(False)
        _save(ctx, *inputs[2 : len(inputs) - ctx.others], *point_of(ctx.layer, output))

    @staticmethod
    def backward(ctx, *cotangents):
        *operands, x, v, status = ctx.saved_tensors
        gradients = solution_backward(ctx.layer, ctx.needs_input_grad[2:], cotangents, x, v, status, operands)
        return None, None, *gradients, *[None] * ctx.others

    @staticmethod
    @_pushed_forward
    def jvp(ctx, _, __, *tangents):
        layer, tangents = ctx.layer, tangents_given(ctx.layer, ctx.layer.names, tangents)
        *operands, x, v, status = _primals(ctx.saved_tensors)
        solved = solved_mask(x, status)
        x, v = masked(torch, solved, x, v)
        with layer.backend.in_full_precision():
            problem = layer.problem(x, operands)
            parts = right_hand_sides(problem, x, v, tangents, layer.kappa)
            r_x, r_v = (sum(r[1:], r[0]) for r in zip(*parts, strict=True))
        dx, dv = layer.kkt_solve((), r_x, r_v, x, v, operands)
        out = [dx, dv, *[None] * len(OTHERS)]
        with layer.backend.in_full_precision():
            if layer.smoothing is None:
                value = objective_jvp(problem, x, v, tangents, *parts)
            else:
                value = cost_jvp(problem, x, v, dx, dv, tangents, layer.kappa)
            value = filled(torch, solved, value, FILL[layer.fill])
            out[OBJECTIVE] = value.reshape(ctx.batch_shape).double()
        return *out, *([] if layer.smoothing is None else [dx.clone(), dv.clone(), None])

    @staticmethod
    def vmap(info, in_dims, layer, batch_shape, *tensors):
        pairs, count = list(zip(tensors, in_dims[2:], strict=True)), len(layer.names)
        return solution_vmap(layer, info.batch_size, batch_shape, pairs[:count], pairs[count:])


class _KKTSolve(Function):
    """u = K⁻¹ r with the KKT matrix K at the solution x, v of the operands: (B, n) and (B, rows).

    The gradients of the operands that are wanted follow, with r as the cotangents of the solution.
    """

    @staticmethod
    @_bound_as_given
    def forward(layer, wanted, r_x, r_v, x, v, *operands):
        return layer.solve_adjoint(wanted, r_x, r_v, x, v, operands)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.layer, ctx.wanted = inputs[:2]
        ctx.set_materialize_grads(False)
        _save(ctx, *inputs[4:], *output[:2])

    @staticmethod
    def backward(ctx, g_x, g_v, *of_gradients):
        x, v, *operands, u_x, u_v = ctx.saved_tensors
        of_gradients = tangents_given(ctx.layer, ctx.wanted, of_gradients)
        of_vectors, of_operands = kkt_backward(
            ctx.layer, ctx.needs_input_grad[6:], g_x, g_v, of_gradients, x, v, operands, u_x, u_v
        )
        return None, None, *of_vectors, *of_operands

    @staticmethod
    @_pushed_forward
    def jvp(ctx, _, __, dr_x, dr_v, dx, dv, *tangents):
        layer, wanted = ctx.layer, ctx.wanted
        x, v, *operands, u_x, u_v = _primals(ctx.saved_tensors)
        dr_x, dr_v, dx, dv = (or_zeros(d, value) for d, value in ((dr_x, x), (dr_v, v), (dx, x), (dv, v)))
        with layer.backend.in_full_precision():
            problem, tangents = layer.problem(x, operands), tangents_given(layer, layer.names, tangents)
            r_x, r_v, moved = kkt_jvp(problem, x, v, u_x, u_v, dx, dv, tangents, wanted, layer.kappa)
            moved = {name: stored(value) for name, value in moved.items()}
        du_x, du_v, *gradients = layer.kkt_solve(wanted, dr_x + r_x, dr_v + r_v, x, v, operands)
        named = zip(wanted, gradients, strict=True)
        return du_x, du_v, *[d + moved[name] if name in moved else d for name, d in named]

    @staticmethod
    def vmap(info, in_dims, layer, wanted, *tensors):
        return kkt_vmap(layer, info.batch_size, wanted, list(zip(tensors, in_dims[2:], strict=True)))
