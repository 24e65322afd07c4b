"""Linear algebra on stacks, and the names under which it is the same for the arrays of one problem.

A register holds one entry of all problems, so a product takes no shuffles and no masks; a few sums at a time keep the
processor from waiting for the one before.
"""

from __future__ import annotations

from numba.extending import overload

from . import products, tiles
from .compiler import FAST, OPTIONS, jit
from .lanes import Stack, root


@jit
def _copy_upper(M, out, n):
    for i in range(n):
        for j in range(i, n):
            out[i, j] = M[i, j]


@jit
def _transpose(K, out):
    for i in range(K.shape[0]):
        for j in range(K.shape[1]):
            out[j, i] = K[i, j]


@jit
def _product(M, x, out):
    rows, n = min(M.shape[0], out.shape[0]), min(M.shape[1], x.shape[0])
    whole = rows - rows % 4
    for i in range(0, whole, 4):
        a, b, c, d = M[i], M[i + 1], M[i + 2], M[i + 3]
        s0 = s1 = s2 = s3 = 0.0
        for j in range(n):
            value = x[j]
            s0 += a[j] * value
            s1 += b[j] * value
            s2 += c[j] * value
            s3 += d[j] * value
        out[i], out[i + 1], out[i + 2], out[i + 3] = s0, s1, s2, s3
    for i in range(whole, rows):
        total, row = 0.0, M[i]
        for j in range(n):
            total += row[j] * x[j]
        out[i] = total


@jit
def _add_product_transposed(M, v, out):
    rows, n = min(M.shape[0], v.shape[0]), min(M.shape[1], out.shape[0])
    whole = n - n % 4
    for j in range(0, whole, 4):
        s0, s1, s2, s3 = out[j], out[j + 1], out[j + 2], out[j + 3]
        for i in range(rows):
            value = v[i]
            s0 += M[i, j] * value
            s1 += M[i, j + 1] * value
            s2 += M[i, j + 2] * value
            s3 += M[i, j + 3] * value
        out[j], out[j + 1], out[j + 2], out[j + 3] = s0, s1, s2, s3
    for j in range(whole, n):
        total = out[j]
        for i in range(rows):
            total += M[i, j] * v[i]
        out[j] = total


@jit
def _forward(U, r):
    n = r.shape[0]
    for i in range(n):
        x, row = r[i] * U[i, i], U[i]
        r[i] = x
        for j in range(i + 1, n):
            r[j] -= row[j] * x


@jit
def _backward(U, r):
    for i in range(r.shape[0] - 1, -1, -1):
        x = r[i] * U[i, i]
        r[i] = x
        for k in range(i):
            r[k] -= U[k, i] * x


@jit
def _cholesky(U, n):
    sound = True
    for i in range(n):
        pivot = U[i, i]
        for k in range(i):
            pivot -= U[k, i] * U[k, i]
        sound &= pivot > 0.0
        inverse = 1.0 / root(pivot)
        U[i, i] = inverse
        _solve_row(U, U, i, i + 1, n, inverse)
    return sound


@jit
def _cholesky_of_sum(S, diagonal, U, n):
    _copy_upper(S, U, n)
    for i in range(n):
        U[i, i] += diagonal[i]
    return _cholesky(U, n)


@jit
def _solve_row(U, V, i, start, stop, inverse):
    """Row i of U⁻ᵀV in the place of V's, where those above it are already."""
    j = start
    while j + 4 <= stop:
        s0, s1, s2, s3 = V[i, j], V[i, j + 1], V[i, j + 2], V[i, j + 3]
        for k in range(i):
            value, row = U[k, i], V[k]
            s0 -= value * row[j]
            s1 -= value * row[j + 1]
            s2 -= value * row[j + 2]
            s3 -= value * row[j + 3]
        V[i, j], V[i, j + 1], V[i, j + 2], V[i, j + 3] = s0 * inverse, s1 * inverse, s2 * inverse, s3 * inverse
        j += 4
    while j < stop:
        total = V[i, j]
        for k in range(i):
            total -= U[k, i] * V[k, j]
        V[i, j] = total * inverse
        j += 1


@jit
def _solve_rows_above(U, n, V, columns):
    for i in range(n):
        _solve_row(U, V, i, 0, columns, U[i, i])


@jit
def _add_gram(A, rows, C, n):
    i = 0
    while i + 2 <= n:
        j = i
        while j + 2 <= n:
            s00, s01, s10, s11 = C[i, j], C[i, j + 1], C[i + 1, j], C[i + 1, j + 1]
            for k in range(rows):
                row = A[k]
                a0, a1, b0, b1 = row[i], row[i + 1], row[j], row[j + 1]
                s00 += a0 * b0
                s01 += a0 * b1
                s10 += a1 * b0
                s11 += a1 * b1
            C[i, j], C[i, j + 1], C[i + 1, j], C[i + 1, j + 1] = s00, s01, s10, s11
            j += 2
        i += 2
    if n % 2:
        for i in range(n):
            total = C[i, n - 1]
            for k in range(rows):
                total += A[k, i] * A[k, n - 1]
            C[i, n - 1] = total


def _either(of_numbers, of_stacks):
    """One function for the arrays of one problem and for stacks."""

    def function(*arguments):
        raise NotImplementedError("for compiled code")

    @overload(function, jit_options=OPTIONS | {"fastmath": FAST}, strict=False)
    def choose(*arguments):
        return (of_stacks if isinstance(arguments[0], Stack) else of_numbers).py_func

    return function


copy_upper = _either(tiles.copy_upper, _copy_upper)
transpose = _either(tiles.transpose, _transpose)
dot = products.dot
product = _either(products.product, _product)
add_product_transposed = _either(products.add_product_transposed, _add_product_transposed)
forward = _either(products.forward, _forward)
backward = _either(products.backward, _backward)
cholesky = _either(tiles.cholesky, _cholesky)
cholesky_of_sum = _either(tiles.cholesky_of_sum, _cholesky_of_sum)
solve_rows_above = _either(tiles.solve_rows_above, _solve_rows_above)
add_gram = _either(tiles.add_gram, _add_gram)


@jit
def solve_cholesky(U, r):
    """Solve UᵀU x = r in place."""
    forward(U, r)
    backward(U, r)
