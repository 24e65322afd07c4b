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
    "more rows": (20, 60, 0.08), "dense": (60, 30, 0.3),
}  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The functions of sparse_test.cpp, for the widest vectors of this processor."""
    if COMPILER is None or not SOURCES.exists() or platform.system() == "Windows":
        pytest.skip("no C++ compiler, or no sources")
    if engine is None:
        pytest.skip("the compiled engine was not built")
    from qpdiff.engines.compiled import _level

    level = max(level for level in LEVELS if level <= _level.highest())
    path = tmp_path_factory.mktemp("sparse") / "sparse.so"
    machine = [f"-march=x86-64-v{level}"] if level else []
    command = [COMPILER, "-std=c++20", "-O2", "-shared", "-fPIC", *OPTIONS, "-Wno-psabi", *machine, f"-I{SOURCES}"]
    subprocess.run([*command, HERE / "sparse_test.cpp", "-o", path], check=True, timeout=300)
    return ctypes.CDLL(str(path))


def call(function, *arguments):
    """Call a function with numbers and arrays."""
    pointers = [a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else ctypes.c_int(a) for a in arguments]
    return function(*pointers)


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


@pytest.mark.parametrize("teams", ["one", "lanes"])
@pytest.mark.parametrize("name", PATTERNS)
def test_solves_as_scipy(library, teams, name):
    count = 1 if teams == "one" else library.lanes_of_a_register()
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


@pytest.mark.parametrize("teams", ["one", "lanes"])
def test_solves_chains(library, teams):
    """Most columns have an entry in the next row; some in others too, some in none."""
    count, n = 1 if teams == "one" else library.lanes_of_a_register(), 40
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


def test_factors_rows_together_where_that_saves_time(library):
    """Rows of the same columns fill a register; those of a chain are factored one by one."""
    _, dense, *_ = quasidefinite(PATTERNS["dense"], 1)
    chain = sp.diags_array([np.ones(29), np.ones(30)], offsets=[1, 0]).tocsc()
    assert call(library.rows_together, 90, dense.indptr, dense.indices) == library.lanes_of_a_register()
    assert call(library.rows_together, 30, chain.indptr, chain.indices) == 1


@pytest.mark.parametrize("teams", ["one", "lanes"])
def test_replaces_pivots_of_the_wrong_sign(library, teams):
    """A pivot that cancels in one problem is replaced there, and the other problems do not see it."""
    count = 1 if teams == "one" else library.lanes_of_a_register()
    U = sp.csc_array(np.triu([[1.0, 1.0], [1.0, 1.0]]))  # in the order of its columns: M_00, M_01, M_11
    values = np.tile([1.0, 1.0, 3.0], (count, 1))
    values[0, 2] = 1.0  # the second pivot becomes 1 − 1 = 0
    x = np.tile([1.0, 2.0], (count, 1))
    assert call(getattr(library, f"ldl_{teams}"), 2, U.indptr, U.indices, values, np.ones(2), x) == 1
    assert_allclose(x[0], np.linalg.solve([[1, 1], [1, 1 + 1e-6]], [1.0, 2.0]), rtol=1e-9)
    assert_allclose(x[1:], np.tile(np.linalg.solve([[1, 1], [1, 3]], [1.0, 2.0]), (count - 1, 1)))


@pytest.mark.parametrize("teams", ["one", "lanes"])
def test_rounding_in_place_of_pivots_does_not_grow(library, teams):
    """Of dependent rows the pivots are what rounding leaves of terms of 1e12: each may multiply what comes after it."""
    count, n, rows = 1 if teams == "one" else library.lanes_of_a_register(), 5, 40
    rng = np.random.default_rng(0)
    K = np.outer(rng.normal(size=rows), rng.normal(size=n))
    U = sp.triu(sp.csc_array(np.block([[1e-12 * np.eye(n), K.T], [K, -1e-10 * np.eye(rows)]]))).tocsc()
    signs, x = np.repeat([1.0, -1.0], [n, rows]), np.ones((count, n + rows))
    values = np.tile(U.data, (count, 1))
    assert call(getattr(library, f"ldl_{teams}"), n + rows, U.indptr, U.indices, values, signs, x) > 0
    assert np.isfinite(x).all()


@pytest.mark.parametrize("teams", ["one", "lanes"])
def test_says_where_a_number_is_not_finite(library, teams):
    count = 1 if teams == "one" else library.lanes_of_a_register()
    U = sp.csc_array(np.triu([[1.0, 1.0], [1.0, 3.0]]))
    values = np.tile([1.0, np.nan, 3.0], (count, 1))
    assert call(getattr(library, f"ldl_{teams}"), 2, U.indptr, U.indices, values, np.ones(2), np.ones((count, 2))) == -1


@pytest.mark.parametrize("teams", ["one", "lanes"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 4), (20, 33), (3, 0), (0, 3)])
def test_products(library, teams, shape):
    count = 1 if teams == "one" else library.lanes_of_a_register()
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
