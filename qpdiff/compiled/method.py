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

from ..kkt import LARGEST_RATIO, METRIC_PASSES, ROUNDING, SMALLEST_CURVATURE, UNCERTAINTY
from ..method import (
    DOMINANT,
    IMPATIENCE,
    LARGE_MULTIPLIERS,
    LARGEST_FRACTION,
    LEAST_CENTERING,
    LEAST_CENTRALITY,
    LOOSE,
    LOWER_LIMIT,
    LUCK,
    NEARER,
    PATIENCE,
    REACHED,
    RUNNING,
    SMALLER_COST,
    STEP_FRACTION,
    STUCK,
)
from ..problem import INFINITE
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
OF_VARIABLES, OF_ROWS = 18, 29
"""Vectors of a `Room`."""
PRIMAL_UNIT, DUAL_UNIT, GAP_UNIT, REACH, CURVATURE, LEAST_CURVATURE, SIZES = 0, 1, 2, 3, 4, 5, 6
"""Entries of `One.sizes`, and how many there are."""


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
    sizes: Any
    """What its residuals are measured in, how far x is likely to go, and the curvature of the scaled Q."""
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
    found_primal: float
    """The residuals in the caller's units."""
    found_dual: float
    found_gap: float
    primal: float
    """The residuals in the units of the tolerance."""
    dual: float
    gap: float
    near: bool
    worst: float
    best_primal: float
    """The smallest of each so far."""
    best_dual: float
    best_gap: float
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
    sizes: Any
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
        np.zeros((2, rows), np.int8), np.zeros(rows, np.int64), np.zeros(SIZES), np.empty((linear, n), dtype),
        np.empty((linear, n)),
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
    base_D: Any
    """What `balance` finds, which does not depend on q and k."""
    base_E: Any
    filled: Any
    """1 for the rows of A and G with an entry that is not 0, else 0."""
    occupied: Any
    """1 for the variables that are in Q or in a row, else 0."""
    unit_x: Any
    """What residuals are multiplied by before they are compared with the tolerance."""
    unit_v: Any
    sizes: Any
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
        base_D=x[15], occupied=x[16], unit_x=x[17], base_E=v[26], unit_v=v[27], filled=v[28], sizes=room.sizes,
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
def balance(one, work):
    """Fill the scales of the variables and of the rows of A and G, `kkt.balance`, and the curvature."""
    Q, K, D2, E2 = one.Q, one.K, work.base_D, work.base_E
    n, linear = Q.shape[0], K.shape[0]
    columns, lengths, curved = work.columns, work.shifted, work.occupied
    first_D, first_E = work.dx, work.dv
    largest = zero(columns)
    for j in range(n):
        largest = larger(Q[j, j], largest)
    for j in range(n):
        entry = Q[j, j]
        usable = (entry > SMALLEST_CURVATURE * largest) & finite(entry)
        curved[j] = select(usable, 1.0, 0.0)
        first_D[j] = 1.0 / root(select(usable, entry, 1.0))
        columns[j] = 0.0
    for i in range(linear):
        some_curved = every = zero(columns)
        for j in range(n):
            entry = abs(K[i, j])
            every = larger(entry, every)
            some_curved = larger(entry * first_D[j] * curved[j], some_curved)
        length = select(some_curved > 0.0, some_curved, every)
        first_E[i] = reciprocal(length)
        work.filled[i] = select((length > 0.0) & finite(length), 1.0, 0.0)
        for j in range(n):
            columns[j] = larger(abs(K[i, j]) * first_E[i], columns[j])
        E2[i] = 1.0
    for j in range(n):
        first_D[j] = select(curved[j] > 0.0, first_D[j], reciprocal(columns[j]))
        D2[j] = 1.0
    curvature, flattest = zero(columns), zero(columns)
    for _ in range(METRIC_PASSES):
        for i in range(n):
            total = zero(columns)
            for j in range(n):
                total += square(Q[i, j] * first_D[j]) * D2[j]
            columns[i] = square(first_D[i]) * total
            curved[i] = columns[i]
        for i in range(linear):
            total, scale = zero(columns), E2[i]
            for j in range(n):
                entry = square(K[i, j] * first_E[i] * first_D[j])
                columns[j] += entry * scale
                total += entry * D2[j]
            lengths[i] = scale * total
        for i in range(linear):
            E2[i] = rescaled(E2[i], lengths[i])
        curvature, flattest = zero(columns), zero(columns) + np.inf
        for j in range(n):
            columns[j] *= D2[j]
            D2[j] = rescaled(D2[j], columns[j])
            curvature, flattest = larger(curved[j] * D2[j], curvature), smaller(curved[j] * D2[j], flattest)
    for j in range(n):
        D2[j] = root(D2[j]) * first_D[j]
        work.occupied[j] = select(columns[j] > 0.0, 1.0, 0.0)
    for i in range(linear):
        E2[i] = root(E2[i]) * first_E[i]
    one.sizes[CURVATURE], one.sizes[LEAST_CURVATURE] = root(curvature), root(flattest)


