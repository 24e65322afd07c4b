"""The Dask adapter against the solver itself, and what a scheduler adds: laziness, pickling, workers that die."""

import os
import pickle
import signal

import numpy as np
import pytest

pytest.importorskip("dask.array")
import dask
import dask.array as da
from dask.array.utils import assert_eq
from dask.sizeof import sizeof
from problems import kkt_residuals, random_problem
from sparse_problems import as_sparse, random_sparse

import qpdiff
import qpdiff.dask
from qpdiff.backend.threads import THREADS
from qpdiff.solution import FIELDS

PARTS = ["", "A", "G", "A G", "lb", "ub", "lb ub", "G lb", "A G lb ub"]
BATCHES = [(), (1,), (7,), (3, 4), (2, 1, 3)]
TIGHT = {"tol": 1e-12, "rtol": 1e-12}


def blocks(rng, shape):
    """Random chunks of an array."""
    cuts = [
        sorted(rng.choice(np.arange(1, size), rng.integers(0, min(max(size, 1), 4)), replace=False)) for size in shape
    ]
    return tuple(tuple(map(int, np.diff([0, *cut, size]))) for cut, size in zip(cuts, shape, strict=True))


def draw(seed):
    """A batch with some operands shared and some axes of length 1, and the same with operands of all kinds."""
    rng = np.random.default_rng(seed)
    parts, batch = PARTS[seed % len(PARTS)], BATCHES[seed % len(BATCHES)]
    shared = [name for name in ("Q", "q", "G", "A") if rng.uniform() < 0.3]
    eager = random_problem(rng, parts, batch=batch, shared=shared, infinite=0.2)
    for axis in range(len(batch)):
        if "q" not in shared and rng.uniform() < 0.3:
            eager["q"] = np.take(eager["q"], [0], axis)
    kinds = {name: rng.choice(["dask", "dask", "numpy", "list"]) for name in eager}
    lazy = {
        name: da.from_array(value, chunks=blocks(rng, value.shape))
        if kinds[name] == "dask"
        else value.tolist()
        if kinds[name] == "list"
        else value
        for name, value in eager.items()
    }
    return rng, eager, lazy


def sparse_operands(seed):
    """Sparse operands of every kind: shared or not, with values of NumPy or Dask."""
    rng = np.random.default_rng(seed)
    shared = [name for name in ("Q", "G", "A") if rng.uniform() < 0.4]
    operands, masks = random_sparse(rng, "A G lb ub", batch=(2, 5), shared=shared, n=7)
    eager = {name: as_sparse(value, masks[name]) if name in masks else value for name, value in operands.items()}
    lazy = {}
    for name, value in eager.items():
        array = value.values if name in masks else value
        if rng.uniform() < 0.7:
            array = da.from_array(array, chunks=blocks(rng, array.shape))
        lazy[name] = value.with_values(array) if name in masks else array
    return rng, eager, lazy


def sync(*values):
    return dask.compute(*values, scheduler="sync")


def refuse(*args, **kwargs):
    raise AssertionError("something was computed")


@pytest.fixture
def solves(monkeypatch):
    """How many threads each call of the solver was to use."""
    calls, solve_qp = [], qpdiff.solver.solve_qp

    def count(*args, **kwargs):
        sol = solve_qp(*args, **kwargs)
        if sol.status.size:
            calls.append(THREADS.get())
        return sol

    monkeypatch.setattr("qpdiff.solver.solve_qp", count)
    return calls


