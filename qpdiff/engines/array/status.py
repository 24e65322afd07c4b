"""How problems stand: residuals, the stopping test, certificates, progress."""

from __future__ import annotations

from ...problem import Problem
from ...solution import Status
from ..base import Settings
from ..parameters import DOUBLE, parameters
from .state import RUNNING, Part, Residuals, State, cast, choose, measured


def residuals(problem: Problem, x, v, s):
    """Qx, Kx, Kᵀv, and what Qx + q + Kᵀv = 0 and Kx + s = k leave, with the sign of a right-hand side."""
    Qx, Kx, Kv = problem.hessian(x), problem.constraints(x), problem.adjoint(v)
    Kx = problem.where_exists(Kx, 0.0)
    return Qx, Kx, Kv, -(Qx + problem.q + Kv), problem.k - Kx - s


def assess(part: Part, settings: Settings, state: State, previous: State) -> State:
    """Compute the residuals afresh and decide how each problem stands; a certificate takes the place of x or v."""
    problem, backend = part.exact, part.problem.backend
    xp, tol, proven = backend.xp, settings.tol, settings.certificate
    x, v, s = (cast(xp, a, problem.dtype) for a in (state.x, state.v, state.s))
    Qx, Kx, Kv, r_x, r_v = residuals(problem, x, v, s)
    violation = problem.where_exists(problem.where_inequality(backend.clip(Kx - problem.k, 0.0), xp.abs(r_v)), 0.0)
    xQx, qx = backend.dot(x, Qx), backend.dot(x, problem.q)
    blocks = (problem.blocks[name] for name in ("G", "A", "ub", "lb"))
    kv = [backend.dot(problem.k[:, rows], v[:, rows]) for rows in blocks if rows.stop > rows.start]
    found = Residuals(backend.largest(violation), backend.norm(r_x), xp.abs(sum(kv, xQx + qx)))
    primal, dual, gap = found
    if not settings.absolute:
        units = part.units
        primal, dual = measured(backend, units.rows, violation), measured(backend, units.x, r_x)
        gap = gap / units.gap
    hidden = row_rounding(part, x)
    # Not `<=` on a maximum alone: NaN must never pass, nor an infinity that is compared with its own size.
    worst = xp.maximum(xp.maximum(primal, dual), gap)
    near = (worst < float("inf")) & within(
        part, settings, (x, v, Qx, Kx, Kv), (xQx, qx, kv), primal - hidden, dual, gap
    )

    # Farkas: Kᵀv = 0, z ≥ 0, kᵀv < 0 leaves no x; Qx = 0, Kx ≤ 0 (= 0), qᵀx < 0 is a way down without end. Iterates
    # without a limit go off along such a direction, so it shows in their last step long before it does in them.
    no_point, farkas, gain = contradiction(part, tol, v, previous.v, Kx, primal - hidden)
    if part.form.definite:
        no_bottom, ray, fall = backend.full(tuple(dual.shape), 0.0, dual.dtype), x, dual
    else:
        no_bottom, ray, fall = descent(part, tol, x, Qx, Kx, previous, dual)
    proof = xp.maximum(no_point, no_bottom)

    waiting, best = waited(xp, settings, state, Residuals(primal, dual, gap), proof)
    limit, patient = state.iterations >= state.limit, waiting < DOUBLE.stalled_after
    last = limit | ~patient
    solved = near & ((worst <= DOUBLE.solved_share * tol) | last)
    unbounded, infeasible = (
        (r > proven) | (last & (r > DOUBLE.late_certificate * proven)) for r in (no_bottom, no_point)
    )
    if not backend.known_all_false(unbounded):
        feasible = backend.largest(part.metric.rows * violation) <= DOUBLE.ray_violation * part.sizes.scaled_k
        unbounded = unbounded & (last | feasible)
    status = backend.full(tuple(limit.shape), RUNNING, xp.int32)
    if not backend.known_all_false(last | solved | unbounded | infeasible):
        status = xp.where(limit, int(Status.MAX_ITERATIONS), status)
        status = xp.where(patient, status, int(Status.STALLED))
        status = xp.where(unbounded, int(Status.DUAL_INFEASIBLE), status)
        status = xp.where(infeasible, int(Status.PRIMAL_INFEASIBLE), status)
        status = xp.where(solved, int(Status.SOLVED), status)
        x = xp.where(status == int(Status.DUAL_INFEASIBLE), ray / fall, x)
        v = xp.where(status == int(Status.PRIMAL_INFEASIBLE), farkas / gain, v)

    x, v, r_x, r_v = (cast(xp, a, part.problem.dtype) for a in (x, v, r_x, r_v))
    return state._replace(
        x=x, v=v, r_x=r_x, r_v=r_v, Qx=Qx, Kx=Kx, objective=0.5 * xQx + qx, found=found,
        primal=primal, dual=dual, gap=gap, near=near, worst=worst, best=best, proof=xp.maximum(proof, state.proof),
        waiting=waiting, status=status,
    )  # fmt: skip


