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

Where violations have a price, θ = s/z + t/r + σ with the distances z and r of v from its limits, which move with the
linear price w: the right-hand side has c dw + v dσ too, with c = −t/r, and s/z − t/r at equalities. s and t follow from
s − t = k − Kx + σv, one of them 0; at a relaxed point they are κ/z and κ/r, which is why the functions take κ.

An adapter records two functions: the solution (x, v) of the operands, and the solve u = K⁻¹ r with the KKT matrix at
it, of r, the solution and the operands. The rule of each is made of the second and of operations of the framework's,
which closes the loop for higher derivatives. Here `problem` has the framework's operands and operations.

References
----------
B. Amos, J. Z. Kolter, "OptNet: differentiable optimization as a layer in neural networks", ICML 2017, section 3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .problem import MATRICES, PRICE_NAMES, PRICED, PRICES, Problem, join_rows, limit_distances, price_rows, split_rows
from .sparse import Sparse, gather


class Complementarity(NamedTuple):
    """What θ is made of, each (B, rows)."""

    s: Any
    """Slack, 0 in rows without; violation t likewise."""
    z: Any
    """Distance of the multiplier from its lower limit, not 0 in any row; r from its upper one likewise."""
    t: Any
    r: Any
    theta: Any
    """s/z + t/r + σ; 0 at equalities."""
    coefficient: Any
    """c, what the linear price moves of the right-hand side."""
    slack: Any
    """k − Kx + σv."""


def complementarity(problem: Problem, x, v, kappa: float = 0.0) -> Complementarity:
    """Compute what θ is made of at a solution, or at its relaxed point for κ."""
    xp, backend, elastic = problem.backend.xp, problem.backend, problem.elastic
    zero = xp.zeros_like(v)
    slack = problem.k - problem.constraints(x)
    if elastic is None:
        # A multiplier is 0 in problems that are not SOLVED (`masked`).
        z = xp.where(problem.inequality & (v != 0), v, xp.ones_like(v))
        s = xp.where(problem.inequality, slack, zero)
        return Complementarity(s, z, zero, zero, s / z, zero, slack)
    z, r = limit_distances(problem, v)
    slack = slack + elastic.compliance * v
    s, t = (kappa / z, kappa / r) if kappa else (backend.clip(slack, 0.0), backend.clip(-slack, 0.0))
    s = xp.where(elastic.limited, s, xp.where(problem.inequality, slack, zero))
    t = xp.where(elastic.limited, t, zero)
    lower, upper = s / z, t / r
    return Complementarity(
        s, z, t, r, lower + upper + elastic.compliance, xp.where(elastic.two_sided, lower, zero) - upper, slack
    )


def right_hand_side(problem: Problem, x, v, tangents: dict[str, Any], kappa: float = 0.0):
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
    r_v = join_rows(problem, of_rows[0], of_rows[1], of_lb, of_ub, v)
    if PRICES.keys().isdisjoint(tangents):
        return r_x, r_v
    dw, d_sigma = price_tangents(problem, tangents)
    return r_x, r_v + complementarity(problem, x, v, kappa).coefficient * dw + v * d_sigma


def price_tangents(problem: Problem, tangents: dict[str, Any]):
    """Return the tangents of w and σ in all rows, (B or 1, rows), 0 in rows without a price."""
    xp, elastic = problem.backend.xp, problem.elastic
    dw, d_sigma = (price_rows(problem, tangents, option, 0.0) for option in PRICED)
    return xp.where(elastic.limited, dw, 0.0), xp.where(problem.exists, d_sigma, 0.0)


def solution_vjp(problem: Problem, x, v, u_x, u_v, names=None, kappa: float = 0.0) -> dict[str, Any]:
    """Compute the gradients (B or 1, core) of the operands from u = K⁻¹ (x̄, v̄), sparse where the operands are."""
    prices = (complementarity(problem, x, v, kappa).coefficient * u_v, v * u_v) if problem.is_elastic else None
    return _operand_gradients(
        problem, v, names, q=-u_x, k=u_v, Q=(u_x, x), K=[(v, u_x), (u_v, x)], prices=prices
    )  # fmt: skip