@pytest.mark.parametrize("seed", range(45))
def test_the_same_as_without_dask(seed):
    rng, eager, lazy = draw(seed)
    expected = qpdiff.solve_qp(**eager)
    cotangents = {name: rng.normal(size=getattr(expected, name).shape) for name in ("x", "y", "z", "z_lb", "z_ub")}
    if seed % 3:
        cotangents["objective"] = rng.normal(size=expected.objective.shape)
    tangents = {name: rng.normal(size=value.shape) for name, value in eager.items()}
    with dask.config.set(scheduler=refuse):
        sol = qpdiff.dask.solve_qp(**lazy)
        some = {k: v if seed % 2 else da.from_array(v, chunks=blocks(rng, v.shape)) for k, v in cotangents.items()}
        gradients, pushed = qpdiff.dask.vjp(sol, **some), qpdiff.dask.jvp(sol, **tangents)
    for name in FIELDS:
        one, other = getattr(sol, name), getattr(expected, name)
        assert (one.shape, one.dtype) == (other.shape, other.dtype), name
    found, found_gradients, found_tangents = sync(sol, gradients, pushed)
    for name in FIELDS:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-7, err_msg=name)
    residuals = kkt_residuals(eager, found.x, found.y, found.z, found.z_lb, found.z_ub)
    assert max(residuals) < 1e-6
    for name, value in qpdiff.vjp(expected, **cotangents)._asdict().items():
        one = getattr(gradients, name)
        assert (one is None) == (value is None)
        if value is not None:
            assert (one.shape, one.dtype) == (eager[name].shape, value.dtype)
            np.testing.assert_allclose(getattr(found_gradients, name), value, rtol=1e-5, atol=1e-5, err_msg=name)
    tangents = qpdiff.jvp(expected, **tangents)
    for name, value in tangents._asdict().items():
        assert getattr(pushed, name).shape == value.shape
        np.testing.assert_allclose(getattr(found_tangents, name), value, rtol=1e-5, atol=1e-5, err_msg=name)
    assert (pushed.objective.shape, pushed.objective.dtype) == (tangents.objective.shape, tangents.objective.dtype)
    np.testing.assert_allclose(found_tangents.objective, tangents.objective, rtol=1e-5, atol=1e-5)


def test_tangents_stay_a_tuple_of_five_with_an_objective():
    sol = qpdiff.dask.solve_qp(np.eye(2), da.ones((3, 2), chunks=(2, 2)))
    pushed = qpdiff.dask.jvp(sol, q=np.ones(2))
    (computed,), (persisted,) = sync(pushed), dask.persist(pushed, scheduler="sync")
    for tangents in (pushed, computed, persisted, pickle.loads(pickle.dumps(computed))):
        assert isinstance(tangents, qpdiff.differentiation.Tangents)
        assert len(tangents) == 5
        x, *_ = tangents
        for value in (x, tangents.x, tangents[0]):
            np.testing.assert_allclose(value, -np.ones((3, 2)))
        np.testing.assert_allclose(tangents.objective, -2.0 * np.ones(3))  # the value is −½qᵀq


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("lazily", [False, True])
def test_numbers(batch, lazily):
    rng = np.random.default_rng(8)
    operands = random_problem(rng, "A G lb ub", batch=batch)
    numbers = {"lb": -0.5, "ub": 0.75, "h": 2.0, "b": 0.0}
    lazy = {name: da.from_array(value, chunks=blocks(rng, value.shape)) for name, value in operands.items()}
    lazy |= {name: da.asarray(np.asarray(value)) if lazily else value for name, value in numbers.items()}
    expected, sol = qpdiff.solve_qp(**operands | numbers), qpdiff.dask.solve_qp(**lazy)
    cotangent = rng.normal(size=expected.x.shape)
    tangents = {"lb": 1.0, "ub": rng.normal(size=batch), "q": operands["q"]}
    pulled, pushed = qpdiff.dask.vjp(sol, x=cotangent), qpdiff.dask.jvp(sol, **tangents)
    pairs = [(sol.x, expected.x), (sol.status, expected.status)]
    gradients = qpdiff.vjp(expected, x=cotangent)
    pairs += [(getattr(pulled, name), getattr(gradients, name)) for name in operands | numbers]
    pairs += zip(pushed, qpdiff.jvp(expected, **tangents), strict=True)
    found = sync(*(one for one, _ in pairs))
    for (one, other), value in zip(pairs, found, strict=True):
        assert one.shape == other.shape == value.shape
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="tangent of lb has shape"):
        qpdiff.dask.jvp(sol, lb=np.ones((*batch, 5)))


def test_blocks_are_those_of_the_operands():
    Q, q = np.broadcast_to(np.eye(3), (10, 3, 3)), np.ones((10, 3))
    sol = qpdiff.dask.solve_qp(
        da.from_array(Q, chunks=(4, 2, 1)), da.from_array(q, chunks=(6, 3)), np.ones((1, 3)), [1]
    )
    assert sol.x.chunks == ((4, 2, 2, 2), (3,))
    assert sol.z.chunks == ((4, 2, 2, 2), (1,))
    assert sol.status.chunks == ((4, 2, 2, 2),)
    gradients = qpdiff.dask.vjp(sol, x=np.ones(3))
    assert gradients.q.chunks == sol.x.chunks
    assert gradients.G.chunks == ((1,), (3,))
    assert qpdiff.dask.solve_qp(Q, q).x.numblocks == (1, 1)


