"""The derivative of a solution: `vjp` and `jvp`, each one solve with the KKT matrix (`qpdiff.adjoint`)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .adjoint import (
    cost_jvp,
    filled,
    objective_jvp,
    objective_vjp,
    price_gradients,
    relaxed_price_slopes,
    right_hand_sides,
    solution_vjp,
)
from .backend import from_host
from .engines.array.central_path import relax
from .engines.base import Linearization
from .prices import price_operands
from .problem import MATRICES, PRICE_NAMES, PRICES, Problem, join_rows, split_rows
from .solution import Solution, Status
from .sparse import Sparse, check_pattern, is_sparse, read_sparse, with_array


class Gradients(NamedTuple):
    """Gradients with respect to the operands, each of the caller's shape; None where an operand was not given.

    Those of a sparse matrix are a `Sparse` of the same pattern.
    """

    Q: Any = None
    q: Any = None
    G: Any = None
    h: Any = None
    A: Any = None
    b: Any = None
    lb: Any = None
    ub: Any = None
    elastic: Any = None
    """By "A", "G" and "bounds" where it was given so; `elastic_quadratic` likewise."""
    elastic_quadratic: Any = None


class _Tangents(NamedTuple):
    x: Any
    y: Any
    z: Any
    z_lb: Any
    z_ub: Any


class Tangents(_Tangents):
    """Tangents of the solution, of the shapes of its x, y, z, z_lb and z_ub: a tuple of these five.

    Attributes
    ----------
    objective : array (*batch)
        Tangent of the optimal value, in its type. It is not among the entries of the tuple.
    """

    objective: Any = None


def vjp(
    sol: Solution,
    x=None,
    y=None,
    z=None,
    z_lb=None,
    z_ub=None,
    *,
    objective=None,
    smoothing=None,
    unsolved: str = "nan",
) -> Gradients:
    """Pull cotangents of a solution back to the operands of its problem.

    Parameters
    ----------
    sol : Solution
        Of `qpdiff.solve_qp`. Its arrays and the operands of the problem are read again, and must be as they were.
    x, y, z, z_lb, z_ub : array, optional
        Cotangents, each of a shape that broadcasts to that of the output of this name; None means zero.
    objective : array, optional
        Cotangent of the optimal value, of a shape that broadcasts to that of the batch. Alone and without `smoothing`
        it takes products of the solution only, by the envelope theorem [3]_, and no solve with the KKT matrix.
    smoothing : float, optional
        κ > 0: differentiate the solution of the relaxed conditions s ∘ z = κ instead of s ∘ z = 0 [2]_, which also
        moves with data that the solution itself does not depend on, such as an inequality that is nearly active. The
        relaxed point is found by a few Newton steps from the solution. It differs from the solution by about κ/z in the
        active slacks and by κ/s in the other multipliers.
    unsolved : {"nan", "zero"}
        What a problem that is not SOLVED contributes. The gradient of an operand that the batch shares sums over the
        batch, so NaN there marks a batch with an unsolved problem.

    Returns
    -------
    Gradients
        Of the shapes in which operands and prices were given: summed over the batch axes that an operand lacks, and
        over the entries that a number stands for. Computed in the type in which the problem was solved, returned in
        that of its solution. The gradient with respect to Q is symmetric. That of a sparse operand is a `Sparse` of the
        same pattern: the derivative by the entries that are stored. Where lb = ub fixes a variable, the gradient goes
        to the bound that holds it against the cost.

    Raises
    ------
    ValueError
        For a cotangent whose shape does not fit, or an unknown `unsolved`.

    Notes
    -----
    Where active constraints are dependent, what moves one of them alone is shared among them in the proportions of the
    central path; where a constraint is weakly active, the result lies between the derivatives of the two sides.

    References
    ----------
    .. [1] B. Amos, J. Z. Kolter, "OptNet", ICML 2017, equations 6 to 8.
    .. [2] K. Tracy, Z. Manchester, "On the differentiability of the primal-dual interior-point method",
       arXiv:2406.11749.
    .. [3] A. V. Fiacco, "Introduction to sensitivity and stability analysis in nonlinear programming",
       1983, section 3.4.

    Examples
    --------
    The projection of a point onto x₁ + x₂ + x₃ = 1 moves with the point along the plane:

    >>> import numpy as np
    >>> import qpdiff
    >>> row = np.ones((1, 3))
    >>> sol = qpdiff.solve_qp(np.eye(3), -np.ones(3), A=row, b=[1.0])
    >>> grads = qpdiff.vjp(sol, x=np.array([1.0, 0.0, 0.0]))
    >>> np.round(-grads.q, 6).tolist()
    [0.666667, -0.333333, -0.333333]

    The optimal value moves with the right-hand side of a constraint by minus its multiplier:

    >>> qpdiff.vjp(sol, objective=1.0).b.round(6).tolist()
    [-0.666667]
    >>> sol.y.round(6).tolist()
    [0.666667]

    With x ≥ 0 far from active, a bound has no influence but through smoothing:

    >>> sol = qpdiff.solve_qp(np.eye(1), [-1.0], lb=[0.0])
    >>> abs(qpdiff.vjp(sol, x=[1.0]).lb.item()) < 1e-6
    True
    >>> qpdiff.vjp(sol, x=[1.0], smoothing=0.1).lb.round(3).tolist()
    [0.077]
    """
    with _no_grad(sol):
        sol = smoothed(sol, smoothing)
        lin = sol.linearization
        problem, kappa = lin.problem, smoothing or 0.0
        g, out = None, {}
        if objective is not None:
            g = _cotangent(sol, "objective", objective)[:, None]
        if g is None or smoothing is not None or not (x is y is z is z_lb is z_ub is None):
            r_x, r_v = _to_rows(sol, x, y, z, z_lb, z_ub)
            if g is not None and smoothing is not None:  # the relaxed point is no minimum, so the value moves with it
                with problem.reproducibly():
                    r_x = r_x + g * (problem.hessian(lin.x) + problem.q)
                if problem.is_elastic:
                    r_v = r_v + g * relaxed_price_slopes(problem, lin.x, lin.v, kappa)[0]
            _, _, out = solve_adjoint(lin, r_x, r_v, problem.operands, unsolved=unsolved, kappa=kappa)
        if g is not None:
            of_value = objective_gradients(lin, g, problem.operands, kappa=kappa, unsolved=unsolved)
            out = {name: _sum(out[name], value) for name, value in of_value.items()} if out else of_value
        out = in_given_shapes(problem, out)
        if problem.result != problem.dtype:
            out = {name: problem.returned(value) for name, value in out.items()}
        if problem.is_elastic:
            out = {name: value for name, value in out.items() if name not in PRICES} | _by_option(problem, out)
        return Gradients(**out)


def jvp(
    sol: Solution,
    Q=None,
    q=None,
    G=None,
    h=None,
    A=None,
    b=None,
    lb=None,
    ub=None,
    *,
    elastic=None,
    elastic_quadratic=None,
    smoothing=None,
    unsolved: str = "nan",
) -> Tangents:
    """Push tangents of the operands forward to the solution.

    Parameters
    ----------
    sol : Solution
        Of `qpdiff.solve_qp`, as for `vjp`.
    Q, q, G, h, A, b, lb, ub : array, optional
        Tangents, each of a shape that broadcasts to that of its operand with the batch axes; None means zero. Only the
        symmetric part of Q's counts. That of a sparse operand is a sparse matrix of its pattern or an array of values,
        (..., nnz). Where lb = ub fixes a variable, the tangent is that of the bound that holds it.
    elastic, elastic_quadratic : number or dict, optional
        Tangents of these, a number where a number was given, else by "A", "G" and "bounds".
    smoothing : float, optional
        κ > 0: differentiate the solution of the relaxed conditions s ∘ z = κ, see `vjp`.
    unsolved : {"nan", "zero"}
        What a problem that is not SOLVED gets.

    Returns
    -------
    Tangents
        In the types of `vjp`.

    Raises
    ------
    ValueError
        For a tangent of an operand that the problem does not have, or whose shape does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import qpdiff
    >>> row = np.ones((1, 2))
    >>> sol = qpdiff.solve_qp(np.eye(2), np.zeros(2), A=row, b=[1.0])
    >>> moved = qpdiff.jvp(sol, b=np.array([1.0]))
    >>> np.round(moved.x, 6).tolist(), round(float(moved.objective), 6)
    ([0.5, 0.5], 0.5)
    """
    with _no_grad(sol), sol.linearization.problem.reproducibly():
        sol = smoothed(sol, smoothing)
        lin = sol.linearization
        problem, xp = lin.problem, lin.problem.backend.xp
        given = {"Q": Q, "q": q, "G": G, "h": h, "A": A, "b": b, "lb": lb, "ub": ub}
        given |= price_operands(problem.operands, "tangent of ", elastic=elastic, elastic_quadratic=elastic_quadratic)
        tangents = {name: _tangent(problem, name, value) for name, value in given.items() if value is not None}
        at, kappa = lin.at_solved(), smoothing or 0.0
        parts = right_hand_sides(problem, at.x, at.v, tangents, kappa)
        dx, dv = solve_kkt(lin, *[sum(r[1:], r[0]) for r in zip(*parts, strict=True)], unsolved=unsolved)
        if smoothing is None:
            of_value = objective_jvp(problem, at.x, at.v, tangents, *parts)
        else:
            of_value = cost_jvp(problem, at.x, at.v, dx, dv, tangents, kappa)
        of_value = filled(xp, lin.status == int(Status.SOLVED), of_value, FILL[unsolved])

        def shaped(value):
            return xp.reshape(problem.returned(value), (*problem.batch_shape, value.shape[-1]))

        out = Tangents(shaped(dx), *map(shaped, split_rows(problem, dv, lin.v)))
        out.objective = xp.reshape(xp.astype(of_value, sol.objective.dtype), problem.batch_shape)
        return out


# ---- the point at which to differentiate


def _no_grad(sol: Solution):
    if sol.linearization is None:
        raise ValueError("sol has nothing to differentiate with; pass a solution of qpdiff.solve_qp itself")
    return sol.linearization.problem.backend.no_grad()


def smoothed(sol: Solution, smoothing) -> Solution:
    """Return a solution that differentiates at its relaxed point, or the same one where `smoothing` is None."""
    if smoothing is None:
        return sol
    check_smoothing(smoothing)
    with sol.linearization.problem.reproducibly():
        return replace(sol, linearization=relax(sol.linearization, float(smoothing)))


def check_smoothing(smoothing) -> None:
    """Raise a ValueError where `smoothing` is neither a positive number nor None."""
    if smoothing is None:
        return
    number = isinstance(smoothing, (int, float, np.number)) and not isinstance(smoothing, bool)
    if not number or not 0 < smoothing < float("inf"):
        raise ValueError(f"smoothing is {smoothing!r}; expected a number > 0, or None for the derivative itself")


# ---- the linear system


FILL = {"nan": float("nan"), "zero": 0.0}
"""The number that problems get that are not SOLVED."""


def solve_kkt(lin: Linearization, r_x, r_v, *, unsolved: str = "nan"):
    """Solve the KKT system at a solution for right-hand sides (B, n) and (B, rows)."""
    u_x, u_v, _ = solve_adjoint(lin, r_x, r_v, (), unsolved=unsolved)
    return u_x, u_v


def solve_adjoint(lin: Linearization, r_x, r_v, names: Collection[str], *, unsolved: str = "nan", kappa: float = 0.0):
    """Solve the KKT system for cotangents of a solution, and compute the gradients of the operands that are named.

    `kappa` is that of the relaxed point where the solution is one.

    Parameters
    ----------
    r_x, r_v : arrays (B, n), (B, rows)
        Cotangents of the variables and of the multipliers of all rows.

    Returns
    -------
    u_x, u_v : arrays (B, n), (B, rows)
    gradients : dict
        By name, (B or 1, core).
    """
    _check_fill(unsolved)
    problem = lin.problem
    u_x, u_v = r_x, r_v
    gradients: dict[str, Any] = {}
    if problem.batch:
        u_x, u_v, gradients = lin.factors.solve(lin, r_x, r_v, FILL[unsolved], names)
        if problem.sparse:
            operands = problem.operands
            for name in MATRICES:
                if name in gradients:
                    gradients[name] = with_array(operands[name], gradients[name])
    if len(gradients) < len(names):
        rest, at = [name for name in names if name not in gradients], lin.at_solved()
        with problem.reproducibly():
            gradients |= solution_vjp(problem, at.x, at.v, u_x, u_v, rest, kappa)
    return u_x, u_v, gradients


def objective_gradients(
    lin: Linearization, g, names: Collection[str], *, kappa: float = 0.0, unsolved: str = "nan"
) -> dict[str, Any]:
    """Compute the gradients of the named operands from cotangents of the optimal values, without the KKT system.

    Parameters
    ----------
    g : array (B, 1)
        Cotangents.
    kappa : float
        That of a relaxed point, which is no minimum: the variables and multipliers do not move here.

    Returns
    -------
    dict
        By name, (B or 1, core).
    """
    _check_fill(unsolved)
    problem, xp, at = lin.problem, lin.problem.backend.xp, lin.at_solved()
    if at is not lin:
        g = filled(xp, lin.status == int(Status.SOLVED), g, FILL[unsolved])
    with problem.reproducibly():
        gradients = objective_vjp(problem, at.x, xp.zeros_like(at.v) if kappa else at.v, g, names)
    if kappa and problem.is_elastic:
        _, of_w, of_sigma = relaxed_price_slopes(problem, at.x, at.v, kappa)
        gradients |= price_gradients(problem, g * of_w, g * of_sigma, names)
    return gradients


def _check_fill(unsolved: str) -> None:
    if unsolved not in FILL:
        raise ValueError(f"unsolved is {unsolved!r}; expected 'nan' or 'zero'")


# ---- from rows to operands


def _to_rows(sol: Solution, x, y, z, z_lb, z_ub):
    """Right-hand side of the adjoint system: the cotangents of x and of the multipliers of all rows."""
    lin = sol.linearization
    problem = lin.problem
    r_x = _cotangent(sol, "x", x)
    if y is z is z_lb is z_ub is None:
        return r_x, problem.backend.zeros_of_all(problem.batch, problem.rows, problem.dtype)
    given = {"y": y, "z": z, "z_lb": z_lb, "z_ub": z_ub}
    y, z, z_lb, z_ub = (_cotangent(sol, name, value) for name, value in given.items())
    return r_x, join_rows(problem, y, z, z_lb, z_ub, lin.v)


def _sum(a, b):
    """Add two gradients of the same operand."""
    return a.with_values(a.values + b.values) if isinstance(a, Sparse) else a + b


def in_given_shapes(problem: Problem, gradients: dict[str, Any]) -> dict[str, Any]:
    """Sum gradients (B or 1, core) over the axes that their operands lack, each in the caller's shape."""
    if problem.flat:
        return gradients
    shapes = problem.shapes
    return {
        name: value if value.shape == shapes[name] else _in_shape(problem, name, value, shapes[name])
        for name, value in gradients.items()
    }


