"""Starting points: the ordinary one, one for a fraction of the cost, one near the solution of another problem."""

from __future__ import annotations

from ...problem import Problem
from ...solution import Status
from ..base import Settings, StartingPoint
from ..parameters import DOUBLE
from .equilibration import scale_cost
from .kkt import Diagonals, solve_refined
from .state import RUNNING, ElasticState, Residuals, State, SubBatch, choose
from .status import assess


def begin_closer(sub: SubBatch):
    """Start in the ordinary way, or for a fraction of the cost where that is closer to feasible.

    Where the multipliers of equalities are large because of the cost, as in optimal control of an unstable plant, the
    ordinary starting point is far from feasible; one for a fraction of the cost takes its place if it is closer.

    Returns
    -------
    sub : SubBatch
        The problems with the scaling to iterate with.
    state : State
        Their starting point.
    factor
        The factor that it was made with.
    """
    state, factor = begin(sub)
    problem, backend = sub.problem, sub.problem.backend
    xp = backend.xp
    # In float32 the regularisation, which a smaller cost makes larger against it, would outweigh it.
    if sub.form.skips_rho or not problem.may_have_equalities or problem.dtype == xp.float32:
        return sub, state, factor
    ratio = multiplier_ratio(sub, state)
    large, one = ratio > DOUBLE.large_multipliers, xp.ones_like(ratio)
    if backend.known_all_false(large):
        return sub, state, factor
    other = with_cost(sub, xp.where(large, DOUBLE.smaller_cost, one))
    smaller, factor = begin(other)
    closer = large & (smaller.primal < DOUBLE.closer * state.primal)
    closer = closer & (multiplier_ratio(other, smaller) < DOUBLE.less_multipliers * ratio)
    sub = with_cost(sub, xp.where(closer, DOUBLE.smaller_cost, one))
    return sub, choose(xp, closer, smaller, state), factor


def with_cost(sub: SubBatch, c) -> SubBatch:
    """Return the problems as if their cost were c times as large (`scale_cost`), with the sizes of their data."""
    sizes, root = sub.sizes, c**0.5
    sizes = sizes._replace(scaled_k=sizes.scaled_k / root, scaled_q=sizes.scaled_q * root)
    return sub._replace(scaling=scale_cost(sub.scaling, c), sizes=sizes)


def multiplier_ratio(sub: SubBatch, state: State):
    """Return the largest multiplier of an equality against the largest variable in the scaled problem."""
    backend, (D, E, *_) = sub.problem.backend, sub.scaling
    x = backend.norm(state.x / D)
    v = backend.norm(backend.xp.where(sub.problem.equality, state.v / E, 0.0))
    return v / backend.xp.where(x > 0, x, 1.0)


def begin(sub: SubBatch):
    """Start in the ordinary way; return the state and the factor that the starting point was made with."""
    origin = make_origin(sub)
    state, factor = starting_point(sub, origin)
    return assess(sub, state, origin), factor


def starting_point(sub: SubBatch, origin: State):
    """Solve with θ = 1 in the scaled constraints and center the solution (PIQP); return the state and the factor."""
    backend = sub.problem.backend
    xp = backend.xp
    diagonals = first_diagonals(sub, origin)
    factor, factor_ok = sub.form.factor(diagonals)
    right = origin.r_x, sub.form.eliminate(factor, origin.r_x), origin.r_v
    x, v = solve_refined(sub.form, diagonals, factor, right, origin.refine)
    computed = factor_ok & backend.all_finite(x) & backend.all_finite(v)
    v, s, elastic, mu = center_start(sub, diagonals.theta, xp.where(computed, v, origin.v))
    return origin._replace(x=xp.where(computed, x, origin.x), v=v, s=s, elastic=elastic, mu=mu), factor


