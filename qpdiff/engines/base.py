"""The contract of the engines: what they take and what they return.

An engine is a module with three functions, `Engine`. It returns the outcome of every problem, and an object that
solves the KKT system at the solutions, `Factors`, which is all that the derivative asks of it.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from ..problem import Problem
from ..solution import Status
from .parameters import DOUBLE, parameters

MAX_ITERATIONS = DOUBLE.max_iterations


class Settings(NamedTuple):
    """What a call sets of the method, whose other numbers are `Parameters`."""

    tol: float
    rtol: float
    absolute: bool
    """True: residuals are measured in the caller's units; False: in those of the scaled problem (`Units`)."""
    max_iterations: int


def make_settings(problem: Problem, tol=None, rtol=None, max_iterations: int = MAX_ITERATIONS) -> Settings:
    """Make settings for the type that problems are computed in; without tol, in units of the problem's own."""
    return _settings(parameters(problem).tolerance, tol, rtol, max_iterations)


@lru_cache
def _settings(tolerance: float, tol, rtol, max_iterations: int) -> Settings:
    return Settings(
        tol=tolerance if tol is None else float(tol),
        rtol=tolerance if rtol is None else float(rtol),
        absolute=tol is not None,
        max_iterations=max_iterations,
    )


class StartingPoint(NamedTuple):
    """A warm start: variables, multipliers of all constraints, and a mask of where they can be used; (B or 1, ·)."""

    x: Any
    v: Any
    usable: Any


class Outcome(NamedTuple):
    """The results for the problems of a batch; residuals are in the caller's units, scalars have shape (B, 1)."""

    x: Any
    v: Any
    """Multipliers of all constraints."""
    s: Any
    """Slack of all constraints, 0 where the constraint is no inequality."""
    status: Any
    iterations: Any
    objective: Any
    primal: Any
    dual: Any
    gap: Any


class Linearization(NamedTuple):
    """The problem, its solution and the factors there, of which `qpdiff.differentiation` makes the derivative."""

    problem: Problem
    factors: Factors
    x: Any
    v: Any
    s: Any
    status: Any

    def at_solved(self) -> Linearization:
        """Return it with zeros for x and v of problems that are not SOLVED; itself where there are none such."""
        if self.problem.backend.known_all_false(self.status):  # SOLVED is 0
            return self
        xp, solved = self.problem.backend.xp, self.status == int(Status.SOLVED)
        return self._replace(x=xp.where(solved, self.x, 0.0), v=xp.where(solved, self.v, 0.0))


class Factors(Protocol):
    """The factors that an engine saves of a batch to solve the KKT system at its solutions; they can be pickled."""

    def solve(
        self, lin: Linearization, r_x, r_v, fill: float, names: Collection[str]
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Solve for right-hand sides (B, n) and (B, constraints).

        Problems that are not SOLVED get the number `fill`; to gradients their x and v, which may be NaN, are zeros.

        Returns
        -------
        u_x, u_v
        gradients : dict
            Of the operands that are named, those that come along at little cost, (B or 1, core), of sparse ones the
            values (B or 1, nnz): with the right-hand side as cotangents of the solution. The others are for the caller
            to compute.
        """

    def scaling(self, problem: Problem) -> Any:
        """Return the equilibration D and E of every problem, (B, n + constraints)."""


class Engine(Protocol):
    """A module that solves batches."""

    def refusal(self, problem: Problem, verbose: bool) -> str | None:
        """Say why it cannot take these problems; None: it can."""

    def solve(
        self, problem: Problem, settings: Settings, start: StartingPoint | None, *, check: bool, verbose: bool, progress
    ) -> tuple[Outcome, Factors]:
        """Solve every problem of a batch.

        With `check`, operands that break a rule of `validation.check_values` are a ValueError. `progress` is called as
        ``progress(done, batch)`` from this thread, or is None.
        """

    def without_factor(self, problem: Problem, scaling) -> Factors:
        """Return factors that store the scaling alone, (B, n + constraints): each solve factors the KKT matrix anew."""


class CompiledEngine(Engine, Protocol):
    """An engine that "auto" takes where it can solve the problems and suits them."""

    def suits(self, problem: Problem) -> bool:
        """Return whether it is likely to take less time than the engine that is taken otherwise."""
