"""The status of problems: residuals, the stopping test, certificates, progress, acceptance of the last step."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...problem import Problem
from ...solution import Status
from ..base import Settings
from ..parameters import DOUBLE, parameters
from .state import RUNNING, Residuals, State, SubBatch, Unit, cast, choose, scaled_size

# ---- residuals


class Products(NamedTuple):
    """The products with the matrices at a point and what they leave, with the sign of a right-hand side."""

    Qx: Any
    Kx: Any
    Kv: Any
    """Kᵀv."""
    r_x: Any
    """−(Qx + q + Kᵀv)."""
    r_v: Any
    """k − Kx − s, at rows with a price k − Kx − s + t + σv."""


class GapTerms(NamedTuple):
    """The terms whose sum is the duality gap, (B, 1)."""

    xQx: Any
    qx: Any
    kv: list
    """kᵀv, by blocks of constraints."""
    price: Any
    """The price of violations and the σv² of their quadratic one; 0 without prices."""


def residuals(problem: Problem, x, v, s) -> Products:
    """Compute the products with the matrices, and what Qx + q + Kᵀv = 0 and Kx + s = k leave, s less any violation."""
    Qx, Kx, Kv = problem.hessian(x), problem.constraints(x), problem.adjoint(v)
    Kx = problem.where_exists(Kx, 0.0)
    return Products(Qx, Kx, Kv, -(Qx + problem.q + Kv), problem.k - Kx - s)


def violations(problem: Problem, v, t):
    """Return how far rows with a price are violated, t + σv, (B, constraints)."""
    return t + problem.elastic.compliance * v


def linear_price(problem: Problem, s, t):
    """Return the price of violations but for the quadratic one, (B, 1); at an equality s is a violation like t."""
    xp, elastic = problem.backend.xp, problem.elastic
    violated = t + xp.where(elastic.two_sided, s, 0.0)
    return problem.backend.dot(xp.where(elastic.limited, elastic.upper, 0.0), violated)


def price_terms(problem: Problem, v, s, t):
    """Return what prices of violations add to the duality gap, (B, 1): the linear price and σv²."""
    return linear_price(problem, s, t) + problem.backend.dot(problem.elastic.compliance * v, v)


def gap_terms(problem: Problem, x, v, Qx, price=0.0) -> GapTerms:
    """Compute the terms of the duality gap, with those of the prices of violations."""
    backend = problem.backend
    # By blocks, each summed by itself: terms that cancel do so in the same way everywhere.
    blocks = (problem.blocks[name] for name in ("G", "A", "ub", "lb"))
    kv = [backend.dot(problem.k[:, rows], v[:, rows]) for rows in blocks if rows.stop > rows.start]
    return GapTerms(backend.dot(x, Qx), backend.dot(x, problem.q), kv, price)


def per_gap_unit(sub: SubBatch):
    """Return what a gap is multiplied by before it is compared with the tolerance."""
    return 1.0 if sub.units.gap is None else 1.0 / sub.units.gap


def row_rounding(sub: SubBatch, x):
    """Return what rounding may leave of the constraints at x, in the units of the tolerance; 0 in the caller's."""
    if sub.units.v is None:
        return 0.0
    largest = sub.problem.backend.norm(x / sub.scaling.D)
    return parameters(sub.problem).row_rounding * largest / sub.scaling.primal


# ---- the stopping test


def allowed(settings: Settings, size, times=1.0, rounding=0.0):
    """Return what the tolerance allows for a residual whose terms have this size, in the units of the tolerance.

    It is tol + rtol·size, `times` it, and with `rounding` relative to the size on top.
    """
    return times * settings.tol + (times * settings.rtol + rounding) * size


