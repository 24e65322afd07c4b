"""torch: `solve_qp` whose solution differentiates, to any order and in both modes; the layer `OptNet`; `QPFunction`.

Two functions with rules of their own: the solution, and the optimal value with it, as a function of the operands; and
the solve with its KKT matrix, with the gradients of operands that follow from it, as a function of the operands, the
solution and the right-hand side (see `qpdiff.differentiation`). First derivatives of the solution are the second
function, which the engine computes in one pass; those of the optimal value are products of the solution. The second
function's derivatives are made of itself and of torch's operations. Under `torch.func.vmap` they solve all problems as
one batch. In eager calls they are two `torch.autograd.Function`, which have rules for forward mode and `torch.func`;
where `torch.compile` or `torch.export` traces, two operators with the same rules but for these.

Tensors on the CPU go to the solver as the NumPy arrays that share their memory, so that the compiled engine runs. Where
neither transforms nor forward mode are under way, and all matrices are dense, the first function is a third
`torch.autograd.Function` there, of which torch has less to record: `_SolvedArrays`.

On any other device tensors are solved there, in torch's operations (batched `cholesky_ex`): that takes no second
library, stays on torch's stream and in its memory, and on a GPU took a little less time than CuPy does.
"""

from __future__ import annotations

import enum
import functools
import inspect
import math
import re
from typing import Any, NamedTuple

import numpy as np

from . import solver
from .adjoint import (
    cost_jvp,
    filled,
    gradients_vjp,
    kkt_jvp,
    kkt_vjp,
    masked,
    objective_jvp,
    objective_vjp,
    price_gradients,
    relaxed_price_slopes,
    right_hand_sides,
    solution_vjp,
)
from .backend import choose_backend, read_dtype
from .differentiation import FILL, check_smoothing, in_given_shape, objective_gradients, smoothed, solve_adjoint
from .engines.base import Linearization, Outcome
from .engines.choice import choose_engine
from .prices import price_operands, with_prices
from .problem import OPERANDS, PRICED, Problem, make_layout, slack, split_blocks, split_rows
from .solution import FIELDS, POINT, Solution, Status, Violation, check_unsolved, raise_if_unsolved, whole_solution
from .sparse import Pattern, Sparse, is_sparse, read_sparse, stored
from .validation import make_problem, symmetrized

try:
    import torch
except ImportError as error:
    raise ImportError("qpdiff.torch needs torch: pip install 'qpdiff[torch]'") from error
from torch import nn
from torch.autograd import Function, forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def solve_qp(
    Q,
    q,
    G=None,
    h=None,
    A=None,
    b=None,
    lb=None,
    ub=None,
    *,
    elastic=None,
    elastic_quadratic=None,
    unsolved: str = "raise",
    smoothing: float | None = None,
    warm_start=None,
    **options,
) -> Solution:
    """Solve a batch of convex quadratic programs; `qpdiff.solve_qp` for torch.

    Parameters
    ----------
    Q, q, G, h, A, b, lb, ub : tensor
        As for `qpdiff.solve_qp`; any of them may require a gradient. Arrays, lists and numbers become tensors on the
        device of the others. Of Q, G and A any may be a tensor in the layout CSR, whose gradient is one too, or a
        `qpdiff.Sparse` with a tensor of values, through which derivatives of any order go.
    elastic, elastic_quadratic : number or tensor without axes, or dict, optional
        As for `qpdiff.solve_qp`; tensors may require a gradient. Not in `torch.compile` and `torch.export`.
    unsolved : {"raise", "nan", "zero"}
        What to do about problems that are not SOLVED: raise, or give them NaN or zero gradients.
    smoothing : float, optional
        κ > 0: differentiate the solution of the relaxed conditions s ∘ z = κ, to any order, see `qpdiff.vjp`. The
        values stay those of the solution.
    warm_start : Solution, optional
        As for `qpdiff.solve_qp`; of this function or that one. No gradient goes through it.
    **options
        Further options of `qpdiff.solve_qp`, but for `backend`.

    Returns
    -------
    Solution
        Whose x, y, z, z_lb, z_ub, objective and violation differentiate. The other fields are constants. Under
        `torch.func.vmap` all are those of one sample; the function that is mapped returns the ones that it wants.

    Raises
    ------
    RuntimeError
        With ``unsolved="raise"``, when a problem is not SOLVED, or its relaxed point was not found; the error counts
        them and names the first. The axes that `torch.func.vmap` maps over come first in its position.

    Examples
    --------
    >>> import torch
    >>> import qpdiff.torch
    >>> point = torch.tensor([2.0, -3.0], requires_grad=True)
    >>> projection = qpdiff.torch.solve_qp(torch.eye(2), -point, lb=0.0).x
    >>> torch.sum((projection - point) ** 2).backward()
    >>> point.grad.round(decimals=3).abs().tolist()
    [0.0, 6.0]
    """
    check_unsolved(unsolved)
    compiling = torch.compiler.is_compiling()
    if compiling:
        _refuse_arrays(options | {"smoothing": smoothing})
    check_smoothing(smoothing)
    if options:
        solver.check_names("solve_qp", [name for name in options if name != "dtype"])
    operands = {"Q": Q, "q": q, "G": G, "h": h, "A": A, "b": b, "lb": lb, "ub": ub}
    operands, _ = with_prices(operands, elastic, elastic_quadratic)
    operands = {k: _stacked(value) if isinstance(value, (list, tuple)) else value for k, value in operands.items()}
    warm: Any = None
    if isinstance(warm_start, Solution):
        warm = [getattr(warm_start, name) for name in _WARM]
    elif warm_start is not None:
        options["warm_start"] = warm_start  # for the solver to refuse
    if not compiling and smoothing is None and _are_numpys(operands):
        return _solve_arrays(operands, warm, unsolved, **options)
    options["smoothing"] = None if smoothing is None else float(smoothing)
    solve = _solve
    if compiling:
        if len(operands) > len(OPERANDS):
            raise TypeError("torch.compile and torch.export do not take elastic and elastic_quadratic")
        solve = _solve_in_graph
    return Solution(*solve(operands, warm, unsolved, **options))


def _solve(operands, warm, unsolved, *, in_operator=False, dtype=None, **options):
    """Return the fields of the solution; an operator has to call others where a transform of torch.func calls it."""
    result = _half(operands) if dtype is None else None
    problem = make_problem(operands, backend="torch", dtype=dtype if result is None else torch.float64)
    if warm is not None:
        given = (value.detach() if isinstance(value, torch.Tensor) else value for value in warm)
        warm = [problem.backend.asarray(value) for value in given]
    batch_shape, tensors = problem.batch_shape, [stored(value) for value in problem.operands.values()]
    patterns = {name: value.pattern for name, value in problem.operands.items() if isinstance(value, Sparse)}
    settings = _Settings(tuple(problem.operands), problem.rounding, unsolved, options, patterns)
    # In a dispatch mode tensors may have no numbers yet.
    traced = is_in_torch_dispatch_mode() or (in_operator and _transforms())
    if traced and patterns:
        raise _not_in_programs(next(iter(patterns)))
    if traced and problem.is_elastic:
        raise TypeError("qpdiff.torch.solve_qp takes elastic and elastic_quadratic in eager calls only")
    layer = (_Operators if traced else _Layer)(problem.backend, settings)
    x, v, s, *constants = layer.solution(batch_shape, tensors, warm or ())[:_LAST]
    parts = [x, *split_rows(problem, v, v)]
    parts = [_in_batch(part, batch_shape) for part in parts]
    parts.append(s)
    if (result := result or problem.result) != problem.dtype:
        parts = [part.to(result) for part in parts]
    return *parts, *constants, *([_violation(problem, x, result)] if problem.is_elastic else [])


