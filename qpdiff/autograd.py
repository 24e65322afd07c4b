"""HIPS autograd: `solve_qp` whose solution differentiates, to any order.

Three primitives: the solution and the optimal value as functions of the operands, and the solve with the KKT matrix as
a function of the operands, the solution and the right-hand side (see `qpdiff.adjoint`). First derivatives come from the
engine's own pass, and higher ones from autograd's operations.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from . import solver
from .adjoint import filled, kkt_vjp, masked, objective_vjp, relaxed_price, solution_vjp
from .backend import Backend
from .differentiation import FILL, smoothed, solve_adjoint, solve_kkt
from .prices import price_operands
from .problem import PRICE_NAMES, Problem, join_rows, split_rows
from .solution import Solution, Status, check_unsolved, raise_if_unsolved, violation_at, whole_solution
from .sparse import Sparse, apply, is_sparse, read_sparse, stored, with_array

try:
    import autograd.numpy as anp
    from autograd.extend import defvjp, defvjp_argnums, primitive
    from autograd.tracer import getval, isbox
except ImportError as error:
    raise ImportError("qpdiff.autograd needs HIPS autograd: pip install 'qpdiff[autograd]'") from error


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
    smoothing=None,
    **options,
) -> Solution:
    """Solve a batch of convex quadratic programs; `qpdiff.solve_qp` on NumPy for HIPS autograd.

    Parameters
    ----------
    Q, q, G, h, A, b, lb, ub : array
        As for `qpdiff.solve_qp`; any of them may be what autograd differentiates by, as may the values of a
        `qpdiff.Sparse`.
    elastic, elastic_quadratic : number or dict, optional
        As for `qpdiff.solve_qp`; numbers and arrays in them may be that too.
    unsolved : {"raise", "nan", "zero"}
        What to do about problems that are not SOLVED: raise, or give them NaN or zero gradients.
    smoothing : float, optional
        κ > 0: differentiate the solution of the relaxed conditions s ∘ z = κ, to any order, see `qpdiff.vjp`. The
        values stay those of the solution.
    **options
        Further options of `qpdiff.solve_qp`, but for `backend`.

    Returns
    -------
    Solution
        Whose x, y, z, z_lb, z_ub, objective and violation differentiate. The other fields are constants.

    Raises
    ------
    RuntimeError
        With ``unsolved="raise"``, when a problem is not SOLVED, or its relaxed point was not found; the error counts
        them and names the first.

    Examples
    --------
    >>> import autograd.numpy as np
    >>> from autograd import grad
    >>> import qpdiff.autograd
    >>> def squared_distance(point):
    ...     projection = qpdiff.autograd.solve_qp(np.eye(2), -point, lb=0.0).x
    ...     return np.sum((projection - point) ** 2)
    >>> gradient = grad(squared_distance)(np.array([2.0, -3.0]))
    >>> np.abs(np.round(gradient, 6)).tolist()
    [0.0, 6.0]
    """
    check_unsolved(unsolved)
    operands = {"Q": Q, "q": q, "G": G, "h": h, "A": A, "b": b, "lb": lb, "ub": ub}
    given = {
        name: anp.array(value) if isinstance(value, (list, tuple)) else value
        for name, value in operands.items()
        if value is not None
    }
    prices = price_operands(given, elastic=elastic, elastic_quadratic=elastic_quadratic)
    given |= {name: anp.array(value) if isinstance(value, (list, tuple)) else value for name, value in prices.items()}
    given = {name: read_sparse(name, value) if is_sparse(value) else value for name, value in given.items()}
    plain = {name: apply(_plain, value) for name, value in given.items()}
    for option, names in PRICE_NAMES.items():
        plain[option] = {of: plain.pop(name) for of, name in names.items() if name in plain} or None
    sol = solver.solve_qp(**plain, backend="numpy", **options)
    problem = sol.linearization.problem
    if unsolved == "raise":
        raise_if_unsolved(sol.status)
    moving = smoothed(sol, smoothing)
    if unsolved == "raise" and smoothing is not None:
        raise_if_unsolved(moving.linearization.status.reshape(sol.status.shape), relaxed=True)
    layer = _Layer(moving, tuple(given), "zero" if unsolved == "raise" else unsolved, smoothing or 0.0)
    flat = [_one_batch_axis(problem, name, stored(value)) for name, value in given.items()]
    solution = _solution(layer, *flat)
    if smoothing is None:
        objective = _optimal_value(layer, *flat)
    else:  # the relaxed point is no minimum, so the value moves with it
        in_boxes = layer.problem(*flat)
        x, v = _halves(layer, _at_solved(layer, solution))
        value = anp.sum(x * (in_boxes.hessian(x) / 2 + in_boxes.q), axis=-1, keepdims=True)
        if problem.is_elastic:
            value = value + relaxed_price(in_boxes, x, v, layer.kappa)
        value = filled(anp, _solved(layer), value, FILL[layer.unsolved])
        objective = _with_value(sol.objective, anp.reshape(value, problem.batch_shape))
        solution = _with_value(np.concatenate([sol.linearization.x, sol.linearization.v], axis=-1), solution)
    fields = {name: _field(layer, name, solution) for name in ("x", *_OF_ROWS)} | {"objective": objective}
    if problem.is_elastic:
        fields["violation"] = violation_at(layer.problem(*flat), solution[:, : problem.n])
    return whole_solution(sol.__dict__ | fields)


def _plain(value):
    """Return the number or array inside autograd's boxes, however deep."""
    while isbox(value):
        value = getval(value)
    return value


