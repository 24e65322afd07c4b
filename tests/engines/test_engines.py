"""The compiled engine is the array engine in other words: the same iterates to rounding, the same statuses."""

import os
import pathlib
import pickle
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from elastic_problems import contradictory, random_prices
from problems import (
    components,
    documented_test,
    duplicated_variables,
    equality_beyond_bounds,
    infeasible,
    optnet,
    parallel_rows,
    random_problem,
    scaled_both,
    scaled_columns,
    scaled_rows,
    unbounded,
    weakly_active,
)

import qpdiff
from qpdiff.backend import NumPyBackend
from qpdiff.backend.threads import THREADS
from qpdiff.engines.choice import compiled_engine
from qpdiff.problem import INFINITE

pytestmark = pytest.mark.skipif(compiled_engine()[0] is None, reason="the compiled engine was not built")
VECTORS = ("x", "y", "z", "z_lb", "z_ub", "s")


def rng():
    return np.random.default_rng(0)


def second_chance():
    """Problems that one step, with lengths of its own for x and the multipliers, makes worse near the solution."""
    operands = optnet(rng(), (600,), 100, 100, 0)
    return {name: value[[49, 72, 567]] for name, value in operands.items()}


def ill_conditioned():
    """Q near the limit of the dual form: pivots down to 1e-6 of its diagonal."""
    operands = optnet(rng(), (20,), 40, 10, 3)
    basis = np.linalg.qr(rng().normal(size=(20, 40, 40)))[0]
    return operands | {"Q": basis * np.geomspace(1e-4, 1.0, 40) @ basis.mT}


CASES = {
    "optnet": lambda: optnet(rng(), (20,), 10, 5, 3),
    "more rows than variables": lambda: optnet(rng(), (20,), 8, 30, 0),
    "larger": lambda: optnet(rng(), (5,), 60, 30, 10),
    "dense dual, larger": lambda: optnet(rng(), (5,), 80, 40, 0),
    "no constraints": lambda: random_problem(rng(), "", batch=(20,)),
    "equalities only": lambda: random_problem(rng(), "A", batch=(20,)),
    "bounds only": lambda: random_problem(rng(), "lb ub", batch=(20,), cost="psd"),
    "bounds on one side": lambda: random_problem(rng(), "G ub", batch=(20,), infinite=0.3),
    "diagonal": lambda: random_problem(rng(), "A lb", batch=(20,), cost="diagonal", n=12),
    "everything": lambda: random_problem(rng(), "A G lb ub", batch=(20,), infinite=0.3, fixed=2),
    "linear programs": lambda: random_problem(rng(), "A G lb ub", batch=(20,), cost="lp"),
    "shared matrices": lambda: random_problem(rng(), "A G", batch=(20,), shared=("Q", "A", "G"), n=12),
    "shared, primal": lambda: random_problem(rng(), "G lb", batch=(20,), shared=("Q", "G"), n=5, m=20),
    "second chance": lambda: second_chance(),
    "rows without a limit": lambda: random_problem(rng(), "A G", batch=(20,), infinite=0.5, n=40, m=20),
    "ill-conditioned": lambda: ill_conditioned(),
    "infeasible": lambda: infeasible(rng(), parallel_rows, "pd", (5, 4, 2)),
    "infeasible by bounds": lambda: infeasible(rng(), equality_beyond_bounds, "psd", (5, 4, 2)),
    "unbounded": lambda: unbounded(rng(), "A G", "lp", (5, 4, 2)),
    "scaled rows": lambda: scaled_rows(rng(), (20,), 6).operands,
    "scaled columns": lambda: scaled_columns(rng(), (20,), 6).operands,
    "scaled": lambda: scaled_both(rng(), (20,), 6).operands,
    "components": lambda: components(rng(), (20,), 6)[0],
    "weakly active": lambda: weakly_active(rng(), (20,), 6).operands,
    "not unique": lambda: duplicated_variables(rng(), (20,), 6).operands,
}