def is_within_tolerance(sub: SubBatch, x, v, products: Products, terms: GapTerms, found: Residuals):
    """Return for which problems the residuals are within the tolerance, absolute and relative to their terms."""
    problem, sizes, backend, units = sub.wide_problem, sub.sizes, sub.problem.backend, sub.units
    xp, settings, per_unit = backend.xp, sub.settings, per_gap_unit(sub)
    xQx, qx, kv, price = terms
    # Without the price, whose share of the tolerance might be all of the cost.
    size_gap = xp.maximum(xp.maximum(xp.abs(xQx), xp.abs(qx)), xp.abs(sum(kv, 0.0 * qx) + price))
    allowed_gap = allowed(settings, per_unit * size_gap)
    within = found.gap <= allowed_gap
    if backend.known_all_false(within):
        return within
    # The terms of the gap may cancel to 0 by chance: what their rounding hides must not be far beyond the tolerance.
    hidden = backend.dot(xp.abs(x), xp.abs(products.Qx) + xp.abs(problem.q))
    hidden = hidden + backend.dot(xp.abs(v), xp.abs(problem.k)) + price
    size_dual = xp.maximum(scaled_size(backend, units.x, products.Qx), sizes.q)
    size_dual = xp.maximum(size_dual, scaled_size(backend, units.x, products.Kv))
    return (
        (found.primal <= allowed(settings, scaled_size(backend, units.v, products.Kx)))
        & (found.dual <= allowed(settings, size_dual))
        & (found.gap + DOUBLE.gap_rounding * xp.finfo(problem.dtype).eps * per_unit * hidden <= allowed_gap)
    )


def assess(sub: SubBatch, state: State, previous: State) -> State:
    """Compute the residuals afresh and decide how each problem stands.

    Parameters
    ----------
    state
        Where x, v and s are those to be assessed; what is remembered from iterate to iterate is that of the last.
    previous
        The last iterate, from which steps may go along a direction that proves that there is no solution.

    Returns
    -------
    State
        A certificate takes the place of x or v.
    """
    problem, backend, settings, units = sub.wide_problem, sub.problem.backend, sub.settings, sub.units
    xp = backend.xp
    x, v, s = (cast(xp, a, problem.dtype) for a in (state.x, state.v, state.s))
    if state.elastic is None:
        products = residuals(problem, x, v, s)
        terms = gap_terms(problem, x, v, products.Qx)
        violation = backend.clip(products.Kx - problem.k, 0.0)
    else:  # beyond what is paid for
        t = cast(xp, state.elastic.t, problem.dtype)
        paid = violations(problem, v, t)
        products = residuals(problem, x, v, s - paid)
        terms = gap_terms(problem, x, v, products.Qx, price_terms(problem, v, s, t))
        violation = backend.clip(products.Kx - problem.k - paid, 0.0)
        violation = xp.where(problem.elastic.two_sided, xp.abs(products.r_v), violation)
    violation = problem.where_exists(problem.where_inequality(violation, xp.abs(products.r_v)), 0.0)
    absolute = Residuals(
        backend.largest(violation), backend.norm(products.r_x),
        xp.abs(sum(terms.kv, terms.xQx + terms.qx) + terms.price),
    )  # fmt: skip
    found = absolute
    if not settings.absolute:
        primal, dual = scaled_size(backend, units.v, violation), scaled_size(backend, units.x, products.r_x)
        found = Residuals(primal, dual, absolute.gap / units.gap)
    # What rounding leaves of the constraints at x is no violation.
    beyond = found._replace(primal=found.primal - row_rounding(sub, x))
    # Not `<=` on a maximum alone: NaN must never pass, nor an infinity that is compared with its own size.
    worst = xp.maximum(xp.maximum(found.primal, found.dual), found.gap)
    within = (worst < float("inf")) & is_within_tolerance(sub, x, v, products, terms, beyond)

    infeasible = farkas_certificate(sub, v, previous.v, products.Kx, beyond.primal)
    unbounded = descent_direction(sub, x, products, previous, found.dual)
    certificate = xp.maximum(infeasible.ratio, unbounded.ratio)
    without_progress, best = progress(sub, state, found, certificate)
    objective = 0.5 * terms.xQx + terms.qx
    if problem.elastic is not None:
        objective = objective + (terms.price + linear_price(problem, s, t)) / 2.0
    state = state._replace(
        Qx=products.Qx, Kx=products.Kx, objective=objective, absolute=absolute, primal=found.primal,
        dual=found.dual, gap=found.gap, within_tolerance=within, worst=worst, best=best,
        certificate=xp.maximum(certificate, state.certificate), without_progress=without_progress,
    )  # fmt: skip
    status = decide_status(sub, state, infeasible.ratio, unbounded.ratio, violation)
    if status is None:
        status = backend.full(tuple(worst.shape), RUNNING, xp.int32)
    else:
        x = xp.where(status == int(Status.DUAL_INFEASIBLE), unbounded.direction / unbounded.fall, x)
        v = xp.where(status == int(Status.PRIMAL_INFEASIBLE), infeasible.direction / infeasible.fall, v)
    x, v, r_x, r_v = (cast(xp, a, sub.problem.dtype) for a in (x, v, products.r_x, products.r_v))
    return state._replace(x=x, v=v, r_x=r_x, r_v=r_v, status=status)