def _in_shape(problem: Problem, name: str, gradient, shape: tuple[int, ...]):
    if isinstance(gradient, Sparse):
        values = gradient.values
        return gradient.with_values(_in_shape(problem, name, values, (*shape[:-2], values.shape[-1])))
    xp = problem.backend.xp
    if gradient.shape == (1, *shape):
        return gradient[0, ...]
    if not shape:
        return summed(xp, gradient, shape)
    if getattr(problem, name).shape[0] == 1:
        return xp.reshape(gradient, shape)
    return summed(xp, xp.reshape(gradient, problem.batch_shape + gradient.shape[1:]), shape)


def _by_option(problem: Problem, gradients: dict[str, Any]) -> dict[str, Any]:
    """Return the gradients of prices as the options were given: a number, or by "A", "G" and "bounds"."""
    out: dict[str, Any] = {}
    for option, names in PRICE_NAMES.items():
        parts = {of: gradients[name] for of, name in names.items() if name in gradients}
        if option in problem.layout.numbers:
            first, *others = parts.values()
            out[option] = sum(others, first)
        elif parts:
            out[option] = parts
    return out


def summed(xp, value, shape: tuple[int, ...]):
    """Return an array summed over the axes along which one of this shape was broadcast."""
    extra = value.ndim - len(shape)
    axes = [*range(extra), *(extra + i for i, size in enumerate(shape) if size == 1 != value.shape[extra + i])]
    return xp.reshape(xp.sum(value, axis=tuple(axes)), shape) if axes else value