def within(part: Part, settings: Settings, vectors, terms, primal, dual, gap):
    """Whether the residuals are within the tolerance, absolute and relative to the terms that they are sums of."""
    problem, sizes, backend, units = part.exact, part.sizes, part.problem.backend, part.units
    xp, tol, rtol = backend.xp, settings.tol, settings.rtol
    (x, v, Qx, Kx, Kv), (xQx, qx, kv) = vectors, terms
    largest = xp.maximum(xp.maximum(xp.abs(xQx), xp.abs(qx)), xp.abs(sum(kv, 0.0 * qx)))
    of_gap = 1.0 if units.gap is None else 1.0 / units.gap
    most = tol + rtol * of_gap * largest
    near = gap <= most
    if backend.known_all_false(near):
        return near
    # The terms of the gap may cancel to 0 by luck: what their rounding hides must not be far beyond the tolerance.
    hidden = backend.dot(xp.abs(x), xp.abs(Qx) + xp.abs(problem.q)) + backend.dot(xp.abs(v), xp.abs(problem.k))
    slope = xp.maximum(xp.maximum(measured(backend, units.x, Qx), sizes.q), measured(backend, units.x, Kv))
    return (
        (primal <= tol + rtol * measured(backend, units.rows, Kx))
        & (dual <= tol + rtol * slope)
        & (gap + DOUBLE.gap_rounding * xp.finfo(problem.dtype).eps * of_gap * hidden <= most)
    )


def row_rounding(part: Part, x):
    """What rounding may leave of the rows at x, in the units of the tolerance; none of it counts in the caller's."""
    if part.units.rows is None:
        return 0.0
    largest = part.problem.backend.norm(x / part.metric.variables)
    return parameters(part.problem).row_rounding * largest / part.metric.primal


def waited(xp, settings: Settings, state: State, residuals: Residuals, proof):
    """Iterations since a residual or what proves that there is no solution last improved; and the best of each.

    Each of the three residuals counts by itself: while the primal and the dual one fall, the gap may grow.
    """
    least = DOUBLE.solved_share * settings.tol
    improved = proof > DOUBLE.certificate_improvement * state.proof
    for now, best in zip(residuals, state.best, strict=True):
        improved = improved | ((now < DOUBLE.improvement * best) & (best > least))
    best = Residuals(*(xp.where(a < b, a, b) for a, b in zip(residuals, state.best, strict=True)))
    return xp.where(improved, 0, state.waiting + 1), best


def descent(part: Part, tol, x, Qx, Kx, previous: State, dual):
    """How near the last step in the variables is to a way down without end, that step, and how far down it goes."""
    problem, (D, E, *_), backend = part.exact, part.metric, part.problem.backend
    xp = backend.xp
    ray = x - cast(xp, previous.x, x.dtype)
    falls, fall = falling(backend, tol, problem.q, ray, dual, part.units.x)
    if backend.known_all_false(falls):
        return xp.astype(falls, fall.dtype), ray, fall
    slope = Kx - previous.Kx
    climb = xp.where(problem.equality, xp.abs(slope), backend.clip(slope, 0.0))
    uphill = xp.maximum(backend.norm(D * (Qx - previous.Qx)), backend.largest(E * climb))
    # The rounding of these differences hides as much.
    hidden = xp.maximum(backend.norm(D * Qx), backend.norm(E * Kx))
    uphill = xp.maximum(uphill, xp.finfo(problem.dtype).eps * hidden)
    return xp.where(falls, fall / (uphill * part.sizes.scaled_q), 0.0), ray, fall


def contradiction(part: Part, tol, v, previous, Kx, primal):
    """How near the last step in the multipliers is to a Farkas certificate, that step, and how much it gains."""
    problem, backend = part.exact, part.problem.backend
    xp = backend.xp
    farkas = v - cast(xp, previous, v.dtype)
    farkas = problem.where_inequality(backend.clip(farkas, 0.0), farkas)
    gains, gain = falling(backend, tol, problem.k, farkas, primal, part.units.rows)
    if backend.known_all_false(gains):
        return xp.astype(gains, gain.dtype), farkas, gain
    left = backend.norm(part.metric.variables * problem.adjoint(farkas))
    # The rounding of the difference hides as much.
    left = xp.maximum(left, xp.finfo(problem.dtype).eps * backend.norm(v / part.metric.rows))
    size = part.sizes.scaled_k
    size = xp.maximum(size, xp.minimum(backend.norm(part.metric.rows * Kx), DOUBLE.reached * size))
    return xp.where(gains, gain / (left * size), 0.0), farkas, gain


def falling(backend, tol, cost, direction, residual, unit):
    """Where a linear cost falls in a direction, and how far.

    The fall against what the direction leaves is a ratio r that proves that there is no solution of norm less than r in
    the scaled problem, whose own size is that of its cost. It has to be beyond rounding, and beyond what any point may
    leave of the residual within the tolerance: that takes tol·‖direction‖₁ off the fall.
    """
    xp = backend.xp
    fall, length = -backend.dot(cost, direction), xp.abs(direction)
    total = backend.total(length) if unit is None else unit.size * backend.total(length / unit.scale)
    least = xp.maximum(DOUBLE.certificate_rounding * backend.dot(xp.abs(cost), length), tol * total)
    return (residual > tol) & (fall > least), fall


def settle(part: Part, settings: Settings, state: State, moved: State) -> State:
    """The state after a step, or the one before where that was the last.

    From a point within the tolerance one more step is worth it only if it halves the residuals. Where they are above
    tol it gets a second chance, with step lengths that are the same.
    """
    xp, backend = part.problem.backend.xp, part.problem.backend
    running = state.status == RUNNING
    settled = running & state.near & ~(moved.worst <= DOUBLE.worthwhile * state.worst)
    stays = settled | ~running
    if backend.known_all_false(stays):
        return moved
    again = (
        settled
        & (state.worst > settings.tol)
        & (state.waiting < DOUBLE.equal_steps_after)
        & (moved.iterations < state.limit)
    )
    stayed = state._replace(
        status=xp.where(settled & ~again, int(Status.SOLVED), state.status),
        waiting=xp.where(again, DOUBLE.equal_steps_after, state.waiting),
        iterations=state.iterations + xp.astype(again, state.iterations.dtype),
    )
    return choose(xp, stays, stayed, moved)
