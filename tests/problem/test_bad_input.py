"""Every row of docs/input.md: bad input gets the message that stands there, odd input is accepted, none is written to.

The rows of the tables are the ids of the tests; the messages are read from the tables.
"""

from __future__ import annotations

import os
import re
import types
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import apply, complete, kkt_residuals, random_problem, rounded_product

import qpdiff
from qpdiff import Status
from qpdiff.problem import OPERANDS
from qpdiff.validation import make_problem

TABLE = Path(__file__).parents[2] / "docs" / "input.md"
ROWS = dict(re.findall(r"^\| `([\w-]+)` \| .* \| (.*) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE))
ERRORS = {"ValueError": ValueError, "TypeError": TypeError, "ImportError": ImportError, "MemoryError": MemoryError}

# Three problems with the solution (-1, -1); every operand has the batch axis.
GOOD = {
    "Q": np.tile(np.eye(2), (3, 1, 1)), "q": np.ones((3, 2)), "G": np.ones((3, 1, 2)), "h": np.ones((3, 1)),
    "A": np.tile([[1.0, -1.0]], (3, 1, 1)), "b": np.zeros((3, 1)), "lb": np.full((3, 2), -5.0),
    "ub": np.full((3, 2), 5.0),
}  # fmt: skip
for operand in GOOD.values():
    operand.flags.writeable = False


def raises(row):
    """The error and the beginning of the message that the table promises."""
    kind, message = re.fullmatch(r"(\w+): `(.*)`", ROWS[row]).groups()
    return pytest.raises(ERRORS[kind], match="^" + re.escape(message.removesuffix("…")))


def changed(name, index, value):
    array = GOOD[name].copy()
    array[index] = value
    return {name: array}


def to_library(xp, operands):
    return {
        name: xp.asarray(value) if isinstance(value, np.ndarray) else value
        for name, value in operands.items()
        if value is not None
    }


def host(xp, sol):
    """The arrays of a solution, on the host."""
    names = ("x", "y", "z", "z_lb", "z_ub", "s", "status", "objective", "primal_residual", "dual_residual")
    return types.SimpleNamespace(
        **{name: xp.to_numpy(getattr(sol, name)) for name in names}, duality_gap=xp.to_numpy(sol.duality_gap)
    )


# ---- refused

LAST = {"Q": (1, 1), "q": (1,), "G": (0, 1), "h": (0,), "A": (0, 1), "b": (0,), "lb": (1,), "ub": (1,)}
HARMLESS = {"h": np.inf, "lb": -np.inf, "ub": np.inf}

REFUSED = {
    "crossed-bounds": changed("lb", (1, 1), 6.0),
    "asymmetric-Q": changed("Q", (1, 0, 1), 0.5),
    "indefinite-Q": changed("Q", (1, 1, 1), -1.0),
    "shape-Q": {"Q": np.ones((3, 1, 2))},
    "shape-q": {"q": np.ones((3, 3))},
    "shape-G": {"G": np.ones((1, 3))},
    "shape-h": {"h": np.ones((3, 2))},
    "shape-A": {"A": np.ones((1, 3))},
    "shape-b": {"b": np.ones(2)},
    "shape-lb": {"lb": np.ones(3)},
    "shape-ub": {"ub": np.ones(1)},
    "axes-Q": {"Q": np.ones(2)},
    "scalar": {"q": 1.0},
    "batch": {"q": np.ones((4, 2))},
    "empty-variables": {"Q": np.ones((0, 0)), "q": np.ones(0)},
    "missing-Q": {"Q": None},
    "missing-q": {"q": None},
    "missing-G": {"G": None},
    "missing-h": {"h": None},
    "missing-A": {"A": None},
    "missing-b": {"b": None},
    "complex": {"q": np.ones((3, 2), dtype=complex)},
    "object": {"q": [1.0, None]},
    "integer-too-large": {"q": [10**30, 1]},
    "ragged": {"q": [[1.0, 2.0], [1.0]]},
    "not-an-array": {"q": {}},
}
REFUSED_BY_NUMPY = {
    "float16": {"q": np.ones((3, 2), dtype=np.float16)},
    "object": {"q": np.array([1.0, 2.0], dtype=object)},
    "strings": {"q": np.array(["a", "b"])},
    "masked": {"q": np.ma.masked_array(np.ones(2), [True, False])},
}
REFUSED_OPTIONS = {
    "overflow-float32": {"q": np.array([1.0, 1e200]), "dtype": "float32"},
    "unknown-backend": {"backend": "tensorflow"},
    "negative-tol": {"tol": -1},
    "nan-tol": {"tol": float("nan")},
    "negative-rtol": {"rtol": -1},
    "nan-rtol": {"rtol": float("nan")},
    "fractional-iterations": {"max_iterations": 1.5},
    "negative-iterations": {"max_iterations": -1},
    "unknown-dtype": {"dtype": "float16"},
    "unknown-engine": {"engine": "fast"},
    "type-warm-start": {"warm_start": 3},
    "shape-warm-start": {"warm_start": qpdiff.solve_qp(np.eye(3), np.ones(3))},
    "type-progress": {"progress": 3},
    "type-price": {"elastic": [1.0]},
    "unknown-price": {"elastic": {"h": 1.0}},
    "price-without-rows": {"A": None, "b": None, "elastic": {"A": 1.0}},
    "negative-price": {"elastic": {"G": [-1.0]}},
    "infinite-quadratic-price": {"elastic_quadratic": np.inf},
}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", OPERANDS, ids=[f"nan-{name}" for name in OPERANDS])
def test_not_finite(xp, name, value):
    if HARMLESS.get(name) == value:
        pytest.skip("means that there is no such constraint")
    operands = to_library(xp, GOOD | changed(name, (1, *LAST[name]), value))
    with raises(f"nan-{name}") as error:
        qpdiff.solve_qp(**operands)
    assert str(error.value).endswith(f"= {value} (problem 1 of the batch)")


@pytest.mark.parametrize("row", REFUSED)
def test_refused(xp, row):
    with raises(row):
        qpdiff.solve_qp(**{"Q": None, "q": None} | to_library(xp, GOOD | REFUSED[row]))


def csr(data, indices, indptr):
    """A matrix of two columns, of scipy.sparse but with what that does not check."""
    made = sp.csr_array((data, np.zeros_like(indices), indptr), (len(indptr) - 1, 2))
    made.indices[:] = indices
    return made


REFUSED_SPARSE = {
    "sparse-vector": {"q": sp.csr_array(np.ones((2, 1)))},
    "sparse-format": {"Q": sp.eye_array(2)},
    "sparse-axes": {"Q": sp.coo_array((2, 2, 2))},
    "sparse-index": {"G": csr([1.0], [7], [0, 1])},
    "sparse-triangle": {"Q": csr([1.0, 0.5, 1.0], [0, 1, 1], [0, 2, 3])},
    "sparse-pattern": {
        "Q": sp.csr_array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 1.0]]),
        "q": np.ones(3),
        "A": None,
        "b": None,
        "G": None,
        "h": None,
        "lb": None,
        "ub": None,
    },
    "sparse-memory": {
        "Q": sp.eye_array(200_000, format="csr"),
        "q": np.ones(200_000),
        "engine": "array",
        "A": None,
        "b": None,
        "G": None,
        "h": None,
        "lb": None,
        "ub": None,
    },
}


