"""The formulas of the derivative: right-hand sides of the KKT system and gradients, for any framework.

With K the rows of all constraints, k their right-hand side and v their multipliers, the solution satisfies

    Qx + q + Kᵀv = 0,    Kx − θ∘v = k − s − θ∘v   with θ = s/v at the inequalities and 0 at the equalities,

so that data tangents move it by (dx, dv) with

    [ Q   Kᵀ ] [dx]   [ −(dQ x + dq + dKᵀ v) ]
    [ K  −θ  ] [dv] = [ dk − dK x            ].

The matrix is symmetric: the vjp solves the same system with the cotangents (x̄, v̄) on the right for u, and reads off
q̄ = −u_x, Q̄ = −½(u_x xᵀ + x u_xᵀ), k̄ = u_v, K̄ = −(v u_xᵀ + u_v xᵀ). It is also the matrix of the last interior-point
step but for θ, so that step's factor solves it after a few rounds of refinement. Its regularisation keeps the result
finite where constraints are dependent or weakly active.

The optimal value p = ½ xᵀQx + qᵀx needs no system: Q̄ = ½ p̄ xxᵀ, q̄ = p̄ x, k̄ = −p̄ v, K̄ = p̄ v xᵀ, the
derivatives of the Lagrangian at (x, v).

An adapter records two functions: the solution (x, v) of the operands, and the solve u = K⁻¹ r with the KKT matrix at
it, of r, the solution and the operands. The rule of each is made of the second and of operations of the framework's,
which closes the loop for higher derivatives. Here `problem` has the framework's operands and operations.

References
----------
B. Amos, J. Z. Kolter, "OptNet: differentiable optimization as a layer in neural networks", ICML 2017, section 3.
"""

from __future__ import annotations

from typing import Any

from .problem import MATRICES, Problem, join_rows, split_rows
from .sparse import Sparse, gather


def right_hand_side(problem: Problem, x, v, tangents: dict[str, Any]):
    """Compute the right-hand side of the KKT system for tangents (B or 1, core) of the operands.

    Returns
    -------
    r_x, r_v : arrays (B, n), (B, rows)
    """
    xp, blocks = problem.backend.xp, problem.blocks
    r_x = xp.zeros_like(x)
    if "Q" in tangents:
        r_x = r_x - (problem.product(tangents["Q"], x) + problem.product_transposed(tangents["Q"], x)) / 2
    if "q" in tangents:
        r_x = r_x - tangents["q"]
    of_rows = []
    for matrix, vector in (("A", "b"), ("G", "h")):
        r = xp.zeros_like(v[:, blocks[matrix]])
        if matrix in tangents:
            r_x = r_x - problem.product_transposed(tangents[matrix], v[:, blocks[matrix]])
            r = r - problem.product(tangents[matrix], x)
        if vector in tangents:
            r = r + tangents[vector]
        of_rows.append(r)
    zero = xp.zeros_like(x)
    of_lb = zero - tangents["lb"] if "lb" in tangents else zero
    of_ub = zero + tangents["ub"] if "ub" in tangents else zero
    return r_x, join_rows(problem, of_rows[0], of_rows[1], of_lb, of_ub, v)


def solution_vjp(problem: Problem, x, v, u_x, u_v, names=None) -> dict[str, Any]:
    """Compute the gradients (B or 1, core) of the operands from u = K⁻¹ (x̄, v̄), sparse where the operands are."""
    return _operand_gradients(
        problem, v, names, q=-u_x, k=u_v, Q=(u_x, x), K=[(v, u_x), (u_v, x)]
    )  # fmt: skip


def objective_vjp(problem: Problem, x, v, g, names=None) -> dict[str, Any]:
    """Compute the gradients (B or 1, core) of the operands from cotangents g (B, 1) of the optimal values.

    By the envelope theorem they are those of the Lagrangian at a solution (x, v). With v = 0 they are those of
    ½ xᵀQx + qᵀx alone, where x does not move.
    """
    k = -g * v
    return _operand_gradients(problem, v, names, q=g * x, k=k, Q=(-0.5 * g * x, x), K=[(k, x)])


def right_hand_sides(problem: Problem, x, v, tangents: dict[str, Any]):
    """Compute the right-hand sides for tangents of the matrices and for those of the vectors, whose sum is for all."""
    of_matrices = {name: tangent for name, tangent in tangents.items() if name in MATRICES}
    of_vectors = {name: tangent for name, tangent in tangents.items() if name not in MATRICES}
    return right_hand_side(problem, x, v, of_matrices), right_hand_side(problem, x, v, of_vectors)


def objective_jvp(problem: Problem, x, v, of_matrices, of_vectors):
    """Compute the tangents (B, 1) of the optimal values from `right_hand_sides` r, as the transpose of `objective_vjp`.

    They are −rᵀ(x, v), half of that for the matrices, which stand on both sides.
    """
    xp = problem.backend.xp

    def along(r_x, r_v):
        return xp.sum(r_x * x, axis=-1, keepdims=True) + xp.sum(r_v * v, axis=-1, keepdims=True)

    return -(along(*of_matrices) / 2 + along(*of_vectors))


