"""The method of `qpdiff.solver` for one problem at a time, in compiled code.

Every function here does for one problem what the function of the same name in `qpdiff.solver` or `qpdiff.kkt` does for
a batch, where the mathematics is explained; a test holds the two against each other iteration by iteration. One problem
is carried from its start to its end before the next, so that its matrices stay in the cache, and what is the same for
the predictor and the corrector is computed once.

The functions of a step also take `lanes`, the numbers of several problems, for `groups`. Hence they branch on the kinds
of rows, which are the same for all, but on numbers they `select`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from ..kkt import METRIC_PASSES
from ..problem import INFINITE
from ..solution import Status
from ..solver import IMPATIENCE, LUCK, PATIENCE, RUNNING, STEP_FRACTION
from .compiler import OPTIONS, claim, entry, finite, hot, inline, jit, literal
from .lanes import each, every, larger, no, root, select, smaller, some, zero
from .stacks import (
    add_gram,
    add_product_transposed,
    backward,
    cholesky,
    copy_upper,
    dot,
    forward,
    product,
    solve_cholesky,
    solve_rows_above,
    transpose,
)
from .tiles import padded

SOLVED, MAX_ITERATIONS = int(Status.SOLVED), int(Status.MAX_ITERATIONS)
PRIMAL_INFEASIBLE, DUAL_INFEASIBLE = int(Status.PRIMAL_INFEASIBLE), int(Status.DUAL_INFEASIBLE)
STALLED = int(Status.STALLED)
ABSENT, EQUALITY, INEQUALITY = 0, 1, 2
PRIMAL, DENSE_DUAL, DIAGONAL_DUAL = 0, 1, 2
"""The reduced forms: `kkt.PrimalForm`, and `kkt.DualForm` with a dense and with a diagonal Q."""
SMALLEST, SMALLEST_SINGLE = (float(np.finfo(kind).smallest_normal) for kind in (np.float64, np.float32))
LARGEST_ROOT, LARGEST_ROOT_SINGLE = (float(np.sqrt(np.finfo(kind).max)) for kind in (np.float64, np.float32))
EPS = float(np.finfo(np.float64).eps)


class Batch(NamedTuple):
    """Operands of a batch; the first axis is the batch, of length 1 where an operand is shared or absent."""

    Q: Any
    q: Any
    G: Any
    h: Any
    A: Any
    b: Any
    lb: Any
    ub: Any


class One(NamedTuple):
    """One problem: K are the rows of A and G."""

    Q: Any
    q: Any
    K: Any
    k: Any
    kind: Any
    """Of each row: ABSENT, EQUALITY or INEQUALITY."""
    equalities: int
    """Rows of A."""
    lower: int
    """Number of rows of lower bounds, and of upper bounds: 0 or n."""
    upper: int
    D: Any
    E: Any
    Q64: Any
    """Q, q, K and k in float64, in which residuals are computed."""
    q64: Any
    K64: Any
    k64: Any


class Reduced(NamedTuple):
    """The reduced KKT matrix of one problem: what does not change, and the factor. Matrices are `padded`."""

    hessian: Any
    """The factor F of Q = FᵀF; of a diagonal Q with what the bounds add, one row with the square root instead."""
    V: Any
    """F⁻ᵀKᵀ."""
    S: Any
    """K Q⁻¹ Kᵀ."""
    diagonal: Any
    """Of a diagonal Q, with the dual form's own proximal terms."""
    U: Any
    weights: Any


class Iterate(NamedTuple):
    x: Any
    v: Any
    s: Any
    r_x: Any
    r_v: Any
    Qx: Any
    Kx: Any


class Verdict(NamedTuple):
    """How the problem stands at an iterate."""

    status: int
    objective: float
    primal: float
    dual: float
    gap: float
    near: bool
    worst: float
    best: float
    proof: float
    waiting: int


class Room(NamedTuple):
    """Memory for what is computed on the way, allocated once for many problems."""

    x: Any
    """Vectors of variables, and likewise of rows, in the type of the operands and in float64."""
    v: Any
    x64: Any
    v64: Any
    flags: Any
    """Vectors of rows of small integers."""
    stacked: Any
    """The rows of A and G; and in float64."""
    stacked64: Any
    scaled: Any
    """The same padded, and their transpose."""
    turned: Any
    square: Any
    """A padded matrix of variables times variables."""


def make_room(n, linear, rows, dtype) -> Room:
    def matrix(*shape):
        return np.zeros(padded(*shape, dtype.itemsize), dtype)

    return Room(
        np.zeros((13, n), dtype), np.zeros((22, rows), dtype), np.zeros((5, n)), np.zeros((5, rows)),
        np.zeros((2, rows), np.int8), np.empty((linear, n), dtype), np.empty((linear, n)),
        matrix(linear, n), matrix(n, linear), matrix(n, n),
    )  # fmt: skip


class Work(NamedTuple):
    """The same by name."""

    x: Any
    v: Any
    ray: Any
    farkas: Any
    Kv: Any
    k: Any
    k64: Any
    kind: Any
    stacked: Any
    stacked64: Any
    right_x: Any
    right_v: Any
    theta_exact: Any
    heavy: Any
    theta: Any
    rho: Any
    delta: Any
    b_x: Any
    shifted: Any
    complementarity: Any
    weights: Any
    t: Any
    Vt: Any
    dx: Any
    dv: Any
    ds: Any
    metric_x: Any
    metric_v: Any
    per_s: Any
    per_z: Any
    cx: Any
    cv: Any
    e_x: Any
    e_v: Any
    columns: Any
    scaled: Any
    turned: Any
    square: Any


# ---- vectors and products


@jit
def copy(a, out):
    for i in range(a.shape[0]):
        out[i] = a[i]


@jit
def copy_matrix(M, out):
    for i in range(M.shape[0]):
        for j in range(M.shape[1]):
            out[i, j] = M[i, j]


@jit
def constraints(K, lower, upper, x, out):
    """The left-hand side of every row."""
    product(K, x, out)
    row = K.shape[0]
    for i in range(lower):
        out[row + i] = -x[i]
    row += lower
    for i in range(upper):
        out[row + i] = x[i]


@jit
def adjoint(K, lower, upper, v, out):
    """The multipliers of all rows mapped to the variables."""
    out[:] = 0.0
    add_product_transposed(K, v, out)
    row = K.shape[0]
    for i in range(lower):
        out[i] -= v[row + i]
    row += lower
    for i in range(upper):
        out[i] += v[row + i]


@jit
def square(a):
    return a * a


@jit
def positive(a):
    """The positive part; NaN stays."""
    return select(a < 0.0, 0.0, a)


# ---- the reduced KKT system


