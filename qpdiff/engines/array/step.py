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

from ..parameters import DOUBLE
from .kkt import solve_refined
from .start import mean
from .state import State, SubBatch, choose, scaled_size
from .status import accept_or_revert, assess


class NewtonSystem:
    """The factored KKT system at an iterate, solved for directions that take all residuals to 0.

    What s ∘ z is to be diminished by, the complementarity's right-hand side, is the argument of its methods.

    Parameters
    ----------
    s, z : array (B, constraints)
        Positive; 0 and infinite where the constraint is no inequality.
    r_x, r_v
        The residuals, as right-hand sides.
    regularization : tuple
        ρ and δ, (B, 1).
    """

    def __init__(self, sub: SubBatch, s, z, r_x, r_v, regularization):
        self.form, self.s, self.z, self.r_x, self.r_v = sub.form, s, z, r_x, r_v
        self.diagonals = sub.diagonals(s / z, *regularization)
        self.factor, self.factor_ok = sub.form.factor(self.diagonals)
        self._eliminated = sub.form.eliminate(self.factor, r_x)

    def solve_multipliers(self, complementarity):
        """Return dv and ds."""
        dv = self.form.solve_multipliers(self.factor, self._eliminated, self._right_v(complementarity))
        return dv, self._slack(complementarity, dv)

    def solve(self, complementarity, refine=None):
        """Return dx, dv and ds, refined for the problems of a mask."""
        right = self.r_x, self._eliminated, self._right_v(complementarity)
        dx, dv = solve_refined(self.form, self.diagonals, self.factor, right, refine)
        return dx, dv, self._slack(complementarity, dv)

    def _right_v(self, complementarity):
        return self.r_v + complementarity / self.z

    def _slack(self, complementarity, dv):
        return -(complementarity + self.s * dv) / self.z


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


def step(sub: SubBatch, state: State, *, refine: bool, may_revert: bool):
    """Make one predictor-corrector step for every running problem; return the state and the factor.

    `refine` says whether any problem is to be refined; only those that are get it, so that no problem depends on
    another. `may_revert` says whether any may stay at its iterate: one that has ended, or is within the tolerance.
    """
    problem, backend = sub.problem, sub.problem.backend
    # What is divided by an infinite s or z is 0 where the constraint is no inequality.
    s, z = (problem.where_inequality(a, float("inf")) for a in (state.s, state.v))
    system = NewtonSystem(sub, state.s, z, state.r_x, state.r_v, (state.rho, state.delta))
    right, fraction = corrector_rhs(sub, state, (s, z), system.solve_multipliers(state.s * state.v))
    dx, dv, ds = system.solve(right, state.refine if refine else None)
    alpha_s, alpha_z, s, v = take_step(sub, state, (s, z), (dv, ds), fraction)
    x = state.x + alpha_s * dx

    computed = system.factor_ok & backend.all_finite(x) & backend.all_finite(v) & backend.all_finite(s)
    made = Step(alpha_s, alpha_z, computed, alpha_s * (system.diagonals.delta * dv))
    moved = state._replace(x=x, v=v, s=s, mu=mean(sub, s, v))
    # A step that cannot be computed is not taken; more regularisation comes instead.
    if not backend.known_all_false(~computed):
        moved = choose(backend.xp, computed, moved, state)
    moved = assess(sub, moved._replace(iterations=state.iterations + 1), state)
    accurate = constraints_are_accurate(sub, made, state, moved)
    inaccurate = ~variables_are_accurate(sub, made, state, moved, system.diagonals.rho * dx) | ~accurate | ~computed
    moved = update_regularization(sub, made, state, moved._replace(refine=inaccurate))
    return accept_or_revert(sub, state, moved) if may_revert else moved, system.factor


def corrector_rhs(sub: SubBatch, state: State, positive, predictor):
    """Return what the corrector is to diminish s ∘ z by, and its share of the step to the boundary.

    How far towards s ∘ z = 0 the predictor gets decides both: the centering (Nocedal & Wright, 16.62 to 16.66), and the
    share, which has to tend to 1 for fast convergence. `positive` has s and z, infinite where the constraint is no
    inequality, `predictor` dv and ds.
    """
    backend, (s, z), (dv, ds) = sub.problem.backend, positive, predictor
    alpha_s, alpha_z = step_length(backend, s, ds, 1.0), step_length(backend, z, dv, 1.0)
    reached = mean(sub, state.s + alpha_s * ds, state.v + alpha_z * dv)
    ratio = backend.clip(reached / (state.mu + sub.settings.tiny), 0.0, 1.0)
    # Iterates that would repeat each other come to an end with more centering.
    repeating = state.without_progress > DOUBLE.equal_steps_after
    sigma = backend.xp.where(repeating, backend.clip(ratio**3, DOUBLE.least_centering), ratio**3)
    right = state.s * state.v + ds * dv - sigma * state.mu
    return right, backend.clip(1.0 - ratio, DOUBLE.step_fraction, DOUBLE.largest_step_fraction)


def take_step(sub: SubBatch, state: State, positive, direction, fraction):
    """Move slacks and multipliers along the corrector's direction; return the step lengths, s and v.

    `positive` is as in `corrector_rhs`, `direction` has dv and ds.
    """
    problem, backend, settings = sub.problem, sub.problem.backend, sub.settings
    xp, (s, z), (dv, ds) = backend.xp, positive, direction
    alpha_s, alpha_z = step_length(backend, s, ds, fraction), step_length(backend, z, dv, fraction)
    # Unequal steps leave Qx + Kᵀv behind, with which iterates may repeat each other.
    shorter, equal_steps = xp.minimum(alpha_s, alpha_z), state.without_progress >= DOUBLE.equal_steps_after
    alpha_s, alpha_z = xp.where(equal_steps, shorter, alpha_s), xp.where(equal_steps, shorter, alpha_z)
    s = problem.where_inequality(backend.clip(state.s + alpha_s * ds, settings.tiny), 0.0)
    v = problem.where_exists(state.v + alpha_z * dv, 0.0)
    v = problem.where_inequality(backend.clip(v, settings.tiny), v)
    return alpha_s, alpha_z, s, v


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
    left = moved.r_v - (1.0 - made.alpha_s) * state.r_v + made.by_delta
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
    backend, settings = sub.problem.backend, sub.settings
    xp = backend.xp
    after, before, by_delta = (scaled_size(backend, sub.units.v, a) for a in (moved.r_v, state.r_v, made.by_delta))
    limiting = by_delta > DOUBLE.delta_share * after
    limiting = limiting & (after > DOUBLE.delta_stuck * before) & (after > settings.tol)
    rate = xp.maximum((state.mu - moved.mu) / (state.mu + settings.tiny), sub.sizes.least_rate)
    lowest = xp.minimum(state.delta, settings.smallest)
    if not backend.known_all_false(limiting):
        E = sub.scaling.E
        limiting = limiting & (backend.norm(moved.v / E) > backend.norm(E * (sub.problem.k - moved.s - moved.r_v)))
        rate = xp.where(limiting, xp.maximum(rate, DOUBLE.fast_rate), rate)
        lowest = xp.where(limiting, DOUBLE.delta_floor * settings.smallest, lowest)
    times = xp.where(made.computed, 1.0 - rate, DOUBLE.failure_growth)
    rho = state.rho if sub.form.skips_rho else backend.clip(times * state.rho, settings.smallest)
    return moved._replace(rho=rho, delta=xp.maximum(times * state.delta, lowest))
