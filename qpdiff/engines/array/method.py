"""The method: a point to start from, a step to the next, and how each problem of a batch stands.

Each step is a predictor-corrector step of Mehrotra's on the KKT system with proximal terms around the iterate: ρ on the
variables and δ on the multipliers, which shrink with the complementarity. A step is one function from named state to
named state; `qpdiff.engines.array` decides how to iterate.

References
----------
R. Schwan, Y. Jiang, D. Kuhn, C. N. Jones, "PIQP: a proximal interior-point quadratic programming solver", CDC 2023.
J. Nocedal, S. J. Wright, "Numerical optimization", 2nd ed., 2006, section 16.6.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ...problem import Problem, take
from ...solution import Status
from ..base import Settings, StartingPoint
from ..parameters import DOUBLE, parameters
from . import kkt

RUNNING = -1


class State(NamedTuple):
    """The iterate of every problem; scalars have shape (B, 1). Residuals have the type of `Part.exact`."""

    x: Any
    v: Any
    """Multipliers of all rows."""
    s: Any
    """Slack of all rows, 0 where the row is no inequality."""
    mu: Any
    rho: Any
    delta: Any
    r_x: Any
    """−(Qx + q + Kᵀv)."""
    r_v: Any
    """k − Kx − s."""
    Qx: Any
    Kx: Any
    objective: Any
    found: Residuals
    """In the caller's units."""
    primal: Any
    """The residuals in the units of the tolerance."""
    dual: Any
    gap: Any
    near: Any
    """Whether the iterate is within the tolerance."""
    worst: Any
    """Largest of the three residuals."""
    best: Residuals
    """The smallest of each so far."""
    inexact: Any
    """Whether the last step was not accurate enough to go without refinement."""
    proof: Any
    """How near to a certificate of infeasibility or unboundedness the iterates have come."""
    waiting: Any
    """Iterations since `best` or `proof` last improved."""
    iterations: Any
    limit: Any
    """Iterations after which to give up."""
    status: Any
    seen: Any = None
    """What `dual_space` knows of x where x itself is that of an earlier iterate."""


class Residuals(NamedTuple):
    """Primal residual, dual residual and duality gap, (B, 1)."""

    primal: Any
    dual: Any
    gap: Any


class Unit(NamedTuple):
    """Residuals are multiplied by a scale and divided by a size before they are compared with the tolerance."""

    scale: Any
    size: Any


class Units(NamedTuple):
    """Those of the variables and the constraints, and the size of the gap; None: residuals in the caller's units."""

    x: Unit | None
    rows: Unit | None
    gap: Any


class Sizes(NamedTuple):
    """Numbers of each problem's data, (B or 1, 1)."""

    inequalities: Any
    """How many there are, at least 1."""
    q: Any
    """The largest |q| in the units of the tolerance."""
    scaled_k: Any
    """The largest |k| in the scaled problem but for loose constraints, at least what its residual is measured in."""
    scaled_q: Any
    least_rate: Any
    """How fast ρ and δ shrink at least: by themselves where there is no inequality and so no complementarity."""


class Part(NamedTuple):
    """Problems that are iterated on together, with what does not change on the way."""

    form: Any
    metric: kkt.Metric
    sizes: Sizes
    units: Units
    exact: Problem
    """The problems in float64, in which residuals are computed: in float32 rounding would hide what is left."""

    @property
    def problem(self) -> Problem:
        return self.form.problem

    @property
    def idle(self) -> bool:
        """Whether so little is in work that the device waits for calls: then it is their number that counts."""
        return self.problem.batch * self.problem.bytes_per_problem < self.problem.backend.idle_bytes

    def select(self, index) -> Part:
        problem = self.problem.select(index)
        exact = problem if self.exact is self.problem else self.exact.select(index)
        xp = problem.backend.xp
        metric, sizes, units = take(xp, (self.metric, self.sizes, self.units), index)
        return Part(self.form.select(problem, index), metric, sizes, units, exact)