@jit
def equilibrate(one, lb, ub, work):
    """Fill the metric of a problem, `kkt.equilibrate`; its bounds only matter for variables that are in no row."""
    Q, K, D, E = one.Q, one.K, one.D, one.E
    n, linear = Q.shape[0], K.shape[0]
    columns = work.columns
    D[:] = 1.0
    E[:] = 1.0
    for _ in range(METRIC_PASSES):
        for i in range(n):
            total = 0.0
            for j in range(n):
                total += Q[i, j] * Q[i, j] * D[j]
            columns[i] = total
        for i in range(linear):
            total, scale = 0.0, E[i]
            for j in range(n):
                square = K[i, j] * K[i, j]
                columns[j] += square * scale
                total += square * D[j]
            E[i] = rescaled(scale, scale * total)
        for j in range(n):
            columns[j] *= D[j]
            D[j] = rescaled(D[j], columns[j])
    for j in range(min(lb.shape[0], ub.shape[0])):
        span = ub[j] - lb[j]
        width = smaller(larger(span, 1e-6), 1e6)
        D[j] = select(no(columns[j] > 0.0) & finite(span) & (span > 0.0), width * width, D[j])
    for i in range(linear):
        E[i] = root(E[i])
    row = linear
    for j in range(n):
        D[j] = root(D[j])
        if one.lower:
            E[row + j] = 1.0 / D[j]
        if one.upper:
            E[row + one.lower + j] = 1.0 / D[j]


@jit
def rescaled(scale, length2):
    return select(finite(length2) & (length2 > 0.0), smaller(larger(scale / root(length2), 1e-8), 1e8), 1.0)


@jit
def own_terms(diagonal, single):
    """`kkt._own_terms`."""
    if single:
        return 1e-5 * diagonal + SMALLEST_SINGLE
    return 1e-10 * diagonal + SMALLEST


@jit
def prepare_dense(one, reduced, single):
    """What the dual form keeps of a dense Q without bounds; whether Q is conditioned well enough for it."""
    Q, F = one.Q, reduced.hessian
    n, linear = Q.shape[0], one.K.shape[0]
    copy_upper(Q, F, n)
    for i in range(n):
        F[i, i] += own_terms(Q[i, i], single)
    sound = cholesky(F, n)
    enough = 1e-2 if single else 1e-6
    for i in range(n):
        sound &= (Q[i, i] > 0.0) & (enough * Q[i, i] * F[i, i] * F[i, i] < 1.0)
    if not some(sound):
        return sound
    transpose(one.K, reduced.V)
    solve_rows_above(F, n, reduced.V, linear)
    reduced.S[:] = 0.0
    add_gram(reduced.V, n, reduced.S, linear)
    return sound


@jit
def prepare_diagonal(one, reduced, single):
    """The same for a diagonal Q, with or without bounds."""
    sound = True
    for i in range(one.Q.shape[0]):
        entry = one.Q[i, i]
        sound &= entry * one.D[i] * one.D[i] > 1e-6
        reduced.diagonal[i] = entry + own_terms(entry, single)
    return sound


@hot
def bound_weights(one, weights, i):
    """What the weights of the bounds add to the diagonal at a variable."""
    row = one.K.shape[0]
    total = 0.0
    if one.lower:
        total += weights[row + i]
    if one.upper:
        total += weights[row + one.lower + i]
    return total


@jit
def whiten_diagonal(one, reduced, turned):
    """The square root of a diagonal Q with what bounds add to it, and Kᵀ divided by it."""
    roots, linear = reduced.hessian[0], one.K.shape[0]
    for j in range(roots.shape[0]):
        roots[j] = root(reduced.diagonal[j] + bound_weights(one, reduced.weights, j))
        inverse = 1.0 / roots[j]
        row, out = turned[j], reduced.V[j]
        for i in range(linear):
            out[i] = row[i] * inverse


@hot
def factor(form, one, reduced, theta, rho, delta, work):
    """Factor the reduced KKT matrix in `reduced`; whether it was positive definite."""
    n, linear, rows = one.K.shape[1], one.K.shape[0], theta.shape[0]
    U, weights = reduced.U, reduced.weights
    if form != DENSE_DUAL:
        for i in range(rows):
            weights[i] = 1.0 / (theta[i] + delta[i])
    if form == PRIMAL:
        copy_upper(one.Q, U, n)
        for i in range(linear):
            scale, row, out = root(weights[i]), one.K[i], work.scaled[i]
            for j in range(n):
                out[j] = scale * row[j]
        add_gram(work.scaled, linear, U, n)
        for i in range(n):
            U[i, i] += rho[i] + bound_weights(one, weights, i)
        return cholesky(U, n)
    if form == DENSE_DUAL:
        copy_upper(reduced.S, U, linear)
    else:
        whiten_diagonal(one, reduced, work.turned)
        U[:] = 0.0
        add_gram(reduced.V, n, U, linear)
    huge = LARGEST_ROOT_SINGLE if one.q.itemsize == 4 else LARGEST_ROOT
    for i in range(linear):
        entry = theta[i] + delta[i]
        # Rows that do not exist get a diagonal that is huge but harmless to the factorisation.
        U[i, i] += select(finite(entry), entry, huge)
    return cholesky(U, linear)


@hot
def eliminate(form, one, reduced, r_x, work):
    """What a solve needs of the right-hand side of the variables alone, in `work`: done once for many solves."""
    if form == DENSE_DUAL:
        copy(r_x, work.t)
        forward(reduced.hessian, work.t)
        work.Vt[:] = 0.0
        add_product_transposed(reduced.V, work.t, work.Vt)


@hot
def solve_rows(form, one, reduced, r_x, r_v, dx, dv, work):
    """`solve` as far as the multipliers need it, which with a dense dual form is without dx."""
    K, lower, upper = one.K, one.lower, one.upper
    n, linear, rows = K.shape[1], K.shape[0], r_v.shape[0]
    weights, t = reduced.weights, work.t
    if form == DENSE_DUAL:
        for i in range(linear):
            dv[i] = work.Vt[i] - r_v[i]
        solve_cholesky(reduced.U, dv)
        return
    if form == PRIMAL:
        for i in range(rows):
            dv[i] = weights[i] * r_v[i]
        adjoint(K, lower, upper, dv, dx)
        for i in range(n):
            dx[i] += r_x[i]
        solve_cholesky(reduced.U, dx)
        constraints(K, lower, upper, dx, dv)
        for i in range(rows):
            dv[i] = weights[i] * (dv[i] - r_v[i])
        return
    roots = reduced.hessian[0]
    for j in range(n):
        value = r_x[j]
        if lower:
            value -= weights[linear + j] * r_v[linear + j]
        if upper:
            value += weights[linear + lower + j] * r_v[linear + lower + j]
        t[j] = value / roots[j]
    y = dv[:linear]
    for i in range(linear):
        y[i] = -r_v[i]
    add_product_transposed(reduced.V, t, y)
    solve_cholesky(reduced.U, y)
    product(reduced.V, y, dx)
    for j in range(n):
        dx[j] = (t[j] - dx[j]) / roots[j]
        if lower:
            dv[linear + j] = weights[linear + j] * (-dx[j] - r_v[linear + j])
        if upper:
            dv[linear + lower + j] = weights[linear + lower + j] * (dx[j] - r_v[linear + lower + j])


@hot
def solve(form, one, reduced, r_x, r_v, dx, dv, work):
    """Solve for right-hand sides of the variables and of the rows, after `eliminate`."""
    solve_rows(form, one, reduced, r_x, r_v, dx, dv, work)
    if form == DENSE_DUAL:
        product(reduced.V, dv, dx)
        for i in range(dx.shape[0]):
            dx[i] = work.t[i] - dx[i]
        backward(reduced.hessian, dx)


