"""Many Python threads solve and differentiate at once; each result must have the bits of a call alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np

import qpdiff
from qpdiff.backend import single_threaded_blas

from .common import Clock, Plan, Row, same_bits, verdict
from .jobs import ENGINES, PRICED, SPARSE, Job, by_adapters, by_choice, by_engines, draw, working_threads

CALLERS = 8
SHARED = ("torch", "torch: second order", "JAX: jit", "JAX: eager", "autograd", "from_cvxpy")
"""Adapters that are called from several threads; CVXPY's own problems are not made for that."""


def run(plan: Plan) -> Iterator[Row]:
    """Compare calls from many threads with the same calls one by one."""
    groups = {f"{e} engine": {k: v for k, v in by_engines().items() if k.startswith(e)} for e in ENGINES}
    groups |= {f"{engine} engine, one solution": _differentiations(engine) for engine in ENGINES}
    groups |= {"sparse matrices": by_choice(SPARSE), "prices": by_choice(PRICED)}
    if not plan.quick:
        adapters = {name: job for name, job in by_adapters().items() if name in SHARED}
        groups |= {", ".join(sorted({name.partition(":")[0] for name in adapters})): adapters} if adapters else {}
    for (what, jobs), clock in zip(groups.items(), plan.parts(len(groups)), strict=True):
        yield _together(what, jobs, clock, plan)


def _differentiations(engine: str) -> dict[str, Job]:
    """Return jobs that all differentiate one solution, along different cotangents."""
    sol = qpdiff.solve_qp(**draw("medium"), engine=engine)

    def differentiate(cotangent: np.ndarray) -> list[np.ndarray]:
        return [gradient for gradient in qpdiff.vjp(sol, x=cotangent) if gradient is not None]

    def job(seed: int) -> Job:
        cotangent = np.random.default_rng(seed).normal(size=sol.x.shape)
        return lambda: differentiate(cotangent)

    return {f"cotangent {seed}": job(seed) for seed in range(CALLERS)}


def _together(what: str, jobs: dict[str, Job], clock: Clock, plan: Plan) -> Row:
    """Call random jobs from all threads until the time is over, each with one to three threads of its own."""
    with single_threaded_blas(), working_threads(1):
        expected = {name: job() for name, job in jobs.items()}
        calls, wrong, failures = _calls(jobs, expected, clock, plan)
    found = f"{calls - wrong - len(failures)} with the same bits"
    if wrong or failures:
        found += f", {wrong} with others, {len(failures)} failed: {'; '.join(sorted(set(failures))[:3])}"
    return Row(what, f"{calls} calls from {CALLERS} threads", found, verdict(not wrong and not failures))


def _calls(jobs, expected, clock: Clock, plan: Plan) -> tuple[int, int, list[str]]:
    lock, failures = threading.Lock(), []
    calls = wrong = 0

    def call(seed: int) -> None:
        nonlocal calls, wrong
        rng, names = np.random.default_rng((plan.seed, seed)), list(jobs)
        while True:
            name = names[rng.integers(len(names))]
            try:
                with working_threads(int(rng.integers(1, 4))):
                    same, failure = same_bits(jobs[name](), expected[name]), []
            except Exception as error:
                same, failure = True, [f"{name}: {error!r}"]
            with lock:
                calls += 1
                wrong += not same
                failures.extend(failure)
                if clock.over():
                    return

    _with_frequent_switches(lambda: _join([threading.Thread(target=call, args=(i,)) for i in range(CALLERS)]))
    return calls, wrong, failures


def _join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _with_frequent_switches(function: Callable[[], None]) -> None:
    """Call a function while Python changes between its threads a hundred times as often as otherwise."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    try:
        function()
    finally:
        sys.setswitchinterval(before)
