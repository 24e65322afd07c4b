"""Sparse operands: what `Sparse` takes from other libraries, what it refuses and in which words."""

import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.testing import assert_allclose, assert_array_equal

import qpdiff
from qpdiff import Sparse
from qpdiff.sparse import REMEMBERED, full_pattern

N = 5


def matrix(rng, rows=4, columns=N, density=0.4):
    """A matrix with empty rows now and then."""
    return sp.random_array((rows, columns), density=density, rng=rng).tocsr()


def cost(rng, n=N):
    """A sparse Q in full."""
    F = matrix(rng, n, n, 0.3)
    return sp.csr_array(F.T @ F + sp.eye_array(n))


def scipy_forms(M):
    """The same matrix in every format and class that is taken."""
    unsorted = sp.csr_array(M)
    for row in range(M.shape[0]):
        entries = slice(unsorted.indptr[row], unsorted.indptr[row + 1])
        unsorted.indices[entries] = unsorted.indices[entries][::-1].copy()
        unsorted.data[entries] = unsorted.data[entries][::-1].copy()
    unsorted.has_sorted_indices = False
    coo = sp.coo_array(M)
    twice = sp.coo_array(
        (np.r_[0.25 * coo.data, 0.75 * coo.data], (np.r_[coo.row, coo.row], np.r_[coo.col, coo.col])), M.shape
    )
    wide = sp.csr_array(M)
    wide.indices, wide.indptr = wide.indices.astype(np.int64), wide.indptr.astype(np.int64)
    of_matrices = [sp.csr_matrix(M), sp.csc_matrix(M), sp.coo_matrix(M)]
    return [sp.csr_array(M), sp.csc_array(M), coo, twice, unsorted, wide, *of_matrices]


@pytest.mark.parametrize("form", range(9))
def test_scipy(form):
    rng = np.random.default_rng(form)
    for _ in range(5):
        M = matrix(rng)
        read = Sparse.like(given := scipy_forms(M)[form], given.data)
        assert_allclose(read.toarray(), M.toarray(), rtol=1e-15)
        reference = sp.csr_array(M)
        reference.sort_indices()
        assert_array_equal(read.indices, reference.indices)
        assert_array_equal(read.indptr, reference.indptr)
        assert read.shape == M.shape


@pytest.mark.parametrize("form", range(9))
def test_values_of_a_batch_are_in_the_order_of_the_matrix(form):
    rng = np.random.default_rng(form)
    M = matrix(rng)
    given = scipy_forms(M)[form]
    factors = rng.normal(size=(3, 2, 1))
    read = Sparse.like(given, factors * given.data)
    assert read.shape == (3, 2, *M.shape)
    assert_allclose(read.toarray(), factors[..., None] * M.toarray(), rtol=1e-14)


def test_solving_takes_every_form():
    rng = np.random.default_rng(0)
    Q, A = cost(rng), sp.csr_array(np.ones((1, N)))
    q = rng.normal(size=(3, N))
    expected = qpdiff.solve_qp(Q.toarray(), q, A=A.toarray(), b=[1.0]).x
    for form in scipy_forms(Q):
        assert_allclose(qpdiff.solve_qp(form, q, A=sp.coo_array(A), b=[1.0]).x, expected, atol=1e-7)


def test_explicit_zeros_are_part_of_the_pattern():
    Q = sp.csr_array((np.ones(2), [0, 1], [0, 1, 2]), (2, 2))
    G = sp.csr_array((np.array([1.0, 0.0]), [0, 1], [0, 2]), (1, 2))
    sol = qpdiff.solve_qp(Q, [-1.0, -1.0], G, [0.5])
    gradient = qpdiff.vjp(sol, x=[1.0, 0.0]).G
    expected = qpdiff.vjp(qpdiff.solve_qp(Q.toarray(), [-1.0, -1.0], G.toarray(), [0.5]), x=[1.0, 0.0]).G
    assert_array_equal(gradient.indices, [0, 1])
    assert_allclose(gradient.values, expected[0], atol=1e-7)
    assert abs(gradient.values[1]) > 0.1


def test_one_pattern_is_one_object():
    first, second = (Sparse(np.ones((3, 2)), [0, 1], [0, 1, 2], (2, 2)) for _ in range(2))
    assert first.pattern is second.pattern
    assert pickle.loads(pickle.dumps(first)).pattern is first.pattern
    assert_array_equal(pickle.loads(pickle.dumps(first)).values, first.values)
    with pytest.raises(ValueError, match="read-only"):
        first.indices[0] = 1
    for column in range(2 * REMEMBERED):
        Sparse(np.ones(1), [column], [0, 1], (1, 2 * REMEMBERED))
    assert Sparse(np.ones(2), [0, 1], [0, 1, 2], (2, 2)).pattern is first.pattern
    assert pickle.loads(pickle.dumps(first)).pattern is first.pattern