def _in_batch(value, batch_shape):
    """Return a tensor (B, ·) with the batch axes of the caller; each operation that torch records takes time."""
    if len(batch_shape) == 1:
        return value
    return value.reshape((*batch_shape, value.shape[1])) if batch_shape else value[0]


def _violation(problem: Problem, x, result):
    """Return the violations at x (B, n), which differentiate as x does, in the type of the results."""
    found: Any = solver.violation(problem, x)
    return Violation(*(part if part is None else part.to(result) for part in found))


_HALF = frozenset({torch.float16, torch.bfloat16})


def _half(operands):
    """Return the type of the results where operands are in half precision, else None."""
    if _HALF.isdisjoint([getattr(value, "dtype", None) for value in operands.values()]):
        return None
    arrays = [stored(read_sparse(name, value)) if is_sparse(value) else value for name, value in operands.items()]
    kinds = [value.dtype for value in arrays if isinstance(value, torch.Tensor)]
    on_host = [value for value in arrays if isinstance(value, (np.ndarray, np.generic))]
    kinds += [getattr(torch, value.dtype.name) for value in on_host if value.dtype.name in ("float32", "float64")]
    return functools.reduce(torch.promote_types, [kind for kind in kinds if kind.is_floating_point])


def _stacked(value):
    """Return a list with tensors in it as one tensor."""
    parts = [_stacked(part) if isinstance(part, (list, tuple)) else part for part in value]
    tensors = any(isinstance(part, torch.Tensor) for part in parts)
    return torch.stack([torch.as_tensor(part) for part in parts]) if tensors else value


# ---- the two functions; operands and solutions have one batch axis, of length 1 where an operand is shared


_WARM = ("x", "y", "z", "z_lb", "z_ub", "status")
_OTHERS = tuple(name for name in FIELDS if name not in _WARM[:-1])
_STATUS, _OBJECTIVE = (2 + _OTHERS.index(name) for name in ("status", "objective"))
_LAST = 2 + len(_OTHERS)
"""The number of the first function's results; with `smoothing` x, v and status of the relaxed point follow."""


class _Settings(NamedTuple):
    """The arguments of both functions beside tensors."""

    names: tuple[str, ...]
    """Of the operands."""
    rounding: float
    unsolved: str
    options: dict[str, Any]
    patterns: dict[str, Pattern]
    """Of the sparse operands, of which the functions take the values."""


class _Layer:
    """Both functions for tensors that have numbers, and the linearization that the first leaves for the second."""

    def __init__(self, backend, settings: _Settings):
        self.backend: Any = backend
        self.names, self.rounding, self.unsolved, self.options, self.patterns = settings
        # Of the engines for NumPy arrays one takes sparse problems; there is none on a GPU.
        self.solver_backend = _host_backend() if self.patterns or _on_host(backend.device) else backend
        self.smoothing = self.options.get("smoothing")
        self.fill, self.kappa = _fill(self.unsolved), self.smoothing or 0.0
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
            known = dict.fromkeys(_OTHERS) | dict(zip(_WARM, self.arrays(warm), strict=True))
            options = options | {"warm_start": Solution(**known)}
        layout = make_layout(self.solver_backend, batch_shape, arrays, self.rounding)
        sol = solver.solve_problem(layout.problem(arrays), **options)
        self._refuse(sol.status)
        lin = sol.linearization
        arrays = [lin.x, lin.v, *[getattr(sol, name) for name in _OTHERS]]
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
        tensors = _as_tensors(arrays)
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
        return [_array(tensor) for tensor in tensors]

    def problem(self, x, operands) -> Problem:
        """Return the problem in torch's operands and operations."""
        return _problem(self.backend, x, self.operands(self.names, operands))


def _array(tensor) -> np.ndarray:
    """Return the NumPy array in the memory of a tensor."""
    try:
        return tensor.numpy(force=True)
    except RuntimeError as error:
        raise RuntimeError(
            "qpdiff.torch does not run under torch's first vmap, which torch.autograd.grad(is_grads_batched=True) "
            "and torch.autograd.functional.jacobian(vectorize=True) use; take torch.func.jacrev, jacfwd or vmap "
            "instead"
        ) from error


def _fill(unsolved: str) -> str:
    """Return what problems that are not SOLVED contribute; with "raise" there are none."""
    return "zero" if unsolved == "raise" else unsolved


def _with_patterns(arrays: dict[str, Any], patterns: dict[str, Pattern]) -> dict[str, Any]:
    if not patterns:
        return arrays
    return {k: Sparse.of_pattern(v, patterns[k]) if k in patterns and v is not None else v for k, v in arrays.items()}


def _problem(backend, x, operands: dict[str, Any]) -> Problem:
    return make_layout(backend, (x.shape[0],), operands).problem(operands)


def _on_host(device) -> bool:
    return device.type == "cpu"


@functools.cache
def _host_backend():
    return choose_backend({}, "numpy")[0]


def _as_tensors(arrays) -> list:
    """Return the tensors in the memory of the solver's arrays."""
    if arrays and isinstance(arrays[0], np.ndarray):
        return [torch.from_numpy(array) for array in arrays]
    return [array.detach() for array in arrays]


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
        if not _has_transforms():
            return jvp(*args)
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(*args)

    return rule