@jit
def reciprocal(length):
    usable = (length > 0.0) & finite(length)
    return 1.0 / select(usable, length, 1.0)


@jit
def rescaled(scale, length2):
    usable = finite(length2) & (length2 > 0.0)
    value = scale / root(select(usable, length2, 1.0))
    return select(usable, smaller(larger(value, 1.0 / LARGEST_RATIO), LARGEST_RATIO), 1.0)


@jit
def equilibrate(one, settings, lb, ub, work):
    """Fill the metric of a problem after `balance`, and what its residuals are measured in; its largest |Dq|."""
    D, E, occupied = one.D, one.E, work.occupied
    n, linear, lower, upper = one.q.shape[0], one.K.shape[0], one.lower, one.upper
    for j in range(n):
        D[j] = work.base_D[j]
    for i in range(linear):
        E[i] = work.base_E[i]
    scale_bounds(one)
    needed = nearest = slope = zero(one.q)
    for i in range(E.shape[0]):
        k = select(one.kind[i] == ABSENT, 0.0, E[i] * one.k[i])
        if i < linear:
            k *= work.filled[i]
        elif lower and upper:
            k *= occupied[i - linear if i < linear + lower else i - linear - lower]
        needed = larger(abs(k) if one.kind[i] == EQUALITY else positive(-k), needed)
        nearest = larger(select(k == 0.0, 0.0, 1.0 / select(k == 0.0, 1.0, abs(k))), nearest)
    for j in range(n):
        slope = larger(abs(D[j] * one.q[j]), slope)
    curvature = one.sizes[CURVATURE]
    free = select(curvature > 0.0, slope / select(curvature > 0.0, curvature, 1.0), 0.0)
    least = select(nearest > 0.0, 1.0 / select(nearest > 0.0, nearest, 1.0), np.inf)
    primal = smaller(least, select(free > 0.0, free, np.inf))
    primal = select(needed > 0.0, larger(needed, ROUNDING * free), primal)
    primal = select(primal < np.inf, primal, 1.0)
    curved = curvature * primal
    dual = select(curved < slope, root(slope * select(curved > 0.0, curved, slope)), curved)
    dual = select(dual > 0.0, dual, primal)
    flattest = one.sizes[LEAST_CURVATURE]
    far = select(flattest > 0.0, slope / select(flattest > 0.0, flattest, 1.0), np.inf)
    reach = larger(needed, smaller(far, UNCERTAINTY * free))
    one.sizes[PRIMAL_UNIT], one.sizes[DUAL_UNIT], one.sizes[GAP_UNIT] = primal, dual, primal * dual
    one.sizes[REACH] = select(reach > 0.0, reach, np.inf)
    if lower and upper:
        for j in range(n):
            span = ub[j] - lb[j]
            known = (occupied[j] == 0.0) & (span > 0.0) & (span < INFINITE)
            D[j] = select(known, span / primal, D[j])
        scale_bounds(one)
    for j in range(n):
        work.unit_x[j] = 1.0 if settings.absolute else D[j] / dual
    for i in range(E.shape[0]):
        work.unit_v[i] = 1.0 if settings.absolute else E[i] / primal
    return slope


