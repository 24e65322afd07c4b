"""Threads for the ranges of a batch, with BLAS held to one thread each meanwhile."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache

from ..problem import Problem

try:
    from threadpoolctl import ThreadpoolController
except ImportError:
    ThreadpoolController = None

TASKS = 4
"""Ranges of problems for each thread, so that none waits long for the others."""


def work_on(problem: Problem, first: int, solve_range: Callable[[slice], None], progress: Callable | None) -> None:
    """Call the function for ranges that make up the problems from the first on, on as many threads as help."""
    count, workers = problem.batch - first, min(problem.backend.workers, problem.batch - first)
    tasks = min(count, workers * TASKS)
    edges = [first + i * count // tasks for i in range(tasks + 1)] if count else []
    ranges = [slice(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]
    done = first

    def advance(where: slice) -> None:
        nonlocal done
        done += where.stop - where.start
        if progress is not None:
            progress(done, problem.batch)

    if workers < 2:
        for where in ranges:
            solve_range(where)
            advance(where)
        return
    with single_threaded_blas(), ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(contextvars.copy_context().run, solve_range, where): where for where in ranges}
        for future in as_completed(futures):
            future.result()
            advance(futures[future])


@cache
def _controller():
    return ThreadpoolController()


_lock = threading.Lock()
_users = 0
_limit = None


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """One thread for each call of BLAS, from when the first of any Python threads enters until the last has left.

    Several would fight over the processors with ours, and OpenBLAS's go on spinning for a while after a call.
    """
    global _users, _limit
    if ThreadpoolController is None:
        yield
        return
    with _lock:
        if _users == 0:
            _limit = _controller().limit(limits=1, user_api="blas")
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _limit.restore_original_limits()
