"""The derivative of a solution: vjp and jvp, both one solve with the KKT matrix.

With K the rows of all constraints, k their right-hand side and v their multipliers, the solution satisfies

    Qx + q + Kᵀv = 0,    Kx − θ∘v = k − s − θ∘v   with θ = s/v at the inequalities and 0 at the equalities,

so that data tangents move it by (dx, dv) with

    [ Q   Kᵀ ] [dx]   [ −(dQ x + dq + dKᵀ v) ]
    [ K  −θ  ] [dv] = [ dk − dK x            ].

The matrix is symmetric: the vjp solves the same system with the cotangents (x̄, v̄) on the right for u, and reads off
q̄ = −u_x, Q̄ = −½(u_x xᵀ + x u_xᵀ), k̄ = u_v, K̄ = −(v u_xᵀ + u_v xᵀ). It is also the matrix of the last interior-point
step but for θ, so that step's factor solves it after a few rounds of refinement. The proximal terms of the factor keep
the result finite where constraints are dependent or weakly active.

References
----------
B. Amos, J. Z. Kolter, "OptNet: differentiable optimization as a layer in neural networks", ICML 2017, section 3.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .backend import from_host
from .engines.array.central_path import relax
from .engines.base import Linearization
from .problem import OPERANDS, Problem, product, product_transposed
from .solution import Solution
from .solver import fixed_variables


class Gradients(NamedTuple):
    """Gradients with respect to the operands, each of the caller's shape; None where an operand was not given."""

    Q: Any = None
    q: Any = None
    G: Any = None
    h: Any = None
    A: Any = None
    b: Any = None
    lb: Any = None
    ub: Any = None


class Tangents(NamedTuple):
    """Tangents of the solution, of the shapes of its x, y, z, z_lb and z_ub."""

    x: Any
    y: Any
    z: Any
    z_lb: Any
    z_ub: Any


def vjp(
    sol: Solution, x=None, y=None, z=None, z_lb=None, z_ub=None, *, smoothing=None, unsolved: str = "nan"
) -> Gradients:
    """Pull cotangents of a solution back to the operands of its problem.

    Parameters
    ----------
    sol : Solution
        Of `qpdiff.solve_qp`.
    x, y, z, z_lb, z_ub : array, optional
        Cotangents, each of a shape that broadcasts to that of the output of this name; None means zero.
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
        Of the shapes in which the operands were given: summed over the batch axes that an operand lacks, and over the
        entries that a number stands for. Computed in the type in which the problem was solved, returned in that of its
        solution. The gradient with respect to Q is symmetric. Where lb = ub fixes a variable, the gradient goes to the
        bound that holds it against the cost.

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

    Examples
    --------
    The projection of a point onto x₁ + x₂ + x₃ = 1 moves with the point along the plane:

    >>> import numpy as np
    >>> import qpdiff
    >>> sol = qpdiff.solve_qp(np.eye(3), -np.ones(3), A=np.ones((1, 3)), b=[1.0])
    >>> grads = qpdiff.vjp(sol, x=np.array([1.0, 0.0, 0.0]))
    >>> np.round(-grads.q, 6).tolist()
    [0.666667, -0.333333, -0.333333]

    With x ≥ 0 far from active, a bound has no influence but through smoothing:

    >>> sol = qpdiff.solve_qp(np.eye(1), [-1.0], lb=[0.0])
    >>> abs(qpdiff.vjp(sol, x=[1.0]).lb.item()) < 1e-6
    True
    >>> qpdiff.vjp(sol, x=[1.0], smoothing=0.1).lb.round(3).tolist()
    [0.077]
    """
    with _no_grad(sol), sol.linearization.problem.reproducibly():
        sol = _smoothed(sol, smoothing)
        lin = sol.linearization
        r_x, r_v = _to_rows(sol, {"x": x, "y": y, "z": z, "z_lb": z_lb, "z_ub": z_ub})
        u_x, u_v, done = _solve_kkt(lin, r_x, r_v, unsolved, of_matrices=True)
        problem = lin.problem
        rest = [name for name in problem.operands if name not in done]
        out = done | solution_vjp(problem, lin.x, lin.v, u_x, u_v, rest)
        out = {name: _reduce(problem, name, value) for name, value in out.items()}
        if problem.result != problem.dtype:
            out = {name: problem.returned(value) for name, value in out.items()}
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
    smoothing=None,
    unsolved: str = "nan",
) -> Tangents:
    """Push tangents of the operands forward to the solution.

    Parameters
    ----------
    sol : Solution
        Of `qpdiff.solve_qp`.
    Q, q, G, h, A, b, lb, ub : array, optional
        Tangents, each of a shape that broadcasts to that of its operand with the batch axes; None means zero. Only the
        symmetric part of Q's counts. Where lb = ub fixes a variable, the tangent is that of the bound that holds it.
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
    >>> sol = qpdiff.solve_qp(np.eye(2), np.zeros(2), A=np.ones((1, 2)), b=[1.0])
    >>> np.round(qpdiff.jvp(sol, b=np.array([1.0])).x, 6).tolist()
    [0.5, 0.5]
    """
    with _no_grad(sol), sol.linearization.problem.reproducibly():
        sol = _smoothed(sol, smoothing)
        lin = sol.linearization
        problem, xp = lin.problem, lin.problem.backend.xp
        given = {"Q": Q, "q": q, "G": G, "h": h, "A": A, "b": b, "lb": lb, "ub": ub}
        tangents = {
            name: _flat(problem, sol, name, value, "tangent") for name, value in given.items() if value is not None
        }
        x, v, blocks = lin.x, lin.v, problem.blocks
        dx, dv = solve_kkt(lin, *right_hand_side(problem, x, v, tangents), unsolved=unsolved)
        zero = xp.zeros_like(x)
        d_lb = dv[:, blocks["lb"]] if problem.lb is not None else zero
        d_ub = dv[:, blocks["ub"]] if problem.ub is not None else zero
        if problem.lb is not None and problem.ub is not None:
            fixed, at_lower = fixed_variables(problem, v)
            d_ub = xp.where(fixed, xp.where(at_lower, zero, -d_lb), d_ub)
            d_lb = xp.where(fixed & ~at_lower, zero, d_lb)

        def shaped(value):
            return xp.reshape(problem.returned(value), (*problem.batch_shape, value.shape[-1]))

        return Tangents(shaped(dx), shaped(dv[:, blocks["A"]]), shaped(dv[:, blocks["G"]]), shaped(d_lb), shaped(d_ub))


