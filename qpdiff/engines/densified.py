"""Sparse problems in an engine of dense ones: their matrices are made dense, to solve and again for each derivative."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from ..problem import Problem
from .base import Engine, Factors, Linearization, Outcome, Settings, StartingPoint


class Densified(NamedTuple):
    """An engine for sparse problems that is another one for dense ones (`engines.base.Engine`)."""

    engine: Engine

    def refusal(self, problem: Problem, verbose: bool) -> str | None:
        """Say why the other one cannot take these problems; None: it can."""
        return self.engine.refusal(problem, verbose)

    def solve(
        self, problem: Problem, settings: Settings, start: StartingPoint | None, *, check: bool, verbose: bool, progress
    ) -> tuple[Outcome, Factors]:
        """Solve every problem of a batch, as `engines.base.Engine` says."""
        dense = problem.made_dense()
        outcome, factors = self.engine.solve(dense, settings, start, check=check, verbose=verbose, progress=progress)
        return outcome, OfDense(factors)

    def without_factor(self, problem: Problem, scaling) -> Factors:
        """Return factors that store the scaling alone, as `engines.base.Engine` says."""
        return OfDense(self.engine.without_factor(problem.made_dense(), scaling))


class OfDense(NamedTuple):
    """The factors of the dense problems (`engines.base.Factors`)."""

    factors: Factors

    def solve(
        self, lin: Linearization, r_x, r_v, fill: float, names: Collection[str]
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Solve the KKT system; no gradients come along: the caller computes those of matrices on the pattern."""
        dense = lin._replace(problem=lin.problem.made_dense(), factors=self.factors)
        u_x, u_v, _ = self.factors.solve(dense, r_x, r_v, fill, ())
        return u_x, u_v, {}

    def scaling(self, problem: Problem):
        """Return the equilibration D and E of every problem."""
        return self.factors.scaling(problem)
