"""Processes that are forked and spawned solve and differentiate; each result must have the bits of this process."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qpdiff.backend import single_threaded_blas

from .common import RECORDED, Clock, Plan, Row, counted, verdict
from .jobs import Job, by_adapters, by_choice, by_engines, working_threads

PATIENCE = 60.0
"""Seconds after which a child counts as hanging; alone it takes about two."""


def run(plan: Plan) -> Iterator[Row]:
    """Compare children with this process, first those that are forked before it has solved anything."""
    clocks = iter(plan.parts(5 if plan.quick else 7))
    jobs = _jobs(plan.quick)
    before = _forked(lambda: _digests(jobs), next(clocks))
    expected = _digests(jobs)
    yield _row("fork before the first solve", _judged(before, expected))
    yield _row("fork after solves", _judged(_forked(lambda: _digests(jobs), next(clocks)), expected))
    with single_threaded_blas():  # with more threads of its own, OpenBLAS hangs after some forks
        alone = _digests(jobs)
        with _solving(jobs):
            results = _forked(lambda: _digests(jobs), next(clocks))
    yield _row("fork while other threads solve, BLAS with one thread", _judged(results, alone))
    for method in ("spawn", "forkserver"):
        yield _row(method, _judged(_started(method, plan.quick, next(clocks)), expected))
    if not plan.quick:
        for what in ("torch", "JAX"):
            used = {name: job for name, job in by_adapters().items() if name.startswith(what)}
            if used:
                yield _of_framework(what, used, next(clocks))


def _jobs(quick: bool) -> dict[str, Job]:
    jobs = by_engines() | by_choice()
    ends = ("small", "medium", "sparse", "a price")
    return {name: job for name, job in jobs.items() if not quick or name.endswith(ends)}


def _of_framework(what: str, jobs: dict[str, Job], clock: Clock) -> Row:
    """Fork after a framework has worked, which is its own to allow."""
    expected = _digests(jobs)
    outcomes = _judged(_forked(lambda: _digests(jobs), clock), expected)
    return Row(f"fork after {what} has differentiated", _many(outcomes), counted(outcomes), RECORDED)


def _row(what: str, outcomes: Counter) -> Row:
    return Row(what, _many(outcomes), counted(outcomes), verdict(set(outcomes) <= {"with the same bits"}))


def _many(outcomes: Counter) -> str:
    return f"{outcomes.total()} processes"


def _digests(jobs: dict[str, Job]) -> list[bytes]:
    """Call each job once, with several threads; return the bytes of all that this gives."""
    with working_threads(3):
        return [array.tobytes() for job in jobs.values() for array in job()]


def _judged(results: list[list[bytes] | str], expected: list[bytes]) -> Counter:
    """Count the children by what became of them."""
    return Counter(
        result if isinstance(result, str) else "with the same bits" if result == expected else "with other bits"
        for result in results
    )


def _forked(work: Callable[[], list[bytes]], clock: Clock) -> list[list[bytes] | str]:
    """Fork two children at a time until the time is over; return the result of each, or what became of it."""
    results: list[list[bytes] | str] = []
    while not clock.over():
        children = [_fork(work) for _ in range(2)]
        results += [_result(*child) for child in children]
    return results


def _fork(work: Callable[[], list[bytes]]) -> tuple[int, int, threading.Timer]:
    """Fork a child that writes its result to a pipe; return its id, the end to read, and what ends it if it hangs."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python and JAX warn of forks beside threads, which is what is tried here
        child = os.fork()
    if child == 0:
        status = 1
        faulthandler.dump_traceback_later(0.9 * PATIENCE)  # where it hangs
        try:
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(b"".join(len(part).to_bytes(8) + part for part in work()))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    killer = threading.Timer(PATIENCE, os.kill, (child, signal.SIGKILL))
    killer.start()
    return child, reading, killer


def _result(child: int, reading: int, killer: threading.Timer) -> list[bytes] | str:
    """Return a child's result, or what became of it."""
    data = bytearray()
    with os.fdopen(reading, "rb") as pipe:
        while block := pipe.read(2**16):
            data += block
    _, status = os.waitpid(child, 0)
    killer.cancel()
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return "hanging" if name == "SIGKILL" else f"ended by {name}"
    if status:
        return "with an error"
    parts, view = [], memoryview(data)
    while view:
        size = int.from_bytes(view[:8])
        parts.append(bytes(view[8 : 8 + size]))
        view = view[8 + size :]
    return parts


def _started(method: str, quick: bool, clock: Clock) -> list[list[bytes] | str]:
    """Start processes by `multiprocessing` until the time is over."""
    results: list[list[bytes] | str] = []
    context = multiprocessing.get_context(method)
    while not clock.over():
        with context.Pool(2) as pool:
            pending = [pool.apply_async(_in_a_new_process, (quick,)) for _ in range(2)]
            for result in pending:
                try:
                    results.append(result.get(PATIENCE))
                except multiprocessing.TimeoutError:
                    results.append("hanging")
                except Exception as error:
                    results.append(repr(error))
    return results


def _in_a_new_process(quick: bool) -> list[bytes]:
    return _digests(_jobs(quick))


@contextmanager
def _solving(jobs: dict[str, Job]) -> Iterator[None]:
    """Solve in two other threads meanwhile."""
    over = threading.Event()

    def solve():
        while not over.is_set():
            for job in jobs.values():
                job()

    threads = [threading.Thread(target=solve) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