def make_part(form, settings: Settings) -> Part:
    """The problems of a reduced form, ready to iterate on."""
    problem, backend = form.problem, form.problem.backend
    xp, metric, exact = backend.xp, kkt.equilibrate(problem), problem.astype(backend.exact)
    D, E, primal, dual, reach = metric
    units = Units(None, None, None) if settings.absolute else Units(Unit(D, dual), Unit(E, primal), primal * dual)
    count, k = backend.total(xp.astype(problem.inequality, problem.dtype)), E * exact.k
    sizes = Sizes(
        inequalities=backend.clip(count, 1.0), q=measured(backend, units.x, exact.q),
        scaled_k=xp.maximum(backend.norm(xp.where(k <= DOUBLE.loose * reach, k, 0.0)), primal),
        scaled_q=xp.maximum(backend.norm(D * exact.q), dual),
        least_rate=xp.where(count > 0, 0.0 * count, DOUBLE.fast_rate),
    )  # fmt: skip
    return Part(form, metric, sizes, units, exact)


# ---- a point to start from, and steps


def initialize(part: Part, settings: Settings):
    """The problems with the scaling to iterate with, their starting point, and the factor that it was made with.

    Where the multipliers of equalities are large because of the cost, as in optimal control of an unstable plant, the
    ordinary starting point is far from feasible; one for a fraction of the cost takes its place if it is nearer.
    """
    state, factor = starting_point(part, settings)
    problem, backend = part.problem, part.problem.backend
    xp = backend.xp
    # In float32 the proximal terms, which a smaller cost makes larger against it, would outweigh it.
    if part.form.definite or not problem.may_have_equalities or problem.dtype == xp.float32:
        return part, state, factor
    ratio = multiplier_ratio(part, state)
    large, one = ratio > DOUBLE.large_multipliers, xp.ones_like(ratio)
    if backend.none(large):
        return part, state, factor
    other = part._replace(metric=kkt.with_cost(part.metric, xp.where(large, DOUBLE.smaller_cost, one)))
    smaller, factor = starting_point(other, settings)
    nearer = large & (smaller.primal < DOUBLE.closer * state.primal)
    nearer = nearer & (multiplier_ratio(other, smaller) < DOUBLE.less_multipliers * ratio)
    part = part._replace(metric=kkt.with_cost(part.metric, xp.where(nearer, DOUBLE.smaller_cost, one)))
    return part, choose(xp, nearer, smaller, state), factor


def multiplier_ratio(part: Part, state: State):
    """The largest multiplier of an equality against the largest variable in the scaled problem."""
    backend, (D, E, *_) = part.problem.backend, part.metric
    x = backend.norm(state.x / D)
    v = backend.norm(backend.xp.where(part.problem.equality, state.v / E, 0.0))
    return v / backend.xp.where(x > 0, x, 1.0)


def starting_point(part: Part, settings: Settings):
    """The solution with θ = 1 in the scaled rows, moved onto s ∘ z = μ with s − z kept (PIQP); and its factor."""
    backend = part.problem.backend
    xp, origin, theta = backend.xp, make_origin(part, settings), first_theta(part)
    system = make_system(part, theta, origin.rho, origin.delta)
    factor, positive = part.form.factor(system)
    r_x, r_v = origin.r_x, origin.r_v
    x, v = part.form.solve(factor, part.form.eliminate(factor, r_x), r_v)
    x, v = kkt.refined(part.form, system, factor, r_x, r_v, x, v, origin.inexact)
    sound = positive & backend.all_finite(x) & backend.all_finite(v)
    v, s, mu = place(part, settings, theta, xp.where(sound, v, origin.v))
    state = origin._replace(x=xp.where(sound, x, origin.x), v=v, s=s, mu=mu)
    return assess(part, settings, state, origin), factor