@jit
def residual(one, theta, rho, delta, r_x, r_v, dx, dv, e_x, e_v, work):
    """What a step leaves of the right-hand side of the KKT system, in (e_x, e_v)."""
    product(one.Q, dx, e_x)
    adjoint(one.K, one.lower, one.upper, dv, work.columns)
    for i in range(dx.shape[0]):
        e_x[i] = r_x[i] - e_x[i] - rho[i] * dx[i] - work.columns[i]
    constraints(one.K, one.lower, one.upper, dx, e_v)
    for i in range(dv.shape[0]):
        e_v[i] = select(finite(theta[i]), r_v[i] - e_v[i] + (theta[i] + delta[i]) * dv[i], 0.0)


@jit
def solve_refined(form, one, reduced, refine, r_x, r_v, dx, dv, work):
    """`solve`, and one round of refinement for the problems that want it."""
    solve(form, one, reduced, r_x, r_v, dx, dv, work)
    if not some(refine):
        return
    residual(one, work.theta, work.rho, work.delta, r_x, r_v, dx, dv, work.e_x, work.e_v, work)
    eliminate(form, one, reduced, work.e_x, work)
    solve(form, one, reduced, work.e_x, work.e_v, work.cx, work.cv, work)
    for i in range(dx.shape[0]):
        dx[i] += select(refine, work.cx[i], 0.0)
    for i in range(dv.shape[0]):
        dv[i] += select(refine, work.cv[i], 0.0)


# ---- the iteration


@jit
def onto_path(one, v, difference, mu, s):
    """Multipliers and slacks on s ∘ z = μ with the difference z − s in the scaled rows kept."""
    for i in range(v.shape[0]):
        if one.kind[i] == INEQUALITY:
            d = difference[i]
            large = (abs(d) + root(d * d + 4.0 * mu)) / 2.0
            small = mu / large
            s[i] = select(d > 0.0, small, large) / one.E[i]
            v[i] = select(d > 0.0, large, small) * one.E[i]
        else:
            s[i] = 0.0
            if one.kind[i] == ABSENT:
                v[i] = 0.0


@hot
def mean(one, s, v):
    """Mean complementarity of the inequalities."""
    total, count = zero(s), 0
    for i in range(s.shape[0]):
        if one.kind[i] == INEQUALITY:
            total += s[i] * v[i]
            count += 1
    return total / max(count, 1)


@jit
def initialize(form, one, reduced, settings, now, work):
    """The ordinary starting point in `now`; its mean complementarity, and whether the matrix could be factored."""
    n, rows = now.x.shape[0], now.v.shape[0]
    D, E = one.D, one.E
    for i in range(n):
        work.metric_x[i] = 1.0 / square(D[i])
        work.rho[i] = settings.rho * work.metric_x[i]
        now.r_x[i] = -one.q[i]
    for i in range(rows):
        work.metric_v[i] = 1.0 / square(E[i])
        work.delta[i] = settings.delta * work.metric_v[i]
        kind = one.kind[i]
        work.theta[i] = work.metric_v[i] if kind == INEQUALITY else (0.0 if kind == EQUALITY else np.inf)
        now.r_v[i] = one.k[i]
    factored = factor(form, one, reduced, work.theta, work.rho, work.delta, work)
    if some(factored):
        eliminate(form, one, reduced, now.r_x, work)
        solve_refined(form, one, reduced, factored, now.r_x, now.r_v, now.x, now.v, work)
    good = factored & all_finite(now.x) & all_finite(now.v)
    if not every(good):
        for i in range(n):
            now.x[i] = select(good, now.x[i], 0.0)
        for i in range(rows):
            now.v[i] = select(good, now.v[i], 0.0)
    difference = work.shifted
    most, least = zero(now.v), zero(now.v)
    for i in range(rows):
        difference[i] = now.v[i] / E[i] if one.kind[i] == INEQUALITY else 0.0
        most, least = larger(difference[i], most), larger(-difference[i], least)
    total, count = zero(now.v), 0
    for i in range(rows):
        if one.kind[i] == INEQUALITY:
            total += (difference[i] + least) * (most - difference[i])
            count += 1
    mu = larger(total / max(count, 1), settings.smallest)
    onto_path(one, now.v, difference, mu, now.s)
    return mean(one, now.s, now.v), factored


@jit
def start_near(one, settings, cold_mu, now, work):
    """Move another problem's solution in `now` onto a point of s ∘ z = μ; its mean complementarity."""
    n, rows = now.x.shape[0], now.v.shape[0]
    D, E = one.D, one.E
    slack, difference, error = work.dv, work.shifted, 0.0
    constraints(one.K, one.lower, one.upper, now.x, slack)
    product(one.Q, now.x, work.dx)
    adjoint(one.K, one.lower, one.upper, now.v, work.columns)
    for i in range(rows):
        value = E[i] * (one.k[i] - slack[i])
        if one.kind[i] == EQUALITY:
            error = larger(abs(value), error)
        elif one.kind[i] == INEQUALITY:
            error = larger(-value, error)
        difference[i] = now.v[i] / E[i] - value if one.kind[i] == INEQUALITY else 0.0
    for i in range(n):
        error = larger(abs(D[i] * (work.dx[i] + one.q[i] + work.columns[i])), error)
    mu = 0.1 * error if 0.1 * error < cold_mu else cold_mu
    mu = max(mu, settings.tol, settings.smallest)
    onto_path(one, now.v, difference, mu, now.s)
    return mean(one, now.s, now.v)


@jit
def all_finite(a):
    result = True
    for i in range(a.shape[0]):
        result &= finite(a[i])
    return result