def objective_vjp(problem: Problem, x, v, g, names=None) -> dict[str, Any]:
    """Compute the gradients (B or 1, core) of the operands from cotangents g (B, 1) of the optimal values.

    By the envelope theorem they are those of the Lagrangian at a solution (x, v). With v = 0 they are those of
    ½ xᵀQx + qᵀx alone, where x does not move, without the price of violations.
    """
    k, prices = -g * v, None
    if problem.is_elastic:
        of_w, of_sigma = objective_price_slopes(problem, x, v)
        prices = g * of_w, g * of_sigma
    return _operand_gradients(problem, v, names, q=g * x, k=k, Q=(-0.5 * g * x, x), K=[(k, x)], prices=prices)


def objective_price_slopes(problem: Problem, x, v):
    """Return the derivatives of optimal values by w and σ, (B, rows): the violation with a linear price, and −½v²."""
    xp, at = problem.backend.xp, complementarity(problem, x, v)
    return at.t + xp.where(problem.elastic.two_sided, at.s, xp.zeros_like(v)), -0.5 * v * v


def objective_price_tangent(problem: Problem, x, v, tangents: dict[str, Any]):
    """Compute what tangents of the prices move optimal values by, (B, 1)."""
    return _along(problem.backend.xp, objective_price_slopes(problem, x, v), price_tangents(problem, tangents))


def _along(xp, slopes, tangents):
    """Return the sums of slopes times tangents over the rows of all pairs, (B, 1)."""
    products = [slope * tangent for slope, tangent in zip(slopes, tangents, strict=True)]
    return xp.sum(sum(products[1:], products[0]), axis=-1, keepdims=True)


def relaxed_price(problem: Problem, x, v, kappa: float):
    """Return the prices of violations at relaxed points, (B, 1)."""
    xp, elastic, at = problem.backend.xp, problem.elastic, complementarity(problem, x, v, kappa)
    violated = at.t + xp.where(elastic.two_sided, at.s, 0.0)
    of_row = xp.where(elastic.limited, elastic.upper, 0.0) * violated + elastic.compliance * v * v / 2
    return xp.sum(of_row, axis=-1, keepdims=True)


def relaxed_price_slopes(problem: Problem, x, v, kappa: float):
    """Return the derivatives of `relaxed_price` by v, w and σ, (B, rows)."""
    xp, elastic, at = problem.backend.xp, problem.elastic, complementarity(problem, x, v, kappa)
    w, s = xp.where(elastic.limited, elastic.upper, 0.0), xp.where(elastic.two_sided, at.s, 0.0)
    by_z, by_r = w * s / at.z, w * at.t / at.r
    return by_r - by_z + elastic.compliance * v, at.t + s - by_r - by_z, 0.5 * v * v


def price_gradients(problem: Problem, of_w, of_sigma, names) -> dict[str, Any]:
    """Return the gradients of the named prices (B or 1, core) from those of w and σ in all rows, (B, rows)."""
    return _operand_gradients(problem, of_w, [n for n in names if n in PRICES], prices=(of_w, of_sigma))


def right_hand_sides(problem: Problem, x, v, tangents: dict[str, Any], kappa: float = 0.0):
    """Compute the right-hand sides for tangents of the matrices, of the vectors, and of prices where there are any.

    Their sum is for all tangents together.
    """
    of_matrices = {name: tangent for name, tangent in tangents.items() if name in MATRICES}
    of_vectors = {name: tangent for name, tangent in tangents.items() if name not in MATRICES and name not in PRICES}
    of_prices = {name: tangent for name, tangent in tangents.items() if name in PRICES}
    parts = [of_matrices, of_vectors, *([of_prices] if of_prices else [])]
    return [right_hand_side(problem, x, v, part, kappa) for part in parts]


