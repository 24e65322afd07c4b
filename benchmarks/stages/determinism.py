"""Which bits repeat: the same problems solved again, by other threads, in another place, in another process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator

import numpy as np

from qpdiff.backend import single_threaded_blas

from .common import RECORDED, Plan, Row, same_bits, verdict
from .jobs import ANY_ENGINE, CASES, ENGINES, draw, each_array, engine_for, solve, working_threads

BY_THREADS = "by 1, 2, 3 and 8 threads"
PROMISED = {"the same call again", "in another process", "operands elsewhere in memory"}
"""Of both engines; of the compiled one `BY_THREADS` too."""
BATCHED = {"small": 300, "medium": 40, "bounds": 100, "linear": 100, "prices of problems": 60}
"""Cases whose operands all have a batch axis, and its length."""


def run(plan: Plan) -> Iterator[Row]:
    """Compare each way to solve the same problems with the plain one, for every case, until the time is over."""
    ways: dict[str, Callable[[str, str, Plan], list[float]]] = {
        "the same call again": _again,
        "in another process": _elsewhere,
        BY_THREADS: _by_threads,
        "operands elsewhere in memory": _misaligned,
        "operands in another order of memory": _reordered,
        "in another order of the batch": _permuted,
        "first half of the batch alone": _half,
        "one problem alone": _alone,
        "shared operands given to each problem": _repeated,
        "BLAS with two threads": _by_blas,
    }
    for engine in ENGINES:
        for what, way in ways.items():
            yield _compare(engine, what, way, plan)
    if len(ENGINES) > 1:
        differences = {case: _difference(*(solve(draw(case), e)[:1] for e in ENGINES)) for case in CASES}
        worst = max(differences, key=lambda case: differences[case])
        yield Row(
            "the two engines", f"{len(CASES)} cases", f"x differs by up to {differences[worst]:.0e} ({worst})", RECORDED
        )


def _compare(engine: str, what: str, way, plan: Plan) -> Row:
    """Say in which cases the bits repeat, and the largest difference in the others."""
    differences = {}
    chosen = [case for case in ANY_ENGINE if engine_for(draw(case)) == engine]
    for case in [*CASES, *chosen] if not plan.quick else [*list(CASES)[:2], *chosen[:1]]:
        found = way(engine, case, plan)
        if found:
            differences[case] = max(found)
    other = {case: value for case, value in differences.items() if value > 0}
    count = f"{len(differences)} case{'s' * (len(differences) != 1)}"
    found = f"the same bits in {len(differences) - len(other)}"
    if other:
        found += "; others by up to " + ", ".join(f"{value:.0e} ({case})" for case, value in other.items()) + " in x"
    promised = what in PROMISED or (what == BY_THREADS and engine == "compiled")
    outcome = verdict(not other) if promised else RECORDED
    return Row(f"{engine}: {what}", count, found, outcome)


def _difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Return 0 for the same bits in all arrays, else the largest difference of the first one, x, but at least 1e-17."""
    if same_bits(found, expected):
        return 0.0
    return max(float(np.max(np.abs(found[0] - expected[0]))), 1e-17)


def _plain(engine: str, operands: dict) -> list[np.ndarray]:
    with working_threads(1), single_threaded_blas():
        return solve(operands, engine)


def _again(engine: str, case: str, plan: Plan) -> list[float]:
    expected = _plain(engine, draw(case))
    return [_difference(_plain(engine, draw(case)), expected) for _ in range(2 if plan.quick else 10)]


def _elsewhere(engine: str, case: str, plan: Plan) -> list[float]:
    if plan.quick and case != "small":
        return []
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(_plain, (engine, draw(case)))
    return [_difference(found, _plain(engine, draw(case)))]


def _by_threads(engine: str, case: str, plan: Plan) -> list[float]:
    expected, found = _plain(engine, draw(case)), []
    for count in (1, 2, 3, 8):
        with working_threads(count), single_threaded_blas():
            found.append(_difference(solve(draw(case), engine), expected))
    return found


def _misaligned(engine: str, case: str, plan: Plan) -> list[float]:
    def moved(value):
        memory = np.empty(value.size + 5)
        place = memory[3 : 3 + value.size].reshape(value.shape)
        place[...] = value
        return place

    return [_difference(_plain(engine, each_array(moved, draw(case))), _plain(engine, draw(case)))]


def _reordered(engine: str, case: str, plan: Plan) -> list[float]:
    moved = each_array(np.asfortranarray, draw(case))
    return [_difference(_plain(engine, moved), _plain(engine, draw(case)))]


def _of_batch(engine: str, case: str, index) -> list[float]:
    """Compare the problems that `index` chooses of a batch, solved by themselves, with those of the whole batch."""
    if case not in BATCHED:
        return []
    chosen = each_array(lambda value: value[index], draw(case))
    whole = [value[index] for value in _plain(engine, draw(case))]
    return [_difference(_plain(engine, chosen), whole)]


def _permuted(engine: str, case: str, plan: Plan) -> list[float]:
    order = np.random.default_rng(plan.seed).permutation(BATCHED.get(case, 0))
    return _of_batch(engine, case, order)


def _half(engine: str, case: str, plan: Plan) -> list[float]:
    return _of_batch(engine, case, slice(0, BATCHED.get(case, 0) // 2))


def _alone(engine: str, case: str, plan: Plan) -> list[float]:
    return [worst for i in (0, 7) for worst in _of_batch(engine, case, slice(i, i + 1))]


def _repeated(engine: str, case: str, plan: Plan) -> list[float]:
    if case != "shared":
        return []
    operands = draw(case)
    given = {name: np.array(np.broadcast_to(operands[name], (90, *operands[name].shape))) for name in ("Q", "G", "A")}
    solution = slice(0, 9)  # gradients have other shapes
    return [_difference(_plain(engine, operands | given)[solution], _plain(engine, operands)[solution])]


def _by_blas(engine: str, case: str, plan: Plan) -> list[float]:
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return []
    with working_threads(1), threadpool_limits(2, user_api="blas"):
        found = solve(draw(case), engine)
    return [_difference(found, _plain(engine, draw(case)))]