def cost_jvp(problem: Problem, x, dx, tangents: dict[str, Any]):
    """Compute the tangents (B, 1) of ½ xᵀQx + qᵀx where x moves by dx, at a point that need not be a minimum."""
    xp = problem.backend.xp
    total = (problem.hessian(x) + problem.q) * dx
    if "Q" in tangents:
        total = total + problem.product(tangents["Q"], x) * x / 2
    if "q" in tangents:
        total = total + tangents["q"] * x
    return xp.sum(total, axis=-1, keepdims=True)


def masked(xp, solved, *values):
    """Return values (B, ·) with zeros in problems that are not SOLVED, whose own may be NaN: 0 · NaN is not 0."""
    return [xp.where(solved, value, 0.0) for value in values]


def filled(xp, solved, value, fill: float):
    """Return values (B, 1) with `fill`, 0 or NaN, in problems that are not SOLVED; so have their derivatives."""
    if fill == 0.0:
        return xp.where(solved, value, 0.0)
    one = xp.ones_like(value)
    return xp.where(solved, one, fill * one) * value  # the derivative of where() alone would be 0


def gradients_vjp(problem: Problem, x, v, u_x, u_v, cotangents: dict[str, Any]):
    """Compute the gradients of u, x and v from cotangents of the gradients that `solution_vjp` computes.

    These are linear in u, with the transpose of `right_hand_side`, and those of the matrices also in (x, v).

    Returns
    -------
    of_u_x, of_u_v, of_x, of_v : arrays (B, n), (B, rows), (B, n), (B, rows)
    """
    of_matrices = {name: cotangent for name, cotangent in cotangents.items() if name in MATRICES}
    return *right_hand_side(problem, x, v, cotangents), *right_hand_side(problem, u_x, u_v, of_matrices)


def kkt_vjp(problem: Problem, x, v, u_x, u_v, t_x, t_v, names=None):
    """Compute the gradients of x, v and the operands from t = K⁻¹ ū, where u = K⁻¹ r; that of r is t itself.

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
    """Compute −dK u, the right-hand side for the tangent of u = K⁻¹ r but for the tangent of r."""
    xp = problem.backend.xp
    matrices = {name: tangent for name, tangent in tangents.items() if name in MATRICES}
    r_x, r_v = right_hand_side(problem, u_x, u_v, matrices)
    safe_v, theta = _theta(problem, x, v)
    d_slack = right_hand_side(problem, x, v, tangents)[1] - problem.constraints(dx)
    d_theta = xp.where(problem.inequality, (d_slack - theta * dv) / safe_v, xp.zeros_like(v))
    return r_x, r_v + d_theta * u_v


def _theta(problem: Problem, x, v):
    """Compute the multipliers of the inequalities, 1 in the other rows, and θ = (k − Kx)/v, 0 there.

    A multiplier of an inequality is 0 in problems that are not SOLVED (`masked`), and 1 here.
    """
    xp, inequality = problem.backend.xp, problem.inequality
    safe_v = xp.where(inequality & (v != 0), v, xp.ones_like(v))
    return safe_v, xp.where(inequality, (problem.k - problem.constraints(x)) / safe_v, xp.zeros_like(v))


def _operand_gradients(problem: Problem, v, names, *, q, k, Q, K) -> dict[str, Any]:
    """Compute the gradients of the operands from those of q and k, and from pairs of vectors a, b.

    The gradient of the matrix of all rows is −Σ abᵀ over the pairs of K, and that of Q −½(abᵀ + baᵀ) with the one of Q;
    those of a sparse operand on its pattern alone.
    """
    xp, backend, blocks = problem.backend.xp, problem.backend, problem.blocks
    of_A, of_G, of_lb, of_ub = split_rows(problem, k, v)
    vectors = {"q": q, "b": of_A, "h": of_G, "lb": None if problem.lb is None else -of_lb, "ub": of_ub}
    names = list(problem.operands if names is None else names)
    shared = {name: getattr(problem, name).shape[0] == 1 != problem.batch for name in names}
    out = {}
    for name in names:
        if isinstance(operand := getattr(problem, name), Sparse):
            a, b = -0.5 * Q[0], Q[1]
            pairs = [(a, b), (b, a)] if name == "Q" else [(-a[:, blocks[name]], b) for a, b in K]
            rows, columns = operand.pattern.rows, operand.indices
            values = sum(gather(backend, a, rows) * gather(backend, b, columns) for a, b in pairs)
            out[name] = operand.with_values(xp.sum(values, axis=0, keepdims=True) if shared[name] else values)
        elif name == "Q":
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