def _cotangent(sol: Solution, name: str, value):
    """Return a cotangent of a field of a solution as an array with one batch axis, zeros where it is None."""
    problem, shape = sol.linearization.problem, getattr(sol, name).shape
    if value is None:
        return problem.backend.full((problem.batch, *shape[len(problem.batch_shape) :]), 0.0, problem.dtype)
    return _flat(problem, "cotangent of", name, value, shape)


def _tangent(problem: Problem, name: str, value):
    """Return a tangent of an operand as an array, or a `Sparse`, with one batch axis."""
    label = f"tangent of {name}"
    if name not in problem.operands:
        raise ValueError(f"{label} was given, but the problem has no {name}")
    if not problem.shapes[name]:
        value = as_tangent(problem, label, value, problem.batch_shape)[..., None]
    operand = getattr(problem, name)
    if isinstance(operand, Sparse):
        return operand.with_values(_flat_values(problem, label, operand, value))
    return _flat(problem, "tangent of", name, value, problem.batch_shape + operand.shape[1:])


def _flat(problem: Problem, what: str, name: str, value, shape: tuple[int, ...]):
    """Return a tangent or cotangent of a name that broadcasts to a shape as an array with one batch axis."""
    own = type(value) is np.ndarray is type(problem.q)  # CuPy has NumPy's types of numbers, but not its arrays
    if not (own and value.dtype == problem.dtype and value.shape == shape):
        value = as_tangent(problem, f"{what} {name}", value, shape)
    axes = len(problem.batch_shape)
    return value if axes == 1 else problem.backend.xp.reshape(value, (problem.batch, *shape[axes:]))


def _flat_values(problem: Problem, label: str, operand: Sparse, value):
    """Return the values of a tangent of a sparse operand, given as a matrix of its pattern or as values."""
    if is_sparse(value):
        matrix = read_sparse(label, value)
        check_pattern(label, matrix, operand.pattern)
        value = matrix.values
    value = as_tangent(problem, label, value, (*problem.batch_shape, operand.nnz))
    return problem.backend.xp.reshape(value, (problem.batch, operand.nnz))


def as_tangent(problem: Problem, label: str, value, shape):
    """Return a tangent or cotangent in the library and the floating point type of the problem, broadcast to a shape."""
    xp, backend = problem.backend.xp, problem.backend
    if is_sparse(value):
        raise TypeError(f"{label} is a sparse matrix; expected an array of shape {tuple(shape)}")
    if isinstance(value, np.ndarray) or not hasattr(value, "dtype"):
        value = from_host(label, value, backend)
    if xp.isdtype(value.dtype, "complex floating"):
        raise TypeError(f"{label} has dtype {value.dtype}; expected real numbers")
    value = backend.asarray(value, dtype=problem.dtype)
    try:
        return xp.broadcast_to(value, shape)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{label} has shape {tuple(value.shape)}; expected {tuple(shape)}") from error