ROUNDING = {"ill-conditioned": 1e-5, "infeasible": 1e-2, "unbounded": 1e-2, "scaled": 1e-3, "not unique": 1e-2}
ROUNDING |= {"components": 1e-4}
"""Where rounding grows faster: in iterates that go off to infinity, with large factors between rows, over ρ or ε."""
UNDECIDED = {"infeasible": 0.1, "unbounded": 0.1}
"""The share of problems for which it may decide between a certificate and none."""
DIFFERENTIATED = ["optnet", "larger", "everything", "diagonal"]
DIFFERENTIATED += ["shared matrices", "shared, primal", "rows without a limit"]
"""The cases whose derivatives the engines are compared in, on the CPU and by blocks of threads."""


def priced(problem, *, infinite=0.0, free=0.0, bounds=True):
    """A problem with a linear price of some rows, a quadratic one of some, and rows that cost nothing."""
    options = {"elastic": random_prices(rng(), problem), "elastic_quadratic": random_prices(rng(), problem, True)}
    for option, missing in (("elastic", np.inf), ("elastic_quadratic", 0.0)):
        if not bounds:
            options[option].pop("bounds", None)
        for price in options[option].values():
            price[rng().uniform(size=price.shape) < infinite] = missing
            price[rng().uniform(size=price.shape) > 1.0 - free] = 0.0
    return problem | options


ELASTIC = {
    "dense dual": lambda: priced(contradictory(rng(), "A G", batch=(20,))),
    "dense dual, larger": lambda: priced(contradictory(rng(), "A G", batch=(5,), n=80, m=30, p=10)),
    "diagonal": lambda: priced(contradictory(rng(), "A G lb ub", batch=(20,), cost="diagonal", n=12)),
    "primal": lambda: priced(contradictory(rng(), "A G lb ub", batch=(20,))),
    "equalities only": lambda: priced(contradictory(rng(), "A", batch=(20,))),
    "linear programs": lambda: priced(contradictory(rng(), "A G lb ub", batch=(20,), cost="lp"), bounds=False),
    "some rows": lambda: priced(
        random_problem(rng(), "A G lb ub", batch=(20,), infinite=0.2, fixed=1), infinite=0.3, free=0.1
    ),
    "some rows of a dense dual": lambda: priced(random_problem(rng(), "A G", batch=(20,)), infinite=0.3, free=0.1),
    "shared matrices": lambda: priced(
        random_problem(rng(), "A G", batch=(20,), shared=("Q", "A", "G"), n=12), infinite=0.3
    ),
    "only a linear price": lambda: priced(contradictory(rng(), "A G", batch=(20,))) | {"elastic_quadratic": None},
    "only a quadratic price": lambda: priced(contradictory(rng(), "A G", batch=(20,))) | {"elastic": None},
}


def of_case(table, case, otherwise):
    return next((value for word, value in table.items() if word in case), otherwise)


def assert_same(a, b, accuracy):
    """Two solutions, entry by entry, relative to the largest entry of each problem."""
    for name in VECTORS:
        one, other = getattr(a, name), getattr(b, name)
        finite = np.isfinite(one)
        np.testing.assert_array_equal(finite, np.isfinite(other), err_msg=name)
        one, other = np.where(finite, one, 0.0), np.where(finite, other, 0.0)
        scale = np.maximum(np.max(np.abs(one), axis=-1, keepdims=True, initial=0.0), 1.0)
        assert np.max(np.abs(one - other) / scale, initial=0.0) <= accuracy, name


WAYS = ("in groups", "one by one", "as a small batch")


def go_this_way(way, monkeypatch):
    """Let both engines solve small batches in one of `WAYS`."""
    if way == "one by one":
        monkeypatch.setattr("qpdiff.engines.compiled.engine.SMALL", 0)
    # The array engine makes steps in the rows alone, and drops problems, where more is in work.
    monkeypatch.setattr(NumPyBackend, "launch_bound_bytes", 2**40 if way == "as a small batch" else 0)


