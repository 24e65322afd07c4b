"""The KKT system at the solutions of a batch, solved with what is left of the last iteration.

Along the central path θ tends to 0 at active constraints and to infinity at the others. Where the last factor does not
serve, as with dependent active constraints, a factor is made for the purpose.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple, cast

from ...problem import Layout, Problem, concat_last, limit_distances, product, take
from ...solution import Status
from ..base import Linearization
from ..parameters import DOUBLE, parameters
from .batch import SavedFactor, batch_order
from .equilibration import Scaling
from .kkt import Diagonals, residual
from .reduced_forms import DenseDualForm, PrimalForm


class Factors(NamedTuple):
    """`engines.base.Factors` of the array engine: what each sub-batch has saved."""

    saved: list[SavedFactor]

    def solve(
        self, lin: Linearization, r_x, r_v, fill: float, names: Collection[str]
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Solve the KKT system, as `engines.base.Factors` says; no gradients come along."""
        backend: Any = lin.problem.backend
        if backend.traced:
            arrays, layout = pack(lin)
            u_x, u_v = backend.jit(_solve_traced)(arrays, (r_x, r_v), layout, None)
        else:
            with lin.problem.reproducibly():
                u_x, u_v = _solve(lin, r_x, r_v)
        xp, solved = backend.xp, lin.status == int(Status.SOLVED)
        return *(xp.where(solved, u, xp.full_like(u, fill)) for u in (u_x, u_v)), {}

    def scaling(self, problem: Problem):
        """Return D and E of every problem, as `engines.base.Factors` says."""
        xp, parts = problem.backend.xp, []
        for saved in self.saved:
            index = saved.index
            count = index.stop - index.start if isinstance(index, slice) else index.shape[0]
            both = concat_last(xp, [saved.scaling.D, saved.scaling.E])
            parts.append(xp.broadcast_to(both, (count, both.shape[-1])))
        if not parts:
            return problem.backend.full((0, problem.n + problem.rows), 0.0, problem.dtype)
        joined, order = xp.concat(parts, axis=0), batch_order(problem.backend, self.saved)
        return joined if order is None else xp.take(joined, order, axis=0)


def without_factor(problem: Problem, scaling) -> Factors:
    """Return factors that store the scaling alone, as `engines.base.Engine` says."""
    unit = problem.backend.full((1, 1), 1.0, problem.dtype)  # what residuals are measured in does not matter here
    return saved_together(problem, None, Scaling(scaling[:, : problem.n], scaling[:, problem.n :], *[unit] * 4))


def saved_together(problem: Problem, factor, scaling: Scaling) -> Factors:
    """Return the factors of a batch that was solved by the primal form as one sub-batch; no factor: None."""
    return Factors([SavedFactor(slice(0, problem.batch), factor and PrimalForm, None, factor, scaling)])


def pack(lin: Linearization):
    """Return the arrays of a linearization with one sub-batch, and its layout, for a compiled function."""
    (saved,) = cast(Factors, lin.factors).saved
    return (lin.problem.operands, saved.factor, saved.scaling, lin.x, lin.v, lin.s, lin.status), lin.problem.layout


def unpack(arrays, layout: Layout) -> Linearization:
    """Make a linearization of the arrays that `pack` returns."""
    operands, factor, scaling, x, v, s, status = arrays
    problem = layout.problem(operands)
    return Linearization(problem, saved_together(problem, factor, scaling), x, v, s, status)


def _solve_traced(arrays, right, layout: Layout, _):
    return _solve(unpack(arrays, layout), *right)


def _solve(lin: Linearization, r_x, r_v):
    """Solve for the problems that are SOLVED; for the others the right-hand side is 0."""
    problem, xp, saved = lin.problem, lin.problem.backend.xp, cast(Factors, lin.factors).saved
    solved = lin.status == int(Status.SOLVED)
    r_x, r_v = (xp.where(solved, r, xp.zeros_like(r)) for r in (r_x, r_v))
    solutions = list(
        problem.backend.map(lambda each: _solve_sub_batch(lin, each, r_x, r_v), saved, problem.workers)
    )  # fmt: skip
    order = batch_order(problem.backend, saved)
    u_x, u_v = (xp.concat(list(column), axis=0) for column in zip(*solutions, strict=True))
    if order is None:
        return u_x, u_v
    return xp.take(u_x, order, axis=0), xp.take(u_v, order, axis=0)


def ratio_at_solution(problem: Problem, x, v, s):
    """Return θ of the KKT matrix at solutions: s/z, 0 at equalities, infinite where there is no constraint.

    Where violations have a price it is s/z + t/r + σ.
    """
    xp, inequality = problem.backend.xp, problem.inequality
    one = xp.ones_like(s)
    zero = xp.where(problem.equality, 0 * one, one * float("inf"))
    if (elastic := problem.elastic) is None:
        return xp.where(inequality, s / xp.where(inequality, v, one), zero)
    z, r = limit_distances(problem, v)
    t = problem.backend.clip(s - (problem.k - problem.constraints(x) + elastic.compliance * v), 0.0)
    theta = xp.where(inequality, s / xp.where(inequality, z, one), zero) + elastic.compliance
    return theta + xp.where(elastic.limited, t / r, 0 * one)