def decide_status(sub: SubBatch, state: State, infeasible, unbounded, violation):
    """Return the status of each problem; None where all are known to go on.

    `infeasible` and `unbounded` are the ratios of the directions that may prove so, `violation` is that of the
    constraints.
    """
    backend, settings = sub.problem.backend, sub.settings
    xp = backend.xp
    limit, progressing = state.iterations >= state.limit, state.without_progress < DOUBLE.stalled_after
    last = limit | ~progressing
    solved = state.within_tolerance & ((state.worst <= DOUBLE.solved_share * settings.tol) | last)
    enough = sub.parameters.certificate
    falls, contradicts = (
        (r > enough) | (last & (r > DOUBLE.late_certificate * enough)) for r in (unbounded, infeasible)
    )
    if not backend.known_all_false(falls):
        feasible = backend.largest(sub.scaling.E * violation) <= DOUBLE.ray_violation * sub.sizes.scaled_k
        falls = falls & (last | feasible)
    if backend.known_all_false(last | solved | falls | contradicts):
        return None
    status = backend.full(tuple(limit.shape), RUNNING, xp.int32)
    status = xp.where(limit, int(Status.MAX_ITERATIONS), status)
    status = xp.where(progressing, status, int(Status.STALLED))
    status = xp.where(falls, int(Status.DUAL_INFEASIBLE), status)
    status = xp.where(contradicts, int(Status.PRIMAL_INFEASIBLE), status)
    return xp.where(solved, int(Status.SOLVED), status)


def accept_or_revert(sub: SubBatch, state: State, moved: State) -> State:
    """Return the state after a step, or the one before for problems that the step is not worth it for.

    From a point within the tolerance one more step is worth it only if it halves the residuals. Where they are above
    tol it gets a second chance, with step lengths that are the same.
    """
    xp, backend = sub.problem.backend.xp, sub.problem.backend
    running = state.status == RUNNING
    reverted = running & state.within_tolerance & ~(moved.worst <= DOUBLE.worthwhile * state.worst)
    stays = reverted | ~running
    if backend.known_all_false(stays):
        return moved
    again = (
        reverted
        & (state.worst > sub.settings.tol)
        & (state.without_progress < DOUBLE.equal_steps_after)
        & (moved.iterations < state.limit)
    )
    stayed = state._replace(
        status=xp.where(reverted & ~again, int(Status.SOLVED), state.status),
        without_progress=xp.where(again, DOUBLE.equal_steps_after, state.without_progress),
        iterations=state.iterations + xp.astype(again, state.iterations.dtype),
    )
    return choose(xp, stays, stayed, moved)


def progress(sub: SubBatch, state: State, found: Residuals, certificate):
    """Count the iterations since a residual or a certificate last improved; also return the best of each residual.

    Each of the three residuals counts by itself: while the primal and the dual one fall, the gap may grow.
    """
    xp, least = sub.problem.backend.xp, DOUBLE.solved_share * sub.settings.tol
    improved = certificate > DOUBLE.certificate_improvement * state.certificate
    for now, best in zip(found, state.best, strict=True):
        improved = improved | ((now < DOUBLE.improvement * best) & (best > least))
    best = Residuals(*(xp.where(a < b, a, b) for a, b in zip(found, state.best, strict=True)))
    return xp.where(improved, 0, state.without_progress + 1), best


# ---- certificates
#
# Farkas: Kᵀv = 0, z ≥ 0, kᵀv < 0 leaves no x; Qx = 0, Kx ≤ 0 (= 0), qᵀx < 0 is a direction of unbounded descent.
# Iterates without a limit go off along such a direction, so it shows in their last step long before it does in them.
# Rows with a price contradict nothing, v = 0 there; along x they may be violated if qᵀx < 0 outweighs the linear price.


class Direction(NamedTuple):
    """A direction that may prove that there is no solution."""

    ratio: Any
    """The fall against what the direction leaves; 0 where it proves nothing."""
    direction: Any
    fall: Any
    """The fall of the linear cost along it."""


