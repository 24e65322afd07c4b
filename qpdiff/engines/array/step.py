"""A predictor-corrector step of Mehrotra's on the regularised KKT system.

The regularisation is proximal, around the iterate: ρ on the variables and δ on the multipliers, which shrink with the
complementarity. A step is one function from named state to named state; `loop` and `traced` decide how to iterate.

References
----------
R. Schwan, Y. Jiang, D. Kuhn, C. N. Jones, "PIQP: a proximal interior-point quadratic programming solver", CDC 2023.
J. Nocedal, S. J. Wright, "Numerical optimization", 2nd ed., 2006, section 16.6.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ...problem import Problem
from ..parameters import DOUBLE
from .kkt import solve_refined
from .start import mean
from .state import ElasticState, State, SubBatch, choose, scaled_size
from .status import accept_or_revert, assess


class Pair(NamedTuple):
    """Two numbers of each row with a ∘ b = μ on the central path: s and z, or t and r where violations have a price."""

    a: Any
    """A slack, or a violation; 0 in rows without such a pair."""
    b: Any
    """The distance of the multiplier from a limit."""
    positive_a: Any
    """a, infinite in rows without such a pair, where what is divided by it is 0; `positive_b` likewise."""
    positive_b: Any
    of_upper: bool
    """The limit is the upper one, so that b falls as the multiplier grows."""

    @property
    def theta(self):
        return self.a / self.positive_b

    def along(self, dv):
        """Return the direction of b for one of the multipliers."""
        return -dv if self.of_upper else dv


def complementary_pairs(problem: Problem, v, s, elastic: ElasticState | None) -> list[Pair]:
    """Return s and z, and where violations have a price t and r."""
    z = v if elastic is None else elastic.z
    positive_s, positive_z = (problem.where_inequality(a, float("inf")) for a in (s, z))
    pairs = [Pair(s, z, positive_s, positive_z, False)]
    if elastic is not None:
        t, _, r = elastic
        where, limited = problem.backend.xp.where, problem.elastic.limited
        positive_t, positive_r = (where(limited, a, float("inf")) for a in (t, r))
        pairs.append(Pair(t, r, positive_t, positive_r, True))
    return pairs


def complementarity_ratio(sub: SubBatch, pairs: list[Pair]):
    """Return θ: s/z, and where violations have a price s/z + t/r + σ."""
    elastic = sub.problem.elastic
    return pairs[0].theta if elastic is None else pairs[0].theta + pairs[1].theta + elastic.compliance


def right_of_constraints(pairs: list[Pair], r_v, complementarity):
    """Return the right-hand side of the constraints, for what the product of every pair is to be diminished by."""
    for pair, c in zip(pairs, complementarity, strict=True):
        r_v = r_v - c / pair.positive_b if pair.of_upper else r_v + c / pair.positive_b
    return r_v


def directions_of_pairs(pairs: list[Pair], complementarity, dv):
    """Return the directions of a and b of every pair, for those of the multipliers."""
    along = [pair.along(dv) for pair in pairs]
    terms = zip(pairs, complementarity, along, strict=True)
    return [(-(c + pair.a * db) / pair.positive_b, db) for pair, c, db in terms]


class NewtonSystem:
    """The factored KKT system at an iterate, solved for directions that take all residuals to 0.

    What the products of pairs are to be diminished by, the complementarity's right-hand sides, is the argument of its
    methods.

    Parameters
    ----------
    pairs : list of Pair
    r_x, r_v
        The residuals, as right-hand sides.
    regularization : tuple
        ρ and δ, (B, 1).
    """

    def __init__(self, sub: SubBatch, pairs: list[Pair], r_x, r_v, regularization):
        self.form, self.pairs, self.r_x, self.r_v = sub.form, pairs, r_x, r_v
        self.diagonals = sub.diagonals(complementarity_ratio(sub, pairs), *regularization)
        self.factor, self.factor_ok = sub.form.factor(self.diagonals)
        self._eliminated = sub.form.eliminate(self.factor, r_x)

    def solve_multipliers(self, complementarity):
        """Return the directions of a and b of every pair."""
        right = right_of_constraints(self.pairs, self.r_v, complementarity)
        dv = self.form.solve_multipliers(self.factor, self._eliminated, right)
        return directions_of_pairs(self.pairs, complementarity, dv)

    def solve(self, complementarity, refine=None):
        """Return dx, dv and the directions of a and b of every pair, refined for the problems of a mask."""
        right = self.r_x, self._eliminated, right_of_constraints(self.pairs, self.r_v, complementarity)
        dx, dv = solve_refined(self.form, self.diagonals, self.factor, right, refine)
        return dx, dv, directions_of_pairs(self.pairs, complementarity, dv)


class Step(NamedTuple):
    """A step along a direction, as far as the stopping test and the regularisation need it."""

    alpha_s: Any
    """Step length for x and s."""
    alpha_z: Any
    """Step length for v."""
    computed: Any
    """Mask of the problems for which it could be computed."""
    by_delta: Any
    """The share of the residual of the constraints that δ leaves: α_s δ dv in the caller's units."""
    by_lengths: Any = 0.0
    """What unequal step lengths leave of it where violations have a quadratic price: (α_z − α_s) σ dv."""