# ---- the point at which to differentiate


def _no_grad(sol: Solution):
    if sol.linearization is None:
        raise ValueError("sol keeps nothing to differentiate with; pass a solution of qpdiff.solve_qp itself")
    return sol.linearization.problem.backend.no_grad()


def _smoothed(sol: Solution, smoothing) -> Solution:
    if smoothing is None:
        return sol
    if not isinstance(smoothing, (int, float, np.number)) or not 0 < smoothing < float("inf"):
        raise ValueError(f"smoothing is {smoothing!r}; expected a number > 0, or None for the derivative itself")
    return replace(sol, linearization=relax(sol.linearization, float(smoothing)))


# ---- the linear system


FILL = {"nan": float("nan"), "zero": 0.0}
"""What problems that are not SOLVED get."""


def solve_kkt(lin: Linearization, r_x, r_v, *, unsolved: str = "nan"):
    """Solve the KKT system at a solution for right-hand sides (B, n) and (B, rows)."""
    with lin.problem.reproducibly():
        return _solve_kkt(lin, r_x, r_v, unsolved)[:2]


def _solve_kkt(lin: Linearization, r_x, r_v, unsolved: str, of_matrices: bool = False):
    """u, and of the gradients of matrices, by name, those that are cheap beside it; they are asked for in the vjp."""
    if unsolved not in FILL:
        raise ValueError(f"unsolved is {unsolved!r}; expected 'nan' or 'zero'")
    if lin.problem.batch == 0:
        return r_x, r_v, {}
    return lin.factors.solve(lin, r_x, r_v, FILL[unsolved], of_matrices)


# ---- from rows to operands


def _to_rows(sol: Solution, given):
    """Right-hand side of the adjoint system: the cotangents of x and of the multipliers of all rows."""
    lin = sol.linearization
    problem, xp = lin.problem, lin.problem.backend.xp
    x = _flat(problem, sol, "x", given.pop("x"), "cotangent")
    if all(value is None for value in given.values()):
        return x, problem.backend.zeros_of_all(problem.batch, problem.rows, problem.dtype)
    cotangents = {name: _flat(problem, sol, name, value, "cotangent") for name, value in given.items()}
    z_lb, z_ub = cotangents["z_lb"], cotangents["z_ub"]
    if problem.lb is not None and problem.ub is not None:
        fixed, at_lower = fixed_variables(problem, lin.v)
        z_lb = xp.where(fixed & ~at_lower, -z_ub, z_lb)
    parts = [cotangents["y"], cotangents["z"]]
    parts += [z_lb] if problem.lb is not None else []
    parts += [z_ub] if problem.ub is not None else []
    return x, xp.concat(parts, axis=-1)