def assert_same_iterates(operands, count, accuracy):
    for k in range(count):
        array, compiled = (
            qpdiff.solve_qp(**operands, engine=engine, max_iterations=k) for engine in ("array", "compiled")
        )
        np.testing.assert_array_equal(array.status, compiled.status)
        np.testing.assert_array_equal(array.iterations, compiled.iterations)
        assert_same(array, compiled, accuracy)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_iteration_by_iteration(case, way, monkeypatch):
    """The first iterates to rounding, which grows from one to the next; then where each problem ends."""
    go_this_way(way, monkeypatch)
    operands = CASES[case]()
    assert_same_iterates(operands, 3 if of_case(ROUNDING, case, 0) else 8, of_case(ROUNDING, case, 1e-7))
    array, compiled = (qpdiff.solve_qp(**operands, engine=engine, tol=1e-8) for engine in ("array", "compiled"))
    assert np.mean(array.status != compiled.status) <= of_case(UNDECIDED, case, 0.0)
    solved = (array.status == qpdiff.Status.SOLVED) & (compiled.status == qpdiff.Status.SOLVED)
    assert np.max(np.abs(array.iterations - compiled.iterations)[solved], initial=0) <= 2
    point = [getattr(compiled, name) for name in ("x", "y", "z", "z_lb", "z_ub")]
    assert np.all(documented_test(operands, *point, 1e-8, 1e-8)[solved] <= 1.01)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ELASTIC)
def test_iteration_by_iteration_with_prices(case, way, monkeypatch):
    go_this_way(way, monkeypatch)
    operands = ELASTIC[case]()
    assert_same_iterates(operands, 5, 1e-6 if case == "linear programs" else 1e-7)
    array, compiled = (qpdiff.solve_qp(**operands, engine=engine) for engine in ("array", "compiled"))
    np.testing.assert_array_equal(array.status, compiled.status)
    assert np.all(compiled.status == qpdiff.Status.SOLVED)
    assert np.max(np.abs(array.iterations - compiled.iterations)) <= 2
    for name in ("objective", "primal_residual", "dual_residual", "duality_gap"):
        np.testing.assert_allclose(getattr(compiled, name), getattr(array, name), rtol=1e-7, atol=1e-7, err_msg=name)


def test_one_bad_step_is_not_the_end_of_a_problem():
    """Without a second chance all of them end at 7e-8 to 4e-7, which rtol allows."""
    operands = second_chance()
    for engine in ("array", "compiled"):
        sol = qpdiff.solve_qp(**operands, engine=engine, tol=1e-8)
        point = [getattr(sol, name) for name in ("x", "y", "z", "z_lb", "z_ub")]
        assert np.all(documented_test(operands, *point, 1e-8, 0.0) <= 1)
        assert np.all(sol.iterations <= 14)


def in_single_precision(value):
    """An operand in float32, or prices by the constraints."""
    if isinstance(value, dict):
        return {of: in_single_precision(price) for of, price in value.items()}
    return value.astype(np.float32)


@pytest.mark.parametrize(
    "case",
    ["optnet", "everything", "diagonal", "shared matrices", "shared, primal", "dense dual", "primal", "some rows"],
)
def test_single_precision(case):
    operands = in_single_precision((CASES | ELASTIC)[case]())
    for k in range(4):
        array, compiled = (
            qpdiff.solve_qp(**operands, dtype="float32", engine=engine, max_iterations=k)
            for engine in ("array", "compiled")
        )
        assert compiled.x.dtype == np.float32
        np.testing.assert_array_equal(array.iterations, compiled.iterations)
        assert_same(array, compiled, 1e-2)


