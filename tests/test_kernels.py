"""The compiled engine's own linear algebra against NumPy's, at sizes around those of registers, tiles and blocks."""

import numpy as np
import pytest

pytest.importorskip("numba")
from numba import njit

from qpdiff.compiled import ahead, products, tiles
from qpdiff.compiled.blas import add_product_tn
from qpdiff.compiled.compiler import OPTIONS, claim, peek
from qpdiff.compiled.lanes import larger

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 31, 33, 50, 64, 127, 128, 129, 133, 300]
DTYPES = [np.float64, np.float32]


def called(function, parameters):
    """A function of compiled code as one that Python may call."""
    scope = {"function": function, "njit": njit, "OPTIONS": OPTIONS}
    exec(f"def call({parameters}):\n    return function({parameters})\ncall = njit(**OPTIONS)(call)", scope)
    return scope["call"]


cholesky = called(tiles.cholesky, "U, n")
cholesky_of_sum = called(tiles.cholesky_of_sum, "S, diagonal, U, n")
invert_blocks = called(tiles.invert_blocks, "U, n")
mirror = called(tiles.mirror, "M, n")
solve_rows_above = called(tiles.solve_rows_above, "U, n, V, columns")
add_gram = called(tiles.add_gram, "A, rows, C, n")
product = called(products.product, "M, x, out")
add_product_transposed = called(products.add_product_transposed, "M, v, out")
forward, backward = called(products.forward, "U, r"), called(products.backward, "U, r")
dot = called(products.dot, "a, b")
add_product = called(add_product_tn, "alpha, A, B, C")
larger_of = called(larger, "a, b")
fetch_vectors = called(ahead.fetch_vectors, "vectors, i")
fetch_rows = called(ahead.fetch_rows, "stack, i, part, parts, upper")
claimed, peeked = called(claim, "counts, which"), called(peek, "counts, which")


def rng(n):
    return np.random.default_rng(n)


def stored(M, dtype, filling=np.nan):
    """A matrix in its padded shape, with what must not matter in the padding."""
    rows, columns = M.shape
    out = np.full(tiles.padded(rows, columns, np.dtype(dtype).itemsize), filling, dtype)
    out[:rows, :columns] = M
    return out


def definite(n):
    A = rng(n).normal(size=(n, n))
    return A @ A.T / n + np.eye(n)


def upper(U, n):
    """The factor as NumPy has it: the diagonal itself instead of its inverse."""
    out = np.triu(U[:n, :n])
    np.fill_diagonal(out, 1 / np.diagonal(out))
    return out


def accuracy(dtype, n):
    return 40 * max(n, 10) * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_cholesky(n, dtype):
    M = definite(n)
    U = stored(np.triu(M) + np.tril(np.full_like(M, 7.0), -1), dtype)  # the lower triangle is not looked at
    assert cholesky(U, n)
    np.testing.assert_allclose(upper(U, n), np.linalg.cholesky(M).T, rtol=0, atol=accuracy(dtype, n))


def test_cholesky_of_nothing():
    assert cholesky(np.empty((0, 0)), 0)