@jit
def scale_bounds(one):
    """The scale of a row of bounds is that of its variable."""
    row = one.K.shape[0]
    for j in range(one.lower):
        one.E[row + j] = 1.0 / one.D[j]
    row += one.lower
    for j in range(one.upper):
        one.E[row + j] = 1.0 / one.D[j]


@jit
def scale_cost(one, c):
    """The metric of the problem whose cost is c times as large; what residuals are compared with does not change."""
    factor, sizes = root(c), one.sizes
    for j in range(one.D.shape[0]):
        one.D[j] *= factor
    for i in range(one.E.shape[0]):
        one.E[i] /= factor
    sizes[PRIMAL_UNIT], sizes[DUAL_UNIT], sizes[REACH] = (
        sizes[PRIMAL_UNIT] / factor, sizes[DUAL_UNIT] * factor, sizes[REACH] / factor
    )  # fmt: skip


@jit
def balance_cost(one, slope, work):
    """Without curvature, make the cost about as large as the right-hand sides: `kkt.equilibrate`; for one problem."""
    if one.sizes[CURVATURE] > 0.0 or not slope > 0.0:
        return
    linear, lower, total, count = one.K.shape[0], one.lower, 0.0, 0
    for i in range(one.E.shape[0]):
        counts = one.kind[i] != ABSENT
        if i < linear:
            counts &= work.filled[i] > 0.0
        elif lower and one.upper:
            counts &= work.occupied[i - linear if i < linear + lower else i - linear - lower] > 0.0
        k = abs(one.E[i] * one.k[i])
        if counts and k > 0.0:
            total += np.log(k)
            count += 1
    scale_cost(one, np.exp(total / max(count, 1)) / slope)


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
def prepare_diagonal(one, reduced, single, work):
    """The same for a diagonal Q, with or without bounds."""
    sound = True
    for i in range(one.Q.shape[0]):
        entry = one.Q[i, i]
        sound &= entry * work.base_D[i] * work.base_D[i] > 1e-6
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
def later_delta(settings, delta, rate, limiting):
    """The δ of the next step; further down where it keeps the residual of the constraints from falling."""
    lowest = select(limiting, LOWER_LIMIT * settings.smallest, smaller(delta, settings.smallest))
    return larger((1.0 - rate) * delta, lowest)


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
        if kind == INEQUALITY:
            distance = larger(one.E[i] * one.k[i] / (LOOSE * one.sizes[REACH]), 1.0)
            work.theta[i] = distance * work.metric_v[i]
        else:
            work.theta[i] = 0.0 if kind == EQUALITY else np.inf


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
    mu = larger(total / max(count, 1), LEAST_CENTRALITY * square(larger(most, least)))
    mu = larger(mu, settings.smallest * one.sizes[PRIMAL_UNIT] * one.sizes[DUAL_UNIT])
    for i in range(rows):
        if one.kind[i] == INEQUALITY:
            difference[i] *= square(one.E[i]) * work.theta[i]
    onto_path(one, now.v, difference, mu, now.s)
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
    unit = one.sizes[PRIMAL_UNIT] * one.sizes[DUAL_UNIT]
    mu = 0.1 * error * root(unit)
    mu = mu if mu < cold_mu else cold_mu
    mu = max(mu, max(settings.tol, settings.smallest) * unit)
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

    found_dual = dual = size_Qx = size_q = size_Kv = terms = zero(x)
    for i in range(n):
        Qx, q, unit = now.Qx[i], one.q64[i], work.unit_x[i]
        r_x = -(Qx + q + Kv[i])
        now.r_x[i] = r_x
        found_dual, dual = larger(abs(r_x), found_dual), larger(unit * abs(r_x), dual)
        size_Qx, size_q = larger(unit * abs(Qx), size_Qx), larger(unit * abs(q), size_q)
        size_Kv = larger(unit * abs(Kv[i]), size_Kv)
        terms += abs(x[i]) * (abs(Qx) + abs(q))
    found_primal = primal = size_Kx = scaled_violation = zero(x)
    scaled_k, most = one.sizes[PRIMAL_UNIT], LOOSE * one.sizes[REACH]
    for i in range(rows):
        k, E, unit = one.k64[i], one.E[i], work.unit_v[i]
        scaled_k = larger(select(E * k <= most, abs(E * k), 0.0), scaled_k)
        terms += abs(v[i]) * abs(k)
        if one.kind[i] == ABSENT:
            now.Kx[i] = 0.0
            now.r_v[i] = 0.0
            continue
        Kx = now.Kx[i]
        r_v = k - Kx - now.s[i]
        now.r_v[i] = r_v
        violation = abs(r_v) if one.kind[i] == EQUALITY else positive(Kx - k)
        size_Kx = larger(unit * abs(Kx), size_Kx)
        found_primal, primal = larger(violation, found_primal), larger(unit * violation, primal)
        scaled_violation = larger(E * violation, scaled_violation)
    xQx, qx = dot(x, now.Qx), dot(x, one.q64)
    kv, gap = zero(x), xQx + qx
    # By blocks, each summed by itself, the last first: terms that cancel do so in the same way everywhere.
    p, upper = one.equalities, linear + one.lower
    for start, stop in ((p, linear), (0, p), (upper, rows), (linear, upper)):
        part = dot(one.k64[start:stop], v[start:stop])
        gap += part
        kv += part
    found_gap, unit = abs(gap), gap_unit(one, settings)
    gap = unit * found_gap

    worst = larger(primal, larger(dual, gap))
    tol, rtol = settings.tol, settings.rtol
    near = (
        (primal <= tol + rtol * size_Kx)
        & (dual <= tol + rtol * larger(size_Qx, larger(size_q, size_Kv)))
        & (gap + LUCK * EPS * unit * terms <= tol + rtol * unit * larger(abs(xQx), larger(abs(qx), abs(kv))))
        & (worst < np.inf)
    )

    no_bottom = fall = no_point = gain = zero(x)
    if form != DENSE_DUAL and some(dual > tol):
        no_bottom, fall = unbounded(one, tol, now, before, x, work)
    if some(primal > tol):
        no_point, gain = infeasible(one, tol, before, v, now.Kx, scaled_k, work)
    no_bottom, no_point = select(dual > tol, no_bottom, 0.0), select(primal > tol, no_point, 0.0)
    proof = larger(no_point, no_bottom)

    waiting = waited(settings, past, primal, dual, gap, proof)
    at_limit = iterations >= limit
    patient = waiting < PATIENCE
    last = no(patient) | at_limit
    enough = settings.certificate * select(last, 0.01, 1.0)
    status = select(patient, select(at_limit, MAX_ITERATIONS, RUNNING), STALLED)
    falls = (no_bottom > enough) & (last | (scaled_violation <= 1e-4 * scaled_k))
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
    return Verdict(
        status, 0.5 * xQx + qx, found_primal, found_dual, found_gap, primal, dual, gap, near, worst,
        least_of(primal, past.best_primal), least_of(dual, past.best_dual), least_of(gap, past.best_gap),
        larger(proof, past.proof), waiting,
    )  # fmt: skip


