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
        end = whole(builder, word(0), columns, m.lanes)
        mask = m.first(builder.sub(columns, end))

        def block(i, count):
            starts = [m.at(builder.add(i, word(r)), word(0)) for r in range(count)]
            sums = [cgutils.alloca_once(builder, m.vector) for _ in starts]
            for place in sums:
                builder.store(m.nothing, place)

            def add(j, mask):
                offset = builder.mul(j, word(m.size))
                factor = x.load(x.at(j), mask=mask)
                for start, place in zip(starts, sums, strict=True):
                    entries = m.load(builder.gep(start, [offset]), mask=mask)
                    builder.store(m.plus(builder.load(place), m.times(entries, factor)), place)

            with span(builder, word(0), end, m.lanes) as (j, _):
                add(j, None)
            with builder.if_then(builder.icmp_signed("<", end, columns)):
                add(end, mask)
            for r, place in enumerate(sums):
                to = builder.bitcast(out.at(builder.add(i, word(r))), out.scalar.as_pointer())
                builder.store(m.total(builder.load(place)), to)

        start = word(0)
        for count in (8, 4, 1):
            stop = whole(builder, start, rows, count)
            with span(builder, start, stop, count) as (i, _):
                block(i, count)
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


# ---- with the upper triangular factor of `tiles.cholesky`, which has the inverses of its diagonal on it


@jit
def forward(U, r):
    """Solve Uᵀx = r in place."""
    n = r.shape[0]
    whole = n - n % ROWS
    for i in range(0, whole, ROWS):
        x0 = r[i] * U[i, i]
        x1 = (r[i + 1] - U[i, i + 1] * x0) * U[i + 1, i + 1]
        x2 = (r[i + 2] - U[i, i + 2] * x0 - U[i + 1, i + 2] * x1) * U[i + 2, i + 2]
        x3 = (r[i + 3] - U[i, i + 3] * x0 - U[i + 1, i + 3] * x1 - U[i + 2, i + 3] * x2) * U[i + 3, i + 3]
        r[i], r[i + 1], r[i + 2], r[i + 3] = x0, x1, x2, x3
        # Slices, whose indices plainly start at zero, are what LLVM makes vectors of.
        rest, u0, u1 = r[i + ROWS :], U[i, i + ROWS : n], U[i + 1, i + ROWS : n]
        u2, u3 = U[i + 2, i + ROWS : n], U[i + 3, i + ROWS : n]
        for j in range(rest.shape[0]):
            rest[j] -= u0[j] * x0 + u1[j] * x1 + u2[j] * x2 + u3[j] * x3
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
    for i in range(whole - ROWS, -1, -ROWS):
        s0 = s1 = s2 = s3 = r.dtype.type(0.0)
        rest, u0, u1 = r[i + ROWS :], U[i, i + ROWS : n], U[i + 1, i + ROWS : n]
        u2, u3 = U[i + 2, i + ROWS : n], U[i + 3, i + ROWS : n]
        for j in range(rest.shape[0]):
            value = rest[j]
            s0 += u0[j] * value
            s1 += u1[j] * value
            s2 += u2[j] * value
            s3 += u3[j] * value
        x3 = (r[i + 3] - s3) * U[i + 3, i + 3]
        x2 = (r[i + 2] - s2 - U[i + 2, i + 3] * x3) * U[i + 2, i + 2]
        x1 = (r[i + 1] - s1 - U[i + 1, i + 3] * x3 - U[i + 1, i + 2] * x2) * U[i + 1, i + 1]
        x0 = (r[i] - s0 - U[i, i + 3] * x3 - U[i, i + 2] * x2 - U[i, i + 1] * x1) * U[i, i]
        r[i], r[i + 1], r[i + 2], r[i + 3] = x0, x1, x2, x3
