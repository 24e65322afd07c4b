"""The sparse linear algebra of the compiled engine against SciPy: sparse_test.cpp, compiled here."""

import ctypes
import platform
import subprocess

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg as sl
from numpy.testing import assert_allclose

from .test_kernels import COMPILER, HERE, LEVELS, OPTIONS, SOURCES, engine

PATTERNS = {
    "empty K": (5, 0, 0.3), "one": (1, 1, 1.0), "thin": (40, 12, 0.05), "square": (30, 30, 0.1), "full": (12, 9, 1.0),
    "more rows": (20, 60, 0.08), "dense": (60, 30, 0.3), "large": (150, 90, 0.03),
}  # fmt: skip
TEAMS = ["one", "one_without_blocks", "lanes"]
KINDS = ["wide", "mixed", "scalar", "chained"]
NOT_FINITE, INSIGNIFICANT = -1, -2


@pytest.fixture(scope="module", params=LEVELS)
def library(tmp_path_factory, request):
    """The functions of sparse_test.cpp, for the vectors of one level of instructions."""
    if COMPILER is None or not SOURCES.exists() or platform.system() == "Windows":
        pytest.skip("no C++ compiler, or no sources")
    if engine is None:
        pytest.skip("the compiled engine was not built")
    from qpdiff.engines.compiled import _level

    if request.param > _level.highest():
        pytest.skip("this processor does not run them")
    path = tmp_path_factory.mktemp("sparse") / "sparse.so"
    machine = [f"-march=x86-64-v{request.param}"] if request.param else []
    command = [COMPILER, "-std=c++20", "-O2", "-shared", "-fPIC", *OPTIONS, "-Wno-psabi", *machine, f"-I{SOURCES}"]
    subprocess.run([*command, HERE / "sparse_test.cpp", "-o", path], check=True, timeout=300)
    return ctypes.CDLL(str(path))


def call(function, *arguments):
    """Call a function with numbers and arrays."""
    pointers = [a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else ctypes.c_int(a) for a in arguments]
    return function(*pointers)


def count_of(library, teams):
    """Return the number of problems that are factored together."""
    return library.lanes_of_a_register() if teams == "lanes" else 1


def quasidefinite(size, count):
    """Make a batch of quasidefinite matrices of one pattern, in random order.

    Return the signs of the pivots, the upper triangle in compressed columns, its values (count, nnz) and the matrices.
    """
    n, rows, density = size
    rng = np.random.default_rng(n + rows)
    pattern = sp.random_array((n, n), density=density, rng=rng).astype(bool)
    K = sp.random_array((rows, n), density=density, rng=rng).astype(bool)
    order, signs = rng.permutation(n + rows), np.repeat([1.0, -1.0], [n, rows])
    matrices = []
    for _ in range(count):
        F = pattern.astype(float)
        F.data = rng.normal(size=F.nnz)
        C = K.astype(float)
        C.data = rng.normal(size=C.nnz)
        diagonals = 10.0 ** rng.uniform(-4, 2, n), 10.0 ** rng.uniform(-4, 2, rows)
        M = sp.block_array([[F.T @ F + sp.diags_array(diagonals[0]), C.T], [C, -sp.diags_array(diagonals[1])]]).tocsr()
        matrices.append(M[order][:, order])
    upper = [sp.triu(M).tocsc() for M in matrices]
    for U in upper:
        U.sort_indices()
        assert (U.indptr == upper[0].indptr).all()
        assert (U.indices == upper[0].indices).all()
    return signs[order], upper[0], np.stack([U.data for U in upper]), matrices


@pytest.mark.parametrize("teams", TEAMS)
@pytest.mark.parametrize("name", PATTERNS)
def test_solves_as_scipy(library, teams, name):
    count = count_of(library, teams)
    signs, U, values, matrices = quasidefinite(PATTERNS[name], count)
    x = np.random.default_rng(0).normal(size=(count, len(signs)))
    right = x.copy()
    size = call(getattr(library, f"ldl_{teams}"), len(signs), U.indptr, U.indices, values, signs, x)
    for M, r, found in zip(matrices, right, x, strict=True):
        expected = sl.spsolve(M.tocsc(), r)
        assert_allclose(found, expected, atol=1e-9 * abs(expected).max())
    # The structure of L, by elimination on the graph.
    linked = matrices[0].toarray() != 0
    for k in range(len(signs)):
        after = k + 1 + np.flatnonzero(linked[k + 1 :, k])
        linked[np.ix_(after, after)] = True
    assert size == np.tril(linked, -1).sum()


