"""The iteration where arrays are traced: on the whole batch, as one compiled loop."""

from __future__ import annotations

from typing import Any

from ...problem import Layout, Problem
from ..base import Settings, StartingPoint
from .batch import keeps_factor, outcome_of
from .equilibration import equilibrate
from .reduced_forms import PrimalForm, choose_traced_form
from .start import initialize, start_again, start_near
from .state import RUNNING, choose, make_part
from .step import step


def solve_traced(problem: Problem, settings: Settings, near: StartingPoint | None):
    """The outcome, the last factor of the primal form or None, and the metric, by one compiled function."""
    backend: Any = problem.backend
    return backend.jit(_run_traced)(problem.operands, near, problem.layout, settings)


def _run_traced(operands, near: StartingPoint | None, layout: Layout, settings: Settings):
    """Iterate on the whole batch until every problem has ended.

    Where shapes prefer a dual form, the numbers decide between the two when it runs, and no factor is kept.
    """
    problem, backend, xp = layout.problem(operands), layout.backend, layout.backend.xp
    keep = keeps_factor(problem)
    _ = problem.k  # kept by the problem, so it has to be made here, where all branches and loops may use it

    def run(form):
        part = make_part(form, settings)
        part, state, factor = initialize(part, settings)
        cold = None
        if near is not None:
            cold, (state, usable) = state, start_near(part, settings, near, state)
            state = choose(xp, usable, state, cold)

        def unfinished(state, factor):
            return xp.any(state.status == RUNNING)

        def body(state, factor):
            state, factor = step(part, settings, state, refine=True, stays=True)
            state = state if cold is None else start_again(xp, settings, state, cold)
            return state, factor if keep else None

        start = state, factor if keep else None
        state, factor = backend.while_loop(unfinished, body, start, 2 * settings.max_iterations + 2)
        return outcome_of(state), factor, part.metric

    form, safe = choose_traced_form(problem)
    if safe is None:
        return run(form)
    outcome = backend.cond(safe, lambda: run(form)[0], lambda: run(PrimalForm(problem))[0])
    return outcome, None, equilibrate(problem)
