"""The iteration on a sub-batch until every problem has ended."""

from __future__ import annotations

from ...problem import Problem, take
from ..base import StartingPoint
from ..parameters import DOUBLE
from . import dual_space
from .batch import Ended, SavedFactor, in_batch, outcome_of, save_factor, take_all
from .reduced_forms import PrimalForm, choose_form
from .start import begin_again, begin_closer, begin_warm
from .state import RUNNING, State, SubBatch, choose
from .step import step


def forms(problem: Problem):
    """Divide a chunk into sub-batches by the reduced form that suits each of its problems.

    Returns
    -------
    list
        A reduced form with its problems, and their positions in the chunk or None for all, for each sub-batch.
    """
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
    preferred, others = order[:count], order[count:]
    return [
        (form.select(problem.select(preferred), preferred), preferred),
        (PrimalForm(problem.select(others)), others),
    ]


def in_dual_space(sub: SubBatch) -> bool:
    """Return whether steps in the dual space, which are more operations on fewer numbers, can be made and save time.

    float32 needs its residuals in float64, which they do not give.
    """
    return sub.form.skips_rho and sub.problem.dtype == sub.wide_problem.dtype and not sub.launch_bound


def iterate(
    problem: Problem, sub_batches, warm: StartingPoint | None, verbose: bool
) -> tuple[list[Ended], list[SavedFactor]]:
    """Iterate on the last of some sub-batches until every problem of it has ended.

    Where it saves time, problems that have ended are dropped once they are half. The sub-batch is popped from the list,
    so that no reference keeps the arrays that dropping frees.
    """
    sub, index = sub_batches.pop()
    xp, backend = sub.problem.backend.xp, sub.problem.backend
    point = None if warm is None else take(xp, warm, index)
    start, advance = (dual_space.begin, dual_space.step) if in_dual_space(sub) else (begin_closer, step)
    sub, state, factor = start(sub)
    ordinary = None
    if point is not None:
        ordinary, (state, usable) = state, begin_warm(sub, point, state)
        if ordinary.implicit_x is not None:
            state = dual_space.anchor(sub, state)
        state = choose(xp, usable, state, ordinary)
    # What the dense dual form saves is there from the beginning.
    ended, saved = [], [save_factor(problem, sub, index, None)] if sub.form.skips_rho else []
    while True:
        running = state.status == RUNNING
        masks = [running, running & state.refine, running & state.within_tolerance]
        if state.implicit_x is not None:
            masks.append(running & (state.without_progress >= DOUBLE.equal_steps_after))
        count, refine, close, *stuck = backend.count(*masks)
        if verbose:
            print_progress(xp, state)
        if count == 0 or (2 * count <= sub.problem.batch and not sub.launch_bound):
            order = xp.argsort(xp.astype(~running[:, 0], xp.int8), stable=True)
            done, rest = (order[count:], order[:count]) if count else (None, None)
            outcome = take_all(xp, outcome_of(state), done)
            ended.append(Ended(in_batch(backend, index, done), outcome))
            if not sub.form.skips_rho:
                saved.append(save_factor(problem, sub, index, factor, done))
            if count == 0:
                return ended, saved
            sub, index = sub.select(rest), in_batch(backend, index, rest)
            state, ordinary = take_all(xp, (state, ordinary), rest)
        if any(stuck):
            advance, state = step, dual_space.leave(sub, state)
            ordinary = None if ordinary is None else dual_space.leave(sub, ordinary)
        factor = None  # the next one may take its memory
        state, factor = advance(sub, state, refine=refine, may_revert=close or count < sub.problem.batch)
        if ordinary is not None:
            state = begin_again(xp, sub.settings, state, ordinary)


def print_progress(xp, state: State) -> None:
    """Print the worst residuals of the problems that are still running."""
    running = state.status == RUNNING
    worst = (xp.max(xp.where(running, value, 0.0)) for value in (state.primal, state.dual, state.gap, state.mu))
    primal, dual, gap, mu = map(float, worst)
    print(
        f"{int(xp.max(state.iterations)):4d}  running {int(xp.sum(xp.astype(running, xp.int32))):6d}  "
        f"primal {primal:.1e}  dual {dual:.1e}  gap {gap:.1e}  mu {mu:.1e}"
    )