@pytest.mark.parametrize("n", [1, 3, 4, 10, 40, 140])
@pytest.mark.parametrize("value", [-1.0, 0.0, np.nan, np.inf])
def test_cholesky_refuses(n, value):
    for i in {0, n // 2, n - 1}:
        M = np.eye(n)
        M[i, i] = value
        if value == np.inf and i < n - 1:
            continue  # such a variable is eliminated as one that does not move
        assert not cholesky(stored(M, np.float64), n)


@pytest.mark.parametrize("n", [6, 20, 150])
def test_cholesky_refuses_what_is_not_definite(n):
    M = np.ones((n, n)) * 2.0 + np.eye(n)
    M[0, n - 1] = M[n - 1, 0] = 4.0
    assert not cholesky(stored(M, np.float64), n)
    M[0, n - 1] = M[n - 1, 0] = np.nan
    assert not cholesky(stored(M, np.float64), n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_triangular_solves(n, dtype):
    M, r = definite(n), rng(n).normal(size=n).astype(dtype)
    U = stored(M, dtype)
    assert cholesky(U, n)
    R = upper(U, n).astype(np.float64)
    for solve, matrix in ((forward, R.T), (backward, R)):
        x = r.copy()
        solve(U, x)
        np.testing.assert_allclose(x, np.linalg.solve(matrix, r), rtol=0, atol=accuracy(dtype, n))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_cholesky_of_a_sum(n, dtype):
    S, diagonal = definite(n), rng(n).uniform(size=n).astype(dtype)
    U, kept = stored(np.zeros((n, n)), dtype), stored(np.triu(S), dtype)
    assert cholesky_of_sum(kept, diagonal, U, n)
    R = np.linalg.cholesky(S + np.diag(diagonal)).T
    np.testing.assert_allclose(upper(U, n), R, rtol=0, atol=accuracy(dtype, n))
    np.testing.assert_array_equal(kept, stored(np.triu(S), dtype))
    assert not cholesky_of_sum(kept, diagonal - dtype(2 * n), U, n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_solves_with_a_factor_from_elsewhere(n, dtype):
    R, r = np.linalg.cholesky(definite(n)).T, rng(n).normal(size=n).astype(dtype)
    U = stored(R, dtype)
    U[range(n), range(n)] = 1 / np.diagonal(R)
    invert_blocks(U, n)
    for solve, matrix in ((forward, R.T), (backward, R)):
        x = r.copy()
        solve(U, x)
        np.testing.assert_allclose(x, np.linalg.solve(matrix, r), rtol=0, atol=accuracy(dtype, n))


@pytest.mark.parametrize("n", SIZES)
def test_mirror(n):
    S = definite(n)
    M = stored(np.triu(S), np.float64)
    mirror(M, n)
    np.testing.assert_array_equal(M[:n, :n], np.triu(S) + np.triu(S, 1).T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "columns"), [(1, 1), (5, 3), (8, 8), (10, 20), (33, 9), (130, 17), (140, 150), (300, 5)])
def test_solve_for_all_rows(n, columns, dtype):
    M, V = definite(n), rng(n).normal(size=(n, columns))
    U, X = stored(M, dtype), stored(V, dtype)
    assert cholesky(U, n)
    solve_rows_above(U, n, X, columns)
    expected = np.linalg.solve(np.linalg.cholesky(M), V)
    np.testing.assert_allclose(X[:n, :columns], expected, rtol=0, atol=10 * accuracy(dtype, n))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n"), [(0, 5), (1, 1), (3, 10), (20, 7), (50, 33), (9, 128), (12, 150), (200, 129)])
def test_gram(rows, n, dtype):
    A, C = rng(n).normal(size=(rows, n)), definite(n)
    out = stored(C, dtype)
    add_gram(stored(A, dtype), rows, out, n)
    atol = accuracy(dtype, rows)
    np.testing.assert_allclose(np.triu(out[:n, :n]), np.triu(C + A.T @ A), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 8, 9, 13, 50, 300])
@pytest.mark.parametrize("columns", [1, 5, 8, 10, 16, 33, 50, 300])
def test_products_with_a_vector(rows, columns, dtype):
    generator = rng(rows + columns)
    M, x = generator.normal(size=(rows, columns)).astype(dtype), generator.normal(size=columns).astype(dtype)
    v, start = generator.normal(size=rows).astype(dtype), generator.normal(size=columns).astype(dtype)
    out, total = np.full(rows + 1, 5.0, dtype), start.copy()
    product(M, x, out[:rows])
    add_product_transposed(M, v, total)
    atol = accuracy(dtype, max(rows, columns))
    np.testing.assert_allclose(out[:rows], M @ x, rtol=0, atol=atol)
    assert out[rows] == 5.0  # nothing is written beyond
    np.testing.assert_allclose(total, start + M.T @ v, rtol=0, atol=atol)


def test_products_with_padding_take_the_size_of_the_vectors():
    M = rng(0).normal(size=(10, 6))
    x, v = rng(1).normal(size=6), rng(2).normal(size=10)
    out, total = np.zeros(10), np.zeros(6)
    product(stored(M, float), x, out)
    add_product_transposed(stored(M, float), v, total)
    np.testing.assert_allclose(out, M @ x)
    np.testing.assert_allclose(total, M.T @ v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blas_on_parts_of_matrices(dtype):
    A, B, C = (rng(i).normal(size=shape).astype(dtype) for i, shape in enumerate([(9, 12), (9, 20), (12, 20)]))
    out = C.copy()
    add_product(dtype(-2.0), A[1:7, 2:8], B[1:7, 5:15], out[3:9, 4:14])
    expected = C.copy()
    expected[3:9, 4:14] -= 2 * A[1:7, 2:8].T @ B[1:7, 5:15]
    np.testing.assert_allclose(out, expected, rtol=0, atol=accuracy(dtype, 9))


def test_larger_keeps_nan():
    assert larger_of(1.0, 2.0) == larger_of(2.0, 1.0) == 2.0
    assert np.isnan(larger_of(np.nan, 1.0))
    assert np.isnan(larger_of(1.0, np.nan))
    assert larger_of(-np.inf, 3.0) == 3.0


def test_numbers_are_claimed_once():
    counts = np.array([5, 0, 9])
    assert [claimed(counts, 0) for _ in range(3)] == [5, 6, 7]
    assert claimed(counts, 2) == 9
    assert [peeked(counts, which) for which in range(3)] == counts.tolist() == [8, 0, 10]
    a = rng(0).normal(size=30)
    assert dot(a, a) == pytest.approx(np.sum(a * a))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 8, 16), (1, 8, 16), (3, 0, 0), (3, 5, 1)])
def test_what_is_fetched_stays_as_it_is(dtype, shape):
    stack = rng(0).normal(size=shape).astype(dtype)
    before = stack.copy()
    for i in (-1, 0, shape[0] - 1):
        fetch_vectors((stack.reshape(shape[0], shape[1] * shape[2]),), i)
        for part in range(20):
            fetch_rows(stack, i, part, 20, False)
            fetch_rows(stack, i, part, 20, True)
    assert np.array_equal(stack, before)
    for function in (fetch_vectors, fetch_rows):
        assert all("llvm.prefetch" in code for code in function.inspect_llvm().values())
