"""The KKT system at the solutions of a batch, solved with what the solver has kept, or afresh where that fails."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from ...problem import Layout, Problem, product, take
from ...solution import Status
from ..base import Linearization
from ..parameters import DOUBLE, parameters
from .batch import Kept, batch_order
from .equilibration import Metric
from .kkt import System, residual
from .reduced_forms import DenseDualForm, PrimalForm


class Factors(NamedTuple):
    """Those of the array engine: what each part of the batch has kept."""

    pieces: list[Kept]

    def solve(self, lin: Linearization, r_x, r_v, fill: float, of_matrices: bool) -> tuple[Any, Any, dict[str, Any]]:
        """Solve the KKT system, as `engines.base.Factors` says; no gradients of matrices come along."""
        backend: Any = lin.problem.backend
        if backend.traced:
            arrays, layout = pack(lin)
            u_x, u_v = backend.jit(_solve_traced)(arrays, (r_x, r_v), layout, None)
        else:
            u_x, u_v = _solve(lin, r_x, r_v)
        xp, solved = backend.xp, lin.status == int(Status.SOLVED)
        return *(xp.where(solved, u, xp.full_like(u, fill)) for u in (u_x, u_v)), {}


def whole(problem: Problem, factor, metric: Metric) -> Factors:
    """The batch in one piece."""
    return Factors([Kept(slice(0, problem.batch), factor and PrimalForm, None, factor, metric)])


def pack(lin: Linearization):
    """The arrays of a linearization whose factors are in one piece, and its layout, for a compiled function."""
    (piece,) = cast(Factors, lin.factors).pieces
    return (lin.problem.operands, piece.factor, piece.metric, lin.x, lin.v, lin.s, lin.status), lin.problem.layout


def unpack(arrays, layout: Layout) -> Linearization:
    operands, factor, metric, x, v, s, status = arrays
    problem = layout.problem(operands)
    return Linearization(problem, whole(problem, factor, metric), x, v, s, status)


def _solve_traced(arrays, right, layout: Layout, _):
    return _solve(unpack(arrays, layout), *right)


def _solve(lin: Linearization, r_x, r_v):
    """Solve for the problems that are SOLVED; for the others the right-hand side is 0."""
    xp, solved = lin.problem.backend.xp, lin.status == int(Status.SOLVED)
    return _solve_pieces(lin, xp.where(solved, r_x, xp.zeros_like(r_x)), xp.where(solved, r_v, xp.zeros_like(r_v)))


def _solve_pieces(lin, r_x, r_v):
    problem, xp = lin.problem, lin.problem.backend.xp
    parts = list(
        problem.backend.map(lambda piece: _solve_piece(lin, piece, r_x, r_v), lin.factors.pieces, problem.workers)
    )
    u_x = xp.concat([part[0] for part in parts], axis=0)
    u_v = xp.concat([part[1] for part in parts], axis=0)
    order = batch_order(problem.backend, lin.factors.pieces)
    if order is None:
        return u_x, u_v
    return xp.take(u_x, order, axis=0), xp.take(u_v, order, axis=0)


def _solve_piece(lin, piece, r_x, r_v):
    """The system for the problems of one piece: with what the solver has kept, afresh where that fails."""
    problem, xp = lin.problem, lin.problem.backend.xp
    x, v, s, r_x, r_v = take(xp, (lin.x, lin.v, lin.s, r_x, r_v), piece.index)
    part = problem.select(piece.index)
    inequality, equality = part.inequality, part.equality
    one = xp.ones_like(s)
    theta = xp.where(inequality, s / xp.where(inequality, v, one), xp.where(equality, 0 * one, one * float("inf")))
    if piece.form is None:
        return _solve_afresh(part, piece.metric, theta, r_x, r_v)
    form = piece.form(part, piece.constants)
    if form.definite:
        u_x, u_v, good = _solve_in_rows(form, piece.metric, theta, r_x, r_v)
    else:
        exact = System(theta, xp.zeros_like(x), xp.zeros_like(s))
        heavy, P = _heavy(part, piece.metric, theta), parameters(problem)
        u_x, u_v, left, moved = solve_nearby(
            form, exact, piece.factor, piece.metric, heavy, r_x, r_v, P.derivative_rounds
        )
        good = (left <= P.factor_residual) & (moved <= P.factor_moved)
    if problem.backend.traced:
        return problem.backend.cond(
            xp.all(good),
            lambda: (u_x, u_v),
            lambda: _choose(xp, good, (u_x, u_v), _solve_afresh(part, piece.metric, theta, r_x, r_v)),
        )
    good = good[:, 0]
    (count,) = problem.backend.count(good)
    if count == good.shape[0]:
        return u_x, u_v
    order = xp.argsort(xp.astype(~good, xp.int8), stable=True)
    bad = order[count:]
    metric = take(xp, piece.metric, bad)
    again = _solve_afresh(part.select(bad), metric, *(xp.take(a, bad, axis=0) for a in (theta, r_x, r_v)))
    back = xp.argsort(order)
    return tuple(
        xp.take(xp.concat([xp.take(old, order[:count], axis=0), new], axis=0), back, axis=0)
        for old, new in zip((u_x, u_v), again, strict=True)
    )


def solve_nearby(form, system: System, factor, metric: Metric, heavy, r_x, r_v, refinements: int):
    """Solve a KKT system with the factor of another one; also how far that got.

    The factor's θ may come from an earlier interior-point iterate. Along the central path θ tends to 0 at the active
    rows (`heavy`) and to infinity at the others. At the active rows two such θ differ little against K M⁻¹ Kᵀ; the
    other rows are eliminated with the θ of the system itself, after which what differs is the weight 1/θ, which is
    small in both. The refinement contracts by about the larger of the two differences a round, unless the active rows
    are dependent or what the matrix cannot reach is asked of it.

    Returns
    -------
    dx, dv
    left, moved : (B, 1)
        The residual against the right-hand side, and what a next correction is likely to be against the solution, in
        the scaled problem.
    """
    problem, xp = form.problem, form.problem.backend.xp
    weights = 1.0 / (system.theta + system.delta)
    zero = xp.zeros_like(r_v)
    D, E, *_ = metric

    def size(a_x, a_v, x_scale, v_scale):
        parts = [xp.abs(x_scale * a_x), xp.abs(v_scale * xp.where(heavy, a_v, zero))]
        return problem.backend.largest(xp.concat(parts, axis=-1))

    def correction(e_x, e_v):
        b_x, b_v = e_x + problem.adjoint(xp.where(heavy, zero, weights * e_v)), xp.where(heavy, e_v, zero)
        cx, cv = form.solve(factor, form.eliminate(factor, b_x), b_v)
        return cx, xp.where(heavy, cv, weights * (problem.constraints(cx) - e_v)), size(b_x, b_v, D, E)

    def ratio(a, b):
        return a / xp.where(b > 0, b, xp.ones_like(b))

    dx, dv, asked = correction(r_x, r_v)
    e_x, e_v = residual(problem, system, r_x, r_v, dx, dv)
    left = ratio(size(e_x, e_v, D, E), asked)
    accuracy, further = parameters(problem).refined, DOUBLE.refined_moved

    def inaccurate(dx, dv, e_x, e_v, left, moved, last):
        return ~xp.all((left <= accuracy) & (moved <= further * accuracy))

    def refine(dx, dv, e_x, e_v, left, moved, last):
        cx, cv, _ = correction(e_x, e_v)
        d_x, d_v = residual(problem, system, r_x, r_v, dx + cx, dv + cv)
        after = ratio(size(d_x, d_v, D, E), asked)
        # A factor too far off makes it worse from round to round; the best is kept.
        better = after < left
        now = ratio(size(cx, cv, 1.0 / D, 1.0 / E), size(dx, dv, 1.0 / D, 1.0 / E))
        pairs = ((dx + cx, dx), (dv + cv, dv), (d_x, e_x), (d_v, e_v), (after, left))
        return (*(xp.where(better, new, old) for new, old in pairs), ratio(now * now, last), now)

    start = (dx, dv, e_x, e_v, left, xp.ones_like(left), xp.ones_like(left))
    dx, dv, _, _, left, moved, _ = problem.backend.while_loop(inaccurate, refine, start, refinements)
    return dx, dv, left, moved


def _choose(xp, condition, these, those):
    return tuple(xp.where(condition, a, b) for a, b in zip(these, those, strict=True))


def _heavy(problem: Problem, metric: Metric, theta):
    return problem.equality | (problem.inequality & (theta * metric.rows**2 < DOUBLE.nearly_active))


def _solve_in_rows(form: DenseDualForm, metric: Metric, theta, r_x, r_v):
    """The system with a dense dual form, whose matrix of the rows is factored anew; also where that is accurate.

    The smallest θ are raised, lest dependent active rows leave it singular; refinement takes that back.
    """
    problem, E = form.problem, metric.rows
    xp, backend = problem.backend.xp, problem.backend
    least, enough = parameters(problem).least_theta, parameters(problem).derivative_accuracy
    zero, exists = xp.zeros_like(theta), xp.isfinite(theta)
    whitened, t = form.eliminate(None, r_x)
    right = xp.where(exists, t - r_v, zero)
    factor, positive = form.factor_rows(xp.maximum(theta, least / E**2))

    def inaccurate(u, accurate):
        return ~xp.all(accurate)

    def refine(u, accurate):
        correction = backend.solve(factor, xp.where(exists, right - product(form.S, u) - theta * u, zero))
        now = backend.norm(correction / E) <= enough * backend.norm(u / E)
        return xp.where(accurate | ~exists, u, u + correction), accurate | now

    u, accurate = backend.while_loop(
        inaccurate, refine, (backend.solve(factor, right), positive & False), DOUBLE.derivative_rounds
    )
    return form.variables(whitened, u), u, positive & accurate


def _solve_afresh(problem: Problem, metric: Metric, theta, r_x, r_v):
    """The system for problems whose active rows are dependent or whose Q is singular there, which takes care.

    Where active rows are dependent, their multipliers share what is asked of them in proportion to 1/θ, and no
    inequality stands against an equality. What follows has to hold for the factor too, whose smallest weights must stay
    well above rounding: so the smallest θ are scaled up together, and equalities get a smaller one. The refinement
    takes the result back to the system itself.
    """
    xp = problem.backend.xp
    P = parameters(problem)
    smallest, largest, equal, rho = P.afresh_smallest, P.afresh_largest, P.afresh_equality, P.afresh_rho
    heavy = _heavy(problem, metric, theta)
    scaled = theta * metric.rows**2
    raised = problem.inequality & (scaled < largest)
    zero = xp.zeros_like(scaled)
    top = problem.backend.largest(xp.where(raised, scaled, zero))
    level = problem.backend.clip(scaled * (largest / xp.where(top > 0, top, xp.ones_like(top))), smallest, largest)
    diagonal = xp.where(problem.equality, zero + equal, xp.where(raised, level, scaled)) / metric.rows**2
    form = PrimalForm(problem)
    rho = xp.full_like(r_x[:, :1], rho)

    def factored(rho):
        return *form.factor(System(diagonal, rho / metric.variables**2, zero)), rho

    def failed(factor, positive, rho):
        return ~xp.all(positive)

    def again(factor, positive, rho):
        return factored(xp.where(positive, rho, P.afresh_growth * rho))

    factor, *_ = problem.backend.while_loop(failed, again, factored(rho), P.afresh_attempts - 1)
    exact = System(theta, xp.zeros_like(r_x), zero)
    u_x, u_v, *_ = solve_nearby(form, exact, factor, metric, heavy, r_x, r_v, P.afresh_rounds)
    return u_x, u_v