@pytest.mark.parametrize("teams", TEAMS)
def test_solves_chains(library, teams):
    """Most columns have an entry in the next row; some in others too, some in none."""
    count, n = count_of(library, teams), 40
    rng = np.random.default_rng(0)
    M = sp.diags_array([rng.normal(size=n - 1), np.zeros(n)], offsets=[1, 0]).tolil()
    M[np.arange(0, n, 5), n - 1] = 1.0
    M[9, 10] = M[24, 25] = 0.0
    signs = rng.choice([-1.0, 1.0], n)
    full = (M + M.T + sp.diags_array(10 * signs)).toarray()
    U = sp.triu(sp.csc_array(full)).tocsc()
    x = rng.normal(size=(count, n))
    right = x.copy()
    assert call(getattr(library, f"ldl_{teams}"), n, U.indptr, U.indices, np.tile(U.data, (count, 1)), signs, x) > 0
    assert_allclose(x, np.linalg.solve(full, right.T).T, rtol=1e-12, atol=1e-14)


def kinds_of_rows(library, U):
    counts = np.zeros(4, np.int32)
    call(library.kinds_of_rows, U.shape[0], U.indptr, U.indices, counts)
    return dict(zip(KINDS, counts.tolist(), strict=True))


def test_rows_are_wide_where_that_saves_time(library):
    """Rows of the same columns fill a register; those of a chain are factored one by one."""
    W = library.lanes_of_a_register()
    full = sp.triu(np.ones((3 * W + 2, 3 * W + 2))).tocsc()
    chain = sp.diags_array([np.ones(29), np.ones(30)], offsets=[1, 0]).tocsc()
    assert kinds_of_rows(library, full)["wide"] >= (2 if W > 2 else 0)
    assert kinds_of_rows(library, chain) == {"wide": 0, "mixed": 0, "scalar": 2, "chained": 28}
    found = [kinds_of_rows(library, quasidefinite(size, 1)[1]) for size in PATTERNS.values()]
    assert all(any(counts[kind] for counts in found) for kind in KINDS if W > 2)


