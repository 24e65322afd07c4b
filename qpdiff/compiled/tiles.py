"""Cholesky factors and products of matrices in tiles of registers, written as LLVM instructions.

LAPACK packs matrices before it multiplies them, and factors small ones column by column: at 50 × 50 that takes three
times as long. Here nothing is packed. A tile of a few rows and vectors is loaded once, a sum of products is taken off
it in registers, and it is stored once; above `BLOCK` rows BLAS does the greater part.

The matrices lie row by row, and their rows and columns are `padded`, so that there are only whole tiles. What the
padding holds never gets into the rest. Of symmetric matrices the upper triangle counts.
"""

from __future__ import annotations

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .blas import add_gram_tn, add_product_tn, finite, jit

ROWS, ALIGNMENT = 4, 64
"""Rows of a tile; what the columns of a padded matrix fill, in bytes."""
BLOCK = 128
"""Rows that are factored, or solved for, without BLAS."""
_AT_A_TIME = 2
"""Vectors of a tile, as long as there are so many."""
_FEATURES = binding.get_host_cpu_features()
_VECTOR = 64 if _FEATURES.get("avx512f") else 32 if _FEATURES.get("avx") else 16
"""Bytes of a vector register."""
_FUSED = ("contract",)


def padded(rows: int, columns: int, itemsize: int) -> tuple[int, int]:
    """The shape that a matrix of this many rows and columns is stored in."""
    lanes = ALIGNMENT // itemsize
    return -(-rows // ROWS) * ROWS, -(-columns // lanes) * lanes


class _Memory:
    """Addresses and vectors of one matrix in the instructions under construction."""

    def __init__(self, context, builder, kind, value):
        array = context.make_array(kind)(context, builder, value)
        self.builder, self.size = builder, kind.dtype.bitwidth // 8
        self.scalar = context.get_value_type(kind.dtype)
        self.vector = ir.VectorType(self.scalar, _VECTOR // self.size)
        self.data = builder.bitcast(array.data, ir.IntType(8).as_pointer())
        self.stride = cgutils.unpack_tuple(builder, array.strides)[0]

    def at(self, row, column):
        offset = self.builder.mul(column, _word(self.size))
        return self.builder.gep(self.data, [self.builder.add(self.builder.mul(row, self.stride), offset)])

    def _typed(self, address, kind, offset):
        return self.builder.bitcast(self.builder.gep(address, [_word(offset)]), kind.as_pointer())

    def load(self, address, number):
        """The vector with this number from the address on."""
        return self.builder.load(self._typed(address, self.vector, number * _VECTOR), align=self.size)

    def store(self, vector, address, number):
        self.builder.store(vector, self._typed(address, self.vector, number * _VECTOR), align=self.size)

    def repeated(self, address, number):
        """The entry with this number from the address on, in all lanes."""
        entry = self.builder.load(self._typed(address, self.scalar, number * self.size), align=self.size)
        lanes, none = ir.VectorType(ir.IntType(32), self.vector.count), ir.Constant(self.vector, ir.Undefined)
        first = self.builder.insert_element(none, entry, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(first, none, ir.Constant(lanes, [0] * self.vector.count))


def _word(value: int):
    return ir.Constant(ir.IntType(64), value)


def _tiles(sign: int, substitute: bool):
    """Instructions for C ← C ± AᵀB in rows i to i + ROWS of C, its columns from `start` to `stop`, with rows `first` to
    `last` of A and B. With `substitute` they then solve with the upper triangle that A has at (i, i), transposed."""

    @intrinsic
    def work(typing_context, A, B, C, i, first, last, start, stop):
        signature = types.void(A, B, C, i, first, last, start, stop)

        def generate(context, builder, signature, arguments):
            a, b, c = (_Memory(context, builder, *pair) for pair in zip(signature.args[:3], arguments[:3], strict=True))
            i, first, last, start, stop = (
                context.cast(builder, value, kind, types.int64)
                for value, kind in zip(arguments[3:], signature.args[3:], strict=True)
            )
            rows = range(ROWS)
            triangle = {}
            for r in rows if substitute else ():
                corner = a.at(builder.add(i, _word(r)), i)
                triangle |= {(r, s): a.repeated(corner, s) for s in range(r, ROWS)}
            add = builder.fadd if sign > 0 else builder.fsub

            def product(x, y):
                return builder.fmul(x, y, flags=_FUSED)

            def tile(column, vectors):
                target = [c.at(builder.add(i, _word(r)), column) for r in rows]
                sums = {(r, v): cgutils.alloca_once(builder, c.vector) for r in rows for v in vectors}
                for (r, v), place in sums.items():
                    builder.store(c.load(target[r], v), place)
                with cgutils.for_range_slice(builder, first, last, _word(1), ir.IntType(64)) as (k, _):
                    across, down = b.at(k, column), a.at(k, i)
                    factors = [b.load(across, v) for v in vectors]
                    for r in rows:
                        factor = a.repeated(down, r)
                        for v in vectors:
                            place = sums[r, v]
                            builder.store(add(builder.load(place), product(factor, factors[v]), flags=_FUSED), place)
                for v in vectors:
                    done: list = []
                    for r in rows:
                        value = builder.load(sums[r, v])
                        for s, above in enumerate(done):
                            value = builder.fsub(value, product(triangle[s, r], above), flags=_FUSED)
                        if substitute:
                            value = product(value, triangle[r, r])
                            done.append(value)
                        c.store(value, target[r], v)

            for vectors in (_AT_A_TIME, 1):
                step = _word(vectors * c.vector.count)
                whole = builder.mul(builder.sdiv(builder.sub(stop, start), step), step)
                until = builder.add(start, whole)
                with cgutils.for_range_slice(builder, start, until, step, ir.IntType(64)) as (column, _):
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
    return _VECTOR // M.itemsize


@jit
def _end(n, M):
    """The columns of `M` that n columns take, in whole vectors."""
    return (n + _lanes(M) - 1) // _lanes(M) * _lanes(M)


@jit
def cholesky(U, n):
    """The upper factor of M = UᵀU in place of M, with the inverses on its diagonal; whether M was positive definite."""
    lanes, stop = _lanes(U), _end(n, U)
    for first in range(0, n, BLOCK):
        end = min(first + BLOCK, n)
        if first > 0:
            add_product_tn(-1.0, U[:first, first:end], U[:first, first:n], U[first:end, first:n])
        for i in range(first, end, ROWS):
            start = i - i % lanes
            _subtract(U, U, U, i, first, i, start, start + lanes)
            corner = _factor(U, i)
            _put(U, i, corner)
            _subtract_and_solve(U, U, U, i, 0, 0, start, start + lanes)
            _put(U, i, corner)
            _subtract_and_solve(U, U, U, i, first, i, start + lanes, stop)
    # A pivot that is not positive leaves NaN or infinity in all rows below it, and so do these.
    return n == 0 or (U[n - 1, n - 1] > 0.0 and finite(U[n - 1, n - 1]))


@jit
def _factor(M, i):
    """The upper factor of the ROWS × ROWS block of M at (i, i), by rows."""
    one = M.dtype.type(1.0)
    d0 = one / np.sqrt(M[i, i])
    u01, u02, u03 = d0 * M[i, i + 1], d0 * M[i, i + 2], d0 * M[i, i + 3]
    d1 = one / np.sqrt(M[i + 1, i + 1] - u01 * u01)
    u12, u13 = d1 * (M[i + 1, i + 2] - u01 * u02), d1 * (M[i + 1, i + 3] - u01 * u03)
    d2 = one / np.sqrt(M[i + 2, i + 2] - u02 * u02 - u12 * u12)
    u23 = d2 * (M[i + 2, i + 3] - u02 * u03 - u12 * u13)
    d3 = one / np.sqrt(M[i + 3, i + 3] - u03 * u03 - u13 * u13 - u23 * u23)
    return d0, u01, u02, u03, d1, u12, u13, d2, u23, d3


@jit
def _put(U, i, corner):
    U[i, i], U[i, i + 1], U[i, i + 2], U[i, i + 3] = corner[:4]
    U[i + 1, i + 1], U[i + 1, i + 2], U[i + 1, i + 3] = corner[4:7]
    U[i + 2, i + 2], U[i + 2, i + 3] = corner[7:9]
    U[i + 3, i + 3] = corner[9]


@jit
def solve_rows_above(U, n, V, columns):
    """Solve UᵀX = V in place for a factor U of n rows and a padded V."""
    stop = _end(columns, V)
    for first in range(0, n, BLOCK):
        end = min(first + BLOCK, n)
        if first > 0:
            add_product_tn(-1.0, U[:first, first:end], V[:first, :columns], V[first:end, :columns])
        for i in range(first, end, ROWS):
            _subtract_and_solve(U, V, V, i, first, i, 0, stop)


@jit
def add_gram(A, rows, C, n):
    """C ← C + AᵀA with so many rows of A, in the upper triangle at least."""
    if n > BLOCK:
        add_gram_tn(A[:rows, :n], C[:n, :n])
        return
    stop = _end(n, C)
    for i in range(0, n, ROWS):
        _add(A, A, C, i, 0, rows, i - i % _lanes(C), stop)


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