def make_origin(sub: SubBatch) -> State:
    """Make the state at x = 0, v = 0, before anything is known of it."""
    problem, settings, P, wide = sub.problem, sub.settings, sub.parameters, sub.wide_problem.dtype
    xp, backend = problem.backend.xp, problem.backend

    def full(width, value, dtype):
        return backend.full((problem.batch, width), value, dtype)

    x, v = full(problem.n, 0.0, problem.dtype), full(problem.rows, 0.0, problem.dtype)
    infinite, count = full(1, float("inf"), wide), full(1, 0, xp.int32)
    unknown = Residuals(infinite, infinite, infinite)
    return State(
        x=x, v=v, s=v, mu=full(1, 0.0, problem.dtype),
        rho=full(1, 0.0 if sub.form.skips_rho else P.rho, problem.dtype),
        delta=full(1, P.delta, problem.dtype), r_x=x - problem.q, r_v=problem.k + v,
        Qx=full(problem.n, 0.0, wide), Kx=full(problem.rows, 0.0, wide),
        objective=infinite, absolute=unknown, primal=infinite, dual=infinite, gap=infinite,
        within_tolerance=infinite < 0, worst=infinite, best=unknown, refine=infinite > 0,
        certificate=full(1, 0.0, wide), without_progress=count, iterations=count,
        limit=count + settings.max_iterations, status=count + RUNNING,
        elastic=ElasticState(v, v, v) if problem.is_elastic else None,
    )  # fmt: skip


def first_diagonals(sub: SubBatch, origin: State) -> Diagonals:
    """Return the diagonals of the KKT matrix that the starting point is made with.

    θ is 1 in the scaled constraints, more in those that are loose: else a bound of 1e12 that means none would draw the
    starting point half of the way there.
    """
    problem, scaling = sub.problem, sub.scaling
    xp, E = problem.backend.xp, scaling.E
    zero = problem.backend.full((problem.batch, problem.rows), 0.0, problem.dtype)
    distance = problem.backend.clip(E * problem.k / (DOUBLE.loose * scaling.reach), 1.0)
    theta = xp.where(problem.inequality, distance / E**2 + zero, zero)
    if (elastic := problem.elastic) is not None:
        theta = xp.where(elastic.two_sided, zero, theta) + elastic.compliance
    return sub.diagonals(theta, origin.rho, origin.delta)


def center_start(sub: SubBatch, theta, v):
    """Center the multipliers v of a solution with θ.

    Returns
    -------
    v, s
    elastic : ElasticState or None
    mu : array (B, 1)
        Mean complementarity.
    """
    problem, backend, scaling, elastic = sub.problem, sub.problem.backend, sub.scaling, sub.problem.elastic
    xp, zero = backend.xp, backend.xp.zeros_like(v)
    one_sided = problem.inequality if elastic is None else problem.inequality & ~elastic.two_sided
    z = xp.where(one_sided, v / scaling.E, zero)
    up, down = (backend.clip(backend.largest(a), 0.0) for a in (-z, z))
    mu = backend.dot(xp.where(one_sided, z + up, zero), down - z) / sub.sizes.inequalities
    size = xp.maximum(up, down)
    if elastic is not None:  # equalities with a price decide where there are no inequalities
        multipliers = xp.where(elastic.two_sided, xp.minimum(xp.abs(v), elastic.upper) / scaling.E, zero)
        size = xp.where(xp.any(one_sided, axis=-1, keepdims=True), size, backend.largest(multipliers))
    mu = xp.maximum(mu, DOUBLE.least_centrality * size**2)
    mu = xp.maximum(mu, sub.parameters.smallest * scaling.primal * scaling.dual)
    difference = scaling.E**2 * xp.where(one_sided, theta, zero) * z
    if elastic is not None:
        difference = xp.where(elastic.two_sided, v / scaling.E, difference)
    v, s, priced = center_on_path(sub, v, difference, mu)
    return v, s, priced, mean(sub, s, v, priced)


def begin_warm(sub: SubBatch, point: StartingPoint, ordinary: State):
    """Start at another problem's solution, centered; return the state, and for which problems it is of use.

    μ grows with what that solution leaves of the residuals here, so that the slacks let the steps make up for it, up to
    the μ of the ordinary start.
    """
    problem, backend, (D, E, *units) = sub.problem, sub.problem.backend, sub.scaling
    xp, inequality, equality, unit = backend.xp, problem.inequality, problem.equality, units[0] * units[1]
    x, v = point.x + xp.zeros_like(ordinary.x), point.v + xp.zeros_like(ordinary.v)
    slack = E * (problem.k - problem.constraints(x))
    zero = xp.zeros_like(slack)
    if (elastic := problem.elastic) is not None:
        slack = slack + E * elastic.compliance * v
    violation = xp.where(equality, xp.abs(slack), xp.where(inequality, backend.clip(-slack, 0.0), zero))
    if elastic is not None:  # what is violated at its price is no error
        violation = xp.where(elastic.two_sided, xp.abs(slack), violation)
        of_upper = xp.abs(xp.where(elastic.limited, elastic.upper, zero) - v)
        to_limit = xp.where(slack < 0, of_upper, xp.where(elastic.two_sided, xp.abs(elastic.upper + v), zero))
        violation = xp.where(elastic.limited, xp.minimum(violation, to_limit / E), violation)
    slope = problem.hessian(x) + problem.q + problem.adjoint(v)
    error = xp.maximum(backend.largest(violation), backend.norm(D * slope))
    difference = xp.where(inequality, v / E - slack, zero)
    mu = xp.minimum(DOUBLE.warm_centrality * error * xp.sqrt(unit), ordinary.mu)
    mu = xp.maximum(mu, max(sub.settings.tol, sub.parameters.smallest) * unit)
    v, s, priced = center_on_path(sub, v, difference, mu)
    state = ordinary._replace(x=x, v=v, s=s, elastic=priced, mu=mean(sub, s, v, priced))
    state = assess(sub, state, state)
    usable = point.usable & ((state.status == RUNNING) | (state.status == int(Status.SOLVED)))
    # Also from a solution one step is taken: the derivative needs its factor.
    return state._replace(status=xp.full_like(state.status, RUNNING)), usable


