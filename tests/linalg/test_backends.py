"""What depends on the array library: that derivatives agree, and moving data."""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
from problems import random_problem

import qpdiff
from qpdiff.backend import NumPyBackend, single_threaded_blas
from qpdiff.backend.numpy import LARGE
from qpdiff.backend.threads import THREADS
from qpdiff.differentiation import solve_kkt
from qpdiff.engines.array import engine
from qpdiff.problem import OPERANDS
from qpdiff.validation import make_problem


@pytest.mark.usefixtures("each_engine")
def test_vjp_on_another_library(xp):
    operands = random_problem(np.random.default_rng(1), "A G lb ub")
    expected = qpdiff.vjp(qpdiff.solve_qp(**operands), x=np.ones((4, 6)))
    sol = qpdiff.solve_qp(**{name: xp.asarray(value) for name, value in operands.items()})
    actual = qpdiff.vjp(sol, x=xp.asarray(np.ones((4, 6))))
    tangent = qpdiff.jvp(sol, q=xp.asarray(np.ones((4, 6))))
    expected_tangent = qpdiff.jvp(qpdiff.solve_qp(**operands), q=np.ones((4, 6)))
    for name in operands:
        np.testing.assert_allclose(xp.to_numpy(getattr(actual, name)), getattr(expected, name), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(xp.to_numpy(tangent.x), expected_tangent.x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("n", [1, 9, 30, 70, 200])
def test_products_with_the_inverse_of_a_factor(xp, n, shared):
    rng = np.random.default_rng(n)
    R, r, K = rng.normal(size=(1 if shared else 3, n, n)), rng.normal(size=(3, n)), rng.normal(size=(3, 7, n))
    M = R @ R.mT / n + np.eye(n)
    backend = qpdiff.solve_qp(xp.asarray(M), xp.asarray(r)).linearization.problem.backend
    factor, positive = backend.factor(xp.asarray(M))
    F = backend.substitution(factor)
    assert np.all(xp.to_numpy(positive))
    once = backend.forward(F, xp.asarray(r))
    given = xp.asarray(K.copy())
    rows = backend.forward_rows(F, given)
    expected = np.linalg.solve(M, r[:, :, None])[:, :, 0]
    np.testing.assert_allclose(xp.to_numpy(backend.backward(F, once)), expected, rtol=1e-9, atol=1e-9)
    of_rows = (xp.to_numpy(rows) @ xp.to_numpy(once)[:, :, None])[:, :, 0]
    np.testing.assert_allclose(of_rows, (K @ expected[:, :, None])[:, :, 0], rtol=1e-9, atol=1e-9)
    gram = np.linalg.solve(M, K.mT)
    np.testing.assert_allclose(xp.to_numpy(rows) @ xp.to_numpy(rows).mT, K @ gram, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(xp.to_numpy(given), K)


@pytest.mark.parametrize(("batch", "n"), [(3, 5), (3, 70), (40, 130)])
def test_outer_products(xp, batch, n):
    rng = np.random.default_rng(n)
    a, b, c, d = (rng.normal(size=(batch, size)) for size in (6, n, 6, n))
    backend = qpdiff.solve_qp(xp.asarray(np.eye(1)), xp.asarray(np.ones(1))).linearization.problem.backend
    pairs = [(xp.asarray(a), xp.asarray(b)), (xp.asarray(c), xp.asarray(d))]
    expected = a[:, :, None] * b[:, None, :] + c[:, :, None] * d[:, None, :]
    np.testing.assert_allclose(xp.to_numpy(backend.outer(pairs)), expected, rtol=1e-12, atol=1e-12)
    symmetric = xp.to_numpy(backend.symmetric_outer(xp.asarray(b), xp.asarray(d)))
    expected = b[:, :, None] * d[:, None, :]
    np.testing.assert_allclose(symmetric, expected + expected.mT, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(symmetric, symmetric.mT)


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("failing", [(), (0,), (3, 190)])
def test_threads_share_a_stack_and_change_nothing(monkeypatch, failing, busy):
    rng = np.random.default_rng(len(failing))
    R, K, diagonal = rng.normal(size=(200, 30, 30)), rng.normal(size=(200, 7, 30)), rng.uniform(size=(200, 30))
    M = R @ R.mT
    diagonal[list(failing)] -= 1e3
    backend, results, submitted = NumPyBackend(np), [], []

    class Busy:
        def submit(self, function, *arguments):
            submitted.append(Future())
            return submitted[-1]

    if busy:
        monkeypatch.setattr("qpdiff.backend.numpy.pool", Busy)
    for threads, worth in ((1, 2.5e6), (3, 1e5)):
        monkeypatch.setattr("qpdiff.backend.numpy.THREAD_OPERATIONS", worth)
        token = THREADS.set(threads)
        factor, positive = backend.factor_sum(M, diagonal)
        results.append((*factor, positive, backend.products(K, M), backend.solve(factor, diagonal)))
        THREADS.reset(token)
    assert np.flatnonzero(~results[0][1]).tolist() == list(failing)
    for alone, shared in zip(*results, strict=True):
        np.testing.assert_array_equal(alone, shared)
    assert len(submitted) == (4 if busy else 0)  # two helpers each for the factor and the products
    assert all(helper.cancelled() for helper in submitted)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n", [1, 2, 7, 30, LARGE - 1, LARGE, LARGE + 5])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_stack_is_solved_as_its_matrices_are(dtype, n, count):
    rng = np.random.default_rng(n)
    backend = NumPyBackend(np)
    R, K, r = rng.normal(size=(count, n, 2 * n)), rng.normal(size=(count, 3, n)), rng.normal(size=(count, n))
    M = (R @ R.mT).astype(dtype)
    factor, positive = backend.factor(M)
    assert np.all(positive)
    F, L = backend.substitution(factor), np.linalg.cholesky(M.astype(np.float64))
    close = {"rtol": 1e-3, "atol": 1e-4} if dtype == np.float32 else {"rtol": 1e-9, "atol": 1e-10}
    for got, expected in (
        (backend.solve(factor, r.astype(dtype)), np.linalg.solve(M.astype(np.float64), r[:, :, None])[:, :, 0]),
        (backend.forward(F, r.astype(dtype)), np.linalg.solve(L, r[:, :, None])[:, :, 0]),
        (backend.backward(F, r.astype(dtype)), np.linalg.solve(L.mT, r[:, :, None])[:, :, 0]),
        (backend.forward_rows(F, K.astype(dtype)), np.linalg.solve(L, K.mT).mT),
        (backend.pivots(factor), np.linalg.diagonal(L) ** 2),
    ):
        assert got.dtype == dtype
        np.testing.assert_allclose(got, expected, **close)


@pytest.mark.parametrize("number", [np.nan, np.inf, 1e308])
@pytest.mark.parametrize("where", [0, 4, 8])
def test_numbers_that_are_not_finite_stay_in_their_problem(number, where):
    rng = np.random.default_rng(0)
    backend = NumPyBackend(np)
    R, r = rng.normal(size=(9, 12, 20)), rng.normal(size=(9, 12))
    M = R @ R.mT
    M[where] *= 1e-20 if number == 1e308 else 1.0  # so that the solution overflows
    r[where, 5] = number
    factor, _ = backend.factor(M)
    with np.errstate(all="ignore"):
        x, y = backend.solve(factor, r), backend.forward(backend.substitution(factor), r)
    others = np.arange(9) != where
    assert not np.all(np.isfinite(x[where]))
    np.testing.assert_allclose(x[others], np.linalg.solve(M[others], r[others, :, None])[:, :, 0], rtol=1e-9)
    L = np.linalg.cholesky(M[others])
    np.testing.assert_allclose(y[others], np.linalg.solve(L, r[others, :, None])[:, :, 0], rtol=1e-9)


@pytest.mark.usefixtures("each_engine")
def test_the_backend_flag_moves_the_data(strict):
    operands = random_problem(np.random.default_rng(2), "A G")
    moved = qpdiff.solve_qp(**{name: strict.asarray(value) for name, value in operands.items()}, backend="numpy")
    assert isinstance(moved.x, np.ndarray)
    np.testing.assert_allclose(moved.x, qpdiff.solve_qp(**operands).x)


class TensorOnAGPU:
    """An array that other libraries cannot look into, until it is moved to the host."""

    def __init__(self, value):
        self.value = value

    def __dlpack__(self, **options):
        raise BufferError("on a GPU")

    def __dlpack_device__(self):
        return 2, 0

    def to_device(self, device, **options):
        assert device == "cpu"
        return self.value


@pytest.mark.usefixtures("each_engine")
def test_the_backend_flag_moves_data_from_a_gpu():
    operands = random_problem(np.random.default_rng(2), "A G")
    moved = qpdiff.solve_qp(**{name: TensorOnAGPU(value) for name, value in operands.items()}, backend="numpy")
    np.testing.assert_allclose(moved.x, qpdiff.solve_qp(**operands).x)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="backend is 'tensorflow'; expected one of 'numpy'"):
        qpdiff.solve_qp(np.eye(2), np.ones(2), backend="tensorflow")


@pytest.mark.parametrize(("parts", "cost"), [("A G lb ub", "pd"), ("G", "pd"), ("A lb", "diagonal")])
def test_problems_that_have_ended_stay_or_are_dropped(xp, monkeypatch, parts, cost):
    operands = random_problem(np.random.default_rng(3), parts, cost=cost, batch=(40,), n=9, m=4, p=2)
    arrays = {name: xp.asarray(value) for name, value in operands.items()}
    answers, groups, join = [], [], engine.join

    def counting(problem, pieces):
        groups.append(len(pieces))
        return join(problem, pieces)

    monkeypatch.setattr(engine, "join", counting)
    for launch_bound_bytes in (0, 2**40):
        kind = type(make_problem(arrays | dict.fromkeys(set(OPERANDS) - set(arrays))).backend)
        monkeypatch.setattr(kind, "launch_bound_bytes", launch_bound_bytes)
        sol = qpdiff.solve_qp(**arrays, engine="array")
        gradients = qpdiff.vjp(sol, x=xp.asarray(np.ones((40, 9))))
        answers.append([xp.to_numpy(a) for a in (sol.x, sol.z, *(getattr(gradients, name) for name in operands))])
        np.testing.assert_array_equal(xp.to_numpy(sol.status), qpdiff.Status.SOLVED)
    assert not groups if xp.name == "jax" else groups[0] > groups[1] == 1, "JAX does not drop"
    for dropped, stayed in zip(*answers, strict=True):
        np.testing.assert_allclose(dropped, stayed, rtol=1e-5, atol=1e-6)


# ---- threads of BLAS


@pytest.fixture
def blas_threads():
    """The threads that each BLAS has, as a function; two at first."""
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def count():
        return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        if set(count()) != {2}:
            pytest.skip("BLAS has one thread only")
        yield count


def test_any_thread_holds_blas_to_one_thread(blas_threads):
    """And the last that leaves gives back what there was, whoever came first."""

    def entered(stack):
        stack.enter_context(single_threaded_blas())
        return blas_threads()

    seen = []
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for first, last in ((one, other), (other, one)):
            stacks = ExitStack(), ExitStack()
            seen += [thread.submit(entered, s).result() for thread, s in zip((first, last), stacks, strict=True)]
            first.submit(stacks[0].close).result()
            seen.append(blas_threads())
            last.submit(stacks[1].close).result()
            assert set(blas_threads()) == {2}
    assert {count for counts in seen for count in counts} == {1}


@pytest.mark.usefixtures("each_engine")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_float32_is_the_same_from_any_thread_with_any_number_for_blas(blas_threads, batch, seed):
    """Where only a product of 140 × 140 matrices was split among two threads, a gradient of 5 differed by 0.4."""
    rng, n = np.random.default_rng(seed), 140
    R, G = rng.normal(size=(2, batch, n, n))
    h = (G @ rng.normal(size=(batch, n, 1)))[:, :, 0] + rng.uniform(0, 0.5, size=(batch, n))
    operands = {"Q": R @ R.mT / n + 0.01 * np.eye(n), "q": 3 * rng.normal(size=(batch, n)), "G": G, "h": h}
    operands = {name: value.astype(np.float32) for name, value in operands.items()}

    def results():
        sol = qpdiff.solve_qp(**operands, dtype="float32")
        ones = np.ones_like(sol.x)
        u = solve_kkt(sol.linearization, ones, np.zeros_like(sol.linearization.v))
        return sol.x, sol.z, *qpdiff.vjp(sol, x=ones)[:4], *qpdiff.jvp(sol, q=ones), *u

    here = results()
    with ThreadPoolExecutor(1) as thread:
        there = thread.submit(results).result()
    with pytest.importorskip("threadpoolctl").threadpool_limits(1, user_api="blas"):
        alone = results()
    for first, *others in zip(here, there, alone, strict=True):
        for other in others:
            np.testing.assert_array_equal(first, other)