@hot
def gap_unit(one, settings):
    """What a gap is multiplied by before it is compared with the tolerance."""
    return each(one.sizes[GAP_UNIT], 1.0) if settings.absolute else 1.0 / one.sizes[GAP_UNIT]


@hot
def least_of(value, best):
    """The smaller one; NaN does not count."""
    return select(value < best, value, best)


@hot
def waited(settings, past, primal, dual, gap, proof):
    """Iterations since a residual or what proves that there is no solution last improved, after a further one."""
    least = 0.1 * settings.tol
    improved = proof > 1.1 * past.proof
    improved |= (primal < 0.9 * past.best_primal) & (past.best_primal > least)
    improved |= (dual < 0.9 * past.best_dual) & (past.best_dual > least)
    improved |= (gap < 0.9 * past.best_gap) & (past.best_gap > least)
    return select(improved, 0, past.waiting + 1)


@jit
def unbounded(one, tol, now, before, x, work):
    """How near the last step in x is to a direction of unbounded descent, and how far it goes down."""
    ray = work.ray
    total = size = length = uphill = hidden = zero(x)
    cost = one.sizes[DUAL_UNIT]
    for i in range(x.shape[0]):
        ray[i] = x[i] - before.x[i]
        term = one.q64[i] * ray[i]
        total += term
        size += abs(term)
        length += abs(ray[i]) / work.unit_x[i]
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
    return select(falls, -total / (uphill * cost), 0.0), -total


