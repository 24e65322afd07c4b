"""The method of `qpdiff.method` for one problem at a time, in compiled code.

Every function here does for one problem what the function of the same name in `qpdiff.method` or `qpdiff.kkt` does for
a batch, where the mathematics is explained; a test holds the two against each other iteration by iteration. One problem
is carried from its start to its end before the next, so that its matrices stay in the cache, and what is the same for
the predictor and the corrector is computed once.

The functions of a step also take `lanes`, the numbers of several problems, for `groups`. Hence they branch on the kinds
of rows, which are the same for all, but on numbers they `select`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..kkt import METRIC_PASSES
from ..method import LARGEST_FRACTION, LUCK, PATIENCE, RUNNING, STEP_FRACTION
from ..solution import Status
from .compiler import finite, hot, jit
from .lanes import each, every, larger, no, root, select, smaller, some, zero
from .stacks import (
    add_gram,
    add_product_transposed,
    backward,
    cholesky,
    cholesky_of_sum,
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
"""The reduced forms: `kkt.PrimalForm`, `kkt.DenseDualForm` and `kkt.DiagonalDualForm`."""
SMALLEST, SMALLEST_SINGLE = (float(np.finfo(kind).smallest_normal) for kind in (np.float64, np.float32))
LARGEST_ROOT, LARGEST_ROOT_SINGLE = (float(np.sqrt(np.finfo(kind).max)) for kind in (np.float64, np.float32))
EPS = float(np.finfo(np.float64).eps)
OF_VARIABLES, OF_ROWS = 15, 26
"""Vectors of a `Room`."""


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
    """The factor F of Q = FᵀF; of a diagonal Q with what the bounds add, one row with Q⁻¹ instead."""
    V: Any
    """F⁻ᵀKᵀ."""
    S: Any
    """K Q⁻¹ Kᵀ, the upper triangle at least."""
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
    order: Any
    """Numbers of rows."""
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
        np.zeros((OF_VARIABLES, n), dtype), np.zeros((OF_ROWS, rows), dtype), np.zeros((5, n)), np.zeros((5, rows)),
        np.zeros((2, rows), np.int8), np.zeros(rows, np.int64), np.empty((linear, n), dtype), np.empty((linear, n)),
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
    order: Any
    theta: Any
    rho: Any
    delta: Any
    b_x: Any
    shifted: Any
    complementarity: Any
    weights: Any
    diagonal: Any
    t: Any
    Vt: Any
    dx: Any
    dv: Any
    ds: Any
    metric_x: Any
    metric_v: Any
    per_s: Any
    per_z: Any
    x_seen: Any
    r_seen: Any
    v_seen: Any
    u: Any
    Sdv: Any
    cx: Any
    cv: Any
    e_x: Any
    e_v: Any
    columns: Any
    scaled: Any
    turned: Any
    square: Any


@jit
def make_work(room):
    """The room for one problem by name."""
    x, v, x64, v64, flags = room.x, room.v, room.x64, room.v64, room.flags
    return Work(
        x=x64[0], ray=x64[1], Kv=x64[2], v=v64[0], farkas=v64[1], k64=v64[2],
        kind=flags[0], heavy=flags[1], order=room.order, stacked=room.stacked, stacked64=room.stacked64,
        scaled=room.scaled, turned=room.turned, square=room.square,
        rho=x[0], b_x=x[1], t=x[2], dx=x[3], cx=x[4], e_x=x[5], columns=x[6], right_x=x[7],
        metric_x=x[12], metric_v=v[19], per_s=v[20], per_z=v[21],
        x_seen=x[13], r_seen=x[14], v_seen=v[22], u=v[23], Sdv=v[24], diagonal=v[25],
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


@hot
def hessian(form, Q, x, out):
    """Qx, of whose entries only the diagonal counts in the form that is for no other."""
    if form == DIAGONAL_DUAL:
        for i in range(x.shape[0]):
            out[i] = Q[i, i] * x[i]
    else:
        product(Q, x, out)


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
    columns, lengths = work.columns, work.shifted
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
            lengths[i] = scale * total
        for i in range(linear):
            E[i] = rescaled(E[i], lengths[i])
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
def invert_diagonal(one, reduced):
    """One over a diagonal Q with what bounds add to it."""
    inverse = reduced.hessian[0]
    for j in range(inverse.shape[0]):
        inverse[j] = 1.0 / (reduced.diagonal[j] + bound_weights(one, reduced.weights, j))


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
    huge = LARGEST_ROOT_SINGLE if one.q.itemsize == 4 else LARGEST_ROOT
    diagonal = work.diagonal
    for i in range(linear):
        entry = theta[i] + delta[i]
        # Rows that do not exist get a diagonal that is huge but harmless to the factorisation.
        diagonal[i] = select(finite(entry), entry, huge)
    if form == DENSE_DUAL:
        return cholesky_of_sum(reduced.S, diagonal, U, linear)
    invert_diagonal(one, reduced)
    for j in range(n):
        row, out, scale = work.turned[j], reduced.V[j], root(reduced.hessian[0][j])
        for i in range(linear):
            out[i] = row[i] * scale
    U[:] = 0.0
    add_gram(reduced.V, n, U, linear)
    for i in range(linear):
        U[i, i] += diagonal[i]
    return cholesky(U, linear)


@hot
def eliminate(form, reduced, r_x, work):
    """What a solve needs of the right-hand side of the variables alone, in `work`: done once for many solves."""
    if form == DENSE_DUAL:
        whiten(reduced, r_x, work)


@hot
def whiten(reduced, r_x, work):
    """F⁻ᵀr_x, and K Q⁻¹ r_x."""
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
    # Loops without branches, which become vector instructions.
    inverse, of_upper = reduced.hessian[0], linear + lower
    copy(r_x, t)
    for j in range(lower):
        t[j] -= weights[linear + j] * r_v[linear + j]
    for j in range(upper):
        t[j] += weights[of_upper + j] * r_v[of_upper + j]
    for j in range(n):
        t[j] *= inverse[j]
    y = dv[:linear]
    product(K, t, y)
    for i in range(linear):
        y[i] -= r_v[i]
    solve_cholesky(reduced.U, y)
    dx[:] = 0.0
    add_product_transposed(K, y, dx)
    for j in range(n):
        dx[j] = t[j] - inverse[j] * dx[j]
    for j in range(lower):
        dv[linear + j] = weights[linear + j] * (-dx[j] - r_v[linear + j])
    for j in range(upper):
        dv[of_upper + j] = weights[of_upper + j] * (dx[j] - r_v[of_upper + j])


@hot
def solve(form, one, reduced, r_x, r_v, dx, dv, work):
    """Solve for right-hand sides of the variables and of the rows, after `eliminate`."""
    solve_rows(form, one, reduced, r_x, r_v, dx, dv, work)
    if form == DENSE_DUAL:
        solve_variables(reduced, 1.0, dv, dx, work)


@hot
def solve_variables(reduced, share, dv, dx, work):
    """Q⁻¹ (r_x − Kᵀdv) in the dense dual form, with a share of the r_x that has been whitened."""
    product(reduced.V, dv, dx)
    for i in range(dx.shape[0]):
        dx[i] = share * work.t[i] - dx[i]
    backward(reduced.hessian, dx)


@jit
def residual(form, one, theta, rho, delta, r_x, r_v, dx, dv, e_x, e_v, work):
    """What a step leaves of the right-hand side of the KKT system, in (e_x, e_v)."""
    hessian(form, one.Q, dx, e_x)
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
    residual(form, one, work.theta, work.rho, work.delta, r_x, r_v, dx, dv, work.e_x, work.e_v, work)
    eliminate(form, reduced, work.e_x, work)
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
def first_rho(form, settings):
    """The ρ to begin with; a dense Q that is reduced to the rows is definite without."""
    return 0.0 if form == DENSE_DUAL else settings.rho


@jit
def later_rho(form, settings, rho, rate):
    """The ρ of the next step, after μ has fallen by this share."""
    return 0.0 * rho if form == DENSE_DUAL else larger((1.0 - rate) * rho, settings.smallest)


@jit
def weigh_start(form, one, settings, work):
    """Fill the diagonals of the KKT matrix that the ordinary starting point is made with."""
    for i in range(work.rho.shape[0]):
        work.metric_x[i] = 1.0 / square(one.D[i])
        work.rho[i] = first_rho(form, settings) * work.metric_x[i]
    for i in range(work.delta.shape[0]):
        work.metric_v[i] = 1.0 / square(one.E[i])
        work.delta[i] = settings.delta * work.metric_v[i]
        kind = one.kind[i]
        work.theta[i] = work.metric_v[i] if kind == INEQUALITY else (0.0 if kind == EQUALITY else np.inf)


@jit
def place(one, settings, now, work):
    """Slacks and multipliers on s ∘ z = μ for the multipliers of `now`; the mean complementarity."""
    rows, difference = now.v.shape[0], work.shifted
    most, least = zero(now.v), zero(now.v)
    for i in range(rows):
        difference[i] = now.v[i] / one.E[i] if one.kind[i] == INEQUALITY else 0.0
        most, least = larger(difference[i], most), larger(-difference[i], least)
    total, count = zero(now.v), 0
    for i in range(rows):
        if one.kind[i] == INEQUALITY:
            total += (difference[i] + least) * (most - difference[i])
            count += 1
    onto_path(one, now.v, difference, larger(total / max(count, 1), settings.smallest), now.s)
    return mean(one, now.s, now.v)


@jit
def initialize(form, one, reduced, settings, now, work):
    """The ordinary starting point in `now`; its mean complementarity, and whether the matrix could be factored."""
    n, rows = now.x.shape[0], now.v.shape[0]
    weigh_start(form, one, settings, work)
    for i in range(n):
        now.r_x[i] = -one.q[i]
    copy(one.k, now.r_v)
    factored = factor(form, one, reduced, work.theta, work.rho, work.delta, work)
    if some(factored):
        eliminate(form, reduced, now.r_x, work)
        solve_refined(form, one, reduced, factored, now.r_x, now.r_v, now.x, now.v, work)
    good = factored & all_finite(now.x) & all_finite(now.v)
    if not every(good):
        for i in range(n):
            now.x[i] = select(good, now.x[i], 0.0)
        for i in range(rows):
            now.v[i] = select(good, now.v[i], 0.0)
    return place(one, settings, now, work), factored


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
def assess(form, one, settings, now, before, past, iterations, limit, work):
    """Compute the residuals of `now` afresh and decide how the problem stands; a certificate takes the place of x or v.

    `before` and `past` are the iterate before and its verdict.
    """
    n, rows, linear = now.x.shape[0], now.v.shape[0], one.K.shape[0]
    x, v, Kv = work.x, work.v, work.Kv
    copy(now.x, x)
    copy(now.v, v)
    hessian(form, one.Q64, x, now.Qx)
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
    if form != DENSE_DUAL and some(dual > tol):
        no_bottom, fall = unbounded(one, tol, now, before, x, work)
    if some(primal > tol):
        no_point, gain = infeasible(one, tol, before, v, scaled_k, work)
    no_bottom, no_point = select(dual > tol, no_bottom, 0.0), select(primal > tol, no_point, 0.0)
    proof = larger(no_point, no_bottom)

    waiting = waited(past, worst, proof)
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


@hot
def waited(past, worst, proof):
    """Iterations since the residuals or what proves that there is no solution last improved, after a further one."""
    return select((worst < 0.9 * past.best) | (proof > 1.1 * past.proof), 0, past.waiting + 1)


@jit
def unbounded(one, tol, now, before, x, work):
    """How near the last step in x is to a direction of unbounded descent, and how far it goes down."""
    ray = work.ray
    total = size = length = uphill = hidden = cost = zero(x)
    for i in range(x.shape[0]):
        ray[i] = x[i] - before.x[i]
        term = one.q64[i] * ray[i]
        total += term
        size += abs(term)
        length += abs(ray[i])
        D = one.D[i]
        uphill = larger(abs(D * (now.Qx[i] - before.Qx[i])), uphill)
        hidden = larger(abs(D * now.Qx[i]), hidden)
        cost = larger(abs(D * one.q64[i]), cost)
    falls = -total > larger(1e-8 * size, tol * length)
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
def infeasible(one, tol, before, v, size_k, work):
    """How near the last step in the multipliers is to a Farkas certificate, and how much it gains."""
    farkas = work.farkas
    total = size = length = zero(v)
    for i in range(v.shape[0]):
        step = v[i] - before.v[i]
        farkas[i] = positive(step) if one.kind[i] == INEQUALITY else step
        term = one.k64[i] * farkas[i]
        total += term
        size += abs(term)
        length += abs(farkas[i])
    gains = -total > larger(1e-8 * size, tol * length)
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
def weigh(one, rho, delta, before, work):
    """Fill what a step from an iterate divides by, and the right-hand side of the rows for the predictor."""
    # A division takes as long as many products, so each is done once.
    for i in range(work.rho.shape[0]):
        work.rho[i] = rho * work.metric_x[i]
    for i in range(before.v.shape[0]):
        work.delta[i] = delta * work.metric_v[i]
        kind = one.kind[i]
        work.shifted[i] = before.r_v[i]
        if kind == INEQUALITY:
            work.per_s[i], work.per_z[i] = 1.0 / before.s[i], 1.0 / before.v[i]
            work.theta[i] = before.s[i] * work.per_z[i]
            work.shifted[i] += before.s[i]
        else:
            work.theta[i] = 0.0 if kind == EQUALITY else np.inf


@hot
def center(one, settings, mu, before, work):
    """Fill the right-hand side of the rows for the corrector, after the predictor's multipliers; and its fraction."""
    dv, ds, theta, shifted, complementarity = work.dv, work.ds, work.theta, work.shifted, work.complementarity
    rows = dv.shape[0]
    for i in range(rows):
        ds[i] = -(before.s[i] + theta[i] * dv[i]) if one.kind[i] == INEQUALITY else 0.0
    alpha_s, alpha_z = step_lengths(one, work.per_s, work.per_z, ds, dv, 1.0)
    total, count = zero(dv), 0
    for i in range(rows):
        if one.kind[i] == INEQUALITY:
            total += (before.s[i] + alpha_s * ds[i]) * (before.v[i] + alpha_z * dv[i])
            count += 1
    ratio = positive(total / max(count, 1) / (mu + settings.tiny))
    ratio = select(ratio > 1.0, 1.0, ratio)
    sigma = ratio * ratio * ratio
    for i in range(rows):
        shifted[i] = before.r_v[i]
        if one.kind[i] == INEQUALITY:
            complementarity[i] = before.s[i] * before.v[i] + ds[i] * dv[i] - sigma * mu
            shifted[i] += complementarity[i] * work.per_z[i]
    return smaller(larger(1.0 - ratio, STEP_FRACTION), LARGEST_FRACTION)