def make_origin(part: Part, settings: Settings) -> State:
    """The point x = 0, v = 0, of which nothing else is known."""
    problem, exact = part.problem, part.exact.dtype
    xp, backend = problem.backend.xp, problem.backend

    def full(width, value, dtype):
        return backend.full((problem.batch, width), value, dtype)

    x, v = full(problem.n, 0.0, problem.dtype), full(problem.rows, 0.0, problem.dtype)
    infinite, count = full(1, float("inf"), exact), full(1, 0, xp.int32)
    nothing = Residuals(infinite, infinite, infinite)
    return State(
        x=x, v=v, s=v, mu=full(1, 0.0, problem.dtype),
        rho=full(1, 0.0 if part.form.definite else settings.rho, problem.dtype),
        delta=full(1, settings.delta, problem.dtype), r_x=x - problem.q, r_v=problem.k + v,
        Qx=full(problem.n, 0.0, exact), Kx=full(problem.rows, 0.0, exact),
        objective=infinite, found=nothing, primal=infinite, dual=infinite, gap=infinite, near=infinite < 0,
        worst=infinite, best=nothing, inexact=infinite > 0, proof=full(1, 0.0, exact),
        waiting=count, iterations=count, limit=count + settings.max_iterations, status=count + RUNNING,
    )  # fmt: skip


def first_theta(part: Part):
    """θ of the KKT matrix that the starting point is made with: 1 in the scaled rows, more in those that are loose.

    Else a bound of 1e12 that means none would draw the starting point half of the way there.
    """
    problem, metric = part.problem, part.metric
    xp, E = problem.backend.xp, metric.rows
    zero = problem.backend.full((problem.batch, problem.rows), 0.0, problem.dtype)
    distance = problem.backend.clip(E * problem.k / (DOUBLE.loose * metric.reach), 1.0)
    return xp.where(problem.inequality, distance / E**2 + zero, zero)


def place(part: Part, settings: Settings, theta, v):
    """Multipliers and slacks on s ∘ z = μ for multipliers v of a solution with θ, and the mean complementarity."""
    problem, backend, metric = part.problem, part.problem.backend, part.metric
    xp = backend.xp
    z = xp.where(problem.inequality, v / metric.rows, xp.zeros_like(v))
    up, down = (backend.clip(backend.largest(a), 0.0) for a in (-z, z))
    mu = mean(part, xp.where(problem.inequality, z + up, xp.zeros_like(z)), down - z)
    mu = xp.maximum(mu, DOUBLE.least_centrality * xp.maximum(up, down) ** 2)
    mu = xp.maximum(mu, settings.smallest * metric.primal * metric.dual)
    v, s = onto_path(part, v, metric.rows**2 * theta * z, mu)
    return v, s, mean(part, s, v)


def start_near(part: Part, settings: Settings, near: StartingPoint, cold: State):
    """Start at another problem's solution, moved onto s ∘ z = μ with s − z kept; also whether that is of use.

    μ grows with what that solution leaves of the residuals here, so that the slacks have room for the steps that make
    up for it, up to the μ of the ordinary start.
    """
    problem, backend, (D, E, *units, _) = part.problem, part.problem.backend, part.metric
    xp, inequality, equality, unit = backend.xp, problem.inequality, problem.equality, units[0] * units[1]
    x, v = near.x + xp.zeros_like(cold.x), near.v + xp.zeros_like(cold.v)
    slack = E * (problem.k - problem.constraints(x))
    zero = xp.zeros_like(slack)
    amiss = xp.where(equality, xp.abs(slack), xp.where(inequality, backend.clip(-slack, 0.0), zero))
    slope = problem.hessian(x) + problem.q + problem.adjoint(v)
    error = xp.maximum(backend.largest(amiss), backend.norm(D * slope))
    difference = xp.where(inequality, v / E - slack, zero)
    mu = xp.minimum(DOUBLE.warm_centrality * error * xp.sqrt(unit), cold.mu)
    mu = xp.maximum(mu, max(settings.tol, settings.smallest) * unit)
    v, s = onto_path(part, v, difference, mu)
    state = cold._replace(x=x, v=v, s=s, mu=mean(part, s, v))
    state = assess(part, settings, state, state)
    usable = near.usable & ((state.status == RUNNING) | (state.status == int(Status.SOLVED)))
    # Also from a solution one step is taken: the derivative needs its factor.
    return state._replace(status=xp.full_like(state.status, RUNNING)), usable