def step(sub: SubBatch, state: State, *, refine: bool, may_revert: bool):
    """Make one predictor-corrector step for every running problem; return the state and the factor.

    `refine` says whether any problem is to be refined; only those that are get it, so that no problem depends on
    another. `may_revert` says whether any may stay at its iterate: one that has ended, or is within the tolerance.
    """
    backend = sub.problem.backend
    pairs = complementary_pairs(sub.problem, state.v, state.s, state.elastic)
    system = NewtonSystem(sub, pairs, state.r_x, state.r_v, (state.rho, state.delta))
    predictor = system.solve_multipliers([pair.a * pair.b for pair in pairs])
    right, fraction = corrector_rhs(sub, state, pairs, predictor)
    dx, dv, directions = system.solve(right, state.refine if refine else None)
    alpha_s, alpha_z, s, v, elastic = take_step(sub, state, pairs, directions, fraction)
    x = state.x + alpha_s * dx

    computed = system.factor_ok & backend.all_finite(x) & backend.all_finite(v) & backend.all_finite(s)
    made = Step(alpha_s, alpha_z, computed, alpha_s * (system.diagonals.delta * dv))
    made = with_compliance(sub, made, dv)
    moved = state._replace(x=x, v=v, s=s, elastic=elastic, mu=mean(sub, s, v, elastic))
    # A step that cannot be computed is not taken; more regularisation comes instead.
    if not backend.known_all_false(~computed):
        moved = choose(backend.xp, computed, moved, state)
    moved = assess(sub, moved._replace(iterations=state.iterations + 1), state)
    accurate = constraints_are_accurate(sub, made, state, moved)
    inaccurate = ~variables_are_accurate(sub, made, state, moved, system.diagonals.rho * dx) | ~accurate | ~computed
    moved = update_regularization(sub, made, state, moved._replace(refine=inaccurate))
    return accept_or_revert(sub, state, moved) if may_revert else moved, system.factor


def with_compliance(sub: SubBatch, made: Step, dv) -> Step:
    """Return a step with what its lengths leave of the constraints where violations have a quadratic price."""
    if (elastic := sub.problem.elastic) is None:
        return made
    return made._replace(by_lengths=(made.alpha_z - made.alpha_s) * (elastic.compliance * dv))