@pytest.mark.parametrize("case", [*DIFFERENTIATED, "ill-conditioned"])
def test_the_same_derivatives(case):
    operands = CASES[case]()
    array, compiled = (qpdiff.solve_qp(**operands, engine=e, tol=1e-10) for e in ("array", "compiled"))
    cotangents = {name: rng().normal(size=getattr(array, name).shape) for name in ("x", "y", "z", "z_lb", "z_ub")}
    expected, gradients = (qpdiff.vjp(sol, **cotangents) for sol in (array, compiled))
    for name in operands:
        one, other = getattr(expected, name), getattr(gradients, name)
        np.testing.assert_allclose(other, one, atol=1e-5 * np.max(np.abs(one)), err_msg=name)
    tangents = {name: rng().normal(size=value.shape) for name, value in operands.items()}
    for one, other in zip(qpdiff.jvp(array, **tangents), qpdiff.jvp(compiled, **tangents), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * np.max(np.abs(one), initial=1.0))


@pytest.mark.parametrize("case", ELASTIC)
def test_the_same_derivatives_with_prices(case):
    operands = ELASTIC[case]()
    options = {name: operands.pop(name) for name in ("elastic", "elastic_quadratic")}
    array, compiled = (qpdiff.solve_qp(**operands, **options, engine=e, tol=1e-10) for e in ("array", "compiled"))
    cotangents = {name: rng().normal(size=getattr(array, name).shape) for name in ("x", "y", "z", "z_lb", "z_ub")}
    expected, gradients = (qpdiff.vjp(sol, **cotangents) for sol in (array, compiled))
    pairs = [(getattr(expected, name), getattr(gradients, name)) for name in operands]
    for option, prices in options.items():
        for of in prices or ():
            pairs.append((getattr(expected, option)[of], getattr(gradients, option)[of]))
    for one, other in pairs:
        np.testing.assert_allclose(other, one, atol=1e-5 * np.max(np.abs(one)))
    tangents = {name: rng().normal(size=value.shape) for name, value in operands.items()}
    for option, prices in options.items():
        tangents[option] = prices and {of: rng().normal(size=price.shape) for of, price in prices.items()}
    for one, other in zip(qpdiff.jvp(array, **tangents), qpdiff.jvp(compiled, **tangents), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * np.max(np.abs(one), initial=1.0))


@pytest.mark.parametrize(
    "case", ["everything", "larger", "rows without a limit", "primal", "some rows of a dense dual"]
)
def test_warm_start(case):
    operands = (CASES | ELASTIC)[case]()
    moved = operands | {"q": operands["q"] + 1e-3}
    starts = [qpdiff.solve_qp(**operands, engine=engine) for engine in ("array", "compiled")]
    for k in (0, 1, 3, 200):
        array, compiled = (
            qpdiff.solve_qp(**moved, engine=engine, warm_start=starts[0], max_iterations=k)
            for engine in ("array", "compiled")
        )
        np.testing.assert_array_equal(array.status, compiled.status)
        assert_same(array, compiled, 1e-5)
    assert np.mean(compiled.iterations) < np.mean(starts[1].iterations)


def test_hard_problems(request):
    """Each engine ends where the other does, but for problems that rounding decides."""
    folder = request.config.getoption("--hard")
    if folder is None:
        pytest.skip("needs a folder of hard problems: --hard DIR")
    paths = sorted(pathlib.Path(folder).glob("*.npz"))
    assert paths
    differ = []
    for path in paths:
        with np.load(path) as data:
            operands = {name: data[name] for name in ("Q", "q", "G", "h", "A", "b", "lb", "ub") if name in data.files}
        if len(operands) < 2 or operands["Q"].shape[-1] > 100:
            continue
        for k in range(6):
            array, compiled = (
                qpdiff.solve_qp(**operands, engine=engine, max_iterations=k) for engine in ("array", "compiled")
            )
            assert array.status == compiled.status, path.stem
            assert_same(array, compiled, 1e-6)
        array, compiled = (qpdiff.solve_qp(**operands, engine=engine, tol=1e-6) for engine in ("array", "compiled"))
        if array.status != compiled.status or abs(int(array.iterations) - int(compiled.iterations)) > 2:
            differ.append(path.stem)
    assert len(differ) <= 0.1 * len(paths), differ