def objective_jvp(problem: Problem, x, v, tangents: dict[str, Any], of_matrices, of_vectors, *_):
    """Compute the tangents (B, 1) of the optimal values from `right_hand_sides` r, as the transpose of `objective_vjp`.

    They are −rᵀ(x, v), half of that for the matrices, which stand on both sides; those of prices follow from these.
    """
    xp = problem.backend.xp

    def along(r_x, r_v):
        return xp.sum(r_x * x, axis=-1, keepdims=True) + xp.sum(r_v * v, axis=-1, keepdims=True)

    value = -(along(*of_matrices) / 2 + along(*of_vectors))
    return value + objective_price_tangent(problem, x, v, tangents) if problem.is_elastic else value


def cost_jvp(problem: Problem, x, v, dx, dv, tangents: dict[str, Any], kappa: float):
    """Compute the tangents (B, 1) of the cost at relaxed points, no minima, where x and v move by dx and dv."""
    xp = problem.backend.xp
    total = (problem.hessian(x) + problem.q) * dx
    if "Q" in tangents:
        total = total + problem.product(tangents["Q"], x) * x / 2
    if "q" in tangents:
        total = total + tangents["q"] * x
    value = xp.sum(total, axis=-1, keepdims=True)
    if not problem.is_elastic:
        return value
    moving = dv, *price_tangents(problem, tangents)
    return value + _along(xp, relaxed_price_slopes(problem, x, v, kappa), moving)


def masked(xp, solved, *values):
    """Return values (B, ·) with zeros in problems that are not SOLVED, whose own may be NaN: 0 · NaN is not 0."""
    return [xp.where(solved, value, 0.0) for value in values]


def filled(xp, solved, value, fill: float):
    """Return values (B, 1) with `fill`, 0 or NaN, in problems that are not SOLVED; so have their derivatives."""
    if fill == 0.0:
        return xp.where(solved, value, 0.0)
    one = xp.ones_like(value)
    return xp.where(solved, one, fill * one) * value  # the derivative of where() alone would be 0


def gradients_vjp(problem: Problem, x, v, u_x, u_v, cotangents: dict[str, Any], kappa: float = 0.0):
    """Compute the gradients of u, x and v from cotangents of the gradients that `solution_vjp` computes.

    These are linear in u, with the transpose of `right_hand_side`, and those of the matrices and of σ also in (x, v).

    Returns
    -------
    of_u_x, of_u_v, of_x, of_v : arrays (B, n), (B, rows), (B, n), (B, rows)
    """
    of_matrices = {name: cotangent for name, cotangent in cotangents.items() if name in MATRICES}
    of_x, of_v = right_hand_side(problem, u_x, u_v, of_matrices)
    if not PRICES.keys().isdisjoint(cotangents):
        of_v = of_v + u_v * price_tangents(problem, cotangents)[1]
    return *right_hand_side(problem, x, v, cotangents, kappa), of_x, of_v


def kkt_vjp(problem: Problem, x, v, u_x, u_v, t_x, t_v, names=None, kappa: float = 0.0, of_gradients=None):
    """Compute the gradients of x, v and the operands from t = K⁻¹ ū, where u = K⁻¹ r; that of r is t itself.

    The matrix moves with Q, A, G, and with θ = (k − Kx)/v at the inequalities. Cotangents of the gradients that
    `solution_vjp` computes count here as far as these move with c; the rest of them is `gradients_vjp`.
    """
    xp = problem.backend.xp
    prices = None
    if problem.is_elastic:
        of_c = price_tangents(problem, of_gradients or {})[0] * u_v
        k_bar, v_bar, *prices = _elastic_vjp(problem, x, v, kappa, t_v * u_v, of_c)
    else:
        at = complementarity(problem, x, v)
        k_bar = xp.where(problem.inequality, t_v * u_v / at.z, xp.zeros_like(at.z))
        v_bar = -k_bar * at.theta
    gradients = _operand_gradients(
        problem, v, names, q=xp.zeros_like(u_x), k=k_bar,
        Q=(t_x, u_x), K=[(u_v, t_x), (t_v, u_x), (k_bar, x)], prices=prices,
    )  # fmt: skip
    return -problem.adjoint(k_bar), v_bar, gradients


