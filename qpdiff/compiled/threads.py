"""Threads for the ranges of a batch, with BLAS held to one thread each meanwhile."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

from ..backend import single_threaded_blas
from ..problem import Problem

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