# ---- the arrays that come in


def run(code):
    """Run code in another process, with the package that this one has (-P: not one in the working directory)."""
    subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", code], check=True, timeout=300)


def unaligned(value):
    """A copy that begins at an odd address."""
    out = np.empty(value.nbytes + 1, np.uint8)[1:].view(value.dtype).reshape(value.shape)
    out[...] = value
    assert not out.flags.aligned
    return out


def test_arrays_of_any_layout():
    """Read-only, transposed, strided and unaligned operands give what contiguous ones give, bit by bit."""
    operands = CASES["everything"]()
    expected = qpdiff.solve_qp(**operands, engine="compiled")
    views = {}
    for i, (name, value) in enumerate(operands.items()):
        view = [np.asfortranarray(value), np.repeat(value, 2, axis=-1)[..., ::2], unaligned(value)][i % 3]
        view.flags.writeable = False
        views[name] = view
    sol = qpdiff.solve_qp(**views, engine="compiled")
    for name in (*VECTORS, "status", "iterations"):
        np.testing.assert_array_equal(getattr(sol, name), getattr(expected, name))


def test_broadcast_operands_are_those_of_every_problem():
    operands = CASES["shared matrices"]()
    pretended = {k: v if k in "qhb" else np.broadcast_to(v, (20, *v.shape)) for k, v in operands.items()}
    shared, sol = (qpdiff.solve_qp(**d, engine="compiled") for d in (operands, pretended))
    np.testing.assert_allclose(sol.x, shared.x, atol=1e-12)
    cotangent = rng().normal(size=sol.x.shape)
    gradients, summed = qpdiff.vjp(sol, x=cotangent), qpdiff.vjp(shared, x=cotangent)
    assert gradients.G.shape == (20, *operands["G"].shape)
    np.testing.assert_allclose(np.sum(gradients.G, axis=0), summed.G, atol=1e-9)


def test_any_batch_axes():
    operands = optnet(rng(), (2, 3), 6, 4, 2)
    operands["q"] = operands["q"][:1]
    array, compiled = (qpdiff.solve_qp(**operands, engine=engine) for engine in ("array", "compiled"))
    assert compiled.x.shape == (2, 3, 6)
    np.testing.assert_allclose(compiled.x, array.x, atol=1e-9)
    assert qpdiff.vjp(compiled, x=compiled.x).q.shape == (1, 3, 6)


def test_empty_batch():
    sol = qpdiff.solve_qp(np.zeros((0, 3, 3)), np.zeros((0, 3)), engine="compiled", progress=lambda done, batch: None)
    assert sol.x.shape == (0, 3)
    assert qpdiff.vjp(sol, x=sol.x).Q.shape == (0, 3, 3)


def test_cotangents_of_any_layout():
    sol = qpdiff.solve_qp(**optnet(rng(), (30,), 10, 5, 3), engine="compiled")
    x = rng().normal(size=sol.x.shape)
    expected = qpdiff.vjp(sol, x=x)
    for same in (np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x[::-1][::-1]):
        for gradient, value in zip(qpdiff.vjp(sol, x=same), expected, strict=True):
            if value is not None:
                np.testing.assert_array_equal(gradient, value)


@pytest.mark.parametrize("case", ["optnet", "larger", "everything", "diagonal", "shared matrices"])
def test_where_factors_take_too_much_memory_the_derivative_makes_its_own(monkeypatch, case):
    operands = CASES[case]()
    kept = qpdiff.solve_qp(**operands, engine="compiled", tol=1e-10)
    monkeypatch.setattr("qpdiff.engines.compiled.engine.STORED_BYTES", (0, 0))
    sol = qpdiff.solve_qp(**operands, engine="compiled", tol=1e-10)
    assert sol.linearization.factors.stored.last.size == 0
    cotangent = rng().normal(size=sol.x.shape)
    expected, gradients = qpdiff.vjp(kept, x=cotangent), qpdiff.vjp(sol, x=cotangent)
    for name in operands:
        one, other = getattr(expected, name), getattr(gradients, name)
        np.testing.assert_allclose(other, one, atol=1e-5 * np.max(np.abs(one)), err_msg=name)