def _primals(tensors):
    """Return saved tensors without the tangents of the transform whose rule is being computed."""
    if not _has_transforms():
        return tensors
    return [forward_ad.unpack_dual(tensor).primal for tensor in tensors]


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
        ctx.batch_shape = output[_OBJECTIVE].shape
        ctx.mark_non_differentiable(*_constants(ctx.layer, output))
        ctx.set_materialize_grads(False)
        _save(ctx, *inputs[2 : len(inputs) - ctx.others], *_point(ctx.layer, output))

    @staticmethod
    def backward(ctx, *cotangents):
        *operands, x, v, status = ctx.saved_tensors
        gradients = _solution_backward(ctx.layer, ctx.needs_input_grad[2:], cotangents, x, v, status, operands)
        return None, None, *gradients, *[None] * ctx.others

    @staticmethod
    @_pushed_forward
    def jvp(ctx, _, __, *tangents):
        layer, tangents = ctx.layer, _given(ctx.layer, ctx.layer.names, tangents)
        *operands, x, v, status = _primals(ctx.saved_tensors)
        solved = _solved(x, status)
        x, v = masked(torch, solved, x, v)
        with layer.backend.in_full_precision():
            problem = layer.problem(x, operands)
            parts = right_hand_sides(problem, x, v, tangents, layer.kappa)
            r_x, r_v = (sum(r[1:], r[0]) for r in zip(*parts, strict=True))
        dx, dv = layer.kkt_solve((), r_x, r_v, x, v, operands)
        out = [dx, dv, *[None] * len(_OTHERS)]
        with layer.backend.in_full_precision():
            if layer.smoothing is None:
                value = objective_jvp(problem, x, v, tangents, *parts)
            else:
                value = cost_jvp(problem, x, v, dx, dv, tangents, layer.kappa)
            value = filled(torch, solved, value, FILL[layer.fill])
            out[_OBJECTIVE] = value.reshape(ctx.batch_shape).double()
        return *out, *([] if layer.smoothing is None else [dx.clone(), dv.clone(), None])

    @staticmethod
    def vmap(info, in_dims, layer, batch_shape, *tensors):
        pairs, count = list(zip(tensors, in_dims[2:], strict=True)), len(layer.names)
        return _solution_vmap(layer, info.batch_size, batch_shape, pairs[:count], pairs[count:])


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
        of_gradients = _given(ctx.layer, ctx.wanted, of_gradients)
        of_vectors, of_operands = _kkt_backward(
            ctx.layer, ctx.needs_input_grad[6:], g_x, g_v, of_gradients, x, v, operands, u_x, u_v
        )
        return None, None, *of_vectors, *of_operands

    @staticmethod
    @_pushed_forward
    def jvp(ctx, _, __, dr_x, dr_v, dx, dv, *tangents):
        layer, wanted = ctx.layer, ctx.wanted
        x, v, *operands, u_x, u_v = _primals(ctx.saved_tensors)
        dr_x, dr_v, dx, dv = (_or_zeros(d, value) for d, value in ((dr_x, x), (dr_v, v), (dx, x), (dv, v)))
        with layer.backend.in_full_precision():
            problem, tangents = layer.problem(x, operands), _given(layer, layer.names, tangents)
            r_x, r_v, moved = kkt_jvp(problem, x, v, u_x, u_v, dx, dv, tangents, wanted, layer.kappa)
            moved = {name: stored(value) for name, value in moved.items()}
        du_x, du_v, *gradients = layer.kkt_solve(wanted, dr_x + r_x, dr_v + r_v, x, v, operands)
        named = zip(wanted, gradients, strict=True)
        return du_x, du_v, *[d + moved[name] if name in moved else d for name, d in named]

    @staticmethod
    def vmap(info, in_dims, layer, wanted, *tensors):
        return _kkt_vmap(layer, info.batch_size, wanted, list(zip(tensors, in_dims[2:], strict=True)))


# ---- the first function without transforms, on the CPU
#
# Small problems take less time than torch takes for a few operations. So here the operands go to the solver as arrays
# before anything is recorded, the function takes them in the caller's shapes and returns no more than what moves, and
# the other fields are made when they are asked for. First derivatives are the engine's; where torch records them, the
# rules are those of the functions above.


_TENSORS = frozenset({torch.Tensor, nn.Parameter})
_PLAIN = frozenset({type(None), int, float, list, tuple, np.ndarray})


def _are_numpys(operands) -> bool:
    """Return whether the solver takes operands as NumPy arrays in any case, and nothing has to be traced."""
    if len(operands) > len(OPERANDS) or _transforms() or is_in_torch_dispatch_mode():
        return False
    tensors = []
    for value in operands.values():
        kind = type(value)
        if kind in _TENSORS:
            if not value.is_cpu or value.layout is not torch.strided or value.dtype in _HALF:
                return False
            tensors.append(value)
        elif kind not in _PLAIN:
            return False
    return bool(tensors) and _on_host(tensors[0].device)


def _solve_arrays(operands, warm, unsolved, *, dtype=None, **options) -> Solution:
    """Solve as `_solve` does."""
    tensors = {name: value for name, value in operands.items() if type(value) in _TENSORS}
    problem = make_problem(operands | {name: _array(value) for name, value in tensors.items()}, dtype=dtype)
    if warm is not None:
        arrays = [_array(value) if isinstance(value, torch.Tensor) else value for value in warm]
        options["warm_start"] = Solution(**dict.fromkeys(FIELDS) | dict(zip(_WARM, arrays, strict=True)))
    problem, outcome, factors = solver.solve_problem(problem, finish=_as_found, **options)
    if unsolved == "raise":
        raise_if_unsolved(outcome.status.reshape(problem.batch_shape))
    if torch.is_grad_enabled() and any(value.requires_grad for value in tensors.values()):
        lin = Linearization(problem, factors, outcome.x, outcome.v, outcome.s, outcome.status)
        solved = _Solved(operands, tuple(tensors), dtype, unsolved, lin, outcome)
        x, v, objective = _SolvedArrays.apply(solved, *tensors.values())
        return _RecordedSolution.of(problem, outcome, x, v, objective)
    sol = solver.make_solution(problem, outcome, None)
    return whole_solution(**{name: _tensor(getattr(sol, name)) for name in FIELDS})


def _as_found(*solved):
    """Return the problem, the outcome and the factors of a solve."""
    return solved


def _tensor(array) -> torch.Tensor:
    """Return the tensor in the memory of a NumPy array, which torch may write to."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


class _Solved(NamedTuple):
    """A batch that was solved as NumPy arrays, with what its derivative needs."""

    operands: dict[str, Any]
    """The caller's."""
    names: tuple[str, ...]
    """Of those that are tensors."""
    dtype: Any
    unsolved: str
    linearization: Linearization
    outcome: Outcome

    def gradients(self, wanted, g_x, g_v, g) -> dict[str, Any]:
        """Return the gradients of the tensors that are wanted; a cotangent may be None for zero."""
        lin, fill, gradients = self.linearization, _fill(self.unsolved), dict[str, Any]()
        problem = lin.problem
        with problem.backend.no_grad():
            if g_x is not None or g_v is not None:
                r_x, r_v = _cotangent(problem, g_x, lin.x), _cotangent(problem, g_v, lin.v)
                _, _, gradients = solve_adjoint(lin, r_x, r_v, wanted, unsolved=fill)
            if g is not None:
                g = _array(g).reshape(-1, 1).astype(problem.dtype, copy=False)
                of_value = objective_gradients(lin, g, wanted, unsolved=fill)
                gradients = {name: _sum(value, gradients.get(name)) for name, value in of_value.items()}
            return {
                name: torch.from_numpy(np.asarray(in_given_shape(problem, name, value)))  # NumPy's sums may be numbers
                for name, value in gradients.items()
            }

    def recorded_gradients(self, wanted, g_x, g_v, g, x, v, tensors) -> dict[str, Any]:
        """Return the same by functions and operations that torch differentiates further."""
        lin, given = self.linearization, self.operands | dict(zip(self.names, tensors, strict=True))
        problem = make_problem(given, backend="torch", dtype=self.dtype)
        operands, status = problem.operands, torch.from_numpy(lin.status)
        layer = _Layer(problem.backend, _Settings(tuple(operands), problem.rounding, self.unsolved, {}, {}))
        layer.linearization = lin
        g_x, x = (value if value is None else value.reshape(lin.x.shape) for value in (g_x, x))
        cotangents = [g_x, g_v, *[g if name == "objective" else None for name in _OTHERS]]
        needed = [name in wanted for name in operands]
        gradients = _solution_backward(layer, needed, cotangents, x, v, status, operands.values())
        found = {name: value for name, value in zip(operands, gradients, strict=True) if value is not None}
        return {name: in_given_shape(problem, name, value) for name, value in found.items()}