def _one_batch_axis(problem: Problem, name: str, value):
    """Return the array of an operand with one batch axis, by operations that autograd differentiates."""
    if getattr(value, "dtype", problem.dtype) != problem.dtype:
        value = value.astype(problem.dtype)
    operand, shape = getattr(problem, name), problem.shapes[name]
    size, *core = stored(operand).shape
    if isinstance(operand, Sparse):
        shape = (*shape[:-2], *core)
    whole = (*problem.batch_shape, *core) if size != 1 else (*shape[: -len(core)], *core)
    if shape != whole:
        value = value * np.ones(whole, dtype=problem.dtype)
    return value if value.shape == (size, *core) else anp.reshape(value, (size, *core))


# ---- the primitives; operands have one batch axis, of length 1 where shared


_OPERATIONS = SimpleNamespace(
    **{
        **vars(anp),
        "astype": lambda a, dtype: a.astype(dtype),
        "bool": np.bool_,
        "concat": anp.concatenate,
        "matrix_transpose": lambda a: anp.swapaxes(a, -1, -2),
        "take": lambda a, index, axis: anp.moveaxis(anp.moveaxis(a, axis, -1)[..., index], -1, axis),
    }
)
"""autograd's operations by the names of the array API standard."""


class _Layer(NamedTuple):
    sol: Solution
    names: tuple[str, ...]
    unsolved: str
    kappa: float
    """That of the relaxed point where the derivative is smoothed, else 0."""

    def problem(self, *operands) -> Problem:
        """Return the problem in autograd's operands and operations."""
        solved = self.sol.linearization.problem
        named = {
            name: with_array(getattr(solved, name), value) for name, value in zip(self.names, operands, strict=True)
        }
        return solved.layout._replace(backend=Backend(_OPERATIONS)).problem(named)


@primitive
def _solution(layer, *operands):
    """Return the variables and all rows' multipliers, (B, n + rows)."""
    return np.concatenate([layer.sol.linearization.x, layer.sol.linearization.v], axis=-1)


_OF_ROWS = ("y", "z", "z_lb", "z_ub")
"""The fields of a solution that are made of the multipliers of all rows, in the order of `split_rows`."""


@primitive
def _field(layer, name, solution):
    """Return a field of the solution as the caller gets it, a linear map of the variables and the multipliers."""
    lin, (x, v) = layer.sol.linearization, _halves(layer, solution)
    value = x if name == "x" else split_rows(lin.problem, v, lin.v)[_OF_ROWS.index(name)]
    return lin.problem.returned(value).reshape(*lin.problem.batch_shape, value.shape[-1])