# ---- threads


def test_calls_from_many_threads_give_what_one_gives():
    problems = [optnet(np.random.default_rng(seed), (64,), 30, 20, 4) for seed in range(4)]
    expected = [qpdiff.solve_qp(**operands) for operands in problems]
    results = {}

    def work(i):
        sol = qpdiff.solve_qp(**problems[i % 4])
        results[i] = sol.x, qpdiff.vjp(sol, x=np.ones_like(sol.x)).q

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    for i, (x, gradient) in results.items():
        np.testing.assert_array_equal(x, expected[i % 4].x)
        np.testing.assert_array_equal(gradient, qpdiff.vjp(expected[i % 4], x=np.ones_like(x)).q)


def test_gradients_of_shared_matrices_are_sums_over_the_batch():
    """In the order of the batch, however many threads there are."""
    count, n, m, p = 300, 40, 21, 5
    operands = optnet(rng(), (count,), n, m, p)
    operands |= {name: operands[name][0] for name in ("Q", "G", "A")}
    cotangent = rng().normal(size=(count, n))
    sol = qpdiff.solve_qp(**operands)
    own = qpdiff.vjp(
        qpdiff.solve_qp(**operands | {k: np.repeat(operands[k][None], count, axis=0) for k in ("Q", "G", "A")}),
        x=cotangent,
    )
    results = []
    for threads in (1, 2, 3):
        token = THREADS.set(threads)
        try:
            results.append(qpdiff.vjp(sol, x=cotangent))
        finally:
            THREADS.reset(token)
    for name in ("Q", "G", "A"):
        expected = getattr(own, name).sum(axis=0)
        gradient = getattr(results[0], name)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-8 * np.max(np.abs(expected)), err_msg=name)
        for other in results[1:]:
            np.testing.assert_array_equal(getattr(other, name), gradient)
    np.testing.assert_array_equal(results[0].Q, results[0].Q.T)


def test_what_is_kept_may_be_read_only():
    """As it is after it has come from another process without a copy."""
    operands = optnet(rng(), (20,), 10, 5, 3)
    sol = qpdiff.solve_qp(**operands, engine="compiled")
    buffers = []
    data = pickle.dumps(sol, protocol=5, buffer_callback=lambda buffer: buffers.append(bytes(buffer.raw())))
    other = pickle.loads(data, buffers=buffers)
    for a, b in zip(qpdiff.vjp(other, x=sol.x), qpdiff.vjp(sol, x=sol.x), strict=True):
        np.testing.assert_array_equal(a, b)


def test_blas_has_one_thread_inside_and_its_own_again_outside():
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def threads():
        return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]

    inside, before = [], threads()
    operands = optnet(rng(), (8,), 150, 20, 0)  # of a size at which BLAS takes part
    qpdiff.solve_qp(**operands, engine="compiled", progress=lambda done, batch: inside.append(threads()))
    assert threads() == before
    if os.cpu_count() > 1:
        assert set(inside[0]) == {1}


