"""Steps of the dense dual form in the dual space: x is not formed.

Without bounds and with Q = F Fᵀ, a step moves x by dx = Q⁻¹ (r_x − Kᵀdv). What the iteration needs of x then follows
from S dv, where S = K Q⁻¹ Kᵀ is known: Kdx is t − S dv with t = K Q⁻¹ r_x, and so are the changes of t itself, of the
products xᵀr_x, r_xᵀQ⁻¹r_x and qᵀx, and with them the residuals but that of the variables, which is a combination of one
that is known and of the rows of K. A step costs products with S and a factor of that size. x is formed only where the
stopping test may pass, at the end, and where a problem makes no progress.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ...problem import product, product_transposed, take
from ..parameters import DOUBLE
from . import status
from .start import center_start, first_diagonals, make_origin, mean
from .state import RUNNING, Residuals, State, SubBatch, choose, scaled_size
from .status import accept_or_revert, allowed, farkas_certificate, per_gap_unit, progress
from .step import (
    Step,
    complementarity_ratio,
    complementary_pairs,
    corrector_rhs,
    directions_of_pairs,
    negligible,
    right_of_constraints,
    take_step,
    update_regularization,
    with_compliance,
)

COPY_BYTES = 2**15
"""Size of a problem from which on the few problems whose x is formed are copied for that."""


class ImplicitX(NamedTuple):
    """Vectors and products from which the residuals and, where it is wanted, x are computed.

    Where x was last formed it was `x_anchor`, v was `v_anchor` and r_x was `r_anchor`. Now r_x is `a` times that and
    Kᵀu, and Q times the change of x is (1 − a) r_anchor − Kᵀ(u + the change of v). Scalars have shape (B, 1).
    """

    x_anchor: Any
    v_anchor: Any
    r_anchor: Any
    forward: Any
    """F⁻¹ r_anchor."""
    r: Any
    """The largest entry of r_anchor, in the units of the tolerance."""
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
    """The largest norm of a column of K in the scaled constraints, in the units of the tolerance."""
    expected: Any
    """r_v after a step whose linear solve is without error; NaN where there was none."""
    negligible: Any
    """Distance of r_v from that up to which no refinement is needed."""


class DualSystem:
    """The factored dense dual system, solved for multipliers."""

    def __init__(self, sub: SubBatch, theta, state: State):
        self.sub, self.t = sub, state.implicit_x.t
        self.theta = sub.problem.where_exists(theta + state.delta / sub.scaling.E**2, float("inf"))
        self.factor, self.factor_ok = sub.form.factor_dual(self.theta)

    def solve(self, r_v):
        """Return dv for a right-hand side of the constraints."""
        return self.sub.problem.backend.solve(self.factor, self.t - r_v)

    def solve_refined(self, r_v, refine=None):
        """Return dv, refined for the problems of a mask, and S dv."""
        problem, S = self.sub.problem, self.sub.form.S
        dv = self.solve(r_v)
        Sdv = product(S, dv)
        if refine is None:
            return dv, Sdv
        left = problem.where_exists(self.t - r_v - Sdv - self.theta * dv, 0.0)
        dv = problem.backend.xp.where(refine, dv + problem.backend.solve(self.factor, left), dv)
        return dv, product(S, dv)


def begin(sub: SubBatch):
    """Start in the ordinary way as `start.begin_closer` does, without a factor: the derivative makes another."""
    problem, form, backend = sub.problem, sub.form, sub.problem.backend
    xp, origin = backend.xp, anchor(sub, make_origin(sub))
    known = origin.implicit_x
    theta = first_diagonals(sub, origin).theta
    system = DualSystem(sub, theta, origin)
    dv, Sdv = system.solve_refined(origin.r_v, origin.refine)
    computed = system.factor_ok & backend.all_finite(Sdv)
    dv = xp.where(computed, dv, origin.v)
    # From x = 0 the step is Q⁻¹ (−q − Kᵀdv), which leaves nothing of Qx + q + Kᵀdv; but v is moved onto the path.
    v, s, elastic, mu = center_start(sub, theta, dv)
    u, a, Kx = dv - v, xp.astype(~computed, problem.dtype), xp.where(computed & problem.exists, known.t - Sdv, 0.0)
    Su = product(form.S, u)
    known = known._replace(
        a=a, u=u, t=a * known.t + Su, rr=a * known.rr + backend.dot(u, 2.0 * a * known.t + Su), xr=backend.dot(Kx, u),
        qx=xp.where(computed, backend.dot(known.t, dv) - known.rr, 0.0),
    )  # fmt: skip
    state = origin._replace(v=v, s=s, elastic=elastic, mu=mu, Kx=Kx, implicit_x=known)
    state = state._replace(r_v=problem.k - Kx - paid_slack(problem, state))
    return sub, assess(sub, origin, state, computed, may_revert=False), None


def anchor(sub: SubBatch, state: State) -> State:
    """Begin the recurrences at an iterate whose x and residuals are known."""
    backend = sub.problem.backend
    xp = backend.xp
    forward, t = sub.form.eliminate(None, state.r_x)
    return state._replace(implicit_x=ImplicitX(
        x_anchor=state.x, v_anchor=state.v, r_anchor=state.r_x, forward=forward,
        r=scaled_size(backend, sub.units.x, state.r_x), a=xp.ones_like(state.mu), u=xp.zeros_like(t), t=t,
        rr=backend.dot(forward, forward), xr=backend.dot(state.x, state.r_x), qx=backend.dot(state.x, sub.problem.q),
        column=longest_column(sub) if state.implicit_x is None else state.implicit_x.column,
        expected=xp.full_like(t, xp.nan), negligible=state.mu,
    ))  # fmt: skip


def step(sub: SubBatch, state: State, *, refine: bool, may_revert: bool):
    """Make one step as `step.step` does, with x formed where it is wanted, and without a factor."""
    problem, backend = sub.problem, sub.problem.backend
    xp = backend.xp
    pairs = complementary_pairs(problem, state.v, state.s, state.elastic)
    system = DualSystem(sub, complementarity_ratio(sub, pairs), state)
    products = [pair.a * pair.b for pair in pairs]
    dv = system.solve(right_of_constraints(pairs, state.r_v, products))
    right, fraction = corrector_rhs(sub, state, pairs, directions_of_pairs(pairs, products, dv))
    right_v = right_of_constraints(pairs, state.r_v, right)
    dv, Sdv = system.solve_refined(right_v, state.refine if refine else None)
    directions = directions_of_pairs(pairs, right, dv)
    alpha_s, alpha_z, s, v, elastic = take_step(sub, state, pairs, directions, fraction)

    computed = system.factor_ok & backend.all_finite(Sdv) & backend.all_finite(v) & backend.all_finite(s)
    made = with_compliance(sub, Step(alpha_s, alpha_z, computed, alpha_s * state.delta / sub.scaling.E**2 * dv), dv)
    Kx, known = update(sub, made, state, dv, Sdv)
    moved = state._replace(v=v, s=s, elastic=elastic, mu=mean(sub, s, v, elastic), Kx=Kx, implicit_x=known)
    moved = moved._replace(r_v=problem.k - Kx - paid_slack(problem, moved))
    # A step that cannot be computed is not taken; more regularisation comes instead.
    if not backend.known_all_false(~computed):
        unknown = state.implicit_x._replace(expected=xp.full_like(system.t, xp.nan))
        moved = choose(xp, computed, moved, state._replace(implicit_x=unknown))
    moved = moved._replace(iterations=state.iterations + 1, refine=~constraints_are_accurate(sub, moved))
    moved = update_regularization(sub, made, state, moved)
    moved = assess(sub, state, moved, computed, may_revert=may_revert)
    return choose(xp, state.status != RUNNING, state, moved) if may_revert else moved, None


def paid_slack(problem, state: State):
    """Return s, less the violations at a price."""
    return state.s if state.elastic is None else state.s - status.violations(problem, state.v, state.elastic.t)


def update(sub: SubBatch, made: Step, state: State, dv, Sdv):
    """Return Kx and the recurrences after a step dv in the multipliers."""
    backend, known = sub.problem.backend, state.implicit_x
    t, alpha_s = known.t, made.alpha_s
    Kdx, rest, apart = t - Sdv, 1.0 - alpha_s, alpha_s - made.alpha_z
    Kx = sub.problem.where_exists(state.Kx + alpha_s * Kdx, 0.0)
    t_dv, dv_S_dv, Kx_dv = backend.dot(t, dv), backend.dot(dv, Sdv), backend.dot(state.Kx, dv)
    r_dx = known.rr - t_dv
    return Kx, known._replace(
        a=rest * known.a,
        u=rest * known.u + apart * dv,
        t=rest * t + apart * Sdv,
        rr=rest * rest * known.rr + 2.0 * rest * apart * t_dv + apart * apart * dv_S_dv,
        xr=rest * known.xr + apart * Kx_dv + alpha_s * (rest * r_dx + apart * (t_dv - dv_S_dv)),
        qx=known.qx - alpha_s * (known.xr - Kx_dv + backend.dot(state.v, Kdx) + r_dx),
        expected=rest * state.r_v - made.by_delta + made.by_lengths,
        negligible=negligible(sub, scaled_size(backend, sub.units.v, state.r_v)),
    )


def assess(sub: SubBatch, before: State, state: State, computed, *, may_revert: bool) -> State:
    """Decide how problems stand: without x, and with x formed where that is not enough to go on."""
    running = before.status == RUNNING
    known, enough = assess_without_x(sub, before, state)
    wanted = running & ~(enough & computed)
    count, some = sub.problem.backend.count(wanted, running & enough & computed)
    if count == 0:
        return known
    if 2 * count <= sub.problem.batch and sub.problem.bytes_per_problem >= COPY_BYTES:
        formed = assess_few_with_x(sub, before, state, wanted[:, 0], count, may_revert=may_revert)
    else:
        formed = assess_with_x(sub, before, state, may_revert=may_revert)
    return choose(sub.problem.backend.xp, wanted, formed, known) if some else formed


def assess_without_x(sub: SubBatch, before: State, state: State):
    """Decide how problems stand as far as the recurrences tell.

    Returns
    -------
    State
        With the residuals that the recurrences give.
    enough : array (B, 1)
        For which problems that is enough: the stopping test is far from being passed, and all goes well.
    """
    problem, E, known, units = sub.problem, sub.scaling.E, state.implicit_x, sub.units
    xp, backend, v, Kx, k = problem.backend.xp, problem.backend, state.v, state.Kx, problem.k
    elastic: Any = problem.elastic
    if state.elastic is None:
        price, excess = 0.0, Kx - k
    else:
        price = status.price_terms(problem, v, state.s, state.elastic.t)
        excess = Kx - k - status.violations(problem, v, state.elastic.t)
        excess = xp.where(elastic.two_sided, xp.abs(state.r_v), excess)
    violation = problem.where_inequality(backend.clip(excess, 0.0), xp.abs(state.r_v))
    kv, vKx, primal = backend.dot(k, v), backend.dot(v, Kx), scaled_size(backend, units.v, violation)
    per_unit = per_gap_unit(sub)
    gap = per_unit * xp.abs(kv - vKx - known.xr + price)
    others = xp.maximum(primal, gap)
    # The residual of the variables is seldom the largest, and if so a bound says that, without K.
    dual = known.a * known.r + known.column * xp.sqrt(backend.total((known.u / E) ** 2))
    small = (dual <= others) | (before.status != RUNNING)
    if not backend.known_all_false(~small):
        computed = scaled_size(backend, units.x, known.a * known.r_anchor + problem.adjoint(known.u))
        dual = xp.where(small, dual, computed)
    worst = xp.maximum(dual, others)
    infeasible = farkas_certificate(sub, v, before.v, Kx, primal).ratio
    without_progress, best = progress(sub, before, Residuals(primal, dual, gap), infeasible)

    settings = sub.settings
    size = xp.maximum(xp.abs(known.xr + known.qx + vKx), xp.maximum(xp.abs(known.qx), xp.abs(kv + price)))
    far = primal > allowed(settings, scaled_size(backend, units.v, Kx))
    far = far | (gap > allowed(settings, per_unit * size, 2.0, DOUBLE.product_rounding))
    well = (without_progress < DOUBLE.equal_steps_after) & (worst < float("inf"))
    well = well & ~(infeasible > DOUBLE.late_certificate * sub.parameters.certificate)
    enough = far & well & ~before.within_tolerance & (state.iterations < state.limit)
    return state._replace(
        primal=primal, dual=dual, gap=gap, within_tolerance=before.within_tolerance & False, worst=worst,
        without_progress=without_progress, best=best, certificate=xp.maximum(infeasible, before.certificate),
    ), enough  # fmt: skip


def assess_few_with_x(sub: SubBatch, before: State, state: State, wanted, count: int, *, may_revert: bool) -> State:
    """Call `assess_with_x` for copies of the `count` problems where that is wanted; the others get some state."""
    xp = sub.problem.backend.xp
    those = xp.argsort(xp.astype(~wanted, xp.int8), stable=True)[:count]
    few, earlier = (take(xp, tree, those) for tree in (state, before))
    formed = assess_with_x(sub.select(those), earlier, few, may_revert=may_revert)
    position = xp.where(wanted, xp.cumulative_sum(xp.astype(wanted, xp.int32)) - 1, 0)
    return take(xp, formed, position)


def assess_with_x(sub: SubBatch, before: State, state: State, *, may_revert: bool) -> State:
    """Form x, compute all residuals, decide how problems stand, and begin the recurrences there."""
    formed = status.assess(sub, state._replace(x=form_x(sub, state)), before)
    formed = formed._replace(refine=~constraints_are_accurate(sub, formed))
    return anchor(sub, accept_or_revert(sub, before, formed) if may_revert else formed)


def form_x(sub: SubBatch, state: State):
    """Return x, from where it was last formed, so that rounding counts for less and less."""
    known = state.implicit_x
    change = sub.form.solve_variables((1.0 - known.a) * known.forward, known.u + state.v - known.v_anchor)
    return known.x_anchor + change


def leave(sub: SubBatch, state: State) -> State:
    """Form x and the residuals of all problems, for steps that are not in the dual space.

    There x = −Q⁻¹(q + Kᵀv), and v is rounded: where it is large, no step in the dual space satisfies the constraints.
    The other steps leave what is rounded in the residual of the variables, whose terms are as large.
    """
    x = sub.problem.backend.xp.where(state.status == RUNNING, form_x(sub, state), state.x)
    Qx, Kx, _, r_x, r_v = status.residuals(sub.problem, x, state.v, paid_slack(sub.problem, state))
    return state._replace(x=x, Qx=Qx, Kx=Kx, r_x=r_x, r_v=r_v, implicit_x=None)


def constraints_are_accurate(sub: SubBatch, state: State):
    """Return for which problems the last linear solve has left little of the residual of the constraints."""
    left = scaled_size(sub.problem.backend, sub.units.v, state.r_v - state.implicit_x.expected)
    return left <= state.implicit_x.negligible


def longest_column(sub: SubBatch):
    """Return the largest norm of a column of K in the scaled constraints, in the units of the tolerance."""
    problem, E = sub.problem, sub.scaling.E
    backend, blocks = problem.backend, ((problem.A, "A"), (problem.G, "G"))
    squares = [product_transposed(K * K, E[:, problem.blocks[name]] ** 2) for K, name in blocks if K is not None]
    return scaled_size(backend, sub.units.x, backend.xp.sqrt(sum(squares[1:], squares[0])))