def corrector_rhs(sub: SubBatch, state: State, pairs: list[Pair], predictor):
    """Return what the corrector is to diminish s ∘ z by, for every pair, and its share of the step to the boundary.

    How far towards s ∘ z = 0 the predictor gets decides both: the centering (Nocedal & Wright, 16.62 to 16.66), and the
    share, which has to tend to 1 for fast convergence. `predictor` has the directions of a and b of every pair.
    """
    backend = sub.problem.backend
    alpha_s, alpha_z = step_lengths(backend, pairs, predictor, 1.0)
    moved = ((pair.a + alpha_s * da, pair.b + alpha_z * db) for pair, (da, db) in zip(pairs, predictor, strict=True))
    products = [backend.dot(a, b) for a, b in moved]
    reached = sum(products[1:], products[0]) / sub.sizes.pairs
    ratio = backend.clip(reached / (state.mu + sub.parameters.tiny), 0.0, 1.0)
    # Iterates that would repeat each other come to an end with more centering.
    repeating = state.without_progress > DOUBLE.equal_steps_after
    sigma = backend.xp.where(repeating, backend.clip(ratio**3, DOUBLE.least_centering), ratio**3)
    aim = sigma * state.mu
    right = [pair.a * pair.b + da * db - aim for pair, (da, db) in zip(pairs, predictor, strict=True)]
    return right, backend.clip(1.0 - ratio, DOUBLE.step_fraction, DOUBLE.largest_step_fraction)


def take_step(sub: SubBatch, state: State, pairs: list[Pair], directions, fraction):
    """Move slacks and multipliers along the corrector's directions of a and b of every pair.

    Returns
    -------
    alpha_s, alpha_z : arrays (B, 1)
        The step lengths.
    s, v
    elastic : ElasticState or None
    """
    problem, backend, tiny = sub.problem, sub.problem.backend, sub.parameters.tiny
    xp, (ds, dv) = backend.xp, directions[0]
    alpha_s, alpha_z = step_lengths(backend, pairs, directions, fraction)
    # Unequal steps leave Qx + Kᵀv behind, with which iterates may repeat each other.
    shorter, equal_steps = xp.minimum(alpha_s, alpha_z), state.without_progress >= DOUBLE.equal_steps_after
    alpha_s, alpha_z = xp.where(equal_steps, shorter, alpha_s), xp.where(equal_steps, shorter, alpha_z)
    s = problem.where_inequality(backend.clip(state.s + alpha_s * ds, tiny), 0.0)
    v = problem.where_exists(state.v + alpha_z * dv, 0.0)
    if state.elastic is None:
        return alpha_s, alpha_z, s, problem.where_inequality(backend.clip(v, tiny), v), None
    v, elastic = move_elastic(problem, tiny, state.elastic, directions[1][0], dv, alpha_s, alpha_z, v)
    return alpha_s, alpha_z, s, v, elastic


def move_elastic(problem: Problem, tiny: float, elastic: ElasticState, dt, dv, alpha_s, alpha_z, v):
    """Move what an iterate has of rows with a price, for multipliers v after the step; return v too.

    A multiplier near a limit follows from its distance, which is known better than the difference of the two.
    """
    backend = problem.backend
    xp, limited, two_sided = backend.xp, problem.elastic.limited, problem.elastic.two_sided
    t = xp.where(limited, backend.clip(elastic.t + alpha_s * dt, tiny), 0.0)
    dz = alpha_z * dv
    z, r = backend.clip(elastic.z + dz, tiny), backend.clip(elastic.r - dz, tiny)
    upper = xp.where(limited, problem.elastic.upper, 1.0)
    near = DOUBLE.near_limit * upper
    if backend.known_all_false(two_sided):
        at_upper, z = limited & (r < near), problem.where_inequality(z, 0.0)
        v = xp.where(at_upper, upper - r, problem.where_inequality(z, v))
        return v, ElasticState(t, z, xp.where(at_upper, r, xp.where(limited, upper - v, 0.0)))
    lower = xp.where(two_sided, -upper, 0.0)
    of_limited = xp.where(r < near, upper - r, xp.where((z < near) | ~two_sided, lower + z, v))
    v = xp.where(limited, of_limited, problem.where_inequality(z, v))
    z = xp.where(two_sided & (z >= near), v - lower, problem.where_inequality(z, 0.0))
    r = xp.where(limited, xp.where(r < near, r, upper - v), 0.0)
    return v, ElasticState(t, z, r)