def onto_path(part: Part, v, difference, mu):
    """Multipliers and slacks on s ∘ z = μ with the difference z − s in the scaled rows kept; other multipliers stay."""
    problem, E = part.problem, part.metric.rows
    xp = problem.backend.xp
    large = (xp.abs(difference) + xp.sqrt(difference * difference + 4.0 * mu)) / 2.0
    small = mu / large
    zero = xp.zeros_like(v)
    s = xp.where(problem.inequality, xp.where(difference > 0, small, large) / E, zero)
    z = xp.where(difference > 0, large, small) * E
    return xp.where(problem.inequality, z, xp.where(problem.equality, v, zero)), s


def newton(part: Part, s, z, r_x, r_v, rho, delta):
    """Factor the KKT matrix at s, z > 0 (0 and infinite where the row is no inequality); it, and the step as functions.

    They take what s ∘ z is to be diminished by, and take all other residuals to 0. The first is for the rows alone.
    """
    form = part.form
    system = make_system(part, s / z, rho, delta)
    factor, positive = form.factor(system)
    eliminated = form.eliminate(factor, r_x)

    def shifted(complementarity):
        return r_v + complementarity / z

    def slack(complementarity, dv):
        return -(complementarity + s * dv) / z

    def rows_direction(complementarity):
        dv = form.solve_rows(factor, eliminated, shifted(complementarity))
        return dv, slack(complementarity, dv)

    def direction(complementarity, refine=None):
        right = shifted(complementarity)
        dx, dv = form.solve(factor, eliminated, right)
        if refine is not None:
            dx, dv = kkt.refined(form, system, factor, r_x, right, dx, dv, refine)
        return dx, dv, slack(complementarity, dv)

    return system, factor, positive, rows_direction, direction


def step(part: Part, settings: Settings, state: State, *, refine: bool, stays: bool):
    """One predictor-corrector step for every running problem; also the factor it used.

    `refine` is whether any problem is inexact; only those that are get refined, so that no problem depends on another.
    `stays` is whether any may be found to stay where it is: one that has ended, or is within the tolerance.
    """
    problem, backend = part.problem, part.problem.backend
    xp, r_x, r_v = backend.xp, state.r_x, state.r_v
    # What is divided by an infinite s or z is 0 where the row is no inequality.
    s, z = (problem.where_inequality(a, float("inf")) for a in (state.s, state.v))
    system, factor, positive, rows_direction, direction = newton(part, state.s, z, r_x, r_v, state.rho, state.delta)

    excess, fraction = centering(part, settings, state, s, z, *rows_direction(state.s * state.v))
    dx, dv, ds = direction(excess, state.inexact if refine else None)
    alpha_s, alpha_z, s, v = advance(part, settings, state, s, z, dv, ds, fraction)
    x = state.x + alpha_s * dx

    # A step that cannot be computed is not taken; stronger proximal terms come instead.
    sound = positive & backend.all_finite(x) & backend.all_finite(v) & backend.all_finite(s)
    moved = state._replace(x=x, v=v, s=s, mu=mean(part, s, v))
    if not backend.none(~sound):
        moved = choose(xp, sound, moved, state)
    moved = assess(part, settings, moved._replace(iterations=state.iterations + 1), state)

    # What the linear solve has left of its system shows in the products before and after the step.
    Q_dx = moved.Qx - state.Qx
    Kt_dv = r_x - moved.r_x - Q_dx
    left_x = r_x - Q_dx / alpha_s - Kt_dv / alpha_z - system.rho * dx
    left_v = moved.r_v - (1.0 - alpha_s) * r_v + alpha_s * (system.delta * dv)
    least, units = DOUBLE.refine_absolute * settings.tol, part.units
    left_x, left_v = measured(backend, units.x, left_x), measured(backend, units.rows, left_v)
    inexact = (
        ~(left_x <= backend.clip(DOUBLE.refine_relative * state.dual, least))
        | ~(left_v <= backend.clip(DOUBLE.refine_relative * measured(backend, units.rows, r_v), least))
        | ~sound
    )

    moved = moved._replace(inexact=inexact)
    moved = with_proximal_terms(part, settings, state, moved, sound, alpha_s * (system.delta * dv))
    return settle(part, settings, state, moved) if stays else moved, factor