@pytest.mark.parametrize("row", REFUSED_SPARSE)
def test_refused_sparse(row):
    with raises(row):
        qpdiff.solve_qp(**(GOOD | REFUSED_SPARSE[row]))


@pytest.mark.parametrize("row", ["sparse-triangle", "sparse-pattern"])
def test_refused_sparse_without_checks(row):
    with raises(row):
        qpdiff.solve_qp(**(GOOD | REFUSED_SPARSE[row]), check=False)


def test_sparse_batch():
    torch = pytest.importorskip("torch")
    starts, columns = torch.tensor([[0, 1, 2], [0, 0, 2]]), torch.tensor([[0, 1], [0, 1]])
    G = torch.sparse_csr_tensor(starts, columns, torch.ones((2, 2), dtype=torch.float64), (2, 2, 2))
    with raises("sparse-batch"):
        qpdiff.solve_qp(np.eye(2), np.ones(2), G, np.ones(2), backend="numpy")


SPARSE_TANGENTS = {"sparse-tangent": csr([1.0], [0], [0, 1]), "sparse-tangent-values": np.ones(2)}


@pytest.mark.parametrize("row", SPARSE_TANGENTS)
def test_refused_sparse_tangents(row):
    sol = qpdiff.solve_qp(np.eye(2), np.ones(2), csr([1.0], [1], [0, 1]), [1.0])
    with raises(row):
        qpdiff.jvp(sol, G=SPARSE_TANGENTS[row])


def test_accepted_sparse():
    twice = sp.coo_array(([0.25, 0.75, 1.0], ([0, 0, 1], [0, 0, 1])), (2, 2))
    sol = qpdiff.solve_qp(**(GOOD | {"Q": twice, "A": csr([1.0, -1.0], [0, 1], [0, 2])}))
    np.testing.assert_allclose(sol.x, -1.0, atol=1e-6)


@pytest.mark.parametrize("row", REFUSED_BY_NUMPY)
def test_refused_by_numpy(row):
    with raises(row):
        qpdiff.solve_qp(**(GOOD | REFUSED_BY_NUMPY[row]))