def test_a_fork_solves_too():
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    code = """
import os
import numpy as np
import qpdiff
rng = np.random.default_rng(0)
Q, q = np.eye(20) + np.zeros((400, 20, 20)), rng.normal(size=(400, 20))
G, h = rng.normal(size=(400, 10, 20)), np.ones((400, 10))
x = qpdiff.solve_qp(Q, q, G, h).x
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(qpdiff.solve_qp(Q, q, G, h).x, x) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    run(code)


# ---- the choice


def test_progress_counts_up_to_the_batch():
    for engine in ("array", "compiled"):
        seen = []
        operands = optnet(rng(), (500,), 20, 10, 0)
        qpdiff.solve_qp(**operands, engine=engine, progress=lambda done, batch: seen.append((done, batch)))  # noqa: B023
        assert seen[-1] == (500, 500)
        assert all(batch == 500 for _, batch in seen)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_array_engine_reports_chunk_by_chunk_and_can_be_stopped(monkeypatch, threads):
    monkeypatch.setattr("qpdiff.backend.NumPyBackend.chunk_bytes", 2**18)
    monkeypatch.setattr("qpdiff.problem.Problem.workers", threads)
    make_sub_batch, begun, seen = qpdiff.engines.array.engine.make_sub_batch, [], []

    def counted(form, settings):
        begun.append(form.problem.batch)
        time.sleep(0.5 if len(begun) > 2 * threads else 0.0)  # so that no thread is done before the first report
        return make_sub_batch(form, settings)

    def stop(done, batch):
        seen.append(done)
        raise KeyboardInterrupt

    monkeypatch.setattr("qpdiff.engines.array.engine.make_sub_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        qpdiff.solve_qp(**optnet(rng(), (500,), 20, 10, 0), engine="array", progress=stop)
    assert len(seen) == 1
    assert seen[0] <= sum(begun) < 500


def test_an_error_in_progress_comes_out():
    def stop(done, batch):
        raise KeyboardInterrupt

    for engine in ("array", "compiled"):
        with pytest.raises(KeyboardInterrupt):
            qpdiff.solve_qp(**optnet(rng(), (500,), 20, 10, 0), engine=engine, progress=stop)
    assert np.all(qpdiff.solve_qp(**optnet(rng(), (500,), 20, 10, 0)).status == qpdiff.Status.SOLVED)


def test_an_error_in_progress_comes_out_once():
    """It was called again with the error set, where the next report was due."""
    calls = []

    def stop(done, batch):
        calls.append(done)
        time.sleep(0.3)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        qpdiff.solve_qp(np.eye(60), rng().normal(size=(50_000, 60)), np.eye(60), np.ones(60), progress=stop)
    assert len(calls) == 1


def test_bounds_are_absent_from_the_same_size_on():
    assert compiled_engine()[0]._core.INFINITE == INFINITE


def test_arguments():
    with pytest.raises(ValueError, match="engine is 'numba'; expected one of 'auto', 'array', 'compiled'"):
        qpdiff.solve_qp(np.eye(1), [0.0], engine="numba")
    with pytest.raises(ValueError, match="verbose needs engine='array'"):
        qpdiff.solve_qp(np.eye(1), [0.0], engine="compiled", verbose=True)
    with pytest.raises(TypeError, match="progress is a int"):
        qpdiff.solve_qp(np.eye(1), [0.0], progress=1)
    strict = pytest.importorskip("array_api_strict")
    with pytest.raises(ValueError, match="takes NumPy arrays only"):
        qpdiff.solve_qp(strict.eye(1), strict.zeros(1), engine="compiled")


def test_a_layer_in_training_does_not_go_round_in_circles():
    """With a step length each for variables and multipliers, both engines repeated the same four iterates here."""
    with np.load(pathlib.Path(__file__).with_name("circling.npz")) as file:
        operands = dict(file)
    for engine in ("array", "compiled"):
        sol = qpdiff.solve_qp(**operands, engine=engine)
        assert np.all(sol.status == qpdiff.Status.SOLVED)
        stationary = np.einsum("...ij,...j->...i", operands["Q"], sol.x) + operands["q"]
        stationary = stationary + np.einsum("...ji,...j->...i", operands["G"], sol.z)
        assert np.abs(stationary).max() < 1e-7
        assert (np.einsum("...ij,...j->...i", operands["G"], sol.x) - operands["h"]).max() < 1e-7
        assert sol.z.min() >= 0
