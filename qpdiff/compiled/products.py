"""Products of a matrix and a vector, written as LLVM instructions, and solves with a triangular factor.

Sizes are seldom multiples of a vector register's, and a loop over what is left over takes as long as the rest at the
sizes of most problems: here it is one more vector, under a mask.
"""

from __future__ import annotations

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiler import jit
from .registers import span, unpacked, whole, word

ROWS = 4
"""Rows of a triangle that are solved for at a time."""


@intrinsic
def _rows_times(typing_context, M, x, out, rows, columns):
    """Instructions for out = M x"""

    def generate(context, builder, signature, arguments):
        m, x, out, rows, columns = unpacked(context, builder, signature, arguments, 3)
        start = word(0)
        for count in (8, 4, 1):
            stop = whole(builder, start, rows, count)
            with span(builder, start, stop, count) as (i, _):
                numbers = [builder.add(i, word(r)) for r in range(count)]
                for row, total in zip(numbers, _sums(builder, m, x, numbers, word(0), columns), strict=True):
                    builder.store(total, builder.bitcast(out.at(row), out.scalar.as_pointer()))
            start = stop
        return context.get_dummy_value()

    return types.void(M, x, out, rows, columns), generate


@intrinsic
def _columns_times(typing_context, M, v, out, rows, columns):
    """Instructions for out = out + Mᵀ v"""

    def generate(context, builder, signature, arguments):
        m, v, out, rows, columns = unpacked(context, builder, signature, arguments, 3)

        def tile(j, vectors, at_once, mask):
            sums = {(r, k): cgutils.alloca_once(builder, m.vector) for r in range(at_once) for k in range(vectors)}
            for place in sums.values():
                builder.store(m.nothing, place)

            def take(i, count):
                for r in range(count):
                    row = builder.add(i, word(r))
                    factor, start = m.repeated(v.entry(v.at(row))), m.at(row, j)
                    for k in range(vectors):
                        place = sums[r, k]
                        product = m.times(m.load(start, k, mask), factor)
                        builder.store(m.plus(builder.load(place), product), place)

            stop = whole(builder, word(0), rows, at_once)
            with span(builder, word(0), stop, at_once) as (i, _):
                take(i, at_once)
            with span(builder, stop, rows, 1) as (i, _):
                take(i, 1)
            to = out.at(j)
            for k in range(vectors):
                total = builder.load(sums[0, k])
                for r in range(1, at_once):
                    total = m.plus(total, builder.load(sums[r, k]))
                out.store(m.plus(out.load(to, k, mask), total), to, k, mask)

        start = word(0)
        for vectors, at_once in ((4, 2), (1, 4)):
            stop = whole(builder, start, columns, vectors * m.lanes)
            with span(builder, start, stop, vectors * m.lanes) as (j, _):
                tile(j, vectors, at_once, None)
            start = stop
        with builder.if_then(builder.icmp_signed("<", start, columns)):
            tile(start, 1, 4, m.first(builder.sub(columns, start)))
        return context.get_dummy_value()

    return types.void(M, v, out, rows, columns), generate


@intrinsic
def _take_off(typing_context, U, r, i, start, stop):
    """Instructions for r = r − Uᵀr in its entries from `start` to `stop`, with the rows of U and the entries of r from
    i to i + ROWS.
    """

    def generate(context, builder, signature, arguments):
        u, r, i, start, stop = unpacked(context, builder, signature, arguments, 2)
        rows = [builder.add(i, word(k)) for k in range(ROWS)]
        factors = [r.repeated(r.entry(r.at(row))) for row in rows]

        def tile(j, mask):
            terms = [u.times(u.load(u.at(row, j), mask=mask), x) for row, x in zip(rows, factors, strict=True)]
            total = u.plus(u.plus(terms[0], terms[1]), u.plus(terms[2], terms[3]))
            r.store(r.minus(r.load(r.at(j), mask=mask), total), r.at(j), mask=mask)

        _in_vectors(builder, u, start, stop, tile)
        return context.get_dummy_value()

    return types.void(U, r, i, start, stop), generate


@intrinsic
def _sums_of_rows(typing_context, U, r, i, start, stop):
    """Instructions for U r with the rows of U from i to i + ROWS, and the entries of r from `start` to `stop`."""

    def generate(context, builder, signature, arguments):
        u, r, i, start, stop = unpacked(context, builder, signature, arguments, 2)
        rows = [builder.add(i, word(k)) for k in range(ROWS)]
        return context.make_tuple(builder, signature.return_type, _sums(builder, u, r, rows, start, stop))

    return types.UniTuple(U.dtype, ROWS)(U, r, i, start, stop), generate