@hot
def assess(one, settings, now, before, past, iterations, limit, work):
    """Compute the residuals of `now` afresh and decide how the problem stands; a certificate takes the place of x or v.

    `before` and `past` are the iterate before and its verdict.
    """
    n, rows, linear = now.x.shape[0], now.v.shape[0], one.K.shape[0]
    x, v, Kv = work.x, work.v, work.Kv
    copy(now.x, x)
    copy(now.v, v)
    product(one.Q64, x, now.Qx)
    constraints(one.K64, one.lower, one.upper, x, now.Kx)
    adjoint(one.K64, one.lower, one.upper, v, Kv)

    dual = size_Qx = size_q = size_Kv = terms = zero(x)
    for i in range(n):
        Qx, q = now.Qx[i], one.q64[i]
        r_x = -(Qx + q + Kv[i])
        now.r_x[i] = r_x
        dual = larger(abs(r_x), dual)
        size_Qx, size_q, size_Kv = larger(abs(Qx), size_Qx), larger(abs(q), size_q), larger(abs(Kv[i]), size_Kv)
        terms += abs(x[i]) * (abs(Qx) + abs(q))
    primal = size_Kx = size_k = scaled_violation = scaled_k = zero(x)
    for i in range(rows):
        k, E = one.k64[i], one.E[i]
        size_k, scaled_k = larger(abs(k), size_k), larger(abs(E * k), scaled_k)
        terms += abs(v[i]) * abs(k)
        if one.kind[i] == ABSENT:
            now.Kx[i] = 0.0
            now.r_v[i] = 0.0
            continue
        Kx = now.Kx[i]
        r_v = k - Kx - now.s[i]
        now.r_v[i] = r_v
        violation = abs(r_v) if one.kind[i] == EQUALITY else positive(Kx - k)
        size_Kx = larger(abs(Kx), size_Kx)
        primal, scaled_violation = larger(violation, primal), larger(E * violation, scaled_violation)
    xQx, qx = dot(x, now.Qx), dot(x, one.q64)
    kv, gap = zero(x), xQx + qx
    # By blocks, each summed by itself, the last first: terms that cancel do so in the same way everywhere.
    p, upper = one.equalities, linear + one.lower
    for start, stop in ((p, linear), (0, p), (upper, rows), (linear, upper)):
        part = dot(one.k64[start:stop], v[start:stop])
        gap += part
        kv += part
    gap = abs(gap)

    worst = larger(primal, larger(dual, gap))
    tol, rtol = settings.tol, settings.rtol
    near = (
        (primal <= tol + rtol * larger(size_Kx, size_k))
        & (dual <= tol + rtol * larger(size_Qx, larger(size_q, size_Kv)))
        & (gap + LUCK * EPS * terms <= tol + rtol * larger(abs(xQx), larger(abs(qx), abs(kv))))
        & (worst < np.inf)
    )
    best = select(worst < past.best, worst, past.best)

    no_bottom = fall = no_point = gain = zero(x)
    if some(dual > tol):
        no_bottom, fall = unbounded(one, now, before, x, work)
    if some(primal > tol):
        no_point, gain = infeasible(one, before, v, scaled_k, work)
    no_bottom, no_point = select(dual > tol, no_bottom, 0.0), select(primal > tol, no_point, 0.0)
    proof = larger(no_point, no_bottom)

    improved = (worst < 0.9 * past.best) | (proof > 1.1 * past.proof)
    waiting = select(improved, 0, past.waiting + 1)
    at_limit = iterations >= limit
    patient = waiting < PATIENCE
    last = no(patient) | at_limit
    enough = settings.certificate * select(last, 0.01, 1.0)
    status = select(patient, select(at_limit, MAX_ITERATIONS, RUNNING), STALLED)
    falls = (no_bottom > enough) & (last | (scaled_violation <= 1e-4 * larger(scaled_k, 1.0)))
    contradicts = no_point > enough
    status = select(falls, DUAL_INFEASIBLE, status)
    status = select(contradicts, PRIMAL_INFEASIBLE, status)
    status = select(near & ((worst <= 0.1 * tol) | last), SOLVED, status)
    if some(status == DUAL_INFEASIBLE):
        for i in range(n):
            now.x[i] = select(status == DUAL_INFEASIBLE, work.ray[i] / fall, now.x[i])
    if some(status == PRIMAL_INFEASIBLE):
        for i in range(rows):
            now.v[i] = select(status == PRIMAL_INFEASIBLE, work.farkas[i] / gain, now.v[i])
    proof = larger(proof, past.proof)
    return Verdict(status, 0.5 * xQx + qx, primal, dual, gap, near, worst, best, proof, waiting)


@jit
def unbounded(one, now, before, x, work):
    """How near the last step in x is to a direction of unbounded descent, and how far it goes down."""
    ray = work.ray
    total = size = uphill = hidden = cost = zero(x)
    for i in range(x.shape[0]):
        ray[i] = x[i] - before.x[i]
        term = one.q64[i] * ray[i]
        total += term
        size += abs(term)
        D = one.D[i]
        uphill = larger(abs(D * (now.Qx[i] - before.Qx[i])), uphill)
        hidden = larger(abs(D * now.Qx[i]), hidden)
        cost = larger(abs(D * one.q64[i]), cost)
    falls = -total > 1e-8 * size
    if not some(falls):
        return select(falls, 1.0, 0.0), -total
    for i in range(now.Kx.shape[0]):
        slope, E = now.Kx[i] - before.Kx[i], one.E[i]
        climb = abs(slope) if one.kind[i] == EQUALITY else positive(slope)
        uphill = larger(E * climb, uphill)
        hidden = larger(abs(E * now.Kx[i]), hidden)
    uphill = larger(uphill, EPS * hidden)
    return select(falls, -total / (uphill * larger(cost, 1.0)), 0.0), -total


@jit
def infeasible(one, before, v, size_k, work):
    """How near the last step in the multipliers is to a Farkas certificate, and how much it gains."""
    farkas = work.farkas
    total = size = zero(v)
    for i in range(v.shape[0]):
        step = v[i] - before.v[i]
        farkas[i] = positive(step) if one.kind[i] == INEQUALITY else step
        term = one.k64[i] * farkas[i]
        total += term
        size += abs(term)
    gains = -total > 1e-8 * size
    if not some(gains):
        return select(gains, 1.0, 0.0), -total
    adjoint(one.K64, one.lower, one.upper, farkas, work.Kv)
    left = zero(v)
    for i in range(work.Kv.shape[0]):
        left = larger(abs(one.D[i] * work.Kv[i]), left)
    return select(gains, -total / (left * larger(size_k, 1.0)), 0.0), -total


@hot
def step_lengths(one, per_s, per_z, ds, dv, fraction):
    """Largest steps in [0, 1] that keep s and z, given as 1/s and 1/z, ≥ (1 − fraction) times what they are."""
    of_s = of_z = zero(ds)
    for i in range(ds.shape[0]):
        if one.kind[i] == INEQUALITY:
            of_s = larger(-ds[i] * per_s[i], of_s)
            of_z = larger(-dv[i] * per_z[i], of_z)
    return 1.0 / larger(of_s / fraction, 1.0), 1.0 / larger(of_z / fraction, 1.0)


