"""Memory over many thousands of calls of every public function and adapter: it does not go on growing."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from itertools import pairwise

from .common import Clock, Plan, Row, resident, verdict
from .jobs import Job, all_jobs

WINDOWS, MOST = 4, 16
"""Windows of calls for each job, and of one whose memory still grows, as it does where there is a leak."""
BYTES, BLOCKS = 2**18, 50
"""What a window of many calls may add to the resident memory, and to Python's blocks of memory."""


def run(plan: Plan) -> Iterator[Row]:
    """Call each job for the same time."""
    jobs = all_jobs(plan.quick)
    for (what, job), clock in zip(jobs.items(), plan.parts(len(jobs)), strict=True):
        yield _repeat(what, job, clock)


def _repeat(what: str, job: Job, clock: Clock) -> Row:
    """Call a job in windows of equal numbers of calls; a leak adds to the memory in every one of them.

    What is stored at the first calls, and a heap in which free blocks lie between others, does so only in some. The
    first window counts for nothing.
    """
    for _ in range(2):  # with what is compiled
        job()
    warm = Clock(clock.seconds / (WINDOWS + 1))
    calls = 0
    while not warm.over() or calls < 2:
        job()
        calls += 1
    marks, kept = [_memory()], False
    while len(marks) <= (WINDOWS if kept else MOST):
        for _ in range(calls):
            job()
        marks.append(_memory())
        grown = [(late[0] - early[0], late[1] - early[1]) for early, late in pairwise(marks)]
        memory, blocks = min(pair[0] for pair in grown), min(pair[1] for pair in grown)
        kept = memory <= BYTES and blocks <= BLOCKS + calls // 20
    whole = marks[-1][0] - marks[0][0]
    found = f"{whole / 1024:+.0f} KiB in all, {memory / 1024:+.0f} KiB and {blocks:+d} blocks of Python's in the least"
    return Row(what, f"{calls * (len(marks) - 1)} calls", found, verdict(kept))


def _memory() -> tuple[int, int]:
    gc.collect()
    return resident(), sys.getallocatedblocks()
