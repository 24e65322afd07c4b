"""Starting points: the ordinary one, one for a fraction of the cost, one near the solution of another problem."""

from __future__ import annotations

from ...solution import Status
from ..base import Settings, StartingPoint
from ..parameters import DOUBLE
from .equilibration import with_cost
from .kkt import refined
from .state import RUNNING, Part, Residuals, State, choose, make_system
from .status import assess


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
    if backend.known_all_false(large):
        return part, state, factor
    other = part._replace(metric=with_cost(part.metric, xp.where(large, DOUBLE.smaller_cost, one)))
    smaller, factor = starting_point(other, settings)
    nearer = large & (smaller.primal < DOUBLE.closer * state.primal)
    nearer = nearer & (multiplier_ratio(other, smaller) < DOUBLE.less_multipliers * ratio)
    part = part._replace(metric=with_cost(part.metric, xp.where(nearer, DOUBLE.smaller_cost, one)))
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
    x, v = refined(part.form, system, factor, r_x, r_v, x, v, origin.inexact)
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


def start_again(xp, settings: Settings, state: State, cold: State) -> State:
    """Begin again from the ordinary start, once, where a start near another solution has led nowhere."""
    first = state.limit == settings.max_iterations
    failed = first & (state.status != RUNNING) & (state.status != int(Status.SOLVED)) & (state.iterations > 0)
    again = cold._replace(iterations=state.iterations, limit=state.iterations + settings.max_iterations)
    return choose(xp, failed, again, state)


def mean(part: Part, s, z):
    """Mean of s ∘ z over the inequalities, where s is 0 in the other rows, (B, 1)."""
    return part.problem.backend.dot(s, z) / part.sizes.inequalities