def test_lists_and_repr():
    read = Sparse([[1, 2], [3, 4]], [1, 0], [0, 1, 2], (2, 2))
    assert repr(read) == "Sparse(shape=(2, 2, 2), nnz=2)"
    assert_array_equal(read.toarray(), [[[0, 1], [2, 0]], [[0, 3], [4, 0]]])
    assert Sparse(np.zeros((4, 0)), [], [0, 0, 0], (2, 3)).toarray().shape == (4, 2, 3)


def test_other_forms_by_their_attributes():
    """A module of cupyx, which is not here: the class is recognised by where it says it comes from."""
    kind = type("csr_matrix", (), {"__module__": "cupyx.scipy.sparse._csr"})
    M = matrix(np.random.default_rng(1))
    given = kind()
    given.format, given.ndim, given.shape, given.data = "csr", 2, M.shape, M.data
    given.indices, given.indptr = (SimpleNamespace(get=lambda a=a: a) for a in (M.indices, M.indptr))
    assert_array_equal(Sparse.like(given, M.data).toarray(), M.toarray())


def test_torch():
    torch = pytest.importorskip("torch")
    M = matrix(np.random.default_rng(2))
    indptr, indices = torch.tensor(M.indptr), torch.tensor(M.indices)
    one = torch.sparse_csr_tensor(indptr, indices, torch.tensor(M.data), M.shape)
    read = Sparse.like(one, one.values())
    assert isinstance(read.values, torch.Tensor)
    assert_array_equal(read.toarray().numpy(), M.toarray())
    values = torch.tensor(M.data) * torch.tensor([[1.0], [2.0]])
    many = torch.sparse_csr_tensor(indptr.repeat(2, 1), indices.repeat(2, 1), values, (2, *M.shape))
    assert_array_equal(
        Sparse.like(many, many.values()).toarray().numpy(), np.array([1, 2])[:, None, None] * M.toarray()
    )
    with pytest.raises(
        TypeError, match=r"^Q is a sparse tensor in the layout torch.sparse_coo; pass Q.to_sparse_csr()"
    ):
        qpdiff.solve_qp(one.to_sparse_coo(), torch.ones(N))


def test_jax():
    jax = pytest.importorskip("jax")
    from jax.experimental import sparse as jsp

    M = matrix(np.random.default_rng(3))
    with jax.enable_x64(True):
        data, indices, indptr = (jax.numpy.asarray(a) for a in (M.data, M.indices, M.indptr))
        one = jsp.BCSR((data, indices, indptr), shape=M.shape)
        assert_array_equal(Sparse.like(one, one.data).toarray(), M.toarray())
        many = jsp.BCSR((data * jax.numpy.asarray([[1.0], [2.0]]), indices[None], indptr[None]), shape=(2, *M.shape))
        assert_array_equal(Sparse.like(many, many.data).toarray(), np.array([1, 2])[:, None, None] * M.toarray())
        coordinates = jsp.BCOO.fromdense(jax.numpy.asarray(M.toarray()), nse=M.nnz + 3)  # three beyond the shape
        assert_array_equal(Sparse.like(coordinates, coordinates.data).toarray(), M.toarray())


# ---- refused