@pytest.mark.parametrize(("kind", "dtype"), [("float32", None), ("float32", "float32"), ("float64", None)])
@pytest.mark.parametrize("engine", ["array", "compiled"])
def test_types_of_the_blocks(engine, kind, dtype):
    if engine == "compiled":
        pytest.importorskip("qpdiff.engines.compiled.engine", exc_type=ImportError)
    rng = np.random.default_rng(0)
    operands = {k: v.astype(kind) for k, v in random_problem(rng, "A G lb ub", batch=(5,), shared=("G", "A")).items()}
    operands["lb"] = operands["lb"].tolist()  # a list has no type of its own
    options = {"engine": engine, "dtype": dtype}
    expected = qpdiff.solve_qp(**operands, **options)
    assert expected.x.dtype == kind
    sol = qpdiff.dask.solve_qp(**operands | {"q": da.from_array(operands["q"], chunks=(2, 6))}, **options)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == "float32" else {}
    for name in FIELDS:  # checks the type and the shape of every block too
        assert_eq(getattr(sol, name), getattr(expected, name), **tolerance)
    gradients = qpdiff.dask.vjp(sol, x=np.ones(6))
    for name, value in qpdiff.vjp(expected, x=np.ones(6))._asdict().items():
        assert_eq(getattr(gradients, name), value, **tolerance)
    assert_eq(qpdiff.dask.jvp(sol, b=[1, 2]).x, qpdiff.jvp(expected, b=[1, 2]).x, **tolerance)
    other = "float64" if kind == "float32" else "float32"
    assert qpdiff.dask.solve_qp(**operands, engine=engine, dtype=other).x.dtype == other


def test_no_problems():
    sol = qpdiff.dask.solve_qp(np.eye(2), da.ones((0, 2)), np.ones((3, 2)), np.ones((0, 3)))
    found, gradients = sync(sol, qpdiff.dask.vjp(sol, x=np.ones((0, 2))))
    assert (found.x.shape, found.z.shape, found.status.shape) == ((0, 2), (0, 3), (0,))
    np.testing.assert_array_equal(gradients.G, np.zeros((3, 2)))