def centering(part: Part, settings: Settings, state: State, s, z, dv, ds):
    """What the corrector is to diminish s ∘ z by, after the predictor's direction; and its share of the step.

    How far towards s ∘ z = 0 the predictor gets decides both: the centering (Nocedal & Wright, 16.62 to 16.66), and the
    share, which has to tend to 1 for fast convergence. s and z are as for `step_length`.
    """
    backend = part.problem.backend
    alpha_s, alpha_z = step_length(backend, s, ds, 1.0), step_length(backend, z, dv, 1.0)
    reached = mean(part, state.s + alpha_s * ds, state.v + alpha_z * dv)
    ratio = backend.clip(reached / (state.mu + settings.tiny), 0.0, 1.0)
    # What goes round in circles otherwise comes to an end with more centering.
    stuck = state.waiting > DOUBLE.equal_steps_after
    sigma = backend.xp.where(stuck, backend.clip(ratio**3, DOUBLE.least_centering), ratio**3)
    excess = state.s * state.v + ds * dv - sigma * state.mu
    return excess, backend.clip(1.0 - ratio, DOUBLE.step_fraction, DOUBLE.largest_step_fraction)


def advance(part: Part, settings: Settings, state: State, s, z, dv, ds, fraction):
    """The step lengths for x and s, and for v, along the corrector's direction, and s and v after the step."""
    problem, backend = part.problem, part.problem.backend
    xp = backend.xp
    alpha_s, alpha_z = step_length(backend, s, ds, fraction), step_length(backend, z, dv, fraction)
    # Unequal steps leave Qx + Kᵀv behind, which now and then goes round in circles.
    together, circling = xp.minimum(alpha_s, alpha_z), state.waiting >= DOUBLE.equal_steps_after
    alpha_s, alpha_z = xp.where(circling, together, alpha_s), xp.where(circling, together, alpha_z)
    s = problem.where_inequality(backend.clip(state.s + alpha_s * ds, settings.tiny), 0.0)
    v = problem.where_exists(state.v + alpha_z * dv, 0.0)
    v = problem.where_inequality(backend.clip(v, settings.tiny), v)
    return alpha_s, alpha_z, s, v


def with_proximal_terms(part: Part, settings: Settings, state: State, moved: State, sound, left) -> State:
    """The state after a step with ρ and δ for the next one; `left` is what δ has left in the constraints.

    Where that keeps their residual from falling, as it does where the multipliers have to become very large, δ falls
    faster, and further.
    """
    backend = part.problem.backend
    xp = backend.xp
    now, before, left = (measured(backend, part.units.rows, a) for a in (moved.r_v, state.r_v, left))
    limiting = (left > DOUBLE.delta_share * now) & (now > DOUBLE.delta_stuck * before) & (now > settings.tol)
    rate = xp.maximum((state.mu - moved.mu) / (state.mu + settings.tiny), part.sizes.least_rate)
    lowest = xp.minimum(state.delta, settings.smallest)
    if not backend.none(limiting):
        E = part.metric.rows
        limiting = limiting & (backend.norm(moved.v / E) > backend.norm(E * (part.problem.k - moved.s - moved.r_v)))
        rate = xp.where(limiting, xp.maximum(rate, DOUBLE.fast_rate), rate)
        lowest = xp.where(limiting, DOUBLE.delta_floor * settings.smallest, lowest)
    times = xp.where(sound, 1.0 - rate, DOUBLE.failure_growth)
    rho = state.rho if part.form.definite else backend.clip(times * state.rho, settings.smallest)
    return moved._replace(rho=rho, delta=xp.maximum(times * state.delta, lowest))