@primitive
def _field_adjoint(layer, name, g):
    """Return the adjoint of `_field`, (B, n + rows)."""
    lin = layer.sol.linearization
    problem, n = lin.problem, lin.problem.n
    g = g.reshape(problem.batch, g.shape[-1])
    out = np.zeros((problem.batch, n + problem.rows), problem.dtype)
    if name == "x":
        out[:, :n] = g
        return out
    zero = np.zeros((problem.batch, 1), problem.dtype)
    of_rows = [np.broadcast_to(zero, (problem.batch, size)) for size in (problem.p, problem.m, n, n)]
    of_rows[_OF_ROWS.index(name)] = g
    out[:, n:] = join_rows(problem, *of_rows, lin.v)
    if problem.fixed is not None:  # whose multiplier is in the row of lb alone
        upper = out[:, n:][:, problem.blocks["ub"]]
        upper[...] = np.where(problem.fixed, 0.0, upper)
    return out


@primitive
def _optimal_value(layer, *operands):
    """Return the optimal values, of the shape of the batch."""
    return layer.sol.objective


@primitive
def _with_value(value, moving):
    """Return a value that differentiates as another one does."""
    return value


@primitive
def _kkt_solve(layer, r, solution, *operands):
    """K⁻¹ r with the KKT matrix at the solution, (B, n + rows)."""
    n = layer.sol.linearization.problem.n
    with np.errstate(all="ignore"):
        return np.concatenate(solve_kkt(layer.sol.linearization, r[:, :n], r[:, n:], unsolved=layer.unsolved), axis=-1)


def _solution_vjp(argnums, solution, args, kwargs):
    layer, *operands = args

    def vjp(g):
        names = [layer.names[i - 1] for i in argnums]
        if any(map(isbox, (g, solution, *operands))):
            at = _at_solved(layer, solution)
            u = _kkt_solve(layer, g, at, *operands)
            halves = *_halves(layer, at), *_halves(layer, u)
            gradients = solution_vjp(layer.problem(*operands), *halves, names, layer.kappa)
        else:
            lin = layer.sol.linearization
            with np.errstate(all="ignore"):
                *_, gradients = solve_adjoint(
                    lin, *_halves(layer, g), names, unsolved=layer.unsolved, kappa=layer.kappa
                )
        return [stored(gradients[name]) for name in names]

    return vjp


def _optimal_value_vjp(argnums, objective, args, kwargs):
    layer, *operands = args

    def vjp(g):
        problem, names = layer.problem(*operands), [layer.names[i - 1] for i in argnums]
        x, v = _halves(layer, _at_solved(layer, _solution(layer, *operands)))
        solved = _solved(layer)
        g = filled(anp, solved, anp.reshape(g, solved.shape).astype(problem.dtype), FILL[layer.unsolved])
        gradients = objective_vjp(problem, x, v, g, names)
        return [stored(gradients[name]) for name in names]

    return vjp


def _kkt_solve_vjp(argnums, u, args, kwargs):
    layer, _, solution, *operands = args

    def vjp(g):
        t = _kkt_solve(layer, g, solution, *operands)
        halves = (half for pair in (solution, u, t) for half in _halves(layer, pair))
        x_bar, v_bar, gradients = kkt_vjp(layer.problem(*operands), *halves, kappa=layer.kappa)
        solution_bar = anp.concatenate([x_bar, v_bar], axis=-1)
        by_argument = [None, t, solution_bar, *(stored(gradients[name]) for name in layer.names)]
        return [by_argument[i] for i in argnums]

    return vjp


def _solved(layer: _Layer):
    """Return the mask (B, 1) of the problems that are SOLVED."""
    return layer.sol.linearization.status == int(Status.SOLVED)


def _at_solved(layer: _Layer, solution):
    """Return the solution with zeros in problems that are not SOLVED."""
    (solution,) = masked(anp, _solved(layer), solution)
    return solution


def _halves(layer: _Layer, pair):
    """Return the part of the variables and that of the rows."""
    n = layer.sol.linearization.problem.n
    return pair[:, :n], pair[:, n:]


defvjp_argnums(_solution, _solution_vjp)
defvjp_argnums(_optimal_value, _optimal_value_vjp)
defvjp(_field, lambda result, layer, name, solution: lambda g: _field_adjoint(layer, name, g), argnums=(2,))
defvjp(_field_adjoint, lambda result, layer, name, g: lambda pair: _field(layer, name, pair), argnums=(2,))
defvjp(_with_value, lambda result, value, moving: lambda g: g.astype(moving.dtype), argnums=(1,))
defvjp_argnums(_kkt_solve, _kkt_solve_vjp)
