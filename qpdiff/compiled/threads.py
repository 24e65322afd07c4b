"""Threads for the ranges of a batch, with BLAS held to one thread each meanwhile."""

from __future__ import annotations

import contextvars
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

from ..backend import single_threaded_blas
from ..problem import Problem

RANGES = 4
"""Ranges of problems for each thread, so that none waits long for the others."""
RANGE_BYTES = 2**26
"""Working memory of a range."""
WORTH_A_THREAD = 1e6
"""Operations that take about as long as it takes to wake a thread."""
SOLVE, SWEEP = 10, 1
"""How often the work that `work_on` is for goes through a problem's matrices, in steps of the iteration."""


def work_on(problem: Problem, first: int, solve_range: Callable[[slice], None], passes: int, progress=None) -> None:
    """Call the function for ranges that make up the problems from the first on, on as many threads as help.

    The calling thread is one of them, and the one that reports progress.
    """
    count = problem.batch - first
    # To count operations would take a good part of a small solve.
    workers, number = _plan(problem, count, passes) if count > 1 else (1, count)
    edges = [first + i * count // number for i in range(number + 1)] if count else []
    ranges = deque(slice(start, stop) for start, stop in pairwise(edges))
    finished = deque([first])

    def work(report: Callable | None) -> None:
        while True:
            try:
                where = ranges.popleft()
            except IndexError:
                return
            solve_range(where)
            finished.append(where.stop - where.start)
            if report is not None and ranges:
                report(sum(list(finished)), problem.batch)

    if workers == 1:
        work(progress)
    else:
        with single_threaded_blas():
            helpers = [_pool().submit(contextvars.copy_context().run, work, None) for _ in range(workers - 1)]
            try:
                work(progress)
            finally:
                ranges.clear()
                # A helper that has not begun found every thread busy, and there is nothing left for it to do.
                errors = [helper.exception() for helper in helpers if not helper.cancel()]
        for error in errors:
            if error is not None:
                raise error
    if progress is not None and count:
        progress(problem.batch, problem.batch)


def _plan(problem: Problem, count: int, passes: int) -> tuple[int, int]:
    """How many threads help with so many problems, and in how many ranges to take these."""
    worth = int(count * passes * _operations(problem) / WORTH_A_THREAD)
    workers = max(1, min(problem.backend.workers, count, worth))
    least = -(-count * problem.bytes_per_problem // RANGE_BYTES)
    return workers, min(count, max(min(worth, workers * RANGES), least))


def _operations(problem: Problem) -> float:
    """About what a step takes for one problem."""
    n, linear = problem.n, problem.m + problem.p
    return min(n, linear or n) ** 3 / 3 + 8 * n * (n + linear) + 100 * (n + problem.rows)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="qpdiff")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