def descent_direction(sub: SubBatch, x, products: Products, previous: State, dual) -> Direction:
    """Compare the last step in the variables with a direction of unbounded descent."""
    problem, (D, E, *_, cost), backend = sub.wide_problem, sub.scaling, sub.problem.backend
    xp = backend.xp
    if sub.form.skips_rho:  # a definite Q bounds the cost
        return Direction(backend.full(tuple(dual.shape), 0.0, dual.dtype), x, dual)
    ray = x - cast(xp, previous.x, x.dtype)
    falls, fall = falls_along(sub, problem.q, ray, dual, sub.units.x)
    if backend.known_all_false(falls):
        return Direction(xp.astype(falls, fall.dtype), ray, fall)
    Qx, Kx = products.Qx, products.Kx
    slope = Kx - previous.Kx
    climb = xp.where(problem.equality, xp.abs(slope), backend.clip(slope, 0.0))
    curved = D / cost  # as if the cost were not scaled, which changes the curvature of the scaled problem
    # The rounding of these differences hides as much.
    hidden = xp.maximum(backend.norm(curved * Qx), backend.norm(E * Kx))
    least = xp.maximum(backend.norm(curved * (Qx - previous.Qx)), xp.finfo(problem.dtype).eps * hidden)

    def ratio(falls, fall, climb):
        uphill = xp.maximum(least, backend.largest(E * climb))
        return xp.where(falls, fall / (uphill * sub.sizes.scaled_q), 0.0)

    if (elastic := problem.elastic) is None:
        return Direction(ratio(falls, fall, climb), ray, fall)
    climb = xp.where(elastic.two_sided, xp.abs(slope), climb)
    unpaid = ratio(falls, fall, climb)
    price = backend.dot(xp.where(elastic.limited, elastic.upper, 0.0), xp.where(elastic.limited, climb, 0.0))
    falls, left = falls_along(sub, problem.q, ray, dual, sub.units.x, price)
    paid = ratio(falls, left, xp.where(elastic.limited, 0.0, climb))
    return Direction(xp.maximum(unpaid, paid), ray, xp.where(paid > unpaid, left, fall))


def farkas_certificate(sub: SubBatch, v, previous_v, Kx, primal) -> Direction:
    """Compare the last step in the multipliers with a Farkas certificate."""
    problem, backend = sub.wide_problem, sub.problem.backend
    xp = backend.xp
    farkas = v - cast(xp, previous_v, v.dtype)
    farkas = problem.where_inequality(backend.clip(farkas, 0.0), farkas)
    if problem.elastic is not None:
        farkas = xp.where(problem.elastic.soft, 0.0, farkas)
    falls, fall = falls_along(sub, problem.k, farkas, primal, sub.units.v)
    if backend.known_all_false(falls):
        return Direction(xp.astype(falls, fall.dtype), farkas, fall)
    left = backend.norm(sub.scaling.D * problem.adjoint(farkas))
    # The rounding of the difference hides as much.
    left = xp.maximum(left, xp.finfo(problem.dtype).eps * backend.norm(v / sub.scaling.E))
    size = sub.sizes.scaled_k
    size = xp.maximum(size, xp.minimum(backend.norm(sub.scaling.E * Kx), DOUBLE.reached * size))
    return Direction(xp.where(falls, fall / (left * size), 0.0), farkas, fall)


def falls_along(sub: SubBatch, cost, direction, residual, unit: Unit | None, price=0.0):
    """Return where a linear cost falls along a direction by more than a price, and how far.

    The fall against what the direction leaves is a ratio r that proves that there is no solution of norm less than r in
    the scaled problem, whose own size is that of its cost. It has to be beyond rounding, and beyond what any point may
    leave of the residual within the tolerance: that takes tol·‖direction‖₁ off the fall.
    """
    backend, tol = sub.problem.backend, sub.settings.tol
    xp = backend.xp
    fall, length = -backend.dot(cost, direction) - price, xp.abs(direction)
    total = backend.total(length) if unit is None else unit.size * backend.total(length / unit.scale)
    least = xp.maximum(DOUBLE.certificate_rounding * backend.dot(xp.abs(cost), length), tol * total)
    return (residual > tol) & (fall > least), fall
