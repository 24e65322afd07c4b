"""A predictor-corrector step.

Each step is a predictor-corrector step of Mehrotra's on the KKT system with proximal terms around the iterate: ρ on the
variables and δ on the multipliers, which shrink with the complementarity. A step is one function from named state to
named state; `qpdiff.engines.array` decides how to iterate.

References
----------
R. Schwan, Y. Jiang, D. Kuhn, C. N. Jones, "PIQP: a proximal interior-point quadratic programming solver", CDC 2023.
J. Nocedal, S. J. Wright, "Numerical optimization", 2nd ed., 2006, section 16.6.
"""

from __future__ import annotations

from ..base import Settings
from ..parameters import DOUBLE
from .kkt import refined
from .start import mean
from .state import Part, State, choose, make_system, measured
from .status import assess, settle


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
            dx, dv = refined(form, system, factor, r_x, right, dx, dv, refine)
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
    if not backend.known_all_false(~sound):
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
    if not backend.known_all_false(limiting):
        E = part.metric.rows
        limiting = limiting & (backend.norm(moved.v / E) > backend.norm(E * (part.problem.k - moved.s - moved.r_v)))
        rate = xp.where(limiting, xp.maximum(rate, DOUBLE.fast_rate), rate)
        lowest = xp.where(limiting, DOUBLE.delta_floor * settings.smallest, lowest)
    times = xp.where(sound, 1.0 - rate, DOUBLE.failure_growth)
    rho = state.rho if part.form.definite else backend.clip(times * state.rho, settings.smallest)
    return moved._replace(rho=rho, delta=xp.maximum(times * state.delta, lowest))


def step_length(backend, value, direction, fraction):
    """Largest step in [0, 1] that keeps value + step·direction ≥ (1 − fraction)·value, for positive values."""
    return 1.0 / backend.clip(backend.largest(direction / -value) / fraction, 1.0)