@pytest.mark.parametrize("row", REFUSED_OPTIONS)
def test_refused_options(row):
    with raises(row):
        qpdiff.solve_qp(**(GOOD | REFUSED_OPTIONS[row]))


def other_values(row, *values):
    return [pytest.param(value, id=f"{row}-{i}-{type(value).__name__}") for i, value in enumerate(values)]


@pytest.mark.parametrize("backend", other_values("unknown-backend", 3, [], "", np))
def test_other_unknown_backends(backend):
    with pytest.raises(ValueError, match=r"^backend is .*; expected one of 'numpy'"):
        qpdiff.solve_qp(**GOOD, backend=backend)


@pytest.mark.parametrize("dtype", other_values("unknown-dtype", "double", float, int, np.int64, [], ">f4"))
def test_other_unknown_dtypes(dtype):
    with pytest.raises(ValueError, match=r"^dtype is .*; expected 'float32' or 'float64'"):
        qpdiff.solve_qp(**GOOD, dtype=dtype)


@pytest.mark.parametrize("name", ["tol", "rtol"], ids=["nan-tol", "nan-rtol"])
def test_infinite_tolerance(name):
    with pytest.raises(ValueError, match=f"^{name} is inf; expected a number ≥ 0"):
        qpdiff.solve_qp(**GOOD, **{name: np.inf})


@pytest.mark.parametrize(
    "value", other_values("not-an-array", "ab", 1j, {1, 2}, range(2), (i for i in range(2)), object())
)
def test_other_things_that_are_no_arrays(value):
    with pytest.raises(TypeError, match=f"^q is a builtins.{type(value).__name__}; expected an array"):
        qpdiff.solve_qp(**(GOOD | {"q": value}))


def test_float16_longdouble():
    with pytest.raises(TypeError, match=r"^q has dtype \w+; expected float32 or float64"):
        qpdiff.solve_qp(np.eye(2), np.ones(2, dtype=np.longdouble))


def test_several_batch_axes_in_a_message(xp):
    q = np.ones((2, 3, 2))
    q[1, 2, 0] = np.nan
    with pytest.raises(ValueError, match=r"q\[0\] = nan \(problem \(1, 2\) of the batch\)$"):
        qpdiff.solve_qp(xp.asarray(np.eye(2)), xp.asarray(q))


@pytest.mark.parametrize("name", OPERANDS)
def test_shared_operands_have_no_index_in_a_message(xp, name):
    batched = "h" if name == "q" else "q"
    operands = {other: value if other == batched else value[0] for other, value in GOOD.items()}
    operands[name] = np.full_like(operands[name], np.nan)
    with pytest.raises(ValueError, match=rf"^{name} has NaN .* = nan$"):
        qpdiff.solve_qp(**to_library(xp, operands))


def test_index_in_a_batch_that_is_checked_in_pieces(monkeypatch):
    monkeypatch.setattr(qpdiff.backend.NumPyBackend, "chunk_bytes", 1)
    ub = np.full((3, 2), 5.0)
    ub[2, 0] = -6.0
    with pytest.raises(ValueError, match=r"lb\[0\] = -5.0, ub\[0\] = -6.0 \(problem 2 of the batch\)$"):
        qpdiff.solve_qp(np.eye(2), np.ones(2), lb=np.full(2, -5.0), ub=ub)


def test_mixed_libraries():
    strict = pytest.importorskip("array_api_strict")
    with raises("mixed-libraries"):
        qpdiff.solve_qp(np.eye(2), strict.ones(2))


def test_mixed_devices():
    strict = pytest.importorskip("array_api_strict")
    other = strict.Device("device1")
    with raises("mixed-devices"):
        qpdiff.solve_qp(strict.eye(2), strict.ones(2, device=other))


def test_ragged_list_of_arrays_of_another_device():
    strict = pytest.importorskip("array_api_strict")
    number = strict.ones((), device=strict.Device("device1"))
    with raises("ragged"):
        qpdiff.solve_qp(np.eye(2), [number, number])


def test_moved_libraries():
    strict = pytest.importorskip("array_api_strict")
    sol = qpdiff.solve_qp(np.eye(2), strict.ones(2, device=strict.Device("device1")), backend="numpy")
    assert isinstance(sol.x, np.ndarray)
    np.testing.assert_allclose(sol.x, -1.0, atol=1e-6)


def test_stuck():
    def refuse(self, **_):
        raise BufferError("no way out")

    stuck = type(
        "Stuck", (), {"__module__": "builtins", "__dlpack__": refuse, "__dlpack_device__": lambda self: (1, 0)}
    )
    with raises("stuck") as error:
        qpdiff.solve_qp(np.eye(2), stuck(), backend="numpy")
    assert str(error.value).endswith("no way out")