def settle(part: Part, settings: Settings, state: State, moved: State) -> State:
    """The state after a step, or the one before where that was the last.

    From a point within the tolerance one more step is worth it only if it halves the residuals. Where they are above
    tol it gets a second chance, with step lengths that are the same.
    """
    xp, backend = part.problem.backend.xp, part.problem.backend
    running = state.status == RUNNING
    settled = running & state.near & ~(moved.worst <= DOUBLE.worthwhile * state.worst)
    stays = settled | ~running
    if backend.none(stays):
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
    if not backend.none(unbounded):
        feasible = backend.largest(part.metric.rows * violation) <= DOUBLE.ray_violation * part.sizes.scaled_k
        unbounded = unbounded & (last | feasible)
    status = backend.full(tuple(limit.shape), RUNNING, xp.int32)
    if not backend.none(last | solved | unbounded | infeasible):
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
    if backend.none(near):
        return near
    # The terms of the gap may cancel to 0 by luck: what their rounding hides must not be far beyond the tolerance.
    hidden = backend.dot(xp.abs(x), xp.abs(Qx) + xp.abs(problem.q)) + backend.dot(xp.abs(v), xp.abs(problem.k))
    slope = xp.maximum(xp.maximum(measured(backend, units.x, Qx), sizes.q), measured(backend, units.x, Kv))
    return (
        (primal <= tol + rtol * measured(backend, units.rows, Kx))
        & (dual <= tol + rtol * slope)
        & (gap + DOUBLE.gap_rounding * xp.finfo(problem.dtype).eps * of_gap * hidden <= most)
    )


def measured(backend, unit: Unit | None, a):
    """The largest entry of residuals or of their terms, in the units of the tolerance."""
    return backend.norm(a) if unit is None else backend.norm(unit.scale * a) / unit.size


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
    if backend.none(falls):
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
    if backend.none(gains):
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


def start_again(xp, settings: Settings, state: State, cold: State) -> State:
    """Begin again from the ordinary start, once, where a start near another solution has led nowhere."""
    first = state.limit == settings.max_iterations
    failed = first & (state.status != RUNNING) & (state.status != int(Status.SOLVED)) & (state.iterations > 0)
    again = cold._replace(iterations=state.iterations, limit=state.iterations + settings.max_iterations)
    return choose(xp, failed, again, state)


# ---- small pieces


def make_system(part: Part, theta, rho, delta) -> kkt.System:
    theta = part.problem.where_exists(theta, float("inf"))
    return kkt.System(theta, rho / part.metric.variables**2, delta / part.metric.rows**2)


def cast(xp, a, dtype):
    return a if a.dtype == dtype else xp.astype(a, dtype)


def choose(xp, condition, new, old):
    """The arrays of one named tuple where a condition holds, else those of another."""
    if new is old:
        return new
    if isinstance(new, tuple):
        return type(new)(*(choose(xp, condition, a, b) for a, b in zip(new, old, strict=True)))
    return xp.where(condition, new, old)


def step_length(backend, value, direction, fraction):
    """Largest step in [0, 1] that keeps value + step·direction ≥ (1 − fraction)·value, for positive values."""
    return 1.0 / backend.clip(backend.largest(direction / -value) / fraction, 1.0)


def mean(part: Part, s, z):
    """Mean of s ∘ z over the inequalities, where s is 0 in the other rows, (B, 1)."""
    return part.problem.backend.dot(s, z) / part.sizes.inequalities
