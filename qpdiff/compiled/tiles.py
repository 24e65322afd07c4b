"""Cholesky factors and products of matrices in tiles of registers, written as LLVM instructions.

LAPACK packs matrices before it multiplies them, and factors small ones column by column: at 50 × 50 that takes three
times as long. Here nothing is packed. A tile of a few rows and vectors is loaded once, a sum of products is taken off
it in registers, and it is stored once; above `BLOCK` rows BLAS does the greater part.

The matrices lie row by row, and their rows and columns are `padded`, so that there are only whole tiles. What the
padding holds never gets into the rest. Of symmetric matrices the upper triangle counts.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .blas import add_gram_tn, add_product_tn
from .compiler import finite, jit
from .registers import VECTOR, span, unpacked, whole, word

ROWS, ALIGNMENT = 4, 64
"""Rows of a tile; what the columns of a padded matrix fill, in bytes."""
BLOCK = 128
"""Rows that are factored, or solved for, without BLAS."""
_WIDTHS = 3, 2, 1
"""Vectors of a tile: as many as there are registers for, then what is left over."""


def padded(rows: int, columns: int, itemsize: int) -> tuple[int, int]:
    """The shape that a matrix of this many rows and columns is stored in."""
    lanes = ALIGNMENT // itemsize
    return -(-rows // ROWS) * ROWS, -(-columns // lanes) * lanes


def _tiles(sign: int, substitute: bool):
    """Instructions for C ← M ± AᵀB in rows i to i + ROWS of C, its columns from `start` to `stop`, with rows `first` to
    `last` of A and B. With `substitute` they then solve with the upper triangle that A has at (i, i), transposed.
    """

    @intrinsic
    def work(typing_context, A, B, M, C, i, first, last, start, stop):
        signature = types.void(A, B, M, C, i, first, last, start, stop)

        def generate(context, builder, signature, arguments):
            a, b, m, c, i, first, last, start, stop = unpacked(context, builder, signature, arguments, 4)
            rows = range(ROWS)
            triangle = {}
            for r in rows if substitute else ():
                corner = a.at(builder.add(i, word(r)), i)
                triangle |= {(r, s): a.repeated(a.entry(corner, s)) for s in range(r, ROWS)}
            add = c.plus if sign > 0 else c.minus

            def tile(column, vectors):
                source, target = ([x.at(builder.add(i, word(r)), column) for r in rows] for x in (m, c))
                sums = {(r, v): cgutils.alloca_once(builder, c.vector) for r in rows for v in vectors}
                for (r, v), place in sums.items():
                    builder.store(m.load(source[r], v), place)
                with span(builder, first, last, 1) as (k, _):
                    across, down = b.at(k, column), a.at(k, i)
                    factors = [b.load(across, v) for v in vectors]
                    for r in rows:
                        factor = a.repeated(a.entry(down, r))
                        for v in vectors:
                            place = sums[r, v]
                            builder.store(add(builder.load(place), c.times(factor, factors[v])), place)
                for v in vectors:
                    done: list = []
                    for r in rows:
                        value = builder.load(sums[r, v])
                        for s, above in enumerate(done):
                            value = c.minus(value, c.times(triangle[s, r], above))
                        if substitute:
                            value = c.times(value, triangle[r, r])
                            done.append(value)
                        c.store(value, target[r], v)

            for vectors in _WIDTHS:
                until = whole(builder, start, stop, vectors * c.lanes)
                with span(builder, start, until, vectors * c.lanes) as (column, _):
                    tile(column, range(vectors))
                start = until
            return context.get_dummy_value()

        return signature, generate

    return work


_add = _tiles(1, False)
_subtract = _tiles(-1, False)
_subtract_and_solve = _tiles(-1, True)


@jit
def _lanes(M):
    return VECTOR // M.itemsize


@jit
def _end(n, M):
    """The columns of `M` that n columns take, in whole vectors."""
    return (n + _lanes(M) - 1) // _lanes(M) * _lanes(M)


@jit
def copy_upper(M, out, n):
    """Copy the upper triangle of n rows and columns to a padded matrix, and zeros into the padding."""
    for i in range(n):
        _copy_row(M, out, i, n)
        out[i, n:] = 0.0
    out[n:, :] = 0.0


@jit
def _copy_row(M, out, i, n):
    row, to = M[i, i:n], out[i, i:n]
    for j in range(n - i):
        to[j] = row[j]


@jit
def mirror(M, n):
    """Copy the upper triangle of n rows and columns to the lower one."""
    for i in range(0, n, ROWS):
        a, b, c, d = M[i], M[i + 1], M[i + 2], M[i + 3]
        b[i], c[i], d[i] = a[i + 1], a[i + 2], a[i + 3]
        c[i + 1], d[i + 1], d[i + 2] = b[i + 2], b[i + 3], c[i + 3]
        for j in range(i + ROWS, n):
            row = M[j, i : i + ROWS]
            row[0], row[1], row[2], row[3] = a[j], b[j], c[j], d[j]


@jit
def transpose(K, out):
    """Put Kᵀ in a padded matrix, and zeros into the padding."""
    rows, n = K.shape
    whole = rows - rows % ROWS
    for i in range(0, whole, ROWS):
        a, b, c, d, columns = K[i], K[i + 1], K[i + 2], K[i + 3], out[:, i : i + ROWS]
        for j in range(n):
            columns[j, 0], columns[j, 1], columns[j, 2], columns[j, 3] = a[j], b[j], c[j], d[j]
    for i in range(whole, rows):
        for j in range(n):
            out[j, i] = K[i, j]
    for j in range(n):
        out[j, rows:] = 0.0
    out[n:, :] = 0.0


@jit
def cholesky(U, n):
    """The upper factor of M = UᵀU in place of M, with the inverses on its diagonal; whether M was positive definite.

    Below the diagonal it has the inverses of its ROWS × ROWS blocks there, transposed.
    """
    return _factor_blocks(U, U[0, :0], U, n)


@jit
def cholesky_of_sum(S, diagonal, U, n):
    """The same in U of a matrix S with a diagonal added."""
    for i in range(BLOCK, n):
        _copy_row(S, U, i, n)
    return _factor_blocks(S, diagonal, U, n)


@jit
def _factor_blocks(S, diagonal, U, n):
    """Factor a matrix whose first BLOCK rows are in S, the others in U."""
    stop = _end(n, U)
    for first in range(0, n, BLOCK):
        end, M = min(first + BLOCK, n), S
        if first > 0:
            M = U
            add_product_tn(-1.0, U[:first, first:end], U[:first, first:n], U[first:end, first:n])
        _factor_rows(M, diagonal, U, first, end, stop)
    # A pivot that is not positive leaves NaN in all rows of the blocks below it, and so does NaN.
    sound = True
    for i in range(max(0, n - 1) // ROWS * ROWS, n):
        sound &= U[i, i] > 0.0 and finite(U[i, i])
    return sound


@jit
def _factor_rows(M, diagonal, U, first, end, stop):
    """The rows of the factor from `first` to `end`, once those above it have been taken off M."""
    lanes = _lanes(U)
    for i in range(first, end, ROWS):
        # The first columns have the block on the diagonal among them, and a tile's width so that no sum waits long.
        start = i - i % max(ROWS, lanes)
        edge = min(start + max(_WIDTHS[0] * lanes, ROWS), stop)
        _subtract(U, U, M, U, i, first, i, start, edge)
        for r in range(i, min(i + ROWS, diagonal.shape[0])):
            U[r, r] += diagonal[r]
        corner = _factor(U, i)
        _put(U, i, corner)
        _subtract_and_solve(U, U, U, U, i, 0, 0, start, edge)
        _put(U, i, corner)
        _invert(U, i)
        _subtract_and_solve(U, U, M, U, i, first, i, edge, stop)


@jit
def _factor(M, i):
    """The upper factor of the ROWS × ROWS block of M at (i, i), by rows.

    Only a division stands between one pivot and the next; the square roots are taken beside that.
    """
    one, a01, a02, a03 = M.dtype.type(1.0), M[i, i + 1], M[i, i + 2], M[i, i + 3]
    e0 = one / M[i, i]
    t1, t2 = a01 * e0, a02 * e0
    a12, a13 = M[i + 1, i + 2] - t1 * a02, M[i + 1, i + 3] - t1 * a03
    e1 = one / (M[i + 1, i + 1] - t1 * a01)
    s2 = a12 * e1
    a23 = M[i + 2, i + 3] - t2 * a03 - s2 * a13
    e2 = one / (M[i + 2, i + 2] - t2 * a02 - s2 * a12)
    e3 = one / (M[i + 3, i + 3] - a03 * e0 * a03 - a13 * e1 * a13 - a23 * e2 * a23)
    d0, d1, d2, d3 = np.sqrt(e0), np.sqrt(e1), np.sqrt(e2), np.sqrt(e3)
    return d0, d0 * a01, d0 * a02, d0 * a03, d1, d1 * a12, d1 * a13, d2, d2 * a23, d3


@jit
def _put(U, i, corner):
    U[i, i], U[i, i + 1], U[i, i + 2], U[i, i + 3] = corner[:4]
    U[i + 1, i + 1], U[i + 1, i + 2], U[i + 1, i + 3] = corner[4:7]
    U[i + 2, i + 2], U[i + 2, i + 3] = corner[7:9]
    U[i + 3, i + 3] = corner[9]


@jit
def _invert(U, i):
    """Put the inverse of the triangle at (i, i) below it, transposed."""
    d0, d1, d2, d3 = U[i, i], U[i + 1, i + 1], U[i + 2, i + 2], U[i + 3, i + 3]
    w01, w12, w23 = -d0 * U[i, i + 1] * d1, -d1 * U[i + 1, i + 2] * d2, -d2 * U[i + 2, i + 3] * d3
    w02, w13 = -d0 * (U[i, i + 1] * w12 + U[i, i + 2] * d2), -d1 * (U[i + 1, i + 2] * w23 + U[i + 1, i + 3] * d3)
    w03 = -d0 * (U[i, i + 1] * w13 + U[i, i + 2] * w23 + U[i, i + 3] * d3)
    U[i + 1, i], U[i + 2, i], U[i + 2, i + 1] = w01, w02, w12
    U[i + 3, i], U[i + 3, i + 1], U[i + 3, i + 2] = w03, w13, w23


@jit
def invert_blocks(U, n):
    """Put below the diagonal of a factor from elsewhere what `cholesky` leaves there."""
    for i in range(0, n - n % ROWS, ROWS):
        _invert(U, i)


@jit
def solve_rows_above(U, n, V, columns):
    """Solve UᵀX = V in place for a factor U of n rows and a padded V."""
    stop = _end(columns, V)
    for first in range(0, n, BLOCK):
        end = min(first + BLOCK, n)
        if first > 0:
            add_product_tn(-1.0, U[:first, first:end], V[:first, :columns], V[first:end, :columns])
        for i in range(first, end, ROWS):
            _subtract_and_solve(U, V, V, V, i, first, i, 0, stop)


@jit
def add_gram(A, rows, C, n):
    """C ← C + AᵀA with so many rows of A, in the upper triangle at least."""
    if n > BLOCK:
        add_gram_tn(A[:rows, :n], C[:n, :n])
        return
    stop = _end(n, C)
    for i in range(0, n, ROWS):
        _add(A, A, C, C, i, 0, rows, i - i % _lanes(C), stop)