def test_gradients_by_differences():
    rng = np.random.default_rng(2)
    eager = random_problem(rng, "A G lb ub", batch=(4,), shared=("Q", "G"), n=4, m=3, p=1)
    weights = rng.normal(size=(4, 4))

    def lazy(operands):
        return {
            name: value if name in ("Q", "G", "lb") else da.from_array(value, chunks=(3, *value.shape[1:]))
            for name, value in operands.items()
        }

    def loss(operands):
        sol = qpdiff.dask.solve_qp(**lazy(operands), **TIGHT)
        return float(sync((weights * sol.x).sum() + (sol.z**2).sum())[0])

    sol = qpdiff.dask.solve_qp(**lazy(eager), **TIGHT)
    (gradients,) = sync(
        qpdiff.dask.vjp(sol, x=weights, z=2 * sol.z)
    )  # the cotangent is lazy and of the solution itself
    for name, value in eager.items():
        tangent = rng.normal(size=value.shape)
        tangent = tangent + tangent.T if name == "Q" else tangent
        ends = [loss(eager | {name: value + sign * 1e-6 * tangent}) for sign in (1, -1)]
        pulled = np.sum(getattr(gradients, name) * tangent)
        np.testing.assert_allclose(pulled, (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-5, err_msg=name)


def test_each_block_is_solved_once_and_by_one_thread(solves):
    rng = np.random.default_rng(3)
    operands = random_problem(rng, "G", batch=(9,), shared=("Q", "G"))
    with dask.config.set(scheduler=refuse):
        sol = qpdiff.dask.solve_qp(**operands | {"q": 2 * da.from_array(operands["q"] / 2, chunks=(2, 6))})
        gradients = qpdiff.dask.vjp(sol, x=sol.x - 1)
    assert solves == []
    sync(sol, gradients, sol.objective.sum(), (sol.status == 0).all())
    assert solves == [1] * 5
    kept = qpdiff.dask.persist(sol, scheduler="sync")
    assert len(solves) == 10
    found, kept_gradients = sync(kept, qpdiff.dask.vjp(kept, x=kept.x - 1))
    assert len(solves) == 10
    np.testing.assert_array_equal(found.x, sync(sol.x)[0])
    np.testing.assert_array_equal(kept_gradients.G, sync(gradients.G)[0])


@pytest.mark.parametrize("eager", [True, False])
def test_warm_start(eager):
    rng = np.random.default_rng(4)
    operands = random_problem(rng, "A G lb", batch=(6,), shared=("Q",), infinite=0.2)
    lazy = operands | {"q": da.from_array(operands["q"], chunks=(4, 6))}
    near = qpdiff.solve_qp(**operands) if eager else qpdiff.dask.solve_qp(**lazy)
    cold, warm, other = sync(
        qpdiff.dask.solve_qp(**lazy),
        qpdiff.dask.solve_qp(**lazy, warm_start=near),
        qpdiff.dask.solve_qp(**lazy | {"q": lazy["q"].rechunk((3, 6))}, warm_start=near),
    )
    assert np.all(warm.iterations < cold.iterations)
    np.testing.assert_array_equal(warm.iterations, other.iterations)
    np.testing.assert_allclose(warm.x, cold.x, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(warm.iterations, qpdiff.solve_qp(**operands, warm_start=sync(near)[0]).iterations)


# ---- bad input

GOOD = {"Q": np.eye(3), "q": np.ones((6, 3)), "G": np.ones((2, 3)), "h": np.ones((6, 2))}
BAD = [
    {"Q": None},
    {"h": None},
    {"Q": np.ones((3, 2))},
    {"Q": np.ones(3)},
    {"Q": np.ones((0, 0))},
    {"q": np.ones((6, 4))},
    {"G": np.ones((6, 3, 3))},
    {"h": np.ones((5, 2))},
    {"A": np.ones((1, 3)), "b": np.ones(2)},
    {"lb": np.ones((2, 6, 2))},
    {"q": np.ones((6, 3), complex)},
    {"q": np.ones((6, 3), np.float16)},
    {"q": [[1.0, 2.0, 3.0], [1.0]]},
    {"q": "text"},
    {"dtype": "float16"},
    {"tol": -1},
    {"max_iterations": 1.5},
    {"engine": "fast"},
    {"warm_start": 3},
    {"warm_start": qpdiff.solve_qp(np.eye(3), np.ones((4, 3)), np.ones((2, 3)), np.ones(2), engine="array")},
    {"warm_start": qpdiff.solve_qp(np.eye(3), np.ones(3), engine="array")},
]


@pytest.mark.parametrize("change", BAD, ids=[f"{i}-{'-'.join(change)}" for i, change in enumerate(BAD)])
def test_bad_input_raises_at_once_as_without_dask(change):
    operands = GOOD | change
    with pytest.raises((TypeError, ValueError)) as expected:
        qpdiff.solve_qp(**operands)
    lazy = {k: da.from_array(v, chunks=2) if isinstance(v, np.ndarray) else v for k, v in operands.items()}
    with dask.config.set(scheduler=refuse), pytest.raises(expected.type) as error:
        qpdiff.dask.solve_qp(**lazy)
    assert str(error.value) == str(expected.value)


def test_what_only_dask_can_get_wrong():
    q = da.from_array(GOOD["q"], chunks=(2, 3))
    with pytest.raises(ValueError, match=r"q has shape \(nan, 3\), with sizes that Dask does not know"):
        qpdiff.dask.solve_qp(GOOD["Q"], q[q[:, 0] > 0])
    with pytest.raises(ValueError, match="unsolved is 'ignore'; expected 'raise', 'nan' or 'zero'"):
        qpdiff.dask.solve_qp(GOOD["Q"], q, unsolved="ignore")
    with pytest.raises(TypeError, match="verbose"):
        qpdiff.dask.solve_qp(GOOD["Q"], q, verbose=True)


def test_bad_derivatives_raise_at_once():
    lazy, eager = qpdiff.dask.solve_qp(**GOOD), qpdiff.solve_qp(**GOOD)
    cases = [("vjp", {"x": np.ones((6, 4))}), ("vjp", {"z": [1.0, 2.0, 3.0]}), ("vjp", {"x": np.ones((1, 6, 3))})]
    cases += [("vjp", {"smoothing": -1.0}), ("vjp", {"unsolved": "raise"}), ("jvp", {"unsolved": "raise"})]
    cases += [("jvp", {"b": [1.0]}), ("jvp", {"q": np.ones((4, 3))}), ("jvp", {"Q": np.ones(2)})]
    for name, arguments in cases:
        with pytest.raises((TypeError, ValueError)) as expected:
            getattr(qpdiff, name)(eager, **{"x" if name == "vjp" else "q": np.ones(3)} | arguments)
        with dask.config.set(scheduler=refuse), pytest.raises(expected.type) as error:
            getattr(qpdiff.dask, name)(lazy, **arguments)
        assert str(error.value) == str(expected.value)
        with pytest.raises(TypeError, match=r"sol is one that is not lazy; expected the Solution of qpdiff.dask"):
            getattr(qpdiff.dask, name)(eager)
        with pytest.raises(TypeError, match=r"qpdiff.dask.vjp and qpdiff.dask.jvp take it"):
            getattr(qpdiff, name)(lazy)


@pytest.mark.parametrize("batch", [(30,), (2, 15)])
def test_bad_numbers_raise_when_computed_with_their_block(batch):
    q = np.ones((30, 3))
    q[23, 1] = np.nan
    sol = qpdiff.dask.solve_qp(np.eye(3), da.from_array(q.reshape(*batch, 3), chunks=(1,) * (len(batch) - 1) + (10, 3)))
    with pytest.raises(ValueError, match=r"q has NaN or infinite entries.* of the batch\)") as error:
        sync(sol.x)
    if len(batch) == 1:
        assert "(problem 3 of the batch)" in str(error.value)
        assert "the block [20:30] of the batch" in error.value.__notes__[0]
    else:
        assert "(problem (0, 8) of the batch)" in str(error.value)
        assert "the block [1:2, 0:10] of the batch" in error.value.__notes__[0]


def test_unsolved():
    G = np.array([[1.0], [-1.0]])
    h = np.array([[2.0, 2.0], [2.0, 2.0], [2.0, 2.0], [1.0, -2.0], [1.0, -2.0], [2.0, 2.0]])
    operands = {"Q": [[1.0]], "q": np.ones((6, 1)), "G": G, "h": da.from_array(h, chunks=(3, 2))}
    sol = qpdiff.dask.solve_qp(**operands)
    with pytest.raises(RuntimeError, match="2 of 3 problems not solved; the first is problem 0: PRIMAL") as error:
        sync(sol.x)
    assert "the block [3:6] of the batch" in error.value.__notes__[0]
    np.testing.assert_allclose(sync(sol.x.blocks[0])[0], -1.0, atol=1e-6)  # other blocks are not disturbed
    one = qpdiff.dask.solve_qp(**operands | {"q": [1.0], "h": da.from_array(h[3])})
    with pytest.raises(RuntimeError, match="1 of 1 problems not solved: PRIMAL_INFEASIBLE"):
        sync(one.x)
    grid = qpdiff.dask.solve_qp(**operands | {"q": [1.0], "h": da.from_array(h.reshape(2, 3, 2), chunks=(1, 3, 2))})
    with pytest.raises(RuntimeError, match=r"the first is problem \(0, 0\): PRIMAL_INFEASIBLE") as error:
        sync(grid.x)
    assert "the block [1:2, 0:3] of the batch" in error.value.__notes__[0]
    for unsolved, fill in (("nan", np.nan), ("zero", 0.0)):
        sol = qpdiff.dask.solve_qp(**operands, unsolved=unsolved)
        gradients, opposite = qpdiff.dask.vjp(sol, x=[1.0]), qpdiff.dask.jvp(sol, q=[1.0], unsolved="zero")
        status, of_q, of_G, tangent = sync(sol.status, gradients.q, gradients.G, opposite.x)
        assert status.tolist() == [0, 0, 0, 2, 2, 0]
        np.testing.assert_array_equal(of_q[3:5], fill)
        assert np.all(np.isfinite(of_q[[0, 1, 2, 5]]))
        assert np.isnan(of_G).any() == (unsolved == "nan")
        np.testing.assert_array_equal(tangent[3:5], 0.0)


def test_a_problem_without_numbers_leaves_the_gradients_of_shared_operands_alone():
    operands = random_problem(np.random.default_rng(7), "A G", batch=(4,), shared=("Q", "G", "A"))
    x = np.ones((4, 1)) * [[1.0], [0.0], [1.0], [1.0]]
    expected = qpdiff.vjp(qpdiff.solve_qp(**operands), x=x)
    operands["h"][1] = np.nan
    lazy = operands | {"q": da.from_array(operands["q"], chunks=(2, -1))}
    sol = qpdiff.dask.solve_qp(**lazy, unsolved="zero", check=False)
    found = qpdiff.dask.vjp(sol, x=x)
    assert np.isnan(sync(sol.z)[0][1]).any()
    for name in ("Q", "G", "A"):
        np.testing.assert_allclose(sync(getattr(found, name))[0], getattr(expected, name), rtol=1e-9, atol=1e-12)


# ---- processes


def transported(sol, protocol=5, misaligned=False):
    """What another process makes of a solution; its arrays read-only and not aligned where the network had them so."""
    frames = []
    data = pickle.dumps(sol, protocol, buffer_callback=frames.append if misaligned else None)
    buffers = []
    for frame in frames:
        raw = frame.raw()
        buffer = bytearray(raw.nbytes + 1)
        buffer[1:] = raw
        buffers.append(memoryview(buffer)[1:].toreadonly())
    return pickle.loads(data, buffers=buffers)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("engine", ["array", "compiled"])
def test_a_solution_pickles_with_what_the_derivative_needs(engine, dtype):
    if engine == "compiled":
        pytest.importorskip("qpdiff.engines.compiled.engine", exc_type=ImportError)
    rng = np.random.default_rng(5)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == "float32" else {"rtol": 1e-9, "atol": 1e-9}
    for parts, shape, shared, cost in [
        ("A G", (6, 8, 2), (), "pd"), ("G", (6, 3, 0), (), "pd"), ("G", (6, 3, 0), ("Q", "G"), "pd"),
        ("A G lb ub", (20, 3, 2), (), "diagonal"), ("lb", (4, 0, 0), ("Q",), "pd"), ("G", (5, 3, 0), ("q", "Q"), "pd"),
    ]:  # fmt: skip
        n, m, p = shape
        operands = random_problem(rng, parts, batch=(7,), n=n, m=m, p=p, shared=shared, cost=cost)
        sol = qpdiff.solve_qp(**operands, engine=engine, dtype=dtype)
        x = rng.normal(size=(7, n))
        expected = qpdiff.vjp(sol, x=x)
        for copied in (transported(sol), transported(sol, 4), transported(sol, misaligned=True)):
            for name in FIELDS:
                np.testing.assert_array_equal(getattr(copied, name), getattr(sol, name))
            for one, other in zip(qpdiff.vjp(copied, x=x), expected, strict=True):
                if other is not None:
                    np.testing.assert_allclose(one, other, **tolerance)
            np.testing.assert_allclose(qpdiff.jvp(copied, q=x).x, qpdiff.jvp(sol, q=x).x, **tolerance)


@pytest.mark.parametrize("shared", [(), ("Q", "G")])
def test_dask_knows_how_large_a_block_is(shared):
    sol = qpdiff.solve_qp(**random_problem(np.random.default_rng(6), "G", batch=(500,), shared=shared))
    # Pickled, what is a view of another array or only broadcast takes room of its own.
    assert 0.6 < sizeof(sol) / len(pickle.dumps(sol)) < 1.0


@pytest.fixture(scope="module")
def client():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def many():
    """Problems, the solution and the gradients."""
    rng = np.random.default_rng(7)
    operands = random_problem(rng, "A G", batch=(1200,), shared=("G",))
    sol = qpdiff.solve_qp(**operands, engine="array")
    lazy = {k: v if k == "G" else da.from_array(v, chunks=(20, *v.shape[1:])) for k, v in operands.items()}
    return lazy, sol, qpdiff.vjp(sol, x=np.ones(6))


def test_a_killed_worker_loses_nothing(client, many):
    from distributed import as_completed, futures_of

    operands, expected, expected_gradients = many
    sol = qpdiff.dask.persist(qpdiff.dask.solve_qp(**operands, engine="array"), scheduler=client)
    for done, _ in enumerate(as_completed(futures_of(sol.linearization.solutions), loop=client.loop)):
        if done == 10:
            break
    victim, lost = max(client.has_what().items(), key=lambda item: len(item[1]))
    assert lost
    os.kill(client.run(os.getpid)[victim], signal.SIGKILL)
    gradients = qpdiff.dask.vjp(sol, x=np.ones(6))
    found, found_gradients = dask.compute(sol, gradients, scheduler=client)
    assert np.all(found.status == qpdiff.Status.SOLVED)
    np.testing.assert_allclose(found.x, expected.x, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.objective, expected.objective, rtol=1e-6, atol=1e-7)
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        if other is not None:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ["array", "compiled"])
def test_a_worker_differentiates_what_another_has_solved(client, many, engine):
    if engine == "compiled":
        pytest.importorskip("qpdiff.engines.compiled.engine", exc_type=ImportError)
    client.wait_for_workers(2)
    here, there = client.scheduler_info()["workers"]
    operands, _, expected = many
    few = {name: value if name == "G" else value[:100] for name, value in operands.items()}
    sol = qpdiff.dask.persist(qpdiff.dask.solve_qp(**few, engine=engine), scheduler=client, workers=[here])
    gradients = qpdiff.dask.vjp(sol, x=np.ones(6))
    (found,) = dask.compute(gradients, scheduler=client, workers=[there], allow_other_workers=False)
    for name in ("Q", "q", "h", "A", "b"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name)[:100], rtol=1e-5, atol=1e-5)


