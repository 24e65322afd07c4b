"""Problems in the arrays of other libraries in an engine for NumPy arrays: by way of the host's memory."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from ..backend import choose_backend
from ..problem import Problem
from ..sparse import apply
from .array import engine as array
from .base import CompiledEngine, Linearization, Outcome, Settings, StartingPoint
from .densified import OfDense


class Hosted(NamedTuple):
    """An engine for problems of a library whose backend has `to_host`, by one for NumPy (`CompiledEngine`)."""

    engine: CompiledEngine

    def refusal(self, problem: Problem, verbose: bool) -> str | None:
        """Say why the other one cannot take these problems; None: it can."""
        q = problem.backend.to_host(problem.q)
        return self.engine.refusal(problem.with_layout(**layout_on_host(q)), verbose)  # by the layout alone

    def suits(self, problem: Problem) -> bool:
        """Return whether these problems are solved by fewer operations there."""
        return self.engine.suits(problem)  # by shapes and patterns, which are the same there

    def solve(
        self, problem: Problem, settings: Settings, start: StartingPoint | None, *, check: bool, verbose: bool, progress
    ) -> tuple[Outcome, OfHost]:
        """Solve every problem of a batch, as `engines.base.Engine` says."""
        host, to_host = on_host(problem), problem.backend.to_host
        start = None if start is None else StartingPoint(*map(to_host, start))
        outcome, factors = self.engine.solve(host, settings, start, check=check, verbose=verbose, progress=progress)
        return Outcome(*map(problem.backend.asarray, outcome)), OfHost(host, factors)

    def without_factor(self, problem: Problem, scaling) -> OfHost:
        """Return factors that store the scaling alone, as `engines.base.Engine` says."""
        host = on_host(problem)
        return OfHost(host, self.engine.without_factor(host, problem.backend.to_host(scaling)))


class OfHost(NamedTuple):
    """The factors of the problems on the host (`engines.base.Factors`)."""

    problem: Problem
    factors: Any

    def solve(
        self, lin: Linearization, r_x, r_v, fill: float, names: Collection[str]
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Solve the KKT system, as `engines.base.Factors` says."""
        backend = lin.problem.backend
        if any(map(backend.is_tracer, (*lin[2:], r_x, r_v))):  # they have no numbers yet, so that nothing moves
            dense = array.without_factor(lin.problem.made_dense(), self.scaling(lin.problem))
            return OfDense(dense).solve(lin, r_x, r_v, fill, names)
        x, v, s, status, r_x, r_v = map(backend.to_host, (*lin[2:], r_x, r_v))
        host = Linearization(self.problem, self.factors, x, v, s, status)
        u_x, u_v, gradients = self.factors.solve(host, r_x, r_v, fill, names)
        back = backend.asarray
        return back(u_x), back(u_v), {name: back(value) for name, value in gradients.items()}

    def scaling(self, problem: Problem):
        """Return the equilibration D and E of every problem."""
        return problem.backend.asarray(self.factors.scaling(self.problem))


def on_host(problem: Problem) -> Problem:
    """Return the same problems in NumPy arrays."""
    operands = {name: apply(problem.backend.to_host, value) for name, value in problem.operands.items()}
    return problem.layout._replace(**layout_on_host(operands["q"])).problem(operands)


def layout_on_host(q: np.ndarray) -> dict[str, Any]:
    """Return what differs in the layout of problems in NumPy arrays of the type of q."""
    dtype = np.dtype(q.dtype)
    return {"backend": choose_backend({}, "numpy")[0], "dtype": dtype, "result": dtype}