def test_missing_backend(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(qpdiff.backend.choice.importlib, "import_module", missing)
    with raises("missing-backend"):
        qpdiff.solve_qp(np.eye(2), np.ones(2), backend="torch")


# ---- accepted


def as_type(*dtypes):
    """The operands in these types, in turn."""
    return lambda d: {name: value.astype(dtypes[i % len(dtypes)]) for i, (name, value) in enumerate(d.items())}


def nearly_symmetric(d):
    return d | {"Q": d["Q"] + [[0.0, 5e-9], [0.0, 0.0]]}


def nearly_semidefinite(d):
    return d | {"Q": np.ones((3, 2, 2)) - 5e-9 * np.eye(2), "q": np.full((3, 2), 2.0)}


def infinite_bounds(d):
    return d | {"h": np.full(1, np.inf), "lb": np.full(2, -np.inf), "ub": np.full(2, np.inf)}


def equal_bounds(d):
    return {"Q": d["Q"], "q": -d["q"], "lb": np.full(2, -1.0), "ub": np.full((3, 2), -1.0)}


def empty_rows(d):
    return d | {"G": np.ones((0, 2)), "h": np.ones((3, 0)), "A": np.ones((3, 0, 2)), "b": np.ones(0)}


def numbers(d):
    return d | {"h": 1.0, "b": 0, "lb": np.array(-5.0), "ub": np.float64(np.inf)}


def lists(d):
    return d | {"q": [1, 1.0], "G": d["G"].tolist(), "lb": (-5, -5.0), "b": [0]}


def integers_beside_float32(d):
    return as_type("float32", "int16")(d) | {"b": [0]}


ACCEPTED = {
    "infinite-bounds": (infinite_bounds, "float64"),
    "equal-bounds": (equal_bounds, "float64"),
    "nearly-symmetric-Q": (nearly_symmetric, "float64"),
    "nearly-semidefinite-Q": (nearly_semidefinite, "float64"),
    "empty-rows": (empty_rows, "float64"),
    "integers": (as_type("int64", "int32", "int8"), "float64"),
    "integers-float32": (integers_beside_float32, "float32"),
    "mixed-floats": (as_type("float32", "float64"), "float64"),
    "lists": (lists, "float64"),
    "number": (numbers, "float64"),
}


@pytest.mark.parametrize("row", ACCEPTED)
def test_accepted(xp, row):
    change, dtype = ACCEPTED[row]
    assert ROWS[row].startswith("accepted")
    sol = qpdiff.solve_qp(**to_library(xp, change(GOOD)))
    np.testing.assert_allclose(xp.to_numpy(sol.x), -np.ones((3, 2)), atol=1e-6)
    assert xp.to_numpy(sol.status).tolist() == [Status.SOLVED] * 3
    assert str(sol.x.dtype).endswith(dtype)
    if row == "infinite-bounds":
        assert np.all(xp.to_numpy(sol.s) == np.inf)
        assert not np.any([xp.to_numpy(getattr(sol, name)).any() for name in ("z", "z_lb", "z_ub")])


def test_accepted_bool(xp):
    operands = to_library(xp, {"Q": np.eye(2, dtype=bool), "q": np.array([True, False])})
    sol = qpdiff.solve_qp(**operands)
    np.testing.assert_allclose(xp.to_numpy(sol.x), [-1.0, 0.0], atol=1e-6)
    assert str(sol.x.dtype).endswith("float64")


@pytest.mark.parametrize("dtype", [np.float16, np.longdouble], ids=["float16-converted-half", "float16-converted-long"])
def test_accepted_with_dtype(dtype):
    sol = qpdiff.solve_qp(**as_type(dtype)(GOOD), dtype="float32")
    assert sol.x.dtype == np.float32
    np.testing.assert_allclose(sol.x, -1.0, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_accepted_computed_Q(xp, dtype):
    """What is solved and differentiated is the problem of the symmetric part, whatever the engine reads of Q."""
    if dtype == np.float16 and xp.name == "array-api-strict":
        pytest.skip("has no half precision")
    Q, box = rounded_product(dtype), {"lb": np.full(6, -1.0), "ub": np.ones(6)}
    exact = (Q.astype(np.float64) + Q.mT) / 2
    largest = np.max(np.abs(exact), axis=(-2, -1))
    assert np.all(np.max(np.abs(Q - exact), axis=(-2, -1)) > 1e-8 * largest)
    assert np.all(np.linalg.eigvalsh(exact)[:, 0] < -1e-8 * largest)
    operands = {"q": np.random.default_rng(1).normal(size=(2, 6)), **box}
    expected = qpdiff.solve_qp(exact, **operands, check=False)
    assert np.all(expected.status == Status.SOLVED)
    options = {} if dtype == np.float32 else {"dtype": "float64"}
    sol = qpdiff.solve_qp(**to_library(xp, {"Q": Q, **operands}), **options)
    np.testing.assert_allclose(xp.to_numpy(sol.x), expected.x, atol=1e-9)
    gradient = xp.to_numpy(qpdiff.vjp(sol, x=xp.asarray(np.ones((2, 6)))).Q)
    np.testing.assert_allclose(gradient, qpdiff.vjp(expected, x=np.ones((2, 6))).Q, atol=1e-7)
    np.testing.assert_array_equal(gradient, gradient.mT)
    with raises("asymmetric-Q"):
        qpdiff.solve_qp(**to_library(xp, {"Q": np.array([[1.0, 0.5], [0.0, 1.0]], dtype), "q": np.ones(2)}), **options)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_accepted_matrix():
    sol = qpdiff.solve_qp(np.asmatrix(np.eye(2)), np.asmatrix(np.ones(2)), lb=np.full(2, -5.0))
    assert type(sol.x) is np.ndarray
    np.testing.assert_allclose(sol.x, [[-1.0, -1.0]], atol=1e-6)


def test_accepted_empty_batch(xp):
    operands = to_library(xp, {"Q": -np.eye(2), "q": np.ones((0, 2)), "G": np.ones((1, 2)), "h": np.ones(1)})
    sol = qpdiff.solve_qp(**operands)
    assert (sol.x.shape, sol.z.shape, sol.status.shape) == ((0, 2), (0, 1), (0,))
    grads = qpdiff.vjp(sol, x=xp.asarray(np.ones((0, 2))))
    assert (grads.Q.shape, grads.q.shape) == ((2, 2), (0, 2))
    assert not xp.to_numpy(grads.Q).any()


def test_accepted_no_iterations(xp):
    sol = qpdiff.solve_qp(**to_library(xp, GOOD), max_iterations=0)
    assert xp.to_numpy(sol.status).tolist() == [Status.MAX_ITERATIONS] * 3


# ---- numbers that cannot be solved


def assert_status(operands, sol, i):
    """Problem i has a status; SOLVED means finite numbers and residuals from the definition within the tolerance."""
    if Status(int(sol.status[i])) != Status.SOLVED:
        return
    one = {name: value[i] for name, value in operands.items()}
    x, y, z, z_lb, z_ub = [getattr(sol, name)[i] for name in ("x", "y", "z", "z_lb", "z_ub")]
    # In units of each variable in which no curvature is huge, as SOLVED does not depend on them.
    curvature = np.diagonal(one["Q"])
    unit = np.where(curvature > 1e50, np.sqrt(np.where(curvature > 1e50, curvature, 1.0)), 1.0)
    one["Q"] = one["Q"] / unit[:, None] / unit
    one |= {name: one[name] / unit for name in ("q", "A", "G") if name in one}
    one |= {name: one[name] * unit for name in ("lb", "ub") if name in one}
    x, z_lb, z_ub = x * unit, z_lb / unit, z_ub / unit
    point = [x, y, z, z_lb, z_ub]
    reported = [getattr(sol, name)[i] for name in ("objective", "primal_residual", "dual_residual", "duality_gap")]
    assert all(np.isfinite(part).all() for part in (*point, *reported))
    d = complete(one)
    with np.errstate(all="ignore"):
        finite = {name: np.where(np.isfinite(d[name]), d[name], 0.0) for name in ("h", "lb", "ub")}
        Qx = apply(d["Q"], x)
        Kx = [apply(d["A"], x), apply(d["G"], x), x if "lb" in one or "ub" in one else np.zeros(1)]
        Kv = apply(d["A"].mT, y) + apply(d["G"].mT, z) - z_lb + z_ub
        kv = d["b"] @ y + finite["h"] @ z - finite["lb"] @ z_lb + finite["ub"] @ z_ub
        scales = [[*Kx, d["b"], *finite.values()], [Qx, d["q"], Kv], [x @ Qx, d["q"] @ x, kv]]
        residuals = kkt_residuals(one, *point)
    for residual, terms in zip(residuals, scales, strict=True):
        scale = max(float(np.max(np.abs(term), initial=0.0)) for term in terms)
        assert np.isfinite(scale)
        assert residual <= 1.01 * (1e-8 + 1e-8 * scale) + 1e-15


FAMILIES = [("", "pd"), ("A", "pd"), ("A", "lp"), ("lb ub", "diagonal"), ("G A lb ub", "pd"), ("G A lb ub", "lp")]


def extremes(name, good, values):
    """Versions of an operand of one problem with an entry replaced, or with all entries scaled."""
    for value in values:
        if name == "Q" and value < 0:
            continue  # indefinite
        entry = good.copy()
        if name == "Q":
            entry[0, :] = entry[:, 0] = 0.0
        entry[(0,) * entry.ndim] = value
        yield entry
        yield good * (value / max(np.max(np.abs(good)), 1.0))


@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize(
    "values",
    [
        pytest.param((1e200, -1e200, 1e308, -1e308), id="huge"),
        pytest.param((1e-310, -1e-310, 5e-324), id="denormal"),
    ],
)
def test_extreme_numbers(xp, name, values):
    for parts, cost in FAMILIES:
        one = random_problem(np.random.default_rng(1), parts, batch=(), cost=cost, n=4, m=3, p=2)
        if name not in one:
            continue
        versions = list(extremes(name, one[name], values))
        # An extreme problem between any two good ones.
        batch = {k: np.stack([v] * (2 * len(versions) + 1)) for k, v in one.items()}
        reference = host(xp, qpdiff.solve_qp(**to_library(xp, batch)))
        alone = host(xp, qpdiff.solve_qp(**to_library(xp, one)))
        batch[name][1::2] = versions
        if name == "lb" and "ub" in batch:
            batch["ub"] = np.maximum(batch["lb"], batch["ub"])
        elif name == "ub" and "lb" in batch:
            batch["lb"] = np.minimum(batch["lb"], batch["ub"])
        sol = host(xp, qpdiff.solve_qp(**to_library(xp, batch)))
        for i in range(len(batch["Q"])):
            assert_status(batch, sol, i)
        for field in ("x", "y", "z", "z_lb", "z_ub", "objective", "status"):
            mates, expected, lone = getattr(sol, field)[::2], getattr(reference, field)[::2], getattr(alone, field)
            # A problem whose group holds an extreme one is solved alone, which rounds differently.
            nearest = np.where(np.abs(mates - lone) < np.abs(mates - expected), lone, expected)
            np.testing.assert_allclose(mates, nearest, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "operands",
    [
        pytest.param(
            {
                "Q": 1e218
                * np.array([[4.035674719636182, 2.011244731369064], [2.011244731369064, 1.0023368210965441]]),
                "q": np.array([-0.7767, -0.3871]),
            },
            id="huge-cost",
        ),
        pytest.param(
            {
                "Q": np.diag([5.636703670045968e133, 3.500957579523705e133]),
                "q": np.array([5.007828954347093e-275, 1.1234599349594271e-274]),
                "A": np.array([[4.402154372619385e289, -2.406633781338893e290]]),
                "b": np.array([-1.2841335067587942e-247]),
            },
            id="huge-equality",
        ),
    ],
)
def test_overflow_is_not_solved(operands):
    sol = qpdiff.solve_qp(**operands)
    if sol.status == Status.SOLVED:
        assert np.isfinite([sol.objective, sol.primal_residual, sol.dual_residual, sol.duality_gap]).all()


@pytest.mark.parametrize("name", OPERANDS, ids=[f"unchecked-nan-{name}" for name in OPERANDS])
def test_unchecked_nan(xp, name):
    bad = []
    for value in (np.nan, np.inf, -np.inf):
        if HARMLESS.get(name) != value:
            bad += [GOOD[name][0].copy(), np.full_like(GOOD[name][0], value)]  # an entry, or all
            bad[-2][LAST[name]] = value
    batch = {k: np.stack([v[0]] * (2 * len(bad) + 1)) for k, v in GOOD.items()}
    reference = host(xp, qpdiff.solve_qp(**to_library(xp, batch)))
    batch[name][1::2] = bad
    sol = qpdiff.solve_qp(**to_library(xp, batch), check=False)
    grads = qpdiff.vjp(sol, x=xp.asarray(np.ones_like(batch["q"])))
    result = host(xp, sol)
    assert np.all(result.status[::2] == Status.SOLVED)
    assert np.all(result.status[1::2] != Status.SOLVED)
    np.testing.assert_allclose(result.x[::2], reference.x[::2], rtol=1e-12)
    assert np.isfinite(xp.to_numpy(grads.q)[::2]).all()
    assert np.isnan(xp.to_numpy(grads.q)[1::2]).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_unchecked_nan_in_equal_bounds(xp, value):
    operands = to_library(xp, GOOD | changed("lb", 1, value) | changed("ub", 1, value))
    status = xp.to_numpy(qpdiff.solve_qp(**operands, check=False).status)
    assert [code == Status.SOLVED for code in status] == [True, False, True]


def test_unchecked_crossed_bounds(xp):
    operands = to_library(xp, GOOD | changed("lb", (1, 1), 6.0))
    status = xp.to_numpy(qpdiff.solve_qp(**operands, check=False).status)
    assert [code == Status.SOLVED for code in status] == [True, False, True]


@pytest.mark.parametrize(
    "Q",
    [
        pytest.param([[1.0, 0.5], [0.0, 1.0]], id="unchecked-Q-asymmetric"),
        pytest.param([[1.0, 0.0], [0.0, -1.0]], id="unchecked-Q-indefinite"),
        pytest.param([[-1.0, 0.0], [0.0, -1.0]], id="unchecked-Q-negative"),
    ],
)
def test_unchecked_hessian(xp, Q):
    operands = GOOD | changed("Q", 1, Q)
    sol = host(xp, qpdiff.solve_qp(**to_library(xp, operands), check=False))
    for i in range(3):
        assert_status(operands, sol, i)
    assert sol.status[[0, 2]].tolist() == [Status.SOLVED] * 2


def test_indefinite_among_real_problems():
    """Of the Maros-Meszaros problems one is not convex, and no convex one is taken for it."""
    folder = os.environ.get("QPDIFF_DATA")
    if not folder:
        pytest.skip("QPDIFF_DATA names no folder with quadratic programs")
    files = sorted(Path(folder).glob("*.npz"))
    assert files
    refused = []
    for file in files:
        with np.load(file) as data:
            operands = {name: data[name] for name in data if name in OPERANDS}
        try:
            make_problem(dict.fromkeys(OPERANDS) | operands)
        except ValueError as error:
            refused.append((file.stem, str(error).split(":")[0]))
    assert refused == [("MM_VALUES", "Q is not positive semidefinite, so the problem is not convex")]


# ---- the caller's arrays


def strided(array):
    """Every second entry of an array that is NaN in between."""
    base = np.full([2 * size for size in array.shape], np.nan, dtype=array.dtype)
    view = base[tuple(slice(None, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def reversed_axes(array):
    every = tuple(slice(None, None, -1) for _ in array.shape)
    return np.ascontiguousarray(array[every])[every]


def broadcast(array):
    """The first problem's numbers for all, by a zero stride."""
    return np.broadcast_to(array[0].copy(), array.shape)


def read_only(array):
    copy = array.copy()
    copy.flags.writeable = False
    return copy


LAYOUTS = {
    "c-order": np.ascontiguousarray,
    "fortran-order": lambda array: np.asfortranarray(array).copy(order="F"),
    "strided-views": strided,
    "negative-strides": reversed_axes,
    "broadcast-views": broadcast,
    "read-only": read_only,
    "byte-order": lambda array: array.astype(array.dtype.newbyteorder("S")),
}


def owner(array):
    while array.base is not None:
        array = array.base
    return array


def assert_untouched(operands, xp=None):
    """Solve and differentiate; the arrays, and all the memory that they are views of, keep every bit."""
    rng = np.random.default_rng(0)
    before = {name: owner(value).tobytes() for name, value in operands.items()}
    given = to_library(xp, operands) if xp else operands
    sol = qpdiff.solve_qp(**given)
    assert np.all((xp.to_numpy(sol.status) if xp else sol.status) == Status.SOLVED)
    outputs = ("x", "y", "z", "z_lb", "z_ub")
    cotangents = {name: rng.normal(size=getattr(sol, name).shape) for name in outputs}
    tangents = {name: rng.normal(size=value.shape) for name, value in operands.items()}
    kept = [value.copy() for value in (*cotangents.values(), *tangents.values())]
    for value in (*cotangents.values(), *tangents.values()):
        value.flags.writeable = False
    grads = qpdiff.vjp(sol, **(to_library(xp, cotangents) if xp else cotangents))
    moved = qpdiff.jvp(sol, **(to_library(xp, tangents) if xp else tangents))
    for value, copy in zip((*cotangents.values(), *tangents.values()), kept, strict=True):
        np.testing.assert_array_equal(value, copy)
    assert before == {name: owner(value).tobytes() for name, value in operands.items()}
    if xp:
        for name, value in operands.items():
            np.testing.assert_array_equal(xp.to_numpy(given[name]), value)
    else:
        results = [*(getattr(sol, name) for name in (*outputs, "s")), *grads, *moved]
        for result in results:
            assert result is None or not any(
                np.shares_memory(result, value) for value in (*operands.values(), *cotangents.values())
            )
    return sol, grads, moved


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("parts", "cost"), [*FAMILIES, ("G", "psd")])
def test_layouts(layout, parts, cost):
    operands = random_problem(np.random.default_rng(3), parts, batch=(3,), cost=cost)
    if layout == "broadcast-views":
        operands = {name: broadcast(value) for name, value in operands.items()}
    expected = assert_untouched({name: value.copy() for name, value in operands.items()})
    results = assert_untouched({name: LAYOUTS[layout](value) for name, value in operands.items()})
    assert results[0].x.dtype == np.dtype(np.float64)
    assert results[0].x.dtype.isnative
    np.testing.assert_allclose(results[0].x, expected[0].x, atol=1e-6)
    for name, value in operands.items():
        assert getattr(results[1], name).shape == value.shape


def test_c_order_is_not_copied():
    problem = make_problem(dict.fromkeys(OPERANDS) | GOOD)
    assert all(np.shares_memory(getattr(problem, name), value) for name, value in GOOD.items())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_untouched_in_every_library(xp, dtype):
    operands = random_problem(np.random.default_rng(3), "G A lb ub", batch=(3,), shared=("A", "G"))
    assert_untouched({name: value.astype(dtype) for name, value in operands.items()}, xp)


@given(
    family=st.sampled_from(FAMILIES),
    seed=st.integers(0, 2**32 - 1),
    layouts=st.fixed_dictionaries({name: st.sampled_from(sorted(LAYOUTS)) for name in OPERANDS}),
    shared=st.sets(st.sampled_from(["Q", "A", "G"])),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_mixed_layouts(family, seed, layouts, shared):
    parts, cost = family
    operands = random_problem(np.random.default_rng(seed), parts, batch=(3,), cost=cost, shared=shared)
    # A zero stride changes the numbers, so it stands for itself only where one problem's may be every problem's.
    layouts = {k: "read-only" if v == "broadcast-views" and k not in shared else v for k, v in layouts.items()}
    given = {name: LAYOUTS[layouts[name]](value) for name, value in operands.items() if name not in shared}
    for name in shared & set(operands):
        layout = layouts[name]
        batched = np.broadcast_to(operands[name], (3, *operands[name].shape))
        given[name] = batched if layout == "broadcast-views" else LAYOUTS[layout](operands[name])
    assert_untouched(given)


# ---- derivatives

DERIVATIVES = {
    "cotangent-shape": (qpdiff.vjp, {"x": np.ones(3)}),
    "tangent-shape": (qpdiff.jvp, {"q": np.ones(3)}),
    "absent-tangent": (qpdiff.jvp, {"G": np.ones((1, 2))}),
    "unknown-unsolved": (qpdiff.vjp, {"unsolved": "drop"}),
}


@pytest.mark.parametrize("row", DERIVATIVES)
def test_refused_derivatives(xp, row):
    sol = qpdiff.solve_qp(xp.asarray(GOOD["Q"]), xp.asarray(GOOD["q"]))
    derivative, arguments = DERIVATIVES[row]
    with raises(row):
        derivative(sol, **to_library(xp, arguments))


@pytest.mark.parametrize("derivative", [qpdiff.vjp, qpdiff.jvp])
@pytest.mark.parametrize("row", ["no-linearization"])
def test_refused_solutions(row, derivative):
    sol = replace(qpdiff.solve_qp(GOOD["Q"], GOOD["q"]), linearization=None)
    with raises(row):
        derivative(sol)


@pytest.mark.parametrize("row", ["nan-cotangent", "nan-tangent"])
def test_nan_in_derivatives(xp, row):
    operands = random_problem(np.random.default_rng(5), "G A lb", batch=(3,), shared=("A",))
    sol = qpdiff.solve_qp(**to_library(xp, operands))
    direction = np.random.default_rng(6).normal(size=(3, 6))
    spoilt = direction.copy()
    spoilt[1, 2] = np.nan

    def derivative(value):
        if row == "nan-cotangent":
            return qpdiff.vjp(sol, x=xp.asarray(value))
        return qpdiff.jvp(sol, q=xp.asarray(value))

    for value, expected in zip(derivative(spoilt), derivative(direction), strict=True):
        if value is None:
            continue
        value, expected = xp.to_numpy(value), xp.to_numpy(expected)
        if value.shape == operands["A"].shape:
            assert np.isnan(value).all()
            continue
        np.testing.assert_allclose(value[::2], expected[::2], rtol=1e-6, atol=1e-8)
        if row == "nan-cotangent":
            assert np.isnan(value[1]).any() or not expected[1].any()


# ---- the table


def test_every_row_has_a_test(request):
    tests = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "originalname")]
    if {item.originalname for item in tests} != {name for name in globals() if name.startswith("test_")}:
        pytest.skip("only some of the tests were selected")
    labels = set()
    for item in tests:
        labels.add(item.originalname.removeprefix("test_").removeprefix("accepted_").replace("_", "-"))
        if hasattr(item, "callspec"):
            labels.add(re.sub("^(numpy|array-api-strict|cupy)-", "", item.callspec.id))
            labels.update(value for value in item.callspec.params.values() if isinstance(value, str))
    assert [row for row in ROWS if not any(f"{label}-".startswith(f"{row}-") for label in labels)] == []


def test_a_tensor_that_requires_a_gradient_is_warned_of():
    torch = pytest.importorskip("torch")
    q = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match=r"q requires a gradient.*qpdiff\.torch\.solve_qp"):
        qpdiff.solve_qp(torch.eye(2, dtype=torch.float64), q)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        qpdiff.solve_qp(torch.eye(2, dtype=torch.float64), q)