class Point(NamedTuple):
    """The KKT matrix at the solutions of a sub-batch, and a right-hand side."""

    scaling: Scaling
    theta: Any
    """What `ratio_at_solution` returns."""
    r_x: Any
    r_v: Any


def _solve_sub_batch(lin: Linearization, saved: SavedFactor, r_x, r_v):
    """Solve the system for the problems of one sub-batch; return u_x and u_v."""
    xp = lin.problem.backend.xp
    x, v, s, r_x, r_v = take(xp, (lin.x, lin.v, lin.s, r_x, r_v), saved.index)
    problem = lin.problem.select(saved.index)
    theta = ratio_at_solution(problem, x, v, s)
    at = Point(saved.scaling, theta, r_x, r_v)
    if saved.form is None:
        return solve_afresh(problem, at)
    form = saved.form(problem, saved.constants)
    if form.skips_rho:
        u_x, u_v, accurate = solve_dense_dual(form, at)
    else:
        P = parameters(problem)
        u_x, u_v, left, moved = solve_with_inexact_factor(form, saved.factor, at, P.derivative_rounds)
        accurate = (left <= P.factor_residual) & (moved <= P.factor_moved)
    return _replace_inaccurate(problem, at, (u_x, u_v), accurate)


def _replace_inaccurate(problem: Problem, at: Point, solution, accurate):
    """Solve afresh for the problems whose solution is not accurate."""
    backend: Any = problem.backend
    xp = backend.xp
    if backend.traced:

        def replaced():
            again = solve_afresh(problem, at)
            return tuple(xp.where(accurate, a, b) for a, b in zip(solution, again, strict=True))

        return backend.cond(xp.all(accurate), lambda: solution, replaced)
    accurate = accurate[:, 0]
    (count,) = backend.count(accurate)
    if count == accurate.shape[0]:
        return solution
    order = xp.argsort(xp.astype(~accurate, xp.int8), stable=True)
    others = order[count:]
    again = solve_afresh(
        problem.select(others),
        Point(take(xp, at.scaling, others), *(xp.take(a, others, axis=0) for a in (at.theta, at.r_x, at.r_v))),
    )
    back = xp.argsort(order)
    return tuple(
        xp.take(xp.concat([xp.take(old, order[:count], axis=0), new], axis=0), back, axis=0)
        for old, new in zip(solution, again, strict=True)
    )


def is_nearly_active(problem: Problem, at: Point):
    """Return which constraints are nearly active, (B, constraints): equalities, and inequalities with a small θ."""
    scaled = at.theta * at.scaling.E**2
    return problem.equality | (problem.inequality & (scaled < DOUBLE.nearly_active))


# ---- with the factor of another system


def solve_with_inexact_factor(form, factor, at: Point, rounds: int):
    """Solve the system with the factor of another one, by so many rounds of refinement.

    The factor's θ may come from an earlier interior-point iterate. At the nearly active constraints two such θ differ
    little against K M⁻¹ Kᵀ; the others are eliminated with the θ of the system itself, after which what differs is the
    weight 1/θ, which is small in both. The refinement contracts by about the larger of the two differences a round,
    unless active constraints are dependent or what the matrix cannot reach is asked of it.

    Returns
    -------
    u_x, u_v
    left, moved : (B, 1)
        The residual against the right-hand side, and what a next correction is likely to be against the solution, in
        the scaled problem.
    """
    problem, xp = form.problem, form.problem.backend.xp
    diagonals = Diagonals(at.theta, xp.zeros_like(at.r_x), xp.zeros_like(at.theta))
    weights, zero, active = 1.0 / (at.theta + diagonals.delta), xp.zeros_like(at.r_v), is_nearly_active(problem, at)
    D, E, *_ = at.scaling

    def size(a_x, a_v, x_scale, v_scale):
        scaled = [xp.abs(x_scale * a_x), xp.abs(v_scale * xp.where(active, a_v, zero))]
        return problem.backend.largest(xp.concat(scaled, axis=-1))

    def correction(e_x, e_v):
        b_x, b_v = e_x + problem.adjoint(xp.where(active, zero, weights * e_v)), xp.where(active, e_v, zero)
        cx, cv = form.solve(factor, form.eliminate(factor, b_x), b_v)
        return cx, xp.where(active, cv, weights * (problem.constraints(cx) - e_v)), size(b_x, b_v, D, E)

    def ratio(a, b):
        return a / xp.where(b > 0, b, xp.ones_like(b))

    u_x, u_v, asked = correction(at.r_x, at.r_v)
    e_x, e_v = residual(problem, diagonals, at.r_x, at.r_v, u_x, u_v)
    left = ratio(size(e_x, e_v, D, E), asked)
    accuracy, further = parameters(problem).refined, DOUBLE.refined_moved

    def inaccurate(u_x, u_v, e_x, e_v, left, moved, last):
        return ~xp.all((left <= accuracy) & (moved <= further * accuracy))

    def refine(u_x, u_v, e_x, e_v, left, moved, last):
        cx, cv, _ = correction(e_x, e_v)
        d_x, d_v = residual(problem, diagonals, at.r_x, at.r_v, u_x + cx, u_v + cv)
        after = ratio(size(d_x, d_v, D, E), asked)
        # A factor too far off makes it worse from round to round; the best is returned.
        better = after < left
        now = ratio(size(cx, cv, 1.0 / D, 1.0 / E), size(u_x, u_v, 1.0 / D, 1.0 / E))
        pairs = ((u_x + cx, u_x), (u_v + cv, u_v), (d_x, e_x), (d_v, e_v), (after, left))
        return (*(xp.where(better, new, old) for new, old in pairs), ratio(now * now, last), now)

    start = (u_x, u_v, e_x, e_v, left, xp.ones_like(left), xp.ones_like(left))
    u_x, u_v, _, _, left, moved, _ = problem.backend.while_loop(inaccurate, refine, start, rounds)
    return u_x, u_v, left, moved