@hot
def step(form, one, reduced, settings, mu, rho, delta, refine, circling, before, now, work):
    """One predictor-corrector step from `before` to `now`.

    Returns whether it could be computed, whether the matrix could be factored, its lengths, and μ after it.
    """
    n, rows = before.x.shape[0], before.v.shape[0]
    dx, dv, ds, shifted = work.dx, work.dv, work.ds, work.shifted
    # A division takes as long as many products, so each is done once.
    per_s, per_z, theta = work.per_s, work.per_z, work.theta
    for i in range(n):
        work.rho[i] = rho * work.metric_x[i]
    for i in range(rows):
        work.delta[i] = delta * work.metric_v[i]
        kind = one.kind[i]
        shifted[i] = before.r_v[i]
        if kind == INEQUALITY:
            per_s[i], per_z[i] = 1.0 / before.s[i], 1.0 / before.v[i]
            theta[i] = before.s[i] * per_z[i]
            shifted[i] += before.s[i]
        else:
            theta[i] = 0.0 if kind == EQUALITY else np.inf
    factored = factor(form, one, reduced, theta, work.rho, work.delta, work)
    if not some(factored):
        return factored, factored, 0.0 * mu, 0.0 * mu, mu

    eliminate(form, one, reduced, before.r_x, work)
    solve_rows(form, one, reduced, before.r_x, shifted, dx, dv, work)
    for i in range(rows):
        ds[i] = -(before.s[i] + theta[i] * dv[i]) if one.kind[i] == INEQUALITY else 0.0
    alpha_s, alpha_z = step_lengths(one, per_s, per_z, ds, dv, 1.0)
    total, count = zero(dv), 0
    for i in range(rows):
        if one.kind[i] == INEQUALITY:
            total += (before.s[i] + alpha_s * ds[i]) * (before.v[i] + alpha_z * dv[i])
            count += 1
    ratio = positive(total / max(count, 1) / (mu + settings.tiny))
    ratio = select(ratio > 1.0, 1.0, ratio)
    sigma = ratio * ratio * ratio
    complementarity = work.complementarity
    for i in range(rows):
        shifted[i] = before.r_v[i]
        if one.kind[i] == INEQUALITY:
            complementarity[i] = before.s[i] * before.v[i] + ds[i] * dv[i] - sigma * mu
            shifted[i] += complementarity[i] * per_z[i]
    solve_refined(form, one, reduced, refine, before.r_x, shifted, dx, dv, work)
    for i in range(rows):
        if one.kind[i] == INEQUALITY:
            ds[i] = -(complementarity[i] * per_z[i] + theta[i] * dv[i])
    alpha_s, alpha_z = step_lengths(one, per_s, per_z, ds, dv, STEP_FRACTION)
    shorter = smaller(alpha_s, alpha_z)
    alpha_s, alpha_z = select(circling, shorter, alpha_s), select(circling, shorter, alpha_z)

    for i in range(n):
        now.x[i] = before.x[i] + alpha_s * dx[i]
    for i in range(rows):
        kind = one.kind[i]
        if kind == INEQUALITY:
            now.s[i] = larger(before.s[i] + alpha_s * ds[i], settings.tiny)
            now.v[i] = larger(before.v[i] + alpha_z * dv[i], settings.tiny)
        else:
            now.s[i] = 0.0
            now.v[i] = before.v[i] + alpha_z * dv[i] if kind == EQUALITY else 0.0
    sound = factored & all_finite(now.x) & all_finite(now.v) & all_finite(now.s)
    return sound, factored, alpha_s, alpha_z, select(sound, mean(one, now.s, now.v), mu)


@hot
def needs_refinement(settings, alpha_s, alpha_z, before, now, past, work):
    """Whether the linear solve has left too much of its system; it shows in the products before and after the step."""
    left = allowed = zero(work.dx)
    per_alpha_s, per_alpha_z = 1.0 / alpha_s, 1.0 / alpha_z
    for i in range(now.x.shape[0]):
        Q_dx = now.Qx[i] - before.Qx[i]
        Kt_dv = before.r_x[i] - now.r_x[i] - Q_dx
        value = before.r_x[i] - Q_dx * per_alpha_s - Kt_dv * per_alpha_z - work.rho[i] * work.dx[i]
        left = larger(abs(value), left)
    enough = left <= larger(1e-6 * past.dual, 0.01 * settings.tol)
    left = zero(work.dx)
    for i in range(now.v.shape[0]):
        r_v = before.r_v[i]
        allowed = larger(abs(r_v), allowed)
        value = now.r_v[i] - (1.0 - alpha_s) * r_v + alpha_s * work.delta[i] * work.dv[i]
        left = larger(abs(value), left)
    return no(enough & (left <= larger(1e-6 * allowed, 0.01 * settings.tol)))


@jit
def begin(form, one, reduced, settings, now, before, work):
    """The ordinary start in `now`: its μ, how it stands, and whether the matrix could be factored."""
    mu, sound = initialize(form, one, reduced, settings, now, work)
    before.x[:] = 0.0
    before.v[:] = 0.0
    before.Qx[:] = 0.0
    before.Kx[:] = 0.0
    bad = each(mu, np.inf)
    nothing = Verdict(each(mu, RUNNING), bad, bad, bad, bad, each(mu, False), bad, bad, each(mu, 0.0), each(mu, 0))
    return mu, assess(one, settings, now, before, nothing, np.int64(0), settings.max_iterations, work), sound


@jit
def revised(verdict, status, waiting):
    return Verdict(
        status, verdict.objective, verdict.primal, verdict.dual, verdict.gap, verdict.near, verdict.worst,
        verdict.best, verdict.proof, waiting,
    )  # fmt: skip


@jit
def iterate(form, one, reduced, settings, warm, near_x, near_v, usable, now, before, work):
    """Carry one problem to its end: the iterate there, how it stands, its iterations, whether its factor is of use."""
    iterations, limit = np.int64(0), settings.max_iterations
    inequalities = False
    for i in range(one.kind.shape[0]):
        inequalities |= one.kind[i] == INEQUALITY
    mu, verdict, factored = begin(form, one, reduced, settings, now, before, work)
    if warm and usable:
        copy(near_x, before.x)
        copy(near_v, before.v)
        near_mu = start_near(one, settings, mu, before, work)
        near_verdict = assess(one, settings, before, before, verdict, iterations, limit, work)
        if near_verdict.status in (RUNNING, SOLVED):
            # Also from a solution one step is taken: the derivative needs its factor.
            now, before, mu, verdict = before, now, near_mu, revised(near_verdict, RUNNING, near_verdict.waiting)
    while True:
        rho, delta, refine = settings.rho, settings.delta, np.bool_(True)
        while verdict.status == RUNNING:
            now, before, past = before, now, verdict
            sound, factored, alpha_s, alpha_z, new_mu = step(
                form, one, reduced, settings, mu, rho, delta, refine, past.waiting >= IMPATIENCE, before, now, work
            )
            if not sound:
                # A step that cannot be computed is not taken; stronger proximal terms come instead.
                copy(before.x, now.x)
                copy(before.v, now.v)
                copy(before.s, now.s)
            iterations += 1
            verdict = assess(one, settings, now, before, past, iterations, limit, work)
            if past.near and not verdict.worst <= 0.5 * past.worst:
                # From a point within the tolerance one more step is worth it only if it halves the residuals.
                now, before = before, now
                if past.worst > settings.tol and past.waiting < IMPATIENCE and iterations < limit:
                    verdict = revised(past, RUNNING, IMPATIENCE)
                    continue
                verdict = revised(past, SOLVED, past.waiting)
                iterations -= 1
                break
            if verdict.status != RUNNING:
                break
            if sound:
                refine = needs_refinement(settings, alpha_s, alpha_z, before, now, past, work)
                rate = positive((mu - new_mu) / (mu + settings.tiny)) if inequalities else 0.9
                rho = max((1.0 - rate) * rho, settings.smallest)
                delta = max((1.0 - rate) * delta, settings.smallest)
                mu = new_mu
            else:
                refine = True
                rho, delta = 100.0 * rho, 100.0 * delta
        if not warm or verdict.status == SOLVED or iterations == 0:
            return now, verdict, iterations, factored
        # Begin again from the ordinary start, once, where a start near another solution has led nowhere.
        warm, limit = False, iterations + settings.max_iterations
        mu, verdict, factored = begin(form, one, reduced, settings, now, before, work)


# ---- the operands