EYE = {"values": np.ones(2), "indices": [0, 1], "indptr": [0, 1, 2], "shape": (2, 2)}
REFUSED = {
    "index": ({"indices": [0, 2]}, "the matrix has the index 2 in row 1; expected 0 to 1, as it has 2 columns"),
    "negative": ({"indices": [-1, 1]}, "the matrix has the index -1 in row 0; expected 0 to 1"),
    "indptr-length": ({"indptr": [0, 2]}, "the matrix has an indptr of 2 numbers; expected 3, one more than its rows"),
    "indptr-end": ({"indptr": [0, 1, 3]}, "the matrix has an indptr from 0 to 3; expected 0 to 2"),
    "indptr-falls": ({"indptr": [0, 3, 2]}, "the matrix has an indptr that decreases after row 1"),
    "values": ({"values": np.ones((2, 3))}, "the matrix has values of shape (2, 3); expected (..., 2)"),
    "no-axis": ({"values": 1.0}, "the matrix has values of shape (); expected (..., 2)"),
    "shape": ({"shape": (3, 2, 2)}, "the matrix has shape (3, 2, 2); expected rows and columns, without batch axes"),
    "shape-number": ({"shape": 2}, "the matrix has shape 2; expected rows and columns, without batch axes"),
    "shape-fraction": ({"shape": (2, 2.5)}, "the matrix has shape (2, 2.5); expected rows and columns"),
    "shape-negative": ({"shape": (2, -1)}, "the matrix has shape (2, -1); expected from 0 to 2147483647 rows and"),
    "shape-large": ({"shape": (2, 2**31)}, "the matrix has shape (2, 2147483648); expected from 0 to 2147483647 rows"),
    "ragged": ({"values": [[1.0, 2.0], [1.0]]}, "the matrix has values that are not a regular array: "),
    "axes": ({"indices": [[0, 1]]}, "the matrix has indices of shape (1, 2); expected one axis"),
    "too-large": ({"indices": np.array([0, 2**40])}, "the matrix has indices beyond 2147483647"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    changed, message = REFUSED[case]
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Sparse(**(EYE | changed))


def test_more_entries_than_indices_of_32_bits_count():
    with pytest.raises(ValueError, match=r"dense matrix of shape \(50000, 50000\) .* more than 2147483647 entries"):
        full_pattern(50_000, 50_000)
    half = SimpleNamespace(indptr=np.array([0, 2**30], np.int32), indices=np.zeros(0, np.int32), shape=(1, 1))
    compiled = pytest.importorskip("qpdiff.engines.compiled.sparse")
    with pytest.raises(ValueError, match="A and G have 2147483648 entries together"):
        compiled.Pattern(half, half, half)


def test_indices_that_are_no_integers():
    with pytest.raises(TypeError, match=r"^the matrix has indices of dtype float64; expected integers"):
        Sparse(**(EYE | {"indices": [0.5, 1.0]}))


def refusal(error, **operands):
    given = {"Q": sp.eye_array(2, format="csr"), "q": np.ones(2)} | operands
    with pytest.raises(error) as raised:
        qpdiff.solve_qp(**given)
    return str(raised.value)


UPPER = sp.csr_array([[1.0, 0.5], [0.0, 1.0]])
ONE_SIDED = sp.csr_array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.25, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("Q", "message"),
    [
        (UPPER, "Q has entries in its upper triangle only; pass all of it, with scipy.sparse Q + triu(Q, 1).T"),
        (sp.csr_array(UPPER.T), "Q has entries in its lower triangle only; pass all of it"),
        (
            ONE_SIDED,
            "Q is not symmetric; pass (Q + Qᵀ)/2, which has the same objective: it has an entry at [0, 1] and none at "
            "[1, 0]",
        ),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_one_side_of_Q(Q, message, check):
    assert refusal(ValueError, Q=Q, q=np.ones(Q.shape[0]), check=check).startswith(message)


def batch(values, indices=(0, 1, 0, 1), indptr=(0, 2, 4)):
    return Sparse(np.array(values, float), indices, indptr, (2, 2))


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        (
            {"Q": batch([[1, 0, 0, 1], [1, 0.5, 0.25, 1]])},
            "Q is not symmetric; pass (Q + Qᵀ)/2, which has the same objective: Q[0, 1] = 0.5, Q[1, 0] = 0.25 "
            "(problem 1 of the batch)",
        ),
        (
            {"Q": batch([[1, 0, 0, 1], [1, 2, 2, 1]])},
            "Q is not positive semidefinite, so the problem is not convex: its smallest eigenvalue is -1, -0.5 of its "
            "largest entry; if that is rounding, add 1 to its diagonal or pass check=False (problem 1 of the batch)",
        ),
        (
            {"Q": batch([1, 0, 0, np.nan])},
            "Q has NaN or infinite entries; all must be finite: Q[1, 1] = nan",
        ),
        (
            {"G": Sparse([[1.0], [np.inf]], [1], [0, 0, 1], (2, 2)), "h": np.ones(2)},
            "G has NaN or infinite entries; all must be finite: G[1, 1] = inf (problem 1 of the batch)",
        ),
        ({"lb": 3.0, "ub": [4.0, 2.0]}, "lb is greater than ub for a variable: lb[1] = 3.0, ub[1] = 2.0"),
        (
            {"A": sp.csr_array((1, 3)), "b": [0.0]},
            "A has shape (1, 3); expected (..., p, n) with n = 2 from Q of shape (2, 2)",
        ),
        (
            {"Q": batch(np.ones((3, 4))), "q": np.ones((4, 2))},
            "q has batch axes (4,), which do not broadcast with the batch axes (3,) of Q",
        ),
        ({"Q": sp.csr_array((2, 3))}, "Q has shape (2, 3); expected (..., n, n), square"),
    ],
)
def test_refused_by_value(operands, message):
    assert refusal(ValueError, **operands) == message


def test_refused_by_type():
    eye = sp.eye_array(2)
    assert refusal(TypeError, Q=eye.tobsr()) == "Q is a sparse matrix in BSR format; pass Q.tocsr()"
    assert (
        refusal(TypeError, Q=sp.csr_array(np.eye(2, dtype=complex))) == "Q has dtype complex128; expected real numbers"
    )
    with pytest.raises(TypeError, match=r"^the matrix is a numpy.ndarray; expected a qpdiff.Sparse or a sparse matrix"):
        Sparse.like(np.eye(2), np.ones(2))