# ---- in the dense dual form


def solve_dense_dual(form: DenseDualForm, at: Point):
    """Solve the system with a dense dual form, whose matrix is factored anew.

    The smallest θ are raised, lest dependent active constraints leave it singular; refinement takes that back.

    Returns
    -------
    u_x, u_v
    accurate : (B, 1)
    """
    problem, theta, E = form.problem, at.theta, at.scaling.E
    xp, backend = problem.backend.xp, problem.backend
    least, enough = parameters(problem).least_theta, parameters(problem).derivative_accuracy
    zero, exists = xp.zeros_like(theta), xp.isfinite(theta)
    forward, t = form.eliminate(None, at.r_x)
    right = xp.where(exists, t - at.r_v, zero)
    factor, factor_ok = form.factor_dual(xp.maximum(theta, least / E**2))

    def inaccurate(u, accurate):
        return ~xp.all(accurate)

    def refine(u, accurate):
        correction = backend.solve(factor, xp.where(exists, right - product(form.S, u) - theta * u, zero))
        now = backend.norm(correction / E) <= enough * backend.norm(u / E)
        return xp.where(accurate | ~exists, u, u + correction), accurate | now

    start = backend.solve(factor, right), factor_ok & False
    u, accurate = backend.while_loop(inaccurate, refine, start, DOUBLE.derivative_rounds)
    return form.solve_variables(forward, u), u, factor_ok & accurate


# ---- with a factor made for the purpose


def solve_afresh(problem: Problem, at: Point):
    """Solve with a new factor, for problems whose active constraints are dependent or whose Q is singular there.

    Where active constraints are dependent, their multipliers share what is asked of them in proportion to 1/θ, and no
    inequality stands against an equality. That has to hold for the factor too, whose smallest θ must stay well above
    rounding: so the smallest θ are scaled up together, and equalities get a smaller one. The refinement takes the
    result back to the system itself. Beside the large 1/θ of equalities a small curvature can be lost to rounding, so
    that it does not: then theirs is raised, and the solution stays that leaves by far the least.
    """
    xp, P = problem.backend.xp, parameters(problem)
    D, E, *_ = at.scaling
    scaled = at.theta * E**2
    raised = problem.inequality & (scaled < P.afresh_largest)
    zero = xp.zeros_like(scaled)
    top = problem.backend.largest(xp.where(raised, scaled, zero))
    lift = P.afresh_largest / xp.where(top > 0, top, xp.ones_like(top))
    level = problem.backend.clip(scaled * lift, P.afresh_smallest, P.afresh_largest)
    form, one = PrimalForm(problem), xp.ones_like(at.r_x[:, :1])

    def factor(theta):
        def factored(rho):
            return *form.factor(Diagonals(theta, rho / D**2, zero)), rho

        def failed(factor, factor_ok, rho):
            return ~xp.all(factor_ok)

        def again(factor, factor_ok, rho):
            return factored(xp.where(factor_ok, rho, P.afresh_growth * rho))

        return problem.backend.while_loop(failed, again, factored(P.afresh_rho * one), P.afresh_attempts - 1)[0]

    def inaccurate(u_x, u_v, left, equality):
        return ~xp.all(left <= P.factor_residual)

    def solve(u_x, u_v, left, equality):
        theta = xp.where(problem.equality, xp.maximum(scaled, equality), xp.where(raised, level, scaled)) / E**2
        now_x, now_v, now, _ = solve_with_inexact_factor(form, factor(theta), at, P.afresh_rounds)
        keeps = (left <= P.factor_residual) | ((left < float("inf")) & ~(now < P.afresh_better * left))
        pairs = ((u_x, now_x), (u_v, now_v), (left, now))
        return *(xp.where(keeps, old, new) for old, new in pairs), P.afresh_growth * equality

    start = xp.zeros_like(at.r_x), zero, float("inf") * one, P.afresh_equality * one
    levels = P.afresh_levels if problem.p else 1
    u_x, u_v, *_ = problem.backend.while_loop(inaccurate, solve, start, levels)
    return u_x, u_v