def _cotangent(problem: Problem, cotangent, value):
    """Return the cotangent of an array (B, ·) as one that the solver takes; None stands for zero."""
    if cotangent is None:
        return problem.backend.zeros_of_all(problem.batch, value.shape[1], problem.dtype)
    return _array(cotangent).reshape(value.shape)


class _SolvedArrays(Function):
    """The variables (*batch, n), the multipliers of all rows (B, rows) and the optimal values (*batch).

    torch brings gradients to the types of the operands by itself.
    """

    @staticmethod
    def forward(ctx, solved, *tensors):
        x, v, *_, objective, _, _, _ = solved.outcome
        shape = solved.linearization.problem.batch_shape
        if len(shape) != 1:
            x = x.reshape(*shape, x.shape[1])
        x, v, objective = torch.from_numpy(x), torch.from_numpy(v), torch.from_numpy(objective.reshape(shape))
        ctx.solved = solved
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, x, v)
        return x, v, objective

    @staticmethod
    def backward(ctx, *cotangents):
        *tensors, x, v = ctx.saved_tensors  # also to refuse those that were changed in place
        solved, wanted = ctx.solved, _wanted(ctx.solved.names, ctx.needs_input_grad[1:])
        if _records():
            gradients = solved.recorded_gradients(wanted, *cotangents, x, v, tensors)
        else:
            gradients = solved.gradients(wanted, *cotangents)
        return None, *map(gradients.get, solved.names)


class _RecordedSolution(Solution):
    """A solution whose fields but x and the objective are made when one of them is asked for."""

    @classmethod
    def of(cls, problem: Problem, outcome: Outcome, x, v, objective) -> Solution:
        """Make the solution of what the function has returned."""
        if problem.result != problem.dtype:
            x = x.to(torch.float32)
        source = v, x.dtype, outcome, problem.batch_shape, problem.blocks, problem.fixed, problem.h
        sol = cls.__new__(cls)
        vars(sol).update(x=x, objective=objective, _source=source)  # the class is frozen
        return sol

    def __getattr__(self, name):
        if name not in FIELDS:
            raise AttributeError(f"a solution has no {name!r}")
        if torch.compiler.is_compiling():
            return _other_fields(*self._source)[name]
        # Whatever mode torch is in now, the solution is of another one.
        with torch.inference_mode(False), torch.enable_grad():
            fields = _other_fields(*self._source)
        if not _transforms():  # whose tensors are for them alone
            vars(self).update(fields)
        return fields[name]

    def __reduce__(self):
        return Solution, tuple([getattr(self, name) for name in FIELDS])

    def __repr__(self):
        return repr(Solution(*self.__reduce__()[1]))


def _other_fields(v, result, outcome: Outcome, batch_shape, blocks, fixed, h) -> dict[str, Any]:
    """Return the fields of a solution but x and the objective; the multipliers are views of those of all rows.

    All is in torch's operations, so that torch.compile can trace it.
    """
    s, *scalars = [torch.from_numpy(array) for array in outcome[2:]]
    status, iterations, _, primal, dual, gap = [value.reshape(batch_shape) for value in scalars]
    s = s[:, blocks["G"]]
    if h is not None:
        s = slack(torch, s, torch.from_numpy(h))
    zero = v.new_zeros((1, outcome.x.shape[1])).expand(v.shape[0], -1)
    parts = split_blocks(torch, blocks, v, v, zero, None if fixed is None else torch.from_numpy(fixed))
    parts = [_in_batch(part, batch_shape).to(result) for part in (*parts, s)]
    names = ("y", "z", "z_lb", "z_ub", "s", "status", "iterations", "primal_residual", "dual_residual", "duality_gap")
    return dict(zip(names, (*parts, status, iterations, primal, dual, gap), strict=True))


# ---- their rules, of the second function and of torch's operations


def _point(layer, output):
    """Return x, v and status of the point at which the solution differentiates, from the first function's results."""
    return (*output[:2], output[_STATUS]) if layer.smoothing is None else output[_LAST : _LAST + 3]


def _constants(layer, output):
    """Return those results that do not differentiate."""
    moving = (0, 1, _OBJECTIVE) if layer.smoothing is None else (0, 1, _OBJECTIVE, _LAST, _LAST + 1)
    return [value for i, value in enumerate(output) if i not in moving]


def _solution_backward(layer, needed, cotangents, x, v, status, operands):
    """Return the gradients of the operands from the cotangents of the first function's results."""
    wanted, gradients = _wanted(layer.names, needed), dict[str, Any]()
    (g_x, g_v), g = cotangents[:2], cotangents[_OBJECTIVE]
    records = _records()
    if g is not None and layer.linearization is not None and layer.smoothing is None and not records:
        gradients, g = dict(zip(wanted, layer.objective_gradients(wanted, g), strict=True)), None
    if g is not None or records:
        solved = _solved(x, status)
        x, v = masked(torch, solved, x, v)
    if layer.smoothing is not None:
        g_x, g_v = _sum(g_x, cotangents[_LAST]), _sum(g_v, cotangents[_LAST + 1])
    if g is not None:
        with layer.backend.in_full_precision():
            problem = layer.problem(x, operands)
            g = filled(torch, solved, g.reshape(x.shape[0], 1).to(x.dtype), FILL[layer.fill])
            at_v = v if layer.smoothing is None else torch.zeros_like(v)
            gradients = _gradients(objective_vjp, problem, x, at_v, g, wanted)
            if layer.smoothing is not None:  # the relaxed point is no minimum, so the value moves with it
                g_x = _sum(g_x, g * (problem.hessian(x) + problem.q))
                if problem.is_elastic:
                    by_v, *by_prices = relaxed_price_slopes(problem, x, v, layer.kappa)
                    g_v = _sum(g_v, g * by_v)
                    gradients |= price_gradients(problem, *(g * by for by in by_prices), wanted)
    if g_x is not None or g_v is not None:
        if records:
            r_x, r_v = _or_zeros(g_x, x), _or_zeros(g_v, v)
            _, _, *of_solution = layer.kkt_solve(wanted, r_x, r_v, x, v, operands)
        else:  # which spares a part of the time of a small problem
            of_solution = layer.gradients(wanted, g_x, g_v, x, v, operands)
        gradients = {name: _sum(gradients.get(name), value) for name, value in zip(wanted, of_solution, strict=True)}
    return map(gradients.get, layer.names)


def _solved(x, status):
    """Return the mask (B, 1) of the problems that are SOLVED."""
    return status.reshape(x.shape[0], 1) == int(Status.SOLVED)