@jit
def within(a, below, above):
    """Whether all entries lie strictly between two numbers, which NaN does not."""
    result = True
    for i in range(a.shape[0]):
        result &= below < a[i] < above
    return result


@jit
def plausible(batch, i, all_shared):
    """Whether the operands of a problem pass the rules of `problem` but that of definiteness.

    The rules themselves find out what is wrong. `all_shared` is whether to look at what the problems share, too.
    """
    if not (within(at(batch.q, i), -np.inf, np.inf) and within(at(batch.b, i), -np.inf, np.inf)):
        return False
    if all_shared or batch.h.shape[0] > 1:
        h = at(batch.h, i)
        for j in range(h.shape[0]):
            if not h[j] > -np.inf:
                return False
    if all_shared or batch.lb.shape[0] > 1 or batch.ub.shape[0] > 1:
        lb, ub = at(batch.lb, i), at(batch.ub, i)
        for j in range(lb.shape[0]):
            if not lb[j] < np.inf or (ub.shape[0] and lb[j] > ub[j]):
                return False
        for j in range(ub.shape[0]):
            if not ub[j] > -np.inf:
                return False
    for operand in (batch.A, batch.G):
        if all_shared or operand.shape[0] > 1:
            M = at(operand, i)
            for j in range(M.shape[0]):
                if not within(M[j], -np.inf, np.inf):
                    return False
    if all_shared or batch.Q.shape[0] > 1:
        Q = at(batch.Q, i)
        return asymmetry(Q) <= (1e-4 if Q.itemsize == 4 else 1e-8) * largest_on_diagonal(Q) < np.inf
    return True


@jit
def largest_on_diagonal(Q):
    """The largest entry, of a matrix that is positive semidefinite."""
    largest = SMALLEST_SINGLE if Q.itemsize == 4 else SMALLEST
    for i in range(Q.shape[0]):
        largest = larger(abs(Q[i, i]), largest)
    return largest


@jit
def asymmetry(Q):
    """The largest difference from the transpose; NaN where an entry is not finite."""
    d0 = d1 = d2 = d3 = 0.0
    n = Q.shape[0]
    for i in range(0, n, 4):
        if i + 4 <= n:
            q0, q1, q2, q3, columns = Q[i, :i], Q[i + 1, :i], Q[i + 2, :i], Q[i + 3, :i], Q[:i, i : i + 4]
            for k in range(columns.shape[0]):
                d0 = larger(abs(q0[k] - columns[k, 0]), d0)
                d1 = larger(abs(q1[k] - columns[k, 1]), d1)
                d2 = larger(abs(q2[k] - columns[k, 2]), d2)
                d3 = larger(abs(q3[k] - columns[k, 3]), d3)
        for j in range(i, min(i + 4, n)):
            for k in range(i if i + 4 <= n else 0, j):
                d0 = larger(abs(Q[j, k] - Q[k, j]), d0)
    return larger(larger(d0, d1), larger(d2, d3))


@jit
def convex(Q, M):
    """Whether Q is positive semidefinite as far as `problem` wants it."""
    n, scale, margin = Q.shape[0], 1.0 / largest_on_diagonal(Q), 1e-4 if Q.itemsize == 4 else 1e-8
    for j in range(n):
        row, out = Q[j], M[j]
        for k in range(j, n):
            out[k] = row[k] * scale
        out[j] += margin
    return cholesky(M, n)


# ---- a batch


@jit
def make_work(room):
    """The room for one problem by name."""
    x, v, x64, v64, flags = room.x, room.v, room.x64, room.v64, room.flags
    return Work(
        x=x64[0], ray=x64[1], Kv=x64[2], v=v64[0], farkas=v64[1], k64=v64[2],
        kind=flags[0], heavy=flags[1], stacked=room.stacked, stacked64=room.stacked64, scaled=room.scaled,
        turned=room.turned, square=room.square,
        rho=x[0], b_x=x[1], t=x[2], dx=x[3], cx=x[4], e_x=x[5], columns=x[6], right_x=x[7],
        metric_x=x[12], metric_v=v[19], per_s=v[20], per_z=v[21],
        theta=v[0], delta=v[1], shifted=v[2], complementarity=v[3], weights=v[4], Vt=v[5], dv=v[6], ds=v[7], cv=v[8],
        e_v=v[9], k=v[10], right_v=v[11], theta_exact=v[12],
    )  # fmt: skip


@jit
def make_iterates(room):
    """Two iterates in the room."""
    x, v, x64, v64 = room.x, room.v, room.x64, room.v64
    return (
        Iterate(x[8], v[13], v[14], x[9], v[15], x64[3], v64[3]),
        Iterate(x[10], v[16], v[17], x[11], v[18], x64[4], v64[4]),
    )


@inline
def at(operand, i):
    """The entry of problem i, or the one that is shared."""
    return operand[i if operand.shape[0] > 1 else 0]


@jit
def fill_rows(b, h, lb, ub, k, kind):
    """The right-hand side of every row, and what it is."""
    row = 0
    for i in range(b.shape[0]):
        k[row], kind[row] = b[i], EQUALITY
        row += 1
    for i in range(h.shape[0]):
        k[row], kind[row] = limit(h[i])
        row += 1
    both = lb.shape[0] > 0 and ub.shape[0] > 0
    for i in range(lb.shape[0]):
        k[row], kind[row] = limit(-lb[i])
        if both and lb[i] == ub[i] and finite(lb[i]):
            k[row], kind[row] = -lb[i], EQUALITY
        row += 1
    for i in range(ub.shape[0]):
        k[row], kind[row] = limit(ub[i])
        if both and lb[i] == ub[i] and finite(lb[i]):
            kind[row] = ABSENT
        row += 1


@jit
def limit(value):
    """An upper limit as a row; one that no number satisfies, if it came unchecked, must not pass for none."""
    if value >= INFINITE:
        return 0.0, ABSENT
    return value if finite(value) else np.nan, INEQUALITY


@inline
def stack(A, G, room):
    """The rows of A and G as one matrix, in `room` where there are both."""
    p, m = A.shape[0], G.shape[0]
    if p == 0:
        return G
    if m == 0:
        return A
    copy_matrix(A, room[:p])
    copy_matrix(G, room[p:])
    return room


def in_double(batch, exact, i, K, room):
    """Q, q and K of problem i in float64."""
    raise NotImplementedError("for compiled code")


@overload(in_double, inline="always", jit_options=OPTIONS)
def _in_double(batch, exact, i, K, room):
    if isinstance(exact, types.NoneType):
        return lambda batch, exact, i, K, room: (at(batch.Q, i), at(batch.q, i), K)
    return lambda batch, exact, i, K, room: (
        at(exact.Q, i),
        at(exact.q, i),
        stack(at(exact.A, i), at(exact.G, i), room),
    )


@jit
def reduced_at(store, i):
    """What problem i keeps, or the room for one problem."""
    return Reduced(
        at(store.hessian, i), at(store.V, i), at(store.S, i), at(store.diagonal, i), at(store.U, i),
        at(store.weights, i),
    )  # fmt: skip


