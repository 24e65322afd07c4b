"""The iteration on a part of the batch: dropping of finished problems, early stop."""

from __future__ import annotations

from ...problem import Problem, take
from ..base import Settings, StartingPoint
from . import dual_space
from .batch import Ended, Kept, in_batch, keep, outcome_of, rows_at
from .reduced_forms import PrimalForm, choose_form
from .start import initialize, start_again, start_near
from .state import RUNNING, State, choose
from .step import step


def forms(problem: Problem):
    """Split a chunk by the reduced form that suits each of its problems."""
    xp = problem.backend.xp
    if problem.backend.traced:
        return [(PrimalForm(problem), None)]
    form, safe = choose_form(problem)
    if safe is None:
        return [(form, None)]
    (count,) = problem.backend.count(safe)
    if count == safe.shape[0]:
        return [(form, None)]
    if count == 0:
        return [(PrimalForm(problem), None)]
    order = xp.argsort(xp.astype(~safe, xp.int8), stable=True)
    parts = []
    for make, where in ((form.select, order[:count]), (lambda part, _: PrimalForm(part), order[count:])):
        parts.append((make(problem.select(where), where), where))
    return parts


def run(
    problem: Problem, parts, near: StartingPoint | None, settings: Settings, verbose: bool
) -> tuple[list[Ended], list[Kept]]:
    """Iterate on one part until every problem has ended; where it saves time, those that have are dropped by halves.

    The part is taken off the list, lest the caller keep what dropping has freed.
    """
    part, index = parts.pop()
    xp, backend = part.problem.backend.xp, part.problem.backend
    start = None if near is None else take(xp, near, index)
    start_from, advance = (dual_space.initialize, dual_space.step) if dual_space.pay(part) else (initialize, step)
    part, state, factor = start_from(part, settings)
    cold = None
    if start is not None:
        cold, (state, usable) = state, start_near(part, settings, start, state)
        if cold.seen is not None:
            state = dual_space.observe(part, state)
        state = choose(xp, usable, state, cold)
    # A definite form keeps its constants, which are there from the beginning.
    ended, kept = [], [keep(problem, part, index, None)] if part.form.definite else []
    while True:
        running = state.status == RUNNING
        count, inexact, close = backend.count(running, running & state.inexact, running & state.near)
        if verbose:
            _report(xp, state)
        if count == 0 or (2 * count <= part.problem.batch and not part.idle):
            order = xp.argsort(xp.astype(~running[:, 0], xp.int8), stable=True)
            done, rest = (order[count:], order[:count]) if count else (None, None)
            outcome = rows_at(xp, outcome_of(state), done)
            ended.append(Ended(in_batch(backend, index, done), outcome))
            if not part.form.definite:
                kept.append(keep(problem, part, index, factor, done))
            if count == 0:
                return ended, kept
            part, index = part.select(rest), in_batch(backend, index, rest)
            state, cold = rows_at(xp, (state, cold), rest)
        factor = None  # the next one may take its memory
        state, factor = advance(part, settings, state, refine=inexact, stays=close or count < part.problem.batch)
        if cold is not None:
            state = start_again(xp, settings, state, cold)


def _report(xp, state: State) -> None:
    running = state.status == RUNNING
    worst = (xp.max(xp.where(running, value, 0.0)) for value in (state.primal, state.dual, state.gap, state.mu))
    primal, dual, gap, mu = map(float, worst)
    print(
        f"{int(xp.max(state.iterations)):4d}  running {int(xp.sum(xp.astype(running, xp.int32))):6d}  "
        f"primal {primal:.1e}  dual {dual:.1e}  gap {gap:.1e}  mu {mu:.1e}"
    )