@hot
def advance(one, settings, circling, fraction, before, now, work):
    """Move the slacks and the multipliers along the corrector's direction; the lengths for x and s, and for v."""
    dv, ds = work.dv, work.ds
    for i in range(dv.shape[0]):
        if one.kind[i] == INEQUALITY:
            ds[i] = -(work.complementarity[i] * work.per_z[i] + work.theta[i] * dv[i])
    alpha_s, alpha_z = step_lengths(one, work.per_s, work.per_z, ds, dv, fraction)
    shorter = smaller(alpha_s, alpha_z)
    alpha_s, alpha_z = select(circling, shorter, alpha_s), select(circling, shorter, alpha_z)
    for i in range(dv.shape[0]):
        kind = one.kind[i]
        if kind == INEQUALITY:
            now.s[i] = larger(before.s[i] + alpha_s * ds[i], settings.tiny)
            now.v[i] = larger(before.v[i] + alpha_z * dv[i], settings.tiny)
        else:
            now.s[i] = 0.0
            now.v[i] = before.v[i] + alpha_z * dv[i] if kind == EQUALITY else 0.0
    return alpha_s, alpha_z


@hot
def step(form, one, reduced, settings, mu, rho, delta, refine, circling, before, now, work):
    """One predictor-corrector step from `before` to `now`.

    Returns whether it could be computed, whether the matrix could be factored, its lengths, and μ after it.
    """
    dx, dv = work.dx, work.dv
    weigh(one, rho, delta, before, work)
    factored = factor(form, one, reduced, work.theta, work.rho, work.delta, work)
    if not some(factored):
        return factored, factored, 0.0 * mu, 0.0 * mu, mu
    eliminate(form, reduced, before.r_x, work)
    solve_rows(form, one, reduced, before.r_x, work.shifted, dx, dv, work)
    fraction = center(one, settings, mu, before, work)
    solve_refined(form, one, reduced, refine, before.r_x, work.shifted, dx, dv, work)
    alpha_s, alpha_z = advance(one, settings, circling, fraction, before, now, work)
    for i in range(now.x.shape[0]):
        now.x[i] = before.x[i] + alpha_s * dx[i]
    sound = factored & all_finite(now.x) & all_finite(now.v) & all_finite(now.s)
    return sound, factored, alpha_s, alpha_z, select(sound, mean(one, now.s, now.v), mu)