@jit
def in_primal_form(reduced, work):
    """With room for the factor of the primal form, which is not kept."""
    return Reduced(reduced.hessian, reduced.V, reduced.S, reduced.diagonal, work.square, work.weights)


@jit
def following(i, end, turn, edges):
    """The problem after i, in pieces of the batch of which `turn` has the number of the next; and the piece's end."""
    if i + 1 < end:
        return i + 1, end
    return next_piece(turn, edges)


@jit
def next_piece(turn, edges):
    """Where the next piece of the batch that no thread has taken begins and ends; the last is empty."""
    piece = min(claim(turn), edges.shape[0] - 2)
    return edges[piece], edges[piece + 1]


@entry
def solve_batch(
    batch, exact, check, all_shared, settings, preferred, prepared, warm, near, store, metric, outcome, forms, factored,
    wanted, turn, edges, room,
):  # fmt: skip
    """Solve problems one after the other as long as there are any; False if `check` refused one, which ends it.

    Parameters
    ----------
    batch, exact : Batch
        The operands, and the same in float64 (None where they are).
    check, all_shared : bool
        Whether to look for operands that are against the rules, and for that also at those that the problems share.
    settings : Settings
    preferred : int
        The reduced form to take where it is safe.
    prepared : bool
        Whether `store` and `metric` have what does not change, for matrices that are shared.
    warm : bool
    near : tuple of x, v, usable
        Where to start if `warm`.
    store : Reduced
        What each problem keeps of its reduced form, or room for one of them where the first axis is 1.
    metric : tuple of D, E
    outcome : Outcome
    forms : int array
        The form that each problem has been solved with.
    factored : boolean array
        Whether its factor in `store` is of use.
    wanted : boolean array
        Which problems to solve.
    turn, edges : int array
        As `following` takes them.
    room : Room
    """
    count = outcome.x.shape[0]
    work = make_work(room)
    first, second = make_iterates(room)
    k, k64, kind = work.k, work.k64, work.kind
    single = batch.q.itemsize == 4
    i = end = np.int64(0)
    while True:
        i, end = following(i, end, turn, edges)
        if i >= count:
            return True
        if not wanted[i]:
            continue
        whole = all_shared and i == 0
        if check and not plausible(batch, i, whole):
            turn[0] = edges.shape[0]
            return False
        lb, ub = at(batch.lb, i), at(batch.ub, i)
        fill_rows(at(batch.b, i), at(batch.h, i), lb, ub, k, kind)
        copy(k, k64)
        K = stack(at(batch.A, i), at(batch.G, i), work.stacked)
        Q64, q64, K64 = in_double(batch, exact, i, K, work.stacked64)
        one = One(
            at(batch.Q, i), at(batch.q, i), K, k, kind,
            batch.b.shape[1], lb.shape[0], ub.shape[0], at(metric[0], i), at(metric[1], i),
            Q64, q64, K64, k64,
        )  # fmt: skip
        reduced = reduced_at(store, i)
        form = preferred
        if prepared:
            form = forms[i]
        else:
            equilibrate(one, lb, ub, work)
            if form == DENSE_DUAL and not prepare_dense(one, reduced, single):
                form = PRIMAL
            if form == DIAGONAL_DUAL and not prepare_diagonal(one, reduced, single):
                form = PRIMAL
            # The other forms exist only for a Q that is positive definite.
            if check and form == PRIMAL and (whole or batch.Q.shape[0] > 1) and not convex(one.Q, work.square):
                turn[0] = edges.shape[0]
                return False
        if form != preferred:
            reduced = in_primal_form(reduced, work)
        if form == DIAGONAL_DUAL:
            transpose(K, work.turned)
        now, verdict, iterations, useful = iterate(
            form, one, reduced, settings, warm, at(near[0], i), at(near[1], i), at(near[2], i), first, second, work
        )
        copy(now.x, outcome.x[i])
        copy(now.v, outcome.v[i])
        copy(now.s, outcome.s[i])
        outcome.status[i, 0] = verdict.status
        outcome.iterations[i, 0] = iterations
        outcome.objective[i, 0] = verdict.objective
        outcome.primal[i, 0], outcome.dual[i, 0], outcome.gap[i, 0] = verdict.primal, verdict.dual, verdict.gap
        forms[i] = form
        factored[i] = useful and form == preferred


# ---- the derivative


@jit
def size(heavy, x_scale, v_scale, a_x, a_v):
    """The largest entry of a scaled vector, rows that are not heavy left out."""
    top = 0.0
    for i in range(a_x.shape[0]):
        top = larger(abs(a_x[i] * x_scale[i]), top)
    for i in range(a_v.shape[0]):
        if heavy[i]:
            top = larger(abs(a_v[i] * v_scale[i]), top)
    return top


@jit
def ratio(a, b):
    return a / (b if b > 0.0 else 1.0)


@jit
def correction(form, one, reduced, heavy, weights, e_x, e_v, c_x, c_v, work):
    """Solve with the light rows eliminated by their own weights; the size of what was asked."""
    rows = e_v.shape[0]
    b_x, b_v = work.b_x, work.shifted
    for i in range(rows):
        b_v[i] = 0.0 if heavy[i] else weights[i] * e_v[i]
    adjoint(one.K, one.lower, one.upper, b_v, b_x)
    for i in range(e_x.shape[0]):
        b_x[i] += e_x[i]
    for i in range(rows):
        b_v[i] = e_v[i] if heavy[i] else 0.0
    asked = size(heavy, one.D, one.E, b_x, b_v)
    eliminate(form, one, reduced, b_x, work)
    solve(form, one, reduced, b_x, b_v, c_x, c_v, work)
    light = work.complementarity
    constraints(one.K, one.lower, one.upper, c_x, light)
    for i in range(rows):
        if not heavy[i]:
            c_v[i] = weights[i] * (light[i] - e_v[i])
    return asked


@jit
def solve_nearby(form, one, reduced, theta, heavy, r_x, r_v, u_x, u_v, refinements, work):
    """Solve a KKT system with the factor of another one, `kkt.solve_nearby`; the residual and the next correction."""
    n, rows = u_x.shape[0], u_v.shape[0]
    weights, zero_x, zero_v = work.ds, work.rho, work.delta
    D_inverse, E_inverse = work.x, work.v
    zero_x[:] = 0.0
    zero_v[:] = 0.0
    for i in range(n):
        D_inverse[i] = 1.0 / one.D[i]
    for i in range(rows):
        weights[i] = 1.0 / theta[i]
        E_inverse[i] = 1.0 / one.E[i]
    accuracy = np.finfo(u_x.dtype).eps ** 0.625
    asked = correction(form, one, reduced, heavy, weights, r_x, r_v, u_x, u_v, work)
    residual(one, theta, zero_x, zero_v, r_x, r_v, u_x, u_v, work.e_x, work.e_v, work)
    left, moved, last = ratio(size(heavy, one.D, one.E, work.e_x, work.e_v), asked), 1.0, 1.0
    c_x, c_v, d_x, d_v = work.cx, work.cv, work.dx, work.dv
    for _ in range(refinements):
        if left <= accuracy and moved <= 10.0 * accuracy:
            break
        correction(form, one, reduced, heavy, weights, work.e_x, work.e_v, c_x, c_v, work)
        now = ratio(size(heavy, D_inverse, E_inverse, c_x, c_v), size(heavy, D_inverse, E_inverse, u_x, u_v))
        # What is left is the difference of the two systems times the solution, and so shrinks as the corrections do.
        expected, moved, last = left * ratio(now, last), ratio(now * now, last), now
        for i in range(n):
            c_x[i] += u_x[i]
        for i in range(rows):
            c_v[i] += u_v[i]
        if left <= 1e-5 and expected <= 0.1 * accuracy and moved <= accuracy:
            # Sure enough without the products that it takes to know.
            copy(c_x, u_x)
            copy(c_v, u_v)
            return expected, moved
        residual(one, theta, zero_x, zero_v, r_x, r_v, c_x, c_v, d_x, d_v, work)
        after = ratio(size(heavy, one.D, one.E, d_x, d_v), asked)
        if after < left:
            # A factor too far off makes it worse from round to round; the best is kept.
            copy(c_x, u_x)
            copy(c_v, u_v)
            copy(d_x, work.e_x)
            copy(d_v, work.e_v)
            left = after
    return left, moved