def _kkt_backward(layer, needed, g_x, g_v, of_gradients, x, v, operands, u_x, u_v):
    """Return the gradients of r, x and v, and those of the operands, from the cotangents of u and of gradients."""
    with layer.backend.in_full_precision():
        problem = layer.problem(x, operands)
        s_x, s_v, x_moved, v_moved = gradients_vjp(problem, x, v, u_x, u_v, of_gradients, layer.kappa)
    s_x, s_v = _sum(g_x, s_x), _sum(g_v, s_v)
    t_x, t_v, *_ = layer.kkt_solve((), s_x, s_v, x, v, operands)
    with layer.backend.in_full_precision():
        wanted = _wanted(layer.names, needed)
        x_bar, v_bar, gradients = kkt_vjp(problem, x, v, u_x, u_v, t_x, t_v, wanted, layer.kappa, of_gradients)
    gradients = {name: stored(value) for name, value in gradients.items()}
    return (t_x, t_v, x_bar + x_moved, v_bar + v_moved), map(gradients.get, layer.names)


def _solution_vmap(layer, size: int, batch_shape, operands, warm):
    """Solve all problems as one batch, for tensors with their mapped axes; return what torch's vmap expects."""
    batch = math.prod(batch_shape)
    output = layer.solution((size, *batch_shape), *_mapped_inputs(size, batch_shape, operands, warm))
    parted = [value if 2 <= i < _LAST else _parted(value, size, batch) for i, value in enumerate(output)]
    return tuple(parted), (0,) * len(parted)


def _kkt_vmap(layer, size: int, wanted, pairs):
    """Solve with all KKT matrices as one batch, likewise."""
    tensors = [tensor for tensor, _ in pairs]
    if pairs[2][1] is None:  # several right-hand sides for each problem
        columns = [t.unbind(dim) if dim is not None else (t,) * size for t, dim in pairs[:2]]
        x, v, *operands = tensors[2:]
        solved = [layer.kkt_solve(wanted, *r, x, v, operands) for r in zip(*columns, strict=True)]
        output = tuple(map(torch.stack, zip(*solved, strict=True)))
        return output, (0,) * len(output)
    batch = _batch_of(*pairs[2])
    vectors = [_joined(value, dim, size, batch).expand(size * batch, -1) for value, dim in pairs[:4]]
    operands = _joined_operands(pairs[4:], size, batch)
    # Where all problems share an operand, the engine would sum over the mapped axis, too.
    own = [name for name, value in zip(layer.names, operands, strict=True) if value.shape[0] == size * batch]
    of_each = tuple([name for name in own if name in wanted])
    output = layer.kkt_solve(of_each, *vectors, operands)
    u_x, u_v, *gradients = [_parted(part, size, batch) for part in output]
    by_name = dict(zip(of_each, gradients, strict=True))
    for name, (tensor, dim) in zip(layer.names, pairs[4:], strict=True):
        if name in by_name and _batch_of(tensor, dim) < batch:
            by_name[name] = by_name[name].sum(1, keepdim=True)
    if rest := [name for name in wanted if name not in by_name]:
        by_name |= _vjp_of_each(layer, rest, (u_x, u_v), pairs[2:])
    return (u_x, u_v, *map(by_name.get, wanted)), (0,) * (2 + len(wanted))


def _vjp_of_each(layer, names, u, pairs):
    """Compute the gradients of operands for each entry of a mapped axis, from x, v, the operands and their axes."""
    tensors, in_dims = zip(*pairs, strict=True)

    def gradients(u_x, u_v, x, v, *operands):
        return _gradients(solution_vjp, layer.problem(x, operands), x, v, u_x, u_v, names, layer.kappa)

    with layer.backend.in_full_precision():
        return torch.func.vmap(gradients, (0, 0, *in_dims))(*u, *tensors)


def _records() -> bool:
    """Return whether torch may record or transform what is computed now, for further derivatives or a mapped axis."""
    return torch.is_grad_enabled() or _transforms()


def _transforms() -> bool:
    """Return whether a transform of torch.func or forward mode may be under way."""
    return getattr(forward_ad, "_current_level", 0) >= 0 or _has_transforms()


_has_transforms = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def _save(ctx, *tensors) -> None:
    """Save tensors for derivatives in either mode."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _wanted(names, needed) -> tuple[str, ...]:
    """Return the names of the operands whose gradients are needed."""
    return tuple([name for name, flag in zip(names, needed, strict=False) if flag])


def _given(layer, names, tangents) -> dict[str, Any]:
    given = {name: t for name, t in zip(names, tangents, strict=False) if t is not None}
    return layer.operands(given.keys(), given.values())


def _gradients(vjp, *args) -> dict[str, Any]:
    """Return the tensors of the gradients that a function of `adjoint` computes: of sparse operands the values."""
    return {name: stored(value) for name, value in vjp(*args).items()}


def _sum(one, other):
    """Return the sum of two tangents, either of which may be None for zero."""
    return one if other is None else other if one is None else one + other


def _or_zeros(tangent, value):
    return torch.zeros_like(value) if tangent is None else tangent


# ---- an axis that is mapped over and the batch axis


def _batch_of(tensor, dim: int | None) -> int:
    """Return the length of the batch axis of a tensor with a mapped axis, if any."""
    return tensor.shape[1 if dim == 0 else 0]


def _joined(tensor, dim: int | None, size: int, batch: int):
    """Return a tensor (batch or 1, core) with `size` times the batch; of length 1 still where all problems share it."""
    if dim is None and tensor.shape[0] == 1:
        return tensor
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    core = tensor.shape[2:]
    return tensor.expand(size, batch, *core).reshape(size * batch, *core)


def _joined_operands(pairs, size: int, batch: int):
    """Return operands likewise, q for every problem, so that one has the mapped axis in any case."""
    Q, q, *others = [_joined(tensor, dim, size, batch) for tensor, dim in pairs]
    return Q, q.expand(size * batch, -1), *others


def _mapped_inputs(size: int, batch_shape, operands, warm):
    """Return the operands and the warm start of the first function, from tensors and their mapped axes."""
    cores = [name != "status" for name in _WARM]
    axes = [len(batch_shape) + core for core in cores]
    warm = [_padded(value, dim, size, count) for (value, dim), count in zip(warm, axes, strict=False)]
    return _joined_operands(operands, size, math.prod(batch_shape)), warm


def _parted(tensor, size: int, batch: int):
    """Split the joined axis into the two again."""
    return tensor.reshape(size, batch, *tensor.shape[1:])


def _padded(tensor, dim: int | None, size: int, axes: int):
    """Return a tensor of up to `axes` axes with the mapped axis in front of so many."""
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.reshape(size, *[1] * (axes + 1 - tensor.ndim), *tensor.shape[1:])


# ---- the two functions as operators of torch's, for programs that are traced
#
# A program has no place for a linearization: the second operator makes the factors again from what the first returns.
# Names of operands are in one string each, as lists of strings are no arguments that torch traces.


_DEFAULTS: dict[str, Any] = {
    "tol": None, "rtol": None, "max_iterations": solver.MAX_ITERATIONS, "check": True, "verbose": False,
    "engine": "auto", "smoothing": None,
}  # fmt: skip
_OPTIONS = "float? tol, float? rtol, int max_iterations, bool check, bool verbose, str engine, float? smoothing"


class _Operators:
    """Both functions for tensors that may have no numbers yet: calls of the operators, which have the same rules."""

    linearization = None

    def __init__(self, backend, settings: _Settings, point=()):
        self.backend: Any = backend
        self.settings, self.names, self.unsolved = settings, settings.names, settings.unsolved
        self.smoothing, self.fill = settings.options.get("smoothing"), _fill(settings.unsolved)
        self.kappa = self.smoothing or 0.0
        self.point = point
        """Slacks of all rows (B, rows), status (B), equilibration (B, n + rows), for the second function."""

    def solution(self, batch_shape, operands, warm):
        """Call the first function, whose last results are slacks of all rows and equilibration here."""
        names, rounding, unsolved, options, _ = self.settings
        return _OPERATORS.solve(
            list(operands), " ".join(names), batch_shape, list(warm), rounding, unsolved, *_in_order(options)
        )

    def kkt_solve(self, wanted, r_x, r_v, x, v, operands):
        """Call the second function."""
        names, rounding, unsolved, options, _ = self.settings
        return _OPERATORS.solve_kkt(
            r_x, r_v, x, v, list(operands), " ".join(names), " ".join(wanted), *self.point, rounding, unsolved,
            options.get("engine", "auto"),
        )  # fmt: skip

    def gradients(self, wanted, r_x, r_v, x, v, operands):
        """Return the gradients alone; None is zero."""
        return self.kkt_solve(wanted, _or_zeros(r_x, x), _or_zeros(r_v, v), x, v, operands)[2:]

    def problem(self, x, operands) -> Problem:
        """Return the problem in torch's operands and operations."""
        return _problem(self.backend, x, self.operands(self.names, operands))

    def operands(self, names, tensors) -> dict[str, Any]:
        """Return operands, or tangents of them, by name."""
        return dict(zip(names, tensors, strict=False))


