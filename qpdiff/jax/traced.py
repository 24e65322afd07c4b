"""The array engine in JAX's operations, whose iterations are one `lax.while_loop`."""

from __future__ import annotations

from typing import NamedTuple

from ..engines.array.central_path import relax
from ..engines.array.derivative import pack, saved_together
from ..engines.array.traced import solve_traced
from ..engines.base import Linearization, Outcome, Settings
from ..problem import Layout, Problem


class Traced(NamedTuple):
    """The array engine: all but the arrays of a call, hashable."""

    layout: Layout
    settings: Settings

    def solve(self, operands, start):
        """Return the outcome, and the last factor and the scaling, for `linearization`."""
        outcome, *extra = solve_traced(self.layout.problem(operands), self.settings, start)
        return outcome, tuple(extra)

    def relax(self, problem: Problem, outcome: Outcome, extra, kappa: float):
        """Return the outcome at the relaxed points, and their factor and scaling."""
        (_, factor, scaling, x, v, s, status), _ = pack(relax(self.linearization(problem, outcome, extra), kappa))
        return outcome._replace(x=x, v=v, s=s, status=status), (factor, scaling)

    def linearization(self, problem: Problem, outcome: Outcome, extra) -> Linearization:
        return Linearization(problem, saved_together(problem, *extra), outcome.x, outcome.v, outcome.s, outcome.status)