def _elastic_vjp(problem: Problem, x, v, kappa: float, of_theta, of_c):
    """Return the gradients of k, v, w and σ, (B, rows), from those of θ and c; −Kᵀ that of k is that of x."""
    xp, elastic, at = problem.backend.xp, problem.elastic, complementarity(problem, x, v, kappa)
    zero = xp.zeros_like(v)
    of_theta = xp.where(problem.exists, of_theta, zero)
    of_s = xp.where(problem.inequality, of_theta + xp.where(elastic.two_sided, of_c, zero), zero) / at.z
    of_t = xp.where(elastic.limited, of_theta - of_c, zero) / at.r
    by_path = xp.where(elastic.limited, 2.0 if kappa else 1.0, 1.0)  # where s = κ/z, s moves with z too
    of_z, of_r = -by_path * of_s * at.s / at.z, -by_path * of_t * at.t / at.r
    (z_by_v, z_by_w), (r_by_v, r_by_w) = _slopes_of_distances(problem, v, at)
    if kappa:
        of_slack = xp.where(elastic.limited, zero, of_s)
    else:
        of_limited = xp.where(at.slack > 0, of_s, zero) - xp.where(at.slack < 0, of_t, zero)
        of_slack = xp.where(elastic.limited, of_limited, of_s)
    of_v, of_w = z_by_v * of_z + r_by_v * of_r, z_by_w * of_z + r_by_w * of_r
    return of_slack, of_v + elastic.compliance * of_slack, of_w, of_theta + v * of_slack


def _slopes_of_distances(problem: Problem, v, at: Complementarity):
    """Return the derivatives of z, and of r, by v and by w: at their least, which is a share of w, not by v."""
    xp, elastic = problem.backend.xp, problem.elastic
    zero, one = xp.zeros_like(v), xp.ones_like(v)
    upper = xp.where(elastic.limited, elastic.upper, 1.0)
    least_z, least_r = elastic.two_sided & (at.z != v + upper), elastic.limited & (at.r != upper - v)
    z_by_w = xp.where(elastic.two_sided, xp.where(least_z, at.z / upper, one), zero)
    return (xp.where(least_z, zero, one), z_by_w), (xp.where(least_r, zero, -one), xp.where(least_r, at.r / upper, one))


def _elastic_jvp(problem: Problem, x, v, dx, dv, tangents: dict[str, Any], kappa: float = 0.0):
    """Return the tangents of θ and of c, (B, rows)."""
    xp, elastic, at = problem.backend.xp, problem.elastic, complementarity(problem, x, v, kappa)
    dw, d_sigma = price_tangents(problem, tangents)
    others = {name: tangent for name, tangent in tangents.items() if name not in PRICES}
    d_slack = right_hand_side(problem, x, v, others)[1] - problem.constraints(dx)
    d_slack = d_slack + elastic.compliance * dv + v * d_sigma
    zero = xp.zeros_like(v)
    dz, dr = (by_v * dv + by_w * dw for by_v, by_w in _slopes_of_distances(problem, v, at))
    if kappa:
        ds, dt = -at.s / at.z * dz, -at.t / at.r * dr
    else:
        ds, dt = xp.where(at.slack > 0, d_slack, zero), -xp.where(at.slack < 0, d_slack, zero)
    ds = xp.where(elastic.limited, ds, d_slack)
    lower = xp.where(problem.inequality, (ds - at.s / at.z * dz) / at.z, zero)
    upper = xp.where(elastic.limited, (dt - at.t / at.r * dr) / at.r, zero)
    return lower + upper + d_sigma, xp.where(elastic.two_sided, lower, zero) - upper