@jit
def infeasible(one, tol, before, v, Kx, size_k, work):
    """How near the last step in the multipliers is to a Farkas certificate, and how much it gains."""
    farkas = work.farkas
    total = size = length = zero(v)
    for i in range(v.shape[0]):
        step = v[i] - before.v[i]
        farkas[i] = positive(step) if one.kind[i] == INEQUALITY else step
        term = one.k64[i] * farkas[i]
        total += term
        size += abs(term)
        length += abs(farkas[i]) / work.unit_v[i]
    gains = -total > larger(1e-8 * size, tol * length)
    if not some(gains):
        return select(gains, 1.0, 0.0), -total
    adjoint(one.K64, one.lower, one.upper, farkas, work.Kv)
    left = zero(v)
    for i in range(work.Kv.shape[0]):
        left = larger(abs(one.D[i] * work.Kv[i]), left)
    reached = hidden = zero(v)
    for i in range(Kx.shape[0]):
        reached, hidden = larger(abs(one.E[i] * Kx[i]), reached), larger(abs(v[i] / one.E[i]), hidden)
    # The rounding of the difference hides as much.
    left = larger(left, EPS * hidden)
    most = larger(size_k, smaller(reached, REACHED * size_k))
    return select(gains, -total / (left * most), 0.0), -total


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
def center(one, settings, mu, waiting, before, work):
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
    # What goes round in circles otherwise comes to an end with more centering.
    sigma = select(waiting > IMPATIENCE, larger(sigma, LEAST_CENTERING), sigma)
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
def step(form, one, reduced, settings, mu, rho, delta, refine, waiting, before, now, work):
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
    fraction = center(one, settings, mu, waiting, before, work)
    solve_refined(form, one, reduced, refine, before.r_x, work.shifted, dx, dv, work)
    alpha_s, alpha_z = advance(one, settings, waiting >= IMPATIENCE, fraction, before, now, work)
    for i in range(now.x.shape[0]):
        now.x[i] = before.x[i] + alpha_s * dx[i]
    sound = factored & all_finite(now.x) & all_finite(now.v) & all_finite(now.s)
    return sound, factored, alpha_s, alpha_z, select(sound, mean(one, now.s, now.v), mu)


@hot
def variables_are_exact(settings, alpha_s, alpha_z, before, now, past, work):
    """Whether the linear solve has left little in the variables; it shows in the products before and after the step."""
    left = zero(work.dx)
    per_alpha_s, per_alpha_z = 1.0 / alpha_s, 1.0 / alpha_z
    for i in range(now.x.shape[0]):
        Q_dx = now.Qx[i] - before.Qx[i]
        Kt_dv = before.r_x[i] - now.r_x[i] - Q_dx
        value = before.r_x[i] - Q_dx * per_alpha_s - Kt_dv * per_alpha_z - work.rho[i] * work.dx[i]
        left = larger(work.unit_x[i] * abs(value), left)
    return left <= larger(1e-6 * past.dual, 0.01 * settings.tol)


