"""The iteration where arrays are traced: on the whole batch, as one compiled loop."""

from __future__ import annotations

from typing import Any

from ...problem import Layout, Problem
from ..base import Settings, StartingPoint
from .batch import outcome_of, saves_factor
from .equilibration import equilibrate
from .reduced_forms import PrimalForm, choose_traced_form
from .start import begin_again, begin_closer, begin_warm
from .state import RUNNING, choose, make_sub_batch
from .step import step


def solve_traced(problem: Problem, settings: Settings, warm: StartingPoint | None):
    """Return the outcome, the last factor of the primal form or None, and the scaling, by one compiled function."""
    backend: Any = problem.backend
    return backend.jit(_run_traced)(problem.operands, warm, problem.layout, settings)


def _run_traced(operands, warm: StartingPoint | None, layout: Layout, settings: Settings):
    """Iterate on the whole batch until every problem has ended.

    Where shapes prefer a dual form, the numbers decide between the two when it runs, and no factor is saved.
    """
    problem, backend, xp = layout.problem(operands), layout.backend, layout.backend.xp
    save = saves_factor(problem)
    _ = problem.k  # cached by the problem, so it has to be made here, where all branches and loops may use it

    def run(form):
        sub, state, factor = begin_closer(make_sub_batch(form, settings))
        ordinary = None
        if warm is not None:
            ordinary, (state, usable) = state, begin_warm(sub, warm, state)
            state = choose(xp, usable, state, ordinary)

        def unfinished(state, factor):
            return xp.any(state.status == RUNNING)

        def body(state, factor):
            state, factor = step(sub, state, refine=True, may_revert=True)
            state = state if ordinary is None else begin_again(xp, settings, state, ordinary)
            return state, factor if save else None

        start = state, factor if save else None
        state, factor = backend.while_loop(unfinished, body, start, 2 * settings.max_iterations + 2)
        return outcome_of(state), factor, sub.scaling

    form, safe = choose_traced_form(problem)
    if safe is None:
        return run(form)
    outcome = backend.cond(safe, lambda: run(form)[0], lambda: run(PrimalForm(problem))[0])
    return outcome, None, equilibrate(problem)