def kkt_jvp(problem: Problem, x, v, u_x, u_v, dx, dv, tangents: dict[str, Any], names, kappa: float = 0.0):
    """Compute what tangents of x, v and the operands move u = K⁻¹ r and the gradients of the named operands by.

    Returns
    -------
    r_x, r_v : arrays (B, n), (B, rows)
        −dK u, the right-hand side for the tangent of u but for the tangent of r.
    moved : dict
        The tangents of the gradients that `solution_vjp` computes, but for that of u, of those that have others.
    """
    xp = problem.backend.xp
    matrices = {name: tangent for name, tangent in tangents.items() if name in MATRICES}
    r_x, r_v = right_hand_side(problem, u_x, u_v, matrices)
    moved = solution_vjp(problem, dx, dv, u_x, u_v, [name for name in names if name in MATRICES])
    if problem.is_elastic:
        d_theta, dc = _elastic_jvp(problem, x, v, dx, dv, tangents, kappa)
        moved |= price_gradients(problem, dc * u_v, dv * u_v, names)
    else:
        at = complementarity(problem, x, v)
        d_slack = right_hand_side(problem, x, v, tangents)[1] - problem.constraints(dx)
        d_theta = xp.where(problem.inequality, (d_slack - at.theta * dv) / at.z, xp.zeros_like(v))
    return r_x, r_v + d_theta * u_v, moved


def _operand_gradients(problem: Problem, v, names, *, q=None, k=None, Q=None, K=None, prices=None) -> dict[str, Any]:
    """Compute the gradients of the operands from those of q and k, and from pairs of vectors a, b.

    The gradient of the matrix of all rows is −Σ abᵀ over the pairs of K, and that of Q −½(abᵀ + baᵀ) with the one of Q;
    those of a sparse operand on its pattern alone. `prices` has the gradients of w and σ in all rows.
    """
    vectors = {"q": q}
    if k is not None:
        vectors["b"], vectors["h"], vectors["lb"], vectors["ub"] = split_rows(problem, k, v)
    if prices is not None:
        vectors.update(_split_prices(problem, *prices))
    out = {}
    for name in problem.operands if names is None else names:
        if name == "Q":
            out[name] = _matrix_gradient(problem, name, [(-0.5 * Q[0], Q[1])])
        elif name in MATRICES:
            out[name] = _matrix_gradient(problem, name, [(-a[:, problem.blocks[name]], b) for a, b in K])
        else:
            value = vectors[name]
            if problem.batch != 1 == getattr(problem, name).shape[0]:  # shared
                value = problem.backend.xp.sum(value, axis=0, keepdims=True)
            out[name] = -value if name == "lb" else value
    return out


def _matrix_gradient(problem: Problem, name: str, pairs):
    """Return the sum of abᵀ over pairs of vectors, and with Q that of baᵀ too, where the operand has entries."""
    xp, backend, operand = problem.backend.xp, problem.backend, getattr(problem, name)
    shared = operand.shape[0] == 1 != problem.batch
    if isinstance(operand, Sparse):
        if name == "Q":
            pairs = [*pairs, *[(b, a) for a, b in pairs]]
        rows, columns = operand.pattern.rows, operand.indices
        values = sum(gather(backend, a, rows) * gather(backend, b, columns) for a, b in pairs)
        return operand.with_values(xp.sum(values, axis=0, keepdims=True) if shared else values)
    if not shared:
        return backend.symmetric_outer(*pairs[0]) if name == "Q" else backend.outer(pairs)
    total = sum(a.T @ b for a, b in pairs)
    return (total + total.T if name == "Q" else total)[None, :, :]


def _split_prices(problem: Problem, of_w, of_sigma) -> dict[str, Any]:
    """Split gradients of w and σ in all rows (B, rows) into those of the prices that were given."""
    xp, elastic, blocks = problem.backend.xp, problem.elastic, problem.blocks
    out: dict[str, Any] = {}
    for option, rows, mask in zip(PRICED, (of_w, of_sigma), (elastic.limited, problem.exists), strict=True):
        rows = xp.where(mask, rows, 0.0)
        parts = {name: rows[:, block] for name, block in blocks.items()}
        bounds = [parts[name] for name in ("lb", "ub") if getattr(problem, name) is not None]
        parts["bounds"] = sum(bounds[1:], bounds[0]) if bounds else None
        out |= {name: parts[of] for of, name in PRICE_NAMES[option].items() if name in problem.operands}
    return out