def _in_order(options):
    """Return the values of all options of the operators."""
    if unknown := options.keys() - _DEFAULTS.keys():
        raise TypeError(f"solve_qp got {', '.join(sorted(unknown))}, which torch.compile and torch.export do not take")
    return (_DEFAULTS | options).values()


def _is_sparse(value) -> bool:
    """Return whether a value is a sparse operand, by what torch.compile can trace."""
    return isinstance(value, Sparse) or (isinstance(value, torch.Tensor) and value.layout != torch.strided)


def _not_in_programs(name: str) -> TypeError:
    return TypeError(f"{name} is sparse, which torch.compile and torch.export do not take; pass a dense tensor")


def _settings(names, rounding, unsolved, *values, **options) -> _Settings:
    options |= zip(_DEFAULTS, values, strict=False)
    return _Settings(tuple(names.split()), rounding, unsolved, options, {})


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


# The whole of a call, which torch.compile does not look into; torch makes the operators below of it.


def _whole(Q, q, G, h, A, b, lb, ub, warm, unsolved, dtype, *values):
    operands = {"Q": Q, "q": q, "G": G, "h": h, "A": A, "b": b, "lb": lb, "ub": ub}
    options = dict(zip(_DEFAULTS, values, strict=True))
    return list(_solve(operands, warm or None, unsolved, in_operator=True, dtype=dtype, **options))


def _refuse_arrays(options) -> None:
    """Refuse numbers of NumPy's as options: torch.compile traces them as tensors, so that nothing is known of them."""
    for name in ("tol", "rtol", "max_iterations", "check", "verbose", "smoothing"):
        if isinstance(options.get(name), (torch.Tensor, np.ndarray)):
            raise TypeError(
                f"{name} is a number of NumPy's or torch's, which torch.compile traces; pass one of Python's"
            )


def _solve_in_graph(operands, warm, unsolved, *, dtype=None, **options):
    """Return the fields of the solution in a program that torch.compile or torch.export is making."""
    for name, value in operands.items():
        if _is_sparse(value):
            raise _not_in_programs(name)
    device = next((value.device for value in operands.values() if isinstance(value, torch.Tensor)), None)
    # A number of NumPy's is an array here.
    typed = [isinstance(value, (torch.Tensor, np.ndarray)) for value in operands.values()]
    tensors = [
        value
        if value is None or isinstance(value, torch.Tensor)
        else torch.as_tensor(value, dtype=None if own else torch.float64, device=device)
        for value, own in zip(operands.values(), typed, strict=True)
    ]
    fields = _OPERATORS.solve_qp(*tensors, warm or [], unsolved, read_dtype(dtype), *_in_order(options))
    given = [tensor for tensor, own in zip(tensors, typed, strict=True) if own]
    kinds = [value.dtype for value in given if value.is_floating_point()]
    if dtype is None and kinds and len(given) < len([value for value in tensors if value is not None]):
        kind = functools.reduce(torch.promote_types, kinds)  # numbers and lists have no say in this
        fields = [value.to(kind) if i < len(POINT) else value for i, value in enumerate(fields)]
    return fields


# The first function.


def _solve_op(operands, names, batch_shape, warm, *settings):
    layer = _Layer(_backend_of(operands), _settings(names, *settings))
    tensors = layer.solve(batch_shape, operands, warm)
    lin = layer.linearization
    return _returned([*tensors, *_as_tensors([lin.s, lin.factors.scaling(lin.problem)])])


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
    layer = _Operators(_backend_of(operands), ctx.settings)
    ctx.mark_non_differentiable(*_constants(layer, output))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, *_point(layer, output), *output[-2:])


def _solve_backward(ctx, cotangents):
    *operands, x, v, status, s, scaling = ctx.saved_tensors
    layer = _Operators(_backend_of(operands), ctx.settings, (s, status.reshape(-1), scaling))
    gradients = _solution_backward(layer, ctx.needs_input_grad[0], cotangents, x, v, status, operands)
    of_axes = None if ctx.axes else []  # torch takes an empty list of sizes for one of tensors
    return list(gradients), None, of_axes, [None] * ctx.warm, *[None] * (2 + len(_DEFAULTS))


def _solve_vmap(info, in_dims, operands, names, batch_shape, warm, *settings):
    layer = _Operators(_backend_of(operands), _settings(names, *settings))
    pairs = [list(zip(*each, strict=True)) for each in ((operands, in_dims[0]), (warm, in_dims[3] or ()))]
    output, out_dims = _solution_vmap(layer, info.batch_size, batch_shape, *pairs)
    return list(output), list(out_dims)


# The second function.


def _kkt_op(r_x, r_v, x, v, operands, names, wanted, s, status, scaling, rounding, unsolved, engine):
    layer = _Layer(_backend_of(operands), _settings(names, rounding, unsolved))
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
    _, _, x, v, operands, names, wanted, s, status, scaling, rounding, unsolved, engine = inputs
    ctx.settings, ctx.wanted = _settings(names, rounding, unsolved, engine=engine), tuple(wanted.split())
    ctx.save_for_backward(x, v, s, status, scaling, *operands, *output[:2])


