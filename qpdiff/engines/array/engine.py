"""The array engine as `engines.base.Engine`."""

from __future__ import annotations

from contextlib import closing

from ... import kkt
from ...method import make_part
from ...problem import Problem
from ...validation import check_values, indefinite
from ..base import Outcome, Settings, StartingPoint
from .batch import Ended, Kept, in_batch, join
from .derivative import Factors, whole
from .loop import forms, run
from .traced import solve_traced


def refusal(problem: Problem, verbose: bool) -> str | None:
    """Say why it cannot take these problems: it takes all."""
    return None


def solve(
    problem: Problem, settings: Settings, start: StartingPoint | None, *, check: bool, verbose: bool, progress
) -> tuple[Outcome, Factors]:
    """Solve every problem of a batch, in chunks that fit in memory."""
    xp, backend = problem.backend.xp, problem.backend
    # The dense dual form finds out by itself whether Q is definite; what it leaves to others is looked at then.
    later = kkt.prefers_dense(problem) and not backend.traced
    if check and problem.batch:
        check_values(problem, convexity=not later)
    if backend.traced:
        outcome, factor, metric = solve_traced(problem, settings, start)
        if progress is not None:
            progress(problem.batch, problem.batch)
        return outcome, whole(problem, factor, metric)

    def solve_chunk(chunk: slice) -> tuple[list[Ended], list[Kept]]:
        chosen = forms(problem.select(chunk))
        if check and later and any(not form.definite and xp.any(indefinite(form.problem)) for form, _ in chosen):
            check_values(problem)
        parts = [(make_part(form, settings), in_batch(backend, chunk, where)) for form, where in chosen]
        del chosen  # which would keep what `run` frees
        ended, kept = [], []
        while parts:
            more = run(problem, parts, start, settings, verbose)
            ended += more[0]
            kept += more[1]
        return ended, kept

    chunks = problem.chunks()
    ended, kept, done = [], [], 0
    with closing(backend.map(solve_chunk, chunks, 1 if verbose else problem.workers)) as results:
        for chunk, solved in zip(chunks, results, strict=True):
            ended += solved[0]
            kept += solved[1]
            done += chunk.stop - chunk.start
            if progress is not None:
                progress(done, problem.batch)
    return join(problem, ended), Factors(kept)
