"""Steps of the dense dual form in the rows alone, as `qpdiff.rows` explains them, for one problem at a time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..method import IMPATIENCE, LOOSE, ROUNDING
from .compiler import hot, jit
from .lanes import larger, root
from .method import (
    ABSENT,
    DENSE_DUAL,
    EQUALITY,
    PRIMAL_UNIT,
    REACH,
    RUNNING,
    Verdict,
    add_product_transposed,
    advance,
    all_finite,
    assess,
    center,
    copy,
    dot,
    factor,
    gap_unit,
    infeasible,
    least_of,
    mean,
    place,
    positive,
    solve_rows,
    solve_variables,
    square,
    unknown,
    waited,
    weigh,
    weigh_start,
    whiten,
)
from .products import product
from .stacks import solve_cholesky


class Glimpse(NamedTuple):
    """What is known of x beside the rows.

    Where x was last looked at it was `work.x_seen`, v was `work.v_seen` and r_x was `work.r_seen`. Now r_x is `a` times
    that and Kᵀu, and Q (x − x_seen) is (1 − a) r_seen − Kᵀ(u + v − v_seen).
    """

    a: float
    rr: float
    """r_xᵀ Q⁻¹ r_x."""
    xr: float
    """xᵀ r_x."""
    qx: float
    """qᵀ x."""
    r: float
    """The largest entry of `work.r_seen`, in the units of the tolerance."""
    column: float
    """The largest norm of a column of K in the scaled rows, likewise."""


@jit
def longest_column(one, work):
    """The largest norm of a column of K in the scaled rows, in the units of the tolerance."""
    columns = work.columns
    columns[:] = 0.0
    for i in range(one.K.shape[0]):
        row, E = one.K[i], one.E[i]
        for j in range(columns.shape[0]):
            columns[j] += square(E * row[j])
    most = 0.0
    for j in range(columns.shape[0]):
        most = larger(work.unit_x[j] * root(columns[j]), most)
    return most


@jit
def largest(unit, a):
    """The largest entry in the units of the tolerance."""
    most = 0.0
    for i in range(a.shape[0]):
        most = larger(unit[i] * abs(a[i]), most)
    return most


@jit
def observe(one, reduced, now, column, work):
    """Begin at an iterate that is known with its residuals."""
    copy(now.x, work.x_seen)
    copy(now.v, work.v_seen)
    copy(now.r_x, work.r_seen)
    work.u[:] = 0.0
    whiten(reduced, now.r_x, work)
    xr, qx = dot(now.x, now.r_x), dot(one.q, now.x)
    return Glimpse(1.0, dot(work.t, work.t), xr, qx, largest(work.unit_x, now.r_x), column)


@jit
def begin_in_rows(one, reduced, settings, now, before, work):
    """`method.begin` without x: also what is known of it, and whether it was looked at."""
    rows, t, dv, Sdv, u = now.v.shape[0], work.Vt, work.dv, work.Sdv, work.u
    before.x[:] = 0.0
    before.v[:] = 0.0
    for i in range(before.r_x.shape[0]):
        before.r_x[i] = -one.q[i]
    origin = observe(one, reduced, before, longest_column(one, work), work)
    weigh_start(DENSE_DUAL, one, settings, work)
    factored = factor(DENSE_DUAL, one, reduced, work.theta, work.rho, work.delta, work)
    good = factored
    if factored:
        copy(one.k, work.shifted)
        solve_for_rows(one, reduced, True, before.r_x, work)
        good = all_finite(Sdv)
    if not good:
        dv[:] = 0.0
    # From x = 0 the step is Q⁻¹ (−q − Kᵀdv), which leaves nothing of Qx + q + Kᵀdv; but v is moved onto the path.
    copy(dv, now.v)
    mu = place(one, settings, now, work)
    qx = xr = rr = 0.0
    for i in range(rows):
        u[i] = dv[i] - now.v[i]
        now.Kx[i] = t[i] - Sdv[i] if good and one.kind[i] != ABSENT else 0.0
        now.r_v[i] = one.k[i] - now.Kx[i] - now.s[i]
        qx += t[i] * dv[i]
        xr += now.Kx[i] * u[i]
    product(reduced.S, u, Sdv)
    a = 0.0 if good else 1.0
    for i in range(rows):
        rr += u[i] * (2.0 * a * t[i] + Sdv[i])
        t[i] = a * t[i] + Sdv[i]
    qx = qx - origin.rr if good else 0.0
    glimpse = Glimpse(a, a * origin.rr + rr, xr, qx, origin.r, origin.column)
    verdict, known = judge(
        one, reduced, settings, glimpse, False, now, before, unknown(mu), np.int64(0), settings.max_iterations, work
    )
    return mu, verdict, factored, glimpse, known


@hot
def solve_for_rows(one, reduced, refine, r_x, work):
    """Solve for the right-hand sides `work.Vt` of the variables and `work.shifted` of the rows: dv, and S dv."""
    dv, Sdv, t, shifted, left = work.dv, work.Sdv, work.Vt, work.shifted, work.cv
    rows = dv.shape[0]
    solve_rows(DENSE_DUAL, one, reduced, r_x, shifted, work.dx, dv, work)
    product(reduced.S, dv, Sdv)
    if refine:
        for i in range(rows):
            absent = one.kind[i] == ABSENT
            left[i] = 0.0 if absent else t[i] - shifted[i] - Sdv[i] - (work.theta[i] + work.delta[i]) * dv[i]
        solve_cholesky(reduced.U, left)
        for i in range(rows):
            dv[i] += left[i]
        product(reduced.S, dv, Sdv)


@hot
def step_in_rows(one, reduced, settings, mu, rho, delta, refine, waiting, before, now, work):
    """`method.step` without x; `work.Sdv` is S times the step in the multipliers."""
    weigh(one, rho, delta, before, work)
    if not factor(DENSE_DUAL, one, reduced, work.theta, work.rho, work.delta, work):
        return False, False, 0.0, 0.0, mu
    solve_rows(DENSE_DUAL, one, reduced, before.r_x, work.shifted, work.dx, work.dv, work)
    fraction = center(one, settings, mu, waiting, before, work)
    solve_for_rows(one, reduced, refine, before.r_x, work)
    alpha_s, alpha_z = advance(one, settings, waiting >= IMPATIENCE, fraction, before, now, work)
    sound = all_finite(work.Sdv) & all_finite(now.v) & all_finite(now.s)
    return sound, True, alpha_s, alpha_z, mean(one, now.s, now.v) if sound else mu


@hot
def follow(one, glimpse, alpha_s, alpha_z, before, now, work):
    """What a step of these lengths makes of the rows and of what is known of x."""
    dv, Sdv, t, u = work.dv, work.Sdv, work.Vt, work.u
    keep, apart = 1.0 - alpha_s, alpha_s - alpha_z
    t_dv = dv_S_dv = Kx_dv = v_Kdx = 0.0
    for i in range(dv.shape[0]):
        Kdx = t[i] - Sdv[i]
        t_dv += t[i] * dv[i]
        dv_S_dv += dv[i] * Sdv[i]
        Kx_dv += before.Kx[i] * dv[i]
        v_Kdx += before.v[i] * Kdx
        Kx = 0.0 if one.kind[i] == ABSENT else before.Kx[i] + alpha_s * Kdx
        now.Kx[i] = Kx
        now.r_v[i] = one.k[i] - Kx - now.s[i]
        t[i] = keep * t[i] + apart * Sdv[i]
        u[i] = keep * u[i] + apart * dv[i]
    r_dx = glimpse.rr - t_dv
    return Glimpse(
        keep * glimpse.a,
        keep * keep * glimpse.rr + 2.0 * keep * apart * t_dv + apart * apart * dv_S_dv,
        keep * glimpse.xr + apart * Kx_dv + alpha_s * (keep * r_dx + apart * (t_dv - dv_S_dv)),
        glimpse.qx - alpha_s * (glimpse.xr - Kx_dv + v_Kdx + r_dx),
        glimpse.r,
        glimpse.column,
    )


@hot
def glance(one, settings, glimpse, before, now, past, work):
    """How the problem stands as far as it shows without x; and whether that is all there is to know for now."""
    primal = size_Kx = vKx = kv = uu = 0.0
    scaled_k, most = one.sizes[PRIMAL_UNIT], LOOSE * one.sizes[REACH]
    for i in range(now.v.shape[0]):
        k, Kx, v, unit = one.k[i], now.Kx[i], now.v[i], work.unit_v[i]
        violation = abs(now.r_v[i]) if one.kind[i] == EQUALITY else positive(Kx - k)
        primal = larger(0.0 if one.kind[i] == ABSENT else unit * violation, primal)
        size_Kx = larger(unit * abs(Kx), size_Kx)
        if one.E[i] * k <= most:
            scaled_k = larger(one.E[i] * abs(k), scaled_k)
        vKx += v * Kx
        kv += v * k
        uu += square(work.u[i]) * work.metric_v[i]
    of_gap = gap_unit(one, settings)
    gap = of_gap * abs(kv - vKx - glimpse.xr)
    # The residual of the variables is seldom the largest, and if so a bound does, without K.
    dual = glimpse.a * glimpse.r + glimpse.column * root(uu)
    if not dual <= larger(primal, gap):
        work.columns[:] = 0.0
        add_product_transposed(one.K, work.u, work.columns)
        dual = 0.0
        for i in range(work.columns.shape[0]):
            dual = larger(work.unit_x[i] * abs(glimpse.a * work.r_seen[i] + work.columns[i]), dual)
    worst = larger(primal, larger(dual, gap))
    no_point = 0.0
    if primal > settings.tol:
        no_point, _ = infeasible(one, settings.tol, before, now.v, now.Kx, scaled_k, work)
    tol, rtol = settings.tol, settings.rtol
    size_gap = of_gap * larger(abs(glimpse.xr + glimpse.qx + vKx), larger(abs(glimpse.qx), abs(kv)))
    far = (primal > tol + rtol * size_Kx) or (gap > 2.0 * tol + (2.0 * rtol + ROUNDING) * size_gap)
    waiting = waited(settings, past, primal, dual, gap, no_point)
    well = waiting < IMPATIENCE and worst < np.inf and not no_point > 0.01 * settings.certificate
    verdict = Verdict(
        RUNNING, np.nan, np.nan, np.nan, np.nan, primal, dual, gap, False, worst,
        least_of(primal, past.best_primal), least_of(dual, past.best_dual), least_of(gap, past.best_gap),
        larger(no_point, past.proof), waiting,
    )  # fmt: skip
    return verdict, far and well and not past.near


@hot
def recover(reduced, glimpse, now, work):
    """Compute x; from where it was last looked at, so that rounding counts for less and less."""
    moved, dx = work.cv, work.dx
    for i in range(moved.shape[0]):
        moved[i] = work.u[i] + now.v[i] - work.v_seen[i]
    solve_variables(reduced, 1.0 - glimpse.a, moved, dx, work)
    for i in range(dx.shape[0]):
        now.x[i] = work.x_seen[i] + dx[i]


@hot
def judge(one, reduced, settings, glimpse, look, now, before, past, iterations, limit, work):
    """How the problem stands, and whether x was looked at for it, as it must be with `look`."""
    if not look and iterations < limit:
        verdict, enough = glance(one, settings, glimpse, before, now, past, work)
        if enough:
            return verdict, False
    recover(reduced, glimpse, now, work)
    return assess(DENSE_DUAL, one, settings, now, before, past, iterations, limit, work), True