def _kkt_backward_op(ctx, cotangents):
    x, v, *point = ctx.saved_tensors[:5]
    *operands, u_x, u_v = ctx.saved_tensors[5:]
    layer = _Operators(_backend_of(operands), ctx.settings, tuple(point))
    g_x, g_v, *of_gradients = cotangents
    of_vectors, of_operands = _kkt_backward(
        layer, ctx.needs_input_grad[4], g_x, g_v, _given(layer, ctx.wanted, of_gradients), x, v, operands, u_x, u_v
    )
    return *of_vectors, list(of_operands), *[None] * 8


def _kkt_vmap_op(info, in_dims, r_x, r_v, x, v, operands, names, wanted, s, status, scaling, *settings):
    size, point = info.batch_size, (s, status, scaling)
    if in_dims[2] is not None:
        batch = _batch_of(x, in_dims[2])
        s, status, scaling = map(_joined, point, in_dims[7:10], [size] * 3, [batch] * 3)
    rounding, unsolved, engine = settings
    settings = _settings(names, rounding, unsolved, engine=engine)
    layer = _Operators(_backend_of(operands), settings, (s, status, scaling))
    vectors, dims = [r_x, r_v, x, v, *operands], [*in_dims[:4], *in_dims[4]]
    output, out_dims = _kkt_vmap(layer, size, tuple(wanted.split()), list(zip(vectors, dims, strict=True)))
    return list(output), list(out_dims)


torch.library.define(
    "qpdiff::solve_qp",
    "(Tensor Q, Tensor q, Tensor? G, Tensor? h, Tensor? A, Tensor? b, Tensor? lb, Tensor? ub, Tensor[] warm, "
    f"str unsolved, str? dtype, {_OPTIONS}) -> Tensor[]",
)
for _key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
    torch.library.impl("qpdiff::solve_qp", _key, _whole)
torch.library.define(
    "qpdiff::solve",
    "(Tensor[] operands, str names, SymInt[] batch_shape, Tensor[] warm, float rounding, str unsolved, "
    f"{_OPTIONS}) -> Tensor[]",
)
torch.library.define(
    "qpdiff::solve_kkt",
    "(Tensor r_x, Tensor r_v, Tensor x, Tensor v, Tensor[] operands, str names, str wanted, Tensor s, Tensor status, "
    "Tensor scaling, float rounding, str unsolved, str engine) -> Tensor[]",
)
for _name, _run, _fake, _context, _backward, _vmap in (
    ("qpdiff::solve", _solve_op, _solve_fake, _solve_context, _solve_backward, _solve_vmap),
    ("qpdiff::solve_kkt", _kkt_op, _kkt_fake, _kkt_context, _kkt_backward_op, _kkt_vmap_op),
):
    torch.library.impl(_name, "CompositeExplicitAutograd", _run)
    torch.library.register_fake(_name, _fake)
    torch.library.register_autograd(_name, _backward, setup_context=_context)
    torch.library.register_vmap(_name, _vmap)
_OPERATORS: Any = torch.ops.qpdiff


# ---- layers


