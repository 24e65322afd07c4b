"""Steps of the dense dual form in the rows alone.

Without bounds and with Q = FᵀF, a step moves x by dx = Q⁻¹ (r_x − Kᵀdv). What the iteration wants to know of x then
follows from S dv, where S = K Q⁻¹ Kᵀ is known: Kdx is t − S dv with t = K Q⁻¹ r_x, and so are the changes of t itself,
of the products xᵀr_x, r_xᵀQ⁻¹r_x and qᵀx, and with them the residuals but that of the variables, which is a combination
of one that is known and of the rows of K. A step costs products with S and a factor of that size, and x is computed
only where it is looked at: at the end, and where a problem does not go well.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiler import hot, jit
from .lanes import larger, root
from .method import (
    ABSENT,
    DENSE_DUAL,
    EQUALITY,
    RUNNING,
    Verdict,
    add_product_transposed,
    advance,
    all_finite,
    center,
    copy,
    dot,
    eliminate,
    factor,
    infeasible,
    mean,
    positive,
    weigh,
)
from .products import backward, product
from .stacks import solve_cholesky

ROUNDING = 1e-13
"""What the products may be off by, relative to their terms."""


class Glimpse(NamedTuple):
    """What is known of x beside the rows; r_x is `a` times what it was where x was last looked at, and Kᵀu."""

    a: float
    rr: float
    """r_xᵀ Q⁻¹ r_x."""
    xr: float
    """xᵀ r_x."""
    qx: float
    """qᵀ x."""
    top: float
    """The largest entry on the diagonal of Q."""


@jit
def observe(one, reduced, now, work):
    """Begin at an iterate that is known with its residuals."""
    copy(now.x, work.x_seen)
    copy(now.v, work.v_seen)
    copy(now.r_x, work.r_seen)
    work.u[:] = 0.0
    eliminate(DENSE_DUAL, one, reduced, now.r_x, work)
    top = 0.0
    for i in range(one.Q.shape[0]):
        top = larger(one.Q[i, i], top)
    return Glimpse(1.0, dot(work.t, work.t), dot(now.x, now.r_x), dot(one.q, now.x), top)


@hot
def step_in_rows(one, reduced, settings, mu, rho, delta, refine, circling, before, now, work):
    """`method.step` without x; `work.Sdv` is S times the step in the multipliers."""
    dv, Sdv, t, shifted, theta = work.dv, work.Sdv, work.Vt, work.shifted, work.theta
    rows = dv.shape[0]
    weigh(one, rho, delta, before, work)
    factored = factor(DENSE_DUAL, one, reduced, theta, work.rho, work.delta, work)
    if not factored:
        return False, False, 0.0, 0.0, mu
    for i in range(rows):
        dv[i] = t[i] - shifted[i]
    solve_cholesky(reduced.U, dv)
    center(one, settings, mu, before, work)
    for i in range(rows):
        dv[i] = t[i] - shifted[i]
    solve_cholesky(reduced.U, dv)
    product(reduced.S, dv, Sdv)
    if refine:
        left = work.cv
        for i in range(rows):
            absent = one.kind[i] == ABSENT
            left[i] = 0.0 if absent else t[i] - shifted[i] - Sdv[i] - (theta[i] + work.delta[i]) * dv[i]
        solve_cholesky(reduced.U, left)
        for i in range(rows):
            dv[i] += left[i]
        product(reduced.S, dv, Sdv)
    alpha_s, alpha_z = advance(one, settings, circling, before, now, work)
    sound = all_finite(Sdv) & all_finite(now.v) & all_finite(now.s)
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
        glimpse.top,
    )


@hot
def glance(one, settings, glimpse, before, now, past, work):
    """How the problem stands as far as it shows without x; and whether that is all there is to know for now."""
    primal = size_Kx = size_k = scaled_k = vKx = kv = 0.0
    for i in range(now.v.shape[0]):
        k, Kx, v = one.k[i], now.Kx[i], now.v[i]
        violation = abs(now.r_v[i]) if one.kind[i] == EQUALITY else positive(Kx - k)
        primal = larger(0.0 if one.kind[i] == ABSENT else violation, primal)
        size_Kx, size_k, scaled_k = (
            larger(abs(Kx), size_Kx),
            larger(abs(k), size_k),
            larger(abs(one.E[i] * k), scaled_k),
        )
        vKx += v * Kx
        kv += v * k
    gap = abs(kv - vKx - glimpse.xr)
    largest = larger(primal, gap)
    # Every entry of r_x is a product with a row of Fᵀ, and so not larger than this.
    dual = root(positive(glimpse.rr) * glimpse.top)
    if not dual <= largest:
        work.columns[:] = 0.0
        add_product_transposed(one.K, work.u, work.columns)
        dual = 0.0
        for i in range(work.columns.shape[0]):
            dual = larger(abs(glimpse.a * work.r_seen[i] + work.columns[i]), dual)
        largest = larger(largest, dual)
    no_point = 0.0
    if primal > settings.tol:
        no_point, _ = infeasible(one, before, now.v, scaled_k, work)
    tol, rtol = settings.tol, settings.rtol
    size_gap = larger(abs(glimpse.xr + glimpse.qx + vKx), larger(abs(glimpse.qx), abs(kv)))
    far = (primal > tol + rtol * larger(size_Kx, size_k)) or (gap > 2.0 * tol + (2.0 * rtol + ROUNDING) * size_gap)
    well = largest < 0.9 * past.best and not no_point > 0.01 * settings.certificate
    verdict = Verdict(
        RUNNING, np.nan, primal, dual, gap, False, largest, largest, larger(no_point, past.proof), np.int64(0)
    )
    return verdict, far and well and not past.near


@hot
def recover(reduced, glimpse, now, work):
    """Compute x."""
    moved, dx = work.cv, work.dx
    for i in range(moved.shape[0]):
        moved[i] = work.u[i] + now.v[i] - work.v_seen[i]
    product(reduced.V, moved, dx)
    for i in range(dx.shape[0]):
        dx[i] = (1.0 - glimpse.a) * work.t[i] - dx[i]
    backward(reduced.hessian, dx)
    for i in range(dx.shape[0]):
        now.x[i] = work.x_seen[i] + dx[i]