def _reduce(problem: Problem, name: str, gradient):
    """Sum a gradient (B or 1, core) over the axes that the operand lacks, in the caller's shape."""
    xp = problem.backend.xp
    shape = problem.shapes[name]
    if gradient.shape == shape:
        return gradient
    if gradient.shape == (1, *shape):
        return gradient[0, ...]
    if not shape:
        return summed(xp, gradient, shape)
    if getattr(problem, name).shape[0] == 1:
        return xp.reshape(gradient, shape)
    return summed(xp, xp.reshape(gradient, problem.batch_shape + gradient.shape[1:]), shape)


def summed(xp, value, shape: tuple[int, ...]):
    """An array summed over the axes along which one of this shape was broadcast."""
    extra = value.ndim - len(shape)
    axes = [*range(extra), *(extra + i for i, size in enumerate(shape) if size == 1 != value.shape[extra + i])]
    return xp.reshape(xp.sum(value, axis=tuple(axes)), shape) if axes else value


def _flat(problem: Problem, sol: Solution, name: str, value, kind: str):
    """A tangent or cotangent as an array with one batch axis, zeros where it is None."""
    xp, backend = problem.backend.xp, problem.backend
    if name in OPERANDS:
        if name not in problem.operands:
            raise ValueError(f"{kind} of {name} was given, but the problem has no {name}")
        if not problem.shapes[name]:
            value = as_tangent(problem, f"{kind} of {name}", value, problem.batch_shape)[..., None]
        shape = problem.batch_shape + getattr(problem, name).shape[1:]
    else:
        shape = getattr(sol, name).shape
    core = shape[len(problem.batch_shape) :]
    if value is None:
        return backend.full((problem.batch, *core), 0.0, problem.dtype)
    own = type(value) is np.ndarray is type(problem.q)  # CuPy has NumPy's types of numbers, but not its arrays
    if own and value.dtype == problem.dtype and value.shape == shape:
        return value if len(shape) == 1 + len(core) else value.reshape(problem.batch, *core)
    value = as_tangent(problem, f"{kind} of {name}", value, shape)
    return xp.reshape(value, (math.prod(problem.batch_shape), *core))


def as_tangent(problem: Problem, label: str, value, shape):
    """A tangent or cotangent in the library and the floating point type of the problem, broadcast to a shape."""
    xp, backend = problem.backend.xp, problem.backend
    if isinstance(value, np.ndarray) or not hasattr(value, "dtype"):
        value = from_host(label, value, backend)
    if xp.isdtype(value.dtype, "complex floating"):
        raise TypeError(f"{label} has dtype {value.dtype}; expected real numbers")
    value = backend.asarray(value, dtype=problem.dtype)
    try:
        return xp.broadcast_to(value, shape)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{label} has shape {tuple(value.shape)}; expected {tuple(shape)}") from error


def right_hand_side(problem: Problem, x, v, tangents: dict[str, Any]):
    """What the KKT system has on the right for tangents (B or 1, core) of the operands."""
    xp, blocks = problem.backend.xp, problem.blocks
    r_x, r_v = xp.zeros_like(x), xp.zeros_like(v)
    if "Q" in tangents:
        r_x = r_x - (product(tangents["Q"], x) + product_transposed(tangents["Q"], x)) / 2
    if "q" in tangents:
        r_x = r_x - tangents["q"]
    parts = {name: r_v[:, block] for name, block in blocks.items()}
    for matrix, vector in (("A", "b"), ("G", "h")):
        if matrix in tangents:
            r_x = r_x - product_transposed(tangents[matrix], v[:, blocks[matrix]])
            parts[matrix] = parts[matrix] - product(tangents[matrix], x)
        if vector in tangents:
            parts[matrix] = parts[matrix] + tangents[vector]
    if "lb" in tangents or "ub" in tangents:
        zero = xp.zeros_like(x)
        lower, upper = tangents.get("lb", zero), tangents.get("ub", zero)
        if problem.lb is not None and problem.ub is not None:
            fixed, at_lower = fixed_variables(problem, v)
            lower = xp.where(fixed & ~at_lower, upper, lower)
        if problem.lb is not None:
            parts["lb"] = parts["lb"] - lower
        if problem.ub is not None:
            parts["ub"] = parts["ub"] + upper
    return r_x, xp.concat(list(parts.values()), axis=-1)