@jit
def pivots_count(U, squares):
    """Whether the pivots are more than rounding; where x is not unique, weights of the last iteration may drown ρ."""
    limit = np.finfo(U.dtype).eps
    squares[:] = 0.0
    for i in range(squares.shape[0]):
        pivot = 1.0 / (U[i, i] * U[i, i])
        if not pivot > limit * (squares[i] + pivot):
            return False
        for j in range(i + 1, squares.shape[0]):
            squares[j] += U[i, j] * U[i, j]
    return True


@jit
def solve_afresh(one, reduced, theta, heavy, r_x, r_v, u_x, u_v, work):
    """`differentiation._solve_afresh`: with a factor made for the purpose, where the last one does not do."""
    n, rows = u_x.shape[0], u_v.shape[0]
    single = u_x.itemsize == 4
    smallest, largest = (1e-4, 1e-2) if single else (1e-6, 1e-3)
    equal, start = (1e-5, 1e-5) if single else (1e-10, 1e-9)
    top = 0.0
    for i in range(rows):
        scaled = theta[i] * one.E[i] ** 2
        if one.kind[i] == INEQUALITY and scaled < largest:
            top = larger(scaled, top)
    lift = largest / (top if top > 0.0 else 1.0)
    form, diagonal, rho = np.int64(PRIMAL), work.theta, start
    for i in range(rows):
        scaled = theta[i] * one.E[i] ** 2
        if one.kind[i] == EQUALITY:
            scaled = equal
        elif one.kind[i] == INEQUALITY and scaled < largest:
            scaled = min(max(scaled * lift, smallest), largest)
        diagonal[i] = scaled / one.E[i] ** 2
        work.delta[i] = 0.0
    for _ in range(4):
        for i in range(n):
            work.rho[i] = rho / one.D[i] ** 2
        if factor(form, one, reduced, diagonal, work.rho, work.delta, work) and pivots_count(reduced.U, work.columns):
            break
        rho *= 100.0
    solve_nearby(form, one, reduced, theta, heavy, r_x, r_v, u_x, u_v, np.int64(12), work)


@jit
def solve_kkt(batch, store, metric, form, factored, v, s, i, r_x, r_v, u_x, u_v, work):
    """Solve the KKT system at the solution of problem i."""
    k, kind, theta, heavy, rounds = work.k, work.kind, work.theta_exact, work.heavy, np.int64(3)
    accuracy = np.sqrt(np.finfo(u_x.dtype).eps)
    lb, ub = at(batch.lb, i), at(batch.ub, i)
    fill_rows(at(batch.b, i), at(batch.h, i), lb, ub, k, kind)
    Q, q, K = at(batch.Q, i), at(batch.q, i), stack(at(batch.A, i), at(batch.G, i), work.stacked)
    D, E = at(metric[0], i), at(metric[1], i)
    one = One(Q, q, K, k, kind, batch.b.shape[1], lb.shape[0], ub.shape[0], D, E, Q, q, K, k)
    for j in range(v.shape[0]):
        theta[j] = s[j] / v[j] if kind[j] == INEQUALITY else (0.0 if kind[j] == EQUALITY else np.inf)
        heavy[j] = kind[j] == EQUALITY or (kind[j] == INEQUALITY and theta[j] * E[j] ** 2 < 1.0)
    reduced = reduced_at(store, i)
    if factored and (form != PRIMAL or pivots_count(reduced.U, work.columns)):
        if form == DIAGONAL_DUAL:
            transpose(K, work.turned)
            whiten_diagonal(one, reduced, work.turned)
        left, moved = solve_nearby(form, one, reduced, theta, heavy, r_x, r_v, u_x, u_v, rounds, work)
        if left <= 0.1 * accuracy and moved <= accuracy:
            return
    solve_afresh(one, in_primal_form(reduced, work), theta, heavy, r_x, r_v, u_x, u_v, work)


@entry
def solve_kkt_batch(
    batch, store, metric, forms, factored, x, v, s, solved, r_x, r_v, fill, u_x, u_v, of_Q, of_A, of_G, turn, edges,
    room,
):  # fmt: skip
    """Solve the KKT system at the solutions of a batch, one problem after the other as long as there are any.

    `batch`, `store`, `metric`, `forms`, `factored`, `turn` and `edges` are those of `solve_batch`. Problems that are
    not solved get the number `fill`. `of_Q`, `of_A` and `of_G` are for the gradients of the matrices, or empty.
    """
    work = make_work(room)
    p = of_A.shape[1]
    i = end = np.int64(0)
    while True:
        i, end = following(i, end, turn, edges)
        if i >= u_x.shape[0]:
            return
        if solved[i]:
            copy(r_x[i], work.right_x)
            copy(r_v[i], work.right_v)
            solve_kkt(
                batch, store, metric, forms[i], factored[i], v[i], s[i], i, work.right_x, work.right_v, u_x[i], u_v[i],
                work,
            )  # fmt: skip
        else:
            u_x[i] = fill
            u_v[i] = fill
        if of_Q.shape[0]:
            symmetric_product(u_x[i], x[i], of_Q[i])
        if of_A.shape[0]:
            product_of_rows(v[i, :p], u_v[i, :p], x[i], u_x[i], of_A[i])
        if of_G.shape[0]:
            product_of_rows(v[i, p:], u_v[i, p:], x[i], u_x[i], of_G[i])


@literal
def symmetric_product(u, x, out):
    """−½ (u xᵀ + x uᵀ), the gradient of Q."""
    for j in range(x.shape[0]):
        u_j, x_j, row = -0.5 * u[j], -0.5 * x[j], out[j]
        for k in range(x.shape[0]):
            row[k] = u_j * x[k] + x_j * u[k]


@jit
def product_of_rows(v, u_v, x, u_x, out):
    """−(v u_xᵀ + u_v xᵀ), the gradient of A or G."""
    for j in range(out.shape[0]):
        v_j, u_j, row = v[j], u_v[j], out[j]
        for k in range(x.shape[0]):
            row[k] = -(v_j * u_x[k] + u_j * x[k])
