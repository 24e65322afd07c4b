"""Threads for the problems of a batch, with BLAS held to one thread each meanwhile."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache

import numpy as np

from ..backend import pool, single_threaded_blas
from ..problem import Problem
from .compiler import claim, entry, jit, pause, peek
from .tiles import BLOCK

RANGE_BYTES = 2**28
"""Working memory of a range of the batch."""
WORTH_A_THREAD = 1e6
"""Operations that take about as long as it takes to wake a thread."""
WORTH_A_REPORT = 1e9
"""Operations after which progress is reported."""
SOLVE, SWEEP = 10, 1
"""How often the work that `work_on` is for goes through a problem's matrices, in steps of the iteration."""
CLAIMED, FINISHED, SUMMED = 0, 1, 2
"""What a turn counts: the pieces of a batch that threads have taken, all that is done, and the sums taken then."""
AWAKE = 2**14
"""How often to look at a turn before waiting in another way: for about half a millisecond."""


def work_on(problem: Problem, first: int, prepare: Callable, passes: int, progress=None, group=1, sums=0) -> None:
    """Go through the problems from the first on, on as many threads as help.

    The calling thread is one of them, and the one that reports progress. For each range of the batch, `prepare` makes a
    function that solves problems of it and that all threads call with the same `turn`, from which they claim them.
    What they claim is a multiple of `group` as long as there is so much. `sums` is how many are left for `next_sum`.
    """
    count = problem.batch - first
    workers, number = workers_for(problem, count, passes), _ranges(problem, count, passes, progress is not None)
    with single_threaded_blas() if workers > 1 and max(problem.n, problem.m + problem.p) > BLOCK else nullcontext():
        for i in range(number):
            where = slice(first + i * count // number, first + (i + 1) * count // number)
            edges = _pieces(where.stop - where.start, workers, group)
            _share(prepare(where), edges, len(edges) - 2 + sums, workers)
            if progress is not None:
                progress(where.stop, problem.batch)


def new_turn() -> np.ndarray:
    return np.zeros(3, np.int64)


def _share(run: Callable, edges: np.ndarray, parts: int, workers: int) -> None:
    """Call the function on all threads at a time, until so many parts of it are done.

    The calling thread waits without sleeping for what the others have begun: to be woken would take longer than that.
    """
    turn = new_turn()
    helpers = [pool().submit(contextvars.copy_context().run, run, turn, edges) for _ in range(workers - 1)]
    errors: list = []
    try:
        run(turn, edges)
    finally:
        # A helper that has not begun found every thread busy, and there is nothing left for it to do.
        begun = [helper for helper in helpers if not helper.cancel()]
        if begun and turn[FINISHED] < parts and not wait_for(turn, parts):
            errors = [helper.exception() for helper in begun]
    for error in errors:
        if error is not None:
            raise error


@entry
def wait_for(turn, parts):
    """Wait for a while until so many parts are finished; whether they are."""
    for _ in range(AWAKE):
        if peek(turn, FINISHED) >= parts:
            return True
        pause()
    return False


@lru_cache
def _pieces(count: int, workers: int, group: int) -> np.ndarray:
    """Where the pieces begin that threads take of so many problems, and an empty one at the end.

    Neighbours share lines of the cache, so a piece is large, but the last ones are small: no thread waits for another.
    """
    edges = [0]
    while edges[-1] < count:
        share = -(-(count - edges[-1]) // (2 * workers if workers > 1 else 1))
        edges.append(min(edges[-1] + -(-share // group) * group, count))
    return np.array([*edges, count])


@jit
def following(i, end, turn, edges):
    """The problem after i, in pieces of the batch of which `turn` has the number of the next; and the piece's end."""
    if i + 1 < end:
        return i + 1, end
    return next_piece(end, turn, edges)


@jit
def next_piece(end, turn, edges):
    """Where the next piece of the batch that no thread has taken begins and ends; the last is empty.

    `end` is that of the piece which has been done, or 0.
    """
    if end > 0:
        claim(turn, FINISHED)
    piece = min(claim(turn, CLAIMED), edges.shape[0] - 2)
    return edges[piece], edges[piece + 1]


@jit
def next_sum(number, turn, edges):
    """The number of the next sum that no thread has taken, after the one with this number, or −1."""
    if number >= 0:
        claim(turn, FINISHED)
    else:
        while peek(turn, FINISHED) < edges.shape[0] - 2:
            pause()
    return claim(turn, SUMMED)


def workers_for(problem: Problem, count: int, passes: int) -> int:
    """How many threads help with so many problems."""
    if count <= 1:  # to count operations would take a good part of a small solve
        return 1
    return max(1, min(problem.backend.workers, count, int(count * passes * _operations(problem) / WORTH_A_THREAD)))


def _ranges(problem: Problem, count: int, passes: int, reports: bool) -> int:
    """In how many ranges so many problems are solved."""
    ranges = -(-count * problem.bytes_per_problem // RANGE_BYTES)
    if reports:
        ranges = max(ranges, int(count * passes * _operations(problem) / WORTH_A_REPORT))
    return max(1, min(count, ranges)) if count else 0


def _operations(problem: Problem) -> float:
    """About what a step takes for one problem."""
    n, linear = problem.n, problem.m + problem.p
    return min(n, linear or n) ** 3 / 3 + 8 * n * (n + linear) + 100 * (n + problem.rows)