@hot
def needs_refinement(settings, alpha_s, alpha_z, before, now, past, work):
    """Whether the linear solve has left too much of its system; it shows in the products before and after the step."""
    left = zero(work.dx)
    per_alpha_s, per_alpha_z = 1.0 / alpha_s, 1.0 / alpha_z
    for i in range(now.x.shape[0]):
        Q_dx = now.Qx[i] - before.Qx[i]
        Kt_dv = before.r_x[i] - now.r_x[i] - Q_dx
        value = before.r_x[i] - Q_dx * per_alpha_s - Kt_dv * per_alpha_z - work.rho[i] * work.dx[i]
        left = larger(abs(value), left)
    enough = left <= larger(1e-6 * past.dual, 0.01 * settings.tol)
    return no(enough & rows_are_exact(settings, alpha_s, before, now, work))


@hot
def rows_are_exact(settings, alpha_s, before, now, work):
    """Whether the linear solve has left little in the rows."""
    left = allowed = zero(work.dv)
    for i in range(now.v.shape[0]):
        r_v = before.r_v[i]
        allowed = larger(abs(r_v), allowed)
        value = now.r_v[i] - (1.0 - alpha_s) * r_v + alpha_s * work.delta[i] * work.dv[i]
        left = larger(abs(value), left)
    return left <= larger(1e-6 * allowed, 0.01 * settings.tol)


@jit
def begin(form, one, reduced, settings, now, before, work):
    """The ordinary start in `now`: its μ, how it stands, and whether the matrix could be factored."""
    mu, sound = initialize(form, one, reduced, settings, now, work)
    before.x[:] = 0.0
    before.v[:] = 0.0
    before.Qx[:] = 0.0
    before.Kx[:] = 0.0
    past = unknown(mu)
    return mu, assess(form, one, settings, now, before, past, np.int64(0), settings.max_iterations, work), sound


@jit
def unknown(mu):
    """The verdict before the first."""
    bad = each(mu, np.inf)
    return Verdict(each(mu, RUNNING), bad, bad, bad, bad, each(mu, False), bad, bad, each(mu, 0.0), each(mu, 0))


@jit
def revised(verdict, status, waiting):
    return Verdict(
        status, verdict.objective, verdict.primal, verdict.dual, verdict.gap, verdict.near, verdict.worst,
        verdict.best, verdict.proof, waiting,
    )  # fmt: skip