def test_errors_arrive_with_their_notes(client):
    q = np.ones((4, 2))
    q[3] = np.inf
    sol = qpdiff.dask.solve_qp(np.eye(2), da.from_array(q, chunks=(2, 2)), engine="array")
    with pytest.raises(ValueError, match=r"q has NaN .*problem 1 of the batch") as error:
        dask.compute(sol.x, scheduler=client)
    assert "the block [2:4] of the batch" in error.value.__notes__[0]


# ---- sparse operands


@pytest.mark.parametrize("seed", range(6))
def test_sparse_operands(seed):
    rng, eager, lazy = sparse_operands(seed)
    sol, expected = qpdiff.dask.solve_qp(**lazy, **TIGHT), qpdiff.solve_qp(**eager, **TIGHT)
    np.testing.assert_allclose(sync(sol.x)[0], expected.x, atol=1e-7)
    cotangent = rng.normal(size=expected.x.shape)
    options = {"x": cotangent, "smoothing": 1e-3 if seed % 2 else None}
    gradients, by_hand = qpdiff.dask.vjp(sol, **options), qpdiff.vjp(expected, **options)
    for name, value in eager.items():
        ours, theirs = getattr(gradients, name), getattr(by_hand, name)
        assert ours.shape == theirs.shape
        if isinstance(value, qpdiff.Sparse):
            assert ours.pattern is value.pattern
            ours, theirs = ours.values, theirs.values
        np.testing.assert_allclose(sync(ours)[0], theirs, atol=1e-6 * max(1, np.abs(theirs).max()))
    values = rng.normal(size=eager["G"].nnz)
    expected = qpdiff.jvp(expected, G=values).x
    for tangent in (values, da.from_array(values), eager["G"].with_values(values)):
        pushed = sync(qpdiff.dask.jvp(sol, G=tangent).x)[0]
        np.testing.assert_allclose(pushed, expected, atol=1e-6 * max(1, np.abs(expected).max()))


def test_sparse_operands_go_to_other_processes():
    _, eager, lazy = sparse_operands(1)
    sol = pickle.loads(pickle.dumps(qpdiff.dask.solve_qp(**lazy)))
    gradient = sync(qpdiff.dask.vjp(sol, x=np.ones(7)).G.values)[0]
    np.testing.assert_allclose(gradient, qpdiff.vjp(qpdiff.solve_qp(**eager), x=np.ones(7)).G.values, atol=1e-6)


def test_sparse_tangents_of_another_pattern():
    _, eager, lazy = sparse_operands(2)
    sol = qpdiff.dask.solve_qp(**lazy)
    with pytest.raises(ValueError, match=r"^tangent of G has another pattern than the operand"):
        qpdiff.dask.jvp(sol, G=as_sparse(np.ones(eager["G"].shape), np.ones(eager["G"].shape[-2:], bool)))
