"""The array engine as `engines.base.Engine`."""

from __future__ import annotations

from contextlib import closing

from ...problem import Problem
from ...validation import check_values, indefinite
from ..base import Outcome, Settings, StartingPoint
from ..reduction import prefers_dense
from .batch import Ended, SavedFactor, in_batch, join
from .derivative import Factors, saved_together, without_factor
from .loop import forms, iterate
from .state import make_sub_batch
from .traced import solve_traced

__all__ = ["refusal", "solve", "without_factor"]
MMAP_BYTES = 2**16
"""Size of the working set from which on malloc may ask the system for each array."""


def refusal(problem: Problem, verbose: bool) -> str | None:
    """Say why it cannot take these problems: it takes all."""
    return None


def solve(
    problem: Problem, settings: Settings, start: StartingPoint | None, *, check: bool, verbose: bool, progress
) -> tuple[Outcome, Factors]:
    """Solve every problem of a batch, in chunks that fit in memory."""
    xp, backend = problem.backend.xp, problem.backend
    # The dense dual form finds out by itself whether Q is definite; problems that it leaves to others are checked then.
    later = prefers_dense(problem) and not backend.traced
    if problem.batch * problem.bytes_per_problem >= MMAP_BYTES:
        backend.reuse_freed_memory()
    if check and problem.batch:
        check_values(problem, convexity=not later)
    if backend.traced:
        outcome, factor, scaling = solve_traced(problem, settings, start)
        if progress is not None:
            progress(problem.batch, problem.batch)
        return outcome, saved_together(problem, factor, scaling)

    def solve_chunk(chunk: slice) -> tuple[list[Ended], list[SavedFactor]]:
        chosen = forms(problem.select(chunk))
        if check and later and any(not form.skips_rho and xp.any(indefinite(form.problem)) for form, _ in chosen):
            check_values(problem)
        sub_batches = [(make_sub_batch(form, settings), in_batch(backend, chunk, where)) for form, where in chosen]
        del chosen  # its references would keep the arrays that `iterate` frees
        ended, saved = [], []
        while sub_batches:
            more = iterate(problem, sub_batches, start, verbose)
            ended += more[0]
            saved += more[1]
        return ended, saved

    chunks = problem.chunks()
    ended, saved, done = [], [], 0
    with closing(backend.map(solve_chunk, chunks, 1 if verbose else problem.workers)) as results:
        for chunk, solved in zip(chunks, results, strict=True):
            ended += solved[0]
            saved += solved[1]
            done += chunk.stop - chunk.start
            if progress is not None:
                progress(done, problem.batch)
    return join(problem, ended), Factors(saved)