def _sums(builder, m, x, rows, start, stop):
    """The products of some rows of a matrix with the entries of x from `start` to `stop`."""
    places = [cgutils.alloca_once(builder, m.vector) for _ in rows]
    for place in places:
        builder.store(m.nothing, place)

    def tile(j, mask):
        factor = x.load(x.at(j), mask=mask)
        for row, place in zip(rows, places, strict=True):
            entries = m.load(m.at(row, j), mask=mask)
            builder.store(m.plus(builder.load(place), m.times(entries, factor)), place)

    _in_vectors(builder, m, start, stop, tile)
    return [m.total(builder.load(place)) for place in places]


def _in_vectors(builder, memory, start, stop, tile):
    """A loop over vectors of columns, and what is left over under a mask."""
    end = whole(builder, start, stop, memory.lanes)
    with span(builder, start, end, memory.lanes) as (j, _):
        tile(j, None)
    with builder.if_then(builder.icmp_signed("<", end, stop)):
        tile(end, memory.first(builder.sub(stop, end)))


@jit
def dot(a, b):
    total = 0.0
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@jit
def product(M, x, out):
    """Put M x in `out`, for as many rows and columns of M as the vectors have."""
    _rows_times(M, x, out, min(M.shape[0], out.shape[0]), min(M.shape[1], x.shape[0]))


@jit
def add_product_transposed(M, v, out):
    """Add Mᵀ v to `out`, for as many rows and columns of M as the vectors have."""
    _columns_times(M, v, out, min(M.shape[0], v.shape[0]), min(M.shape[1], out.shape[0]))


# ---- with the upper triangular factor of `tiles.cholesky`, which has the inverses of its diagonal on it, and those of
# its blocks of ROWS rows, transposed, below: a block is solved for by products, which do not wait for each other.


@jit
def forward(U, r):
    """Solve Uᵀx = r in place."""
    n = r.shape[0]
    whole = n - n % ROWS
    for i in range(0, whole, ROWS):
        a0, a1, a2, a3 = r[i], r[i + 1], r[i + 2], r[i + 3]
        r[i] = U[i, i] * a0
        r[i + 1] = U[i + 1, i] * a0 + U[i + 1, i + 1] * a1
        r[i + 2] = U[i + 2, i] * a0 + U[i + 2, i + 1] * a1 + U[i + 2, i + 2] * a2
        r[i + 3] = (U[i + 3, i] * a0 + U[i + 3, i + 1] * a1) + (U[i + 3, i + 2] * a2 + U[i + 3, i + 3] * a3)
        _take_off(U, r, i, i + ROWS, n)
    for i in range(whole, n):
        for k in range(whole, i):
            r[i] -= U[k, i] * r[k]
        r[i] *= U[i, i]


@jit
def backward(U, r):
    """Solve U x = r in place."""
    n = r.shape[0]
    whole = n - n % ROWS
    for i in range(n - 1, whole - 1, -1):
        for k in range(i + 1, n):
            r[i] -= U[i, k] * r[k]
        r[i] *= U[i, i]
    x0 = x1 = x2 = x3 = r.dtype.type(0.0)
    for i in range(whole - ROWS, -1, -ROWS):
        known = i + ROWS
        if known < whole:
            # The last block is still in registers: a vector of what has just been stored apart would wait for it.
            known += ROWS
        s0, s1, s2, s3 = _sums_of_rows(U, r, i, known, n)
        if known > i + ROWS:
            j = i + ROWS
            s0 += (U[i, j] * x0 + U[i, j + 1] * x1) + (U[i, j + 2] * x2 + U[i, j + 3] * x3)
            s1 += (U[i + 1, j] * x0 + U[i + 1, j + 1] * x1) + (U[i + 1, j + 2] * x2 + U[i + 1, j + 3] * x3)
            s2 += (U[i + 2, j] * x0 + U[i + 2, j + 1] * x1) + (U[i + 2, j + 2] * x2 + U[i + 2, j + 3] * x3)
            s3 += (U[i + 3, j] * x0 + U[i + 3, j + 1] * x1) + (U[i + 3, j + 2] * x2 + U[i + 3, j + 3] * x3)
        a0, a1, a2, a3 = r[i] - s0, r[i + 1] - s1, r[i + 2] - s2, r[i + 3] - s3
        x0 = (U[i, i] * a0 + U[i + 1, i] * a1) + (U[i + 2, i] * a2 + U[i + 3, i] * a3)
        x1 = U[i + 1, i + 1] * a1 + U[i + 2, i + 1] * a2 + U[i + 3, i + 1] * a3
        x2 = U[i + 2, i + 2] * a2 + U[i + 3, i + 2] * a3
        x3 = U[i + 3, i + 3] * a3
        r[i], r[i + 1], r[i + 2], r[i + 3] = x0, x1, x2, x3