def begin_again(xp, settings: Settings, state: State, ordinary: State) -> State:
    """Begin again from the ordinary start, once, where a start near another solution has led nowhere."""
    first = state.limit == settings.max_iterations
    failed = first & (state.status != RUNNING) & (state.status != int(Status.SOLVED)) & (state.iterations > 0)
    again = ordinary._replace(iterations=state.iterations, limit=state.iterations + settings.max_iterations)
    return choose(xp, failed, again, state)


def center_on_path(sub: SubBatch, v, difference, mu):
    """Return multipliers and slacks with s ∘ z = μ and a given difference z − s in the scaled constraints.

    Those of equalities stay. Where violations have a linear price, the difference is v − s + t, and s ∘ z = t ∘ r = μ;
    the pair of the limit that is farther from it does not count in the difference.

    Returns
    -------
    v, s
    elastic : ElasticState or None
    """
    return on_path(sub.problem, sub.scaling.E, v, difference, mu)


def on_path(problem: Problem, E, v, difference, mu):
    """Return what `center_on_path` does, for a problem and the scale E of its constraints."""
    xp = problem.backend.xp
    large = (xp.abs(difference) + xp.sqrt(difference * difference + 4.0 * mu)) / 2.0
    small = mu / large
    zero = xp.zeros_like(v)
    s = xp.where(problem.inequality, xp.where(difference > 0, small, large) / E, zero)
    z = xp.where(difference > 0, large, small) * E
    v = xp.where(problem.inequality, z, xp.where(problem.equality, v, zero))
    if (elastic := problem.elastic) is None:
        return v, s, None
    limited, upper = elastic.limited, xp.where(elastic.limited, elastic.upper / E, 1.0)
    lower = xp.where(elastic.two_sided, -upper, 0.0)
    width = upper - lower
    below = 2.0 * difference <= lower + upper
    distance = xp.where(below, difference - lower, upper - difference)
    large = (xp.abs(distance) + xp.sqrt(distance * distance + 4.0 * mu)) / 2.0
    near = xp.minimum(xp.where(distance > 0, large, mu / large), width / 2.0)
    # Not the limit and the distance from it where the limit may be so large that it drowns the multiplier.
    inside, moved = (distance > 0) & (large < width / 2.0), mu / large
    from_difference = xp.where(below, difference + moved, difference - moved)
    inner = xp.where(inside, from_difference, xp.where(below, lower + near, upper - near))
    far = width - near
    of_lower, of_upper = xp.where(below, near, far), xp.where(below, far, near)
    s = xp.where(limited, mu / of_lower / E, s)
    v = xp.where(limited, inner * E, v)
    z = xp.where(limited, of_lower * E, xp.where(problem.inequality, v, zero))
    t, r = xp.where(limited, mu / of_upper / E, zero), xp.where(limited, of_upper * E, zero)
    return v, s, ElasticState(t, z, r)


def mean(sub: SubBatch, s, v, elastic: ElasticState | None):
    """Return the mean complementarity (B, 1): of s ∘ v over the inequalities, where s is 0 in the other constraints.

    With prices, of s ∘ z and t ∘ r.
    """
    dot, pairs = sub.problem.backend.dot, sub.sizes.pairs
    return dot(s, v) / pairs if elastic is None else (dot(s, elastic.z) + dot(elastic.t, elastic.r)) / pairs
