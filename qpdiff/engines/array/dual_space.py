"""Steps of the dense dual form in the rows alone.

Without bounds and with Q = F Fᵀ, a step moves x by dx = Q⁻¹ (r_x − Kᵀdv). What the iteration wants to know of x then
follows from S dv, where S = K Q⁻¹ Kᵀ is known: Kdx is t − S dv with t = K Q⁻¹ r_x, and so are the changes of t itself,
of the products xᵀr_x, r_xᵀQ⁻¹r_x and qᵀx, and with them the residuals but that of the variables, which is a combination
of one that is known and of the rows of K. A step costs products with S and a factor of that size, and x is computed
only where it is looked at: at the end, and where a problem does not go well.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ...problem import product, product_transposed, take
from ..base import Settings
from ..parameters import DOUBLE
from .start import first_theta, make_origin, mean, place
from .state import RUNNING, Part, Residuals, State, choose, measured
from .status import assess, contradiction, settle, waited
from .step import advance, centering, with_proximal_terms

WORTH_A_COPY = 2**15
"""Bytes of a problem from which on those that are looked at are copied, where they are few."""


class Glimpse(NamedTuple):
    """What is known of x beside the rows.

    Where x was last looked at it was `x`, v was `v` and r_x was `r`. Now r_x is `a` times that and Kᵀu, and Q times the
    change of x is (1 − a) r − Kᵀ(u + the change of v). Scalars have shape (B, 1).
    """

    x: Any
    v: Any
    r: Any
    whitened: Any
    """F⁻¹ r."""
    length: Any
    """The largest entry of r."""
    a: Any
    u: Any
    t: Any
    """K Q⁻¹ r_x."""
    rr: Any
    """r_xᵀ Q⁻¹ r_x."""
    xr: Any
    """xᵀ r_x."""
    qx: Any
    """qᵀ x."""
    column: Any
    """The largest norm of a column of K in the scaled rows."""
    expected: Any
    """r_v after an exact step; NaN where there was none."""
    allowed: Any
    """How far r_v may be from that."""


def pay(part: Part) -> bool:
    """Whether steps in the rows, which are more operations on fewer numbers, can be made and save time.

    float32 wants its residuals in float64, which they do not give.
    """
    return part.form.definite and part.problem.dtype == part.exact.dtype and not part.idle


def initialize(part: Part, settings: Settings):
    """`start.initialize` with x only where that is looked at, and without the factor: the derivative makes another."""
    problem, form, backend = part.problem, part.form, part.problem.backend
    xp, origin = backend.xp, observe(part, make_origin(part, settings))
    seen = origin.seen
    theta = first_theta(part)
    positive, _, refined = _newton(part, theta, origin)
    dv, Sdv = refined(origin.r_v, origin.inexact)
    good = positive & backend.all_finite(Sdv)
    dv = xp.where(good, dv, origin.v)
    # From x = 0 the step is Q⁻¹ (−q − Kᵀdv), which leaves nothing of Qx + q + Kᵀdv; but v is moved onto the path.
    v, s, mu = place(part, settings, theta, dv)
    u, a, Kx = dv - v, xp.astype(~good, problem.dtype), xp.where(good & problem.exists, seen.t - Sdv, 0.0)
    Su = product(form.S, u)
    seen = seen._replace(
        a=a, u=u, t=a * seen.t + Su, rr=a * seen.rr + backend.dot(u, 2.0 * a * seen.t + Su), xr=backend.dot(Kx, u),
        qx=xp.where(good, backend.dot(seen.t, dv) - seen.rr, 0.0),
    )  # fmt: skip
    state = origin._replace(v=v, s=s, mu=mu, Kx=Kx, r_v=problem.k - Kx - s, seen=seen)
    return part, glance(part, settings, origin, state, good, stays=False), None


def observe(part: Part, state: State) -> State:
    """The iterate, all of which is known, with what is known of x in the steps that follow."""
    backend = part.problem.backend
    xp = backend.xp
    whitened, t = part.form.eliminate(None, state.r_x)
    return state._replace(seen=Glimpse(
        x=state.x, v=state.v, r=state.r_x, whitened=whitened, length=measured(backend, part.units.x, state.r_x),
        a=xp.ones_like(state.mu), u=xp.zeros_like(t), t=t, rr=backend.dot(whitened, whitened),
        xr=backend.dot(state.x, state.r_x), qx=backend.dot(state.x, part.problem.q),
        column=_longest_column(part) if state.seen is None else state.seen.column,
        expected=xp.full_like(t, xp.nan), allowed=state.mu,
    ))  # fmt: skip


def step(part: Part, settings: Settings, state: State, *, refine: bool, stays: bool):
    """`step.step` with x only where that is looked at, and without the factor."""
    problem, backend, seen = part.problem, part.problem.backend, state.seen
    xp, t = backend.xp, seen.t
    s, z = (problem.where_inequality(a, float("inf")) for a in (state.s, state.v))
    theta = state.s / z
    positive, multipliers, refined = _newton(part, theta, state)
    dv = multipliers(state.r_v + state.s)
    excess, fraction = centering(part, settings, state, s, z, dv, -state.s - theta * dv)
    excess = excess / z
    dv, Sdv = refined(state.r_v + excess, state.inexact if refine else None)
    alpha_s, alpha_z, s, v = advance(part, settings, state, s, z, dv, -excess - theta * dv, fraction)

    Kdx, keep, apart = t - Sdv, 1.0 - alpha_s, alpha_s - alpha_z
    Kx = problem.where_exists(state.Kx + alpha_s * Kdx, 0.0)
    t_dv, dv_S_dv, Kx_dv = backend.dot(t, dv), backend.dot(dv, Sdv), backend.dot(state.Kx, dv)
    r_dx, left = seen.rr - t_dv, alpha_s * state.delta / part.metric.rows**2 * dv
    seen = seen._replace(
        a=keep * seen.a,
        u=keep * seen.u + apart * dv,
        t=keep * t + apart * Sdv,
        rr=keep * keep * seen.rr + 2.0 * keep * apart * t_dv + apart * apart * dv_S_dv,
        xr=keep * seen.xr + apart * Kx_dv + alpha_s * (keep * r_dx + apart * (t_dv - dv_S_dv)),
        qx=seen.qx - alpha_s * (seen.xr - Kx_dv + backend.dot(state.v, Kdx) + r_dx),
        expected=keep * state.r_v - left,
        allowed=backend.clip(
            DOUBLE.refine_relative * measured(backend, part.units.rows, state.r_v),
            DOUBLE.refine_absolute * settings.tol,
        ),
    )
    moved = state._replace(v=v, s=s, mu=mean(part, s, v), Kx=Kx, r_v=problem.k - Kx - s, seen=seen)
    # A step that cannot be computed is not taken; stronger proximal terms come instead.
    sound = positive & backend.all_finite(Sdv) & backend.all_finite(v) & backend.all_finite(s)
    if not backend.known_all_false(~sound):
        nothing = state.seen._replace(expected=xp.full_like(t, xp.nan))
        moved = choose(xp, sound, moved, state._replace(seen=nothing))
    moved = moved._replace(iterations=state.iterations + 1, inexact=_inexact(part, moved))
    moved = with_proximal_terms(part, settings, state, moved, sound, left)
    moved = glance(part, settings, state, moved, sound, stays=stays)
    return choose(xp, state.status != RUNNING, state, moved) if stays else moved, None


def glance(part: Part, settings: Settings, before: State, state: State, sound, *, stays: bool) -> State:
    """How problems stand as far as it shows without x; where that is not all there is to know, also with x."""
    problem, E, seen, units = part.problem, part.metric.rows, state.seen, part.units
    xp, backend, v, Kx, k = problem.backend.xp, problem.backend, state.v, state.Kx, problem.k
    running = before.status == RUNNING
    violation = problem.where_inequality(backend.clip(Kx - k, 0.0), xp.abs(state.r_v))
    kv, vKx, primal = backend.dot(k, v), backend.dot(v, Kx), measured(backend, units.rows, violation)
    of_gap = 1.0 if units.gap is None else 1.0 / units.gap
    gap = of_gap * xp.abs(kv - vKx - seen.xr)
    others = xp.maximum(primal, gap)
    # The residual of the variables is seldom the largest, and if so a bound does, without K.
    dual = seen.a * seen.length + seen.column * xp.sqrt(backend.total((seen.u / E) ** 2))
    small = (dual <= others) | ~running
    if not backend.known_all_false(~small):
        exactly = measured(backend, units.x, seen.a * seen.r + problem.adjoint(seen.u))
        dual = xp.where(small, dual, exactly)
    worst = xp.maximum(dual, others)
    no_point, *_ = contradiction(part, settings.tol, v, before.v, Kx, primal)

    tol, rtol = settings.tol, settings.rtol
    size = xp.maximum(xp.abs(seen.xr + seen.qx + vKx), xp.maximum(xp.abs(seen.qx), xp.abs(kv)))
    far = primal > tol + rtol * measured(backend, units.rows, Kx)
    far = far | (gap > 2.0 * tol + (2.0 * rtol + DOUBLE.product_rounding) * of_gap * size)
    waiting, best = waited(xp, settings, before, Residuals(primal, dual, gap), no_point)
    proven = DOUBLE.late_certificate * settings.certificate
    well = (waiting < DOUBLE.equal_steps_after) & (worst < float("inf")) & ~(no_point > proven)
    enough = far & well & ~before.near & sound & (state.iterations < state.limit)
    known = state._replace(
        primal=primal, dual=dual, gap=gap, near=before.near & False, worst=worst, waiting=waiting,
        best=best, proof=xp.maximum(no_point, before.proof),
    )  # fmt: skip
    wanted = running & ~enough
    count, some = backend.count(wanted, running & enough)
    if count == 0:
        return known
    if 2 * count <= problem.batch and problem.bytes_per_problem >= WORTH_A_COPY:
        looked = look_at_few(part, settings, before, state, wanted[:, 0], count, stays=stays)
    else:
        looked = look(part, settings, before, state, stays=stays)
    return choose(xp, wanted, looked, known) if some else looked


def look_at_few(
    part: Part, settings: Settings, before: State, state: State, wanted, count: int, *, stays: bool
) -> State:
    """`look` at copies of the `count` problems where that is wanted; what it says of the others is of no use."""
    xp = part.problem.backend.xp
    those = xp.argsort(xp.astype(~wanted, xp.int8), stable=True)[:count]
    few, earlier = (take(xp, tree, those) for tree in (state, before))
    looked = look(part.select(those), settings, earlier, few, stays=stays)
    place = xp.where(wanted, xp.cumulative_sum(xp.astype(wanted, xp.int32)) - 1, 0)
    return take(xp, looked, place)


def look(part: Part, settings: Settings, before: State, state: State, *, stays: bool) -> State:
    """How problems stand, with x and all residuals computed."""
    seen = state.seen
    # From where it was last looked at, so that rounding counts for less and less.
    x = seen.x + part.form.variables((1.0 - seen.a) * seen.whitened, seen.u + state.v - seen.v)
    looked = assess(part, settings, state._replace(x=x), before)
    looked = looked._replace(inexact=_inexact(part, looked))
    return observe(part, settle(part, settings, before, looked) if stays else looked)


def _newton(part: Part, theta, state: State):
    """Factor the KKT matrix; the multipliers for a right-hand side of the rows; these refined, and S times them."""
    form, backend, t = part.form, part.problem.backend, state.seen.t
    theta = part.problem.where_exists(theta + state.delta / part.metric.rows**2, float("inf"))
    factor, positive = form.factor_rows(theta)

    def multipliers(right):
        return backend.solve(factor, t - right)

    def refined(right, inexact):
        dv = multipliers(right)
        Sdv = product(form.S, dv)
        if inexact is None:
            return dv, Sdv
        left = part.problem.where_exists(t - right - Sdv - theta * dv, 0.0)
        dv = backend.xp.where(inexact, dv + backend.solve(factor, left), dv)
        return dv, product(form.S, dv)

    return positive, multipliers, refined


def _inexact(part: Part, state: State):
    """Whether the last step has left too much in the rows."""
    left = measured(part.problem.backend, part.units.rows, state.r_v - state.seen.expected)
    return ~(left <= state.seen.allowed)


def _longest_column(part: Part):
    """The largest norm of a column of K in the scaled rows."""
    problem, E = part.problem, part.metric.rows
    backend, blocks = problem.backend, ((problem.A, "A"), (problem.G, "G"))
    squares = [product_transposed(K * K, E[:, problem.blocks[name]] ** 2) for K, name in blocks if K is not None]
    return measured(backend, part.units.x, backend.xp.sqrt(sum(squares[1:], squares[0])))