def step_lengths(backend, pairs: list[Pair], directions, fraction):
    """Return the largest steps that leave every a, and every b, enough of itself, as `step_length` does."""
    (ds, dz), *others = directions
    alpha_s = step_length(backend, pairs[0].positive_a, ds, fraction)
    alpha_z = step_length(backend, pairs[0].positive_b, dz, fraction)
    for pair, (da, db) in zip(pairs[1:], others, strict=True):
        alpha_s = backend.xp.minimum(alpha_s, step_length(backend, pair.positive_a, da, fraction))
        alpha_z = backend.xp.minimum(alpha_z, step_length(backend, pair.positive_b, db, fraction))
    return alpha_s, alpha_z


def step_length(backend, value, direction, fraction):
    """Return the largest step in [0, 1] that keeps value + step·direction ≥ (1 − fraction)·value, for value > 0."""
    return 1.0 / backend.clip(backend.largest(direction / -value) / fraction, 1.0)


# ---- how accurate the linear solve was, which shows in the products before and after the step


def variables_are_accurate(sub: SubBatch, made: Step, state: State, moved: State, rho_dx):
    """Return for which problems the linear solve has left little of the residual of the variables."""
    backend = sub.problem.backend
    Q_dx = moved.Qx - state.Qx
    Kt_dv = state.r_x - moved.r_x - Q_dx
    left = state.r_x - Q_dx / made.alpha_s - Kt_dv / made.alpha_z - rho_dx
    return scaled_size(backend, sub.units.x, left) <= negligible(sub, state.dual)


def constraints_are_accurate(sub: SubBatch, made: Step, state: State, moved: State):
    """Return for which problems the linear solve has left little of the residual of the constraints."""
    backend, unit = sub.problem.backend, sub.units.v
    left = moved.r_v - (1.0 - made.alpha_s) * state.r_v + made.by_delta - made.by_lengths
    return scaled_size(backend, unit, left) <= negligible(sub, scaled_size(backend, unit, state.r_v))


def negligible(sub: SubBatch, before):
    """Return what a linear solve may leave of a residual without being refined."""
    return sub.problem.backend.clip(DOUBLE.refine_relative * before, DOUBLE.refine_absolute * sub.settings.tol)


# ---- regularisation


def update_regularization(sub: SubBatch, made: Step, state: State, moved: State) -> State:
    """Return the state after a step with ρ and δ for the next one.

    They shrink with μ, and grow where the step could not be computed. Where δ keeps the residual of the constraints
    from falling, as it does where the multipliers have to become very large, it shrinks faster, and further.
    """
    backend, P = sub.problem.backend, sub.parameters
    xp = backend.xp
    after, before, by_delta = (scaled_size(backend, sub.units.v, a) for a in (moved.r_v, state.r_v, made.by_delta))
    limiting = by_delta > DOUBLE.delta_share * after
    limiting = limiting & (after > DOUBLE.delta_stuck * before) & (after > sub.settings.tol)
    rate = xp.maximum((state.mu - moved.mu) / (state.mu + P.tiny), sub.sizes.least_rate)
    lowest = xp.minimum(state.delta, P.smallest)
    if not backend.known_all_false(limiting):
        E = sub.scaling.E
        limiting = limiting & (backend.norm(moved.v / E) > backend.norm(E * (sub.problem.k - moved.s - moved.r_v)))
        rate = xp.where(limiting, xp.maximum(rate, DOUBLE.fast_rate), rate)
        lowest = xp.where(limiting, DOUBLE.delta_floor * P.smallest, lowest)
    times = xp.where(made.computed, 1.0 - rate, DOUBLE.failure_growth)
    rho = state.rho if sub.form.skips_rho else backend.clip(times * state.rho, P.smallest)
    return moved._replace(rho=rho, delta=xp.maximum(times * state.delta, lowest))