class OptNet(nn.Module):
    """A layer that minimises ½ xᵀQx + qᵀx over learned constraints, for its input q.

    ::

        Q = L Lᵀ + εI                          L lower triangular
        G x ≤ h,   h = G z₀ + softplus(s₀)
        A x = b,   b = A z₀
        x ≥ 0                                  where asked for; z₀ is softplus(z₀) then

    Whatever the parameters, z₀ satisfies all constraints and Q is positive definite, so that every problem has exactly
    one solution. The operands are computed in float64, whatever the type of the parameters: rounded to float32, Q need
    not be definite, and A x = b need not have a solution where rows of A are dependent. The output has the type of the
    input.

    Parameters
    ----------
    n : int
        Variables: features of input and output.
    m, p : int
        Learned inequalities and equalities.
    nonnegative : bool
        Whether x ≥ 0 is required.
    eps : float
        ε > 0.
    device, dtype
        Of the parameters.
    **options
        Options of `qpdiff.torch.solve_qp`, such as ``unsolved="zero"``, ``smoothing=0.1`` or ``elastic=10.0``.

    Attributes
    ----------
    L : Parameter (n, n)
        Entries above the diagonal do not matter.
    G, A, z0, s0 : Parameter (m, n), (p, n), (n), (m)
        None where there are no such constraints, so that no parameter is empty; z₀ where there are neither.

    Notes
    -----
    The paper's layer [1]_, with the initial values of its code [2]_: L and A uniform in [0, 1], G in [−1, 1], z₀ = 0
    (with x ≥ 0: 1), slack 1. There training may make the slack negative; with softplus it stays positive.

    References
    ----------
    .. [1] B. Amos, J. Z. Kolter, "OptNet: differentiable optimization as a layer in neural networks", ICML 2017,
       section 3.
    .. [2] https://github.com/locuslab/optnet

    Examples
    --------
    >>> import torch
    >>> import qpdiff.torch
    >>> layer = qpdiff.torch.OptNet(3, m=4)
    >>> net = torch.nn.Sequential(torch.nn.Linear(5, 3), layer)
    >>> net(torch.randn(10, 5)).shape
    torch.Size([10, 3])
    """

    L: nn.Parameter
    G: nn.Parameter | None
    A: nn.Parameter | None
    z0: nn.Parameter | None
    s0: nn.Parameter | None

    def __init__(
        self, n: int, m: int = 0, p: int = 0, *, nonnegative=False, eps=1e-4, device=None, dtype=None, **options
    ):
        super().__init__()
        if not eps > 0:
            raise ValueError(f"eps is {eps!r}; expected a number > 0, which makes the solution unique")
        for_solver = dict(options)
        check_unsolved(for_solver.pop("unsolved", "raise"))
        check_smoothing(for_solver.pop("smoothing", None))
        present = [name for name, there in (("A", p), ("G", m), ("lb", nonnegative)) if there]
        price_operands(present, **{option: for_solver.pop(option, None) for option in PRICED})  # for its errors
        solver.check_options("OptNet", for_solver)
        self.nonnegative, self.eps, self.options = nonnegative, eps, options
        shapes = {"L": (n, n), "G": (m, n), "A": (p, n), "z0": (n,) if m or p else (0,), "s0": (m,)}
        for name, shape in shapes.items():
            value = None if 0 in shape else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        one = math.log(math.e - 1)  # softplus of it is 1
        with torch.no_grad():
            self.L.uniform_().tril_()
            if self.G is not None:
                self.G.uniform_(-1, 1)
            if self.A is not None:
                self.A.uniform_()
            if self.z0 is not None:
                self.z0.fill_(one if self.nonnegative else 0.0)
            if self.s0 is not None:
                self.s0.fill_(one)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Earlier versions saved empty parameters of constraints that are not there, and z₀ in any case.
        for name in ("G", "A", "z0", "s0"):
            saved = state_dict.get(prefix + name)
            if getattr(self, name) is None and saved is not None and (name == "z0" or not saved.numel()):
                del state_dict[prefix + name]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def operands(self) -> dict[str, torch.Tensor]:
        """Return the operands of `solve_qp` but for q, by name, in float64."""
        L, names = self.L.tril().double(), ("G", "A", "z0", "s0")
        given = {name: value.double() for name in names if (value := getattr(self, name)) is not None}
        out = {"Q": L @ L.mT + self.eps * torch.eye(len(L), dtype=L.dtype, device=L.device)}
        if self.nonnegative:
            out["lb"] = L.new_zeros(len(L))
        if "z0" in given:
            point = nn.functional.softplus(given["z0"]) if self.nonnegative else given["z0"]
            if "G" in given:
                out |= {"G": given["G"], "h": given["G"] @ point + nn.functional.softplus(given["s0"])}
            if "A" in given:
                out |= {"A": given["A"], "b": given["A"] @ point}
        return out

    def forward(self, q):
        """Return the solutions x (..., n) for linear terms q (..., n), in the type of q."""
        return solve_qp(q=q, **self.operands(), dtype="float64", **self.options).x.to(q.dtype)

    def extra_repr(self) -> str:
        rows = {name: 0 if value is None else len(value) for name, value in (("m", self.G), ("p", self.A))}
        shown = {"n": len(self.L), **rows, "nonnegative": self.nonnegative, "eps": self.eps, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


# ---- qpth's function


class QPSolvers(enum.Enum):
    """qpth's names of its solvers."""

    PDIPM_BATCHED = 1
    CVXPY = 2


def QPFunction(eps=1e-12, verbose=0, notImprovedLim=3, maxIter=20, solver=QPSolvers.PDIPM_BATCHED, check_Q_spd=True):
    """Stand in for qpth's ``QPFunction``: its users change one import, ``from qpdiff.torch import QPFunction``.

    The function that it returns takes ``(Q, p, G, h, A, b)`` and returns the variables (batch, n) that minimise
    ½ zᵀQz + pᵀz subject to Gz ≤ h, Az = b, for Q (n, n) or (batch, n, n), p (n) or (batch, n), and so on; an empty
    tensor, or None, stands for constraints that are not there. Arrays and lists become tensors on the device of the
    others. As with qpth the gradient of an operand without batch axis is the **mean** over the batch; that of
    `solve_qp` is the sum, which is the derivative, and so is that of a batch axis of length 1, which broadcasts. All is
    computed in float64 and returned in the type of p.

    Parameters
    ----------
    eps : float
        Tolerance, where it is above 1e-8, that of `qpdiff.solve_qp`.
    verbose : int
        1: a line an iteration.
    notImprovedLim, maxIter, solver
        Without effect. qpth returns the best point so far when its iterations come to these limits.
    check_Q_spd : bool
        Check the numbers in the operands before solving. Q may also be semidefinite; only its symmetric part counts.

    Raises
    ------
    TypeError, ValueError
        For bad operands, as `solve_qp` does, naming them; for Q or p that is None or empty.
    RuntimeError
        When a problem cannot be solved; qpth prints a warning and returns what it has.

    Examples
    --------
    >>> import torch
    >>> from qpdiff.torch import QPFunction
    >>> e, p = torch.Tensor(), torch.tensor([1.0, -1.0])
    >>> x = QPFunction()(torch.eye(2), p, -torch.eye(2), torch.zeros(2), e, e)
    >>> x.round(decimals=2) + 0
    tensor([[0., 1.]])
    """

    def solve(Q, p, G, h, A, b):
        axes = {"Q": 3, "p": 2, "G": 3, "h": 2, "A": 3, "b": 2}
        given = _tensors(dict(zip(axes, (Q, p, G, h, A, b), strict=True)))
        batch = _batch(given, axes)
        given = {name: value for name, value in given.items() if 0 not in value.shape[1 - axes[name] :]}
        for name, value in (("Q", Q), ("p", p)):
            if name not in given:
                what = "None" if value is None else "empty"
                raise TypeError(f"{name} is {what}; every problem needs Q and p (pass zeros for what it lacks)")
        kind = given["p"].dtype
        mean = _OPERATORS.mean_gradient if torch.compiler.is_compiling() else _MeanGradient.apply
        given = {k: v if v.ndim == axes[k] else mean(v, batch) for k, v in given.items()}
        Q, q = given.pop("Q"), given.pop("p")
        options = {"dtype": "float64", "tol": max(eps, 1e-8), "check": check_Q_spd, "verbose": verbose == 1}
        try:
            x = solve_qp((Q + Q.mT) / 2 if Q.shape[-1] == Q.shape[-2] else Q, q, **given, **options).x
        except (TypeError, ValueError) as error:
            raise type(error)(re.sub(r"\bq\b", "p", str(error))) from error  # as it is called here
        return x.expand(batch, x.shape[-1]).to(kind if kind.is_floating_point else x.dtype)

    return solve


def _tensors(operands: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the operands but for those that are None, as tensors on the device of those that are tensors."""
    for name, value in operands.items():
        if _is_sparse(value):
            raise TypeError(
                f"{name} is sparse; QPFunction takes dense tensors, and qpdiff.torch.solve_qp sparse ones too"
            )
    device = next((value.device for value in operands.values() if isinstance(value, torch.Tensor)), None)
    given = {k: _stacked(v) if isinstance(v, (list, tuple)) else v for k, v in operands.items() if v is not None}
    return {
        name: value if isinstance(value, torch.Tensor) else choose_backend({name: value}, "torch")[1][name].to(device)
        for name, value in given.items()
    }


def _batch(tensors: dict[str, torch.Tensor], axes: dict[str, int]) -> int:
    """Return the length of the batch axis, with which an operand has so many axes."""
    batch, first = 1, ""
    for name, value in tensors.items():
        few = axes[name] - 1
        if value.ndim not in (few, few + 1) and value.numel():
            raise ValueError(f"{name} has {value.ndim} axes; expected {few}, or {few + 1} with that of the batch")
        if value.ndim == few + 1 and value.shape[0] not in (1, batch):  # len() is a constant in a program
            if batch != 1:
                size = value.shape[0]
                raise ValueError(f"{name} has a batch of {size}, but {first} one of {batch}; expected the same")
            batch, first = value.shape[0], name
    return batch


class _MeanGradient(Function):
    """The identity, whose gradient is divided by a number."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value, count):
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.count = inputs[1]

    @staticmethod
    def backward(ctx, g):
        return g / max(ctx.count, 1), None


# torch.export drops the rule of a Function, but not that of an operator.
torch.library.define("qpdiff::mean_gradient", "(Tensor value, SymInt count) -> Tensor")
torch.library.impl("qpdiff::mean_gradient", "CompositeExplicitAutograd", lambda value, count: value.clone())
torch.library.register_fake("qpdiff::mean_gradient", lambda value, count: torch.empty_like(value))
torch.library.register_autograd(
    "qpdiff::mean_gradient", _MeanGradient.backward, setup_context=_MeanGradient.setup_context
)
torch.library.register_vmap(
    "qpdiff::mean_gradient",
    lambda info, in_dims, value, count: (_OPERATORS.mean_gradient(value, count), in_dims[0]),
)