@hot
def rows_after(one, settings, alpha_s, before, now, work):
    """Whether the linear solve has left little in the rows; and whether δ keeps their residual from falling."""
    left = was = now_is = by_delta = multipliers = products = zero(work.dv)
    for i in range(now.v.shape[0]):
        r_v, unit = before.r_v[i], work.unit_v[i]
        was, now_is = larger(unit * abs(r_v), was), larger(unit * abs(now.r_v[i]), now_is)
        proximal = alpha_s * work.delta[i] * work.dv[i]
        by_delta = larger(unit * abs(proximal), by_delta)
        left = larger(unit * abs(now.r_v[i] - (1.0 - alpha_s) * r_v + proximal), left)
    exact = left <= larger(1e-6 * was, 0.01 * settings.tol)
    limiting = (by_delta > DOMINANT * now_is) & (now_is > STUCK * was) & (now_is > settings.tol)
    if some(limiting):
        for i in range(now.v.shape[0]):
            multipliers = larger(abs(now.v[i] / one.E[i]), multipliers)
            products = larger(abs(one.E[i] * now.Kx[i]), products)
        limiting &= multipliers > products
    return exact, limiting


@jit
def begin(form, one, reduced, settings, now, before, work):
    """The ordinary start in `now`: its μ, how it stands, whether the matrix was factored; and `multiplier_ratio`."""
    mu, sound = initialize(form, one, reduced, settings, now, work)
    before.x[:] = 0.0
    before.v[:] = 0.0
    before.Qx[:] = 0.0
    before.Kx[:] = 0.0
    past = unknown(mu)
    verdict = assess(form, one, settings, now, before, past, np.int64(0), settings.max_iterations, work)
    ratio = 0.0 * mu
    if form != DENSE_DUAL and one.q.itemsize == 8 and (one.equalities or (one.lower and one.upper)):
        ratio = multiplier_ratio(one, now)
    return mu, verdict, sound, ratio


@jit
def multiplier_ratio(one, now):
    """The largest multiplier of an equality against the largest variable in the scaled problem."""
    x = v = zero(now.x)
    for j in range(now.x.shape[0]):
        x = larger(abs(now.x[j] / one.D[j]), x)
    for i in range(now.v.shape[0]):
        if one.kind[i] == EQUALITY:
            v = larger(abs(now.v[i] / one.E[i]), v)
    return v / select(x > 0.0, x, 1.0)


@jit
def begin_anywhere(form, one, reduced, settings, now, before, work):
    """`begin`, and for one problem with large multipliers once more for a fraction of the cost: `method.initialize`."""
    mu, verdict, sound, ratio = begin(form, one, reduced, settings, now, before, work)
    if not ratio > LARGE_MULTIPLIERS:
        return mu, verdict, sound
    scale_cost(one, SMALLER_COST)
    other_mu, other, other_sound, other_ratio = begin(form, one, reduced, settings, now, before, work)
    if other.primal < NEARER * verdict.primal and other_ratio < 0.1 * ratio:
        return other_mu, other, other_sound
    scale_cost(one, 1.0 / SMALLER_COST)
    mu, verdict, sound, _ = begin(form, one, reduced, settings, now, before, work)
    return mu, verdict, sound


@jit
def unknown(mu):
    """The verdict before the first."""
    bad = each(mu, np.inf)
    return Verdict(
        each(mu, RUNNING), bad, bad, bad, bad, bad, bad, bad, each(mu, False), bad, bad, bad, bad, each(mu, 0.0),
        each(mu, 0),
    )  # fmt: skip


@jit
def revised(verdict, status, waiting):
    return Verdict(
        status, verdict.objective, verdict.found_primal, verdict.found_dual, verdict.found_gap, verdict.primal,
        verdict.dual, verdict.gap, verdict.near, verdict.worst, verdict.best_primal, verdict.best_dual,
        verdict.best_gap, verdict.proof, waiting,
    )  # fmt: skip