@pytest.mark.parametrize("teams", ["one", "one_without_blocks"])
@pytest.mark.parametrize("seed", range(10))
def test_dense_rows_among_sparse_ones(library, teams, seed):
    """Wide rows with columns of one another and of single rows; single rows before, between and after them."""
    rng, W = np.random.default_rng(seed), library.lanes_of_a_register()
    n = 12 * W
    M = np.zeros((n, n))
    for start in rng.choice(n - 2 * W, 4):
        rows = np.arange(start, start + rng.integers(W, 2 * W))
        columns = np.union1d(rng.choice(n, 6), rows)
        M[np.ix_(rows, columns)] = rng.normal(size=(len(rows), len(columns)))
    signs = rng.choice([-1.0, 1.0], n)
    M = M + M.T + np.diag(n * signs)
    U = sp.triu(sp.csc_array(M)).tocsc()
    x = rng.normal(size=(1, n))
    right = x.copy()
    assert call(getattr(library, f"ldl_{teams}"), n, U.indptr, U.indices, U.data, signs, x) > 0
    assert_allclose(x, np.linalg.solve(M, right.T).T, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("teams", TEAMS)
@pytest.mark.parametrize("k", [1, 7, 20, 39])
def test_tells_pivots_that_are_rounding_errors(library, teams, k):
    """A pivot is what is left of the matrix's entry and a sum of terms, the more of them the later it comes."""
    count, n = count_of(library, teams), 40
    M = np.full((n, n), 0.5) + np.diag(np.full(n, 4.0))
    terms = M[k, :k] @ np.linalg.solve(M[:k, :k], M[:k, k])
    signs = np.where(np.arange(n) == k, -1.0, 1.0)
    U = sp.csc_array(np.triu(M))
    for left, significant in ((1e-10, True), (4e-16, False)):
        values = np.tile(U.data, (count, 1))
        values[:, U.indptr[k + 1] - 1] = terms * (1 - 1e-10)
        values[-1, U.indptr[k + 1] - 1] = terms * (1 - left)
        size = call(getattr(library, f"ldl_{teams}"), n, U.indptr, U.indices, values, signs, np.ones((count, n)))
        assert (size != INSIGNIFICANT) == significant


@pytest.mark.parametrize("teams", TEAMS)
def test_replaces_pivots_of_the_wrong_sign(library, teams):
    """A pivot that cancels in one problem is replaced there, and the other problems do not see it."""
    count = count_of(library, teams)
    U = sp.csc_array(np.triu([[1.0, 1.0], [1.0, 1.0]]))  # in the order of its columns: M_00, M_01, M_11
    values = np.tile([1.0, 1.0, 3.0], (count, 1))
    values[0, 2] = 1.0  # the second pivot becomes 1 − 1 = 0
    x = np.tile([1.0, 2.0], (count, 1))
    assert call(getattr(library, f"ldl_{teams}"), 2, U.indptr, U.indices, values, np.ones(2), x) == 1
    assert_allclose(x[0], np.linalg.solve([[1, 1], [1, 1 + 1e-6]], [1.0, 2.0]), rtol=1e-9)
    assert_allclose(x[1:], np.tile(np.linalg.solve([[1, 1], [1, 3]], [1.0, 2.0]), (count - 1, 1)))


@pytest.mark.parametrize("teams", TEAMS)
def test_rounding_in_place_of_pivots_does_not_grow(library, teams):
    """Of dependent rows the pivots are what rounding leaves of terms of 1e12: each may multiply what comes after it."""
    count, n, rows = count_of(library, teams), 5, 40
    rng = np.random.default_rng(0)
    K = np.outer(rng.normal(size=rows), rng.normal(size=n))
    U = sp.triu(sp.csc_array(np.block([[1e-12 * np.eye(n), K.T], [K, -1e-10 * np.eye(rows)]]))).tocsc()
    signs, x = np.repeat([1.0, -1.0], [n, rows]), np.ones((count, n + rows))
    values = np.tile(U.data, (count, 1))
    assert call(getattr(library, f"ldl_{teams}"), n + rows, U.indptr, U.indices, values, signs, x) == INSIGNIFICANT
    assert np.isfinite(x).all()


@pytest.mark.parametrize("teams", TEAMS)
def test_says_where_a_number_is_not_finite(library, teams):
    count = count_of(library, teams)
    U = sp.csc_array(np.triu([[1.0, 1.0], [1.0, 3.0]]))
    values = np.tile([1.0, np.nan, 3.0], (count, 1))
    assert (
        call(getattr(library, f"ldl_{teams}"), 2, U.indptr, U.indices, values, np.ones(2), np.ones((count, 2)))
        == NOT_FINITE
    )


@pytest.mark.parametrize("teams", ["one", "lanes"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 4), (20, 33), (3, 0), (0, 3)])
def test_products(library, teams, shape):
    count = count_of(library, teams)
    rng = np.random.default_rng(shape[0])
    M = sp.random_array(shape, density=0.3, rng=rng).tocsr()
    M.sort_indices()
    values, x, y = [np.abs(rng.normal(size=(count, size))) for size in (M.nnz, shape[1], shape[0])]
    values *= rng.choice([-1, 1], size=values.shape)
    out = [np.empty((count, size)) for size in (shape[0], shape[1], shape[0], shape[1], M.nnz)]
    call(getattr(library, f"products_{teams}"), *shape, M.indptr, M.indices, values, x, y, *out)
    for b in range(count):
        D = sp.csr_array((values[b], M.indices, M.indptr), shape).toarray()
        assert_allclose(out[0][b], D @ x[b], atol=1e-12)
        assert_allclose(out[1][b], D.T @ y[b], atol=1e-12)
        assert_allclose(out[2][b], (abs(D) * x[b]).max(1, initial=0), atol=1e-14)
        assert_allclose(out[3][b], (abs(D) * y[b][:, None]).max(0, initial=0), atol=1e-14)
        rows = np.repeat(np.arange(shape[0]), np.diff(M.indptr))
        assert_allclose(out[4][b], (values[b] * y[b][rows] * x[b][M.indices]) ** 2, rtol=1e-12)