# ---- the derivative of a solution and of its derivative, for any framework
#
# An adapter records two functions: the solution (x, v) of the operands, and the solve u = K⁻¹ r with the KKT matrix at
# it, of r, the solution and the operands. The rule of each is made of the second and of operations of the framework's,
# which closes the loop for higher derivatives. Here `problem` has the framework's operands and operations.


def solution_vjp(problem: Problem, x, v, u_x, u_v, names=None) -> dict[str, Any]:
    """Gradients (B or 1, core) of the operands from u = K⁻¹ (x̄, v̄)."""
    return _operand_gradients(
        problem, v, names, q=-u_x, k=u_v, Q=(u_x, x), K=[(v, u_x), (u_v, x)]
    )  # fmt: skip


def kkt_vjp(problem: Problem, x, v, u_x, u_v, t_x, t_v, names=None):
    """Gradients of x, v and the operands from t = K⁻¹ ū, where u = K⁻¹ r; that of r is t itself.

    The matrix moves with Q, A, G, and with θ = (k − Kx)/v at the inequalities.
    """
    xp = problem.backend.xp
    safe_v, theta = _theta(problem, x, v)
    k_bar = xp.where(problem.inequality, t_v * u_v / safe_v, xp.zeros_like(theta))
    gradients = _operand_gradients(
        problem, v, names, q=xp.zeros_like(u_x), k=k_bar,
        Q=(t_x, u_x), K=[(u_v, t_x), (t_v, u_x), (k_bar, x)],
    )  # fmt: skip
    return -problem.adjoint(k_bar), -k_bar * theta, gradients


def kkt_jvp(problem: Problem, x, v, u_x, u_v, dx, dv, tangents: dict[str, Any]):
    """What K⁻¹ is to be applied to for the tangent of u = K⁻¹ r, but for that of r: −dK u."""
    xp = problem.backend.xp
    matrices = {name: tangent for name, tangent in tangents.items() if name in ("Q", "G", "A")}
    r_x, r_v = right_hand_side(problem, u_x, u_v, matrices)
    safe_v, theta = _theta(problem, x, v)
    d_slack = right_hand_side(problem, x, v, tangents)[1] - problem.constraints(dx)
    d_theta = xp.where(problem.inequality, (d_slack - theta * dv) / safe_v, xp.zeros_like(v))
    return r_x, r_v + d_theta * u_v


def _theta(problem: Problem, x, v):
    """The multipliers of the inequalities, and 1 in the other rows; θ = (k − Kx)/v, and 0 there."""
    xp, inequality = problem.backend.xp, problem.inequality
    safe_v = xp.where(inequality, v, xp.ones_like(v))
    return safe_v, xp.where(inequality, (problem.k - problem.constraints(x)) / safe_v, xp.zeros_like(v))


def _operand_gradients(problem: Problem, v, names, *, q, k, Q, K) -> dict[str, Any]:
    """Gradients of the operands from those of q and k, and from pairs of vectors a, b.

    The gradient of the matrix of all rows is −Σ abᵀ over the pairs of K, and that of Q −½(abᵀ + baᵀ) with the one of Q.
    """
    xp, backend, blocks = problem.backend.xp, problem.backend, problem.blocks
    lower = -k[:, blocks["lb"]] if problem.lb is not None else None
    upper = k[:, blocks["ub"]] if problem.ub is not None else None
    if lower is not None and upper is not None:
        fixed, at_lower = fixed_variables(problem, v)
        upper = xp.where(fixed, xp.where(at_lower, xp.zeros_like(lower), lower), upper)
        lower = xp.where(fixed & ~at_lower, xp.zeros_like(lower), lower)
    vectors = {"q": q, "b": k[:, blocks["A"]], "h": k[:, blocks["G"]], "lb": lower, "ub": upper}
    names = list(problem.operands if names is None else names)
    shared = {name: getattr(problem, name).shape[0] == 1 != problem.batch for name in names}
    out = {}
    for name in names:
        if name == "Q":
            a, b = -0.5 * Q[0], Q[1]
            if shared[name]:
                half = a.T @ b
                out[name] = (half + half.T)[None, :, :]
            else:
                out[name] = backend.symmetric_outer(a, b)
        elif name in ("A", "G"):
            pairs = [(-a[:, blocks[name]], b) for a, b in K]
            out[name] = sum(a.T @ b for a, b in pairs)[None, :, :] if shared[name] else backend.outer(pairs)
        else:
            out[name] = xp.sum(vectors[name], axis=0, keepdims=True) if shared[name] else vectors[name]
    return out
