"""The compiled engine for sparse problems as `engines.base.Engine`: what a call hands over to `sparse`."""

from __future__ import annotations

from typing import cast

import numpy as np

from ...backend import NumPyBackend
from ...problem import Problem
from ...validation import check_values, indefinite_error
from ..base import Factors, Outcome, Settings, StartingPoint
from . import sparse


def refusal(problem: Problem, verbose: bool) -> str | None:
    """Say why it cannot take these problems; None: it can."""
    if not isinstance(problem.backend, NumPyBackend):
        return "takes sparse NumPy arrays only; pass backend='numpy'"
    if problem.dtype != np.float64:
        return "computes sparse problems in float64; leave dtype out"
    if verbose:
        return "takes one problem after the other; verbose needs engine='array'"
    return None


def suits(problem: Problem) -> bool:
    """Return whether sparse problems take fewer operations sparse than dense."""
    try:
        return sparse.pattern_of(*problem.patterns).pays(
            problem.lb is not None or problem.ub is not None, problem.batch
        )
    except ValueError:  # the factor is too large
        return False


def solve(
    problem: Problem, settings: Settings, start: StartingPoint | None, *, check: bool, verbose: bool, progress
) -> tuple[Outcome, Factors]:
    """Solve every problem of a batch, as `engines.base.Engine` says."""
    rounding = problem.rounding if check else np.inf
    done = _solve(problem, settings, start, progress, check, rounding)
    if done is None:
        check_values(problem, convexity=False)  # raises the error, if there is one: the checks in C++ are stricter
        for position in range(problem.batch):
            one = problem.select(slice(position, position + 1))
            if _solve(one, settings._replace(max_iterations=0), None, None, False, rounding) is None:
                raise indefinite_error(problem, position)
        done = cast(tuple[Outcome, Factors], _solve(problem, settings, start, progress, False, np.inf))
    return done


def _solve(problem: Problem, settings: Settings, start, progress, check: bool, rounding: float):
    """Return the outcome and the factors; None where an operand may not be valid."""
    pattern, operands = sparse.pattern_of(*problem.patterns), sparse.operands_of(problem)
    done = sparse.solve(
        pattern, operands, problem.batch, settings, start, check=check, rounding=rounding,
        workers=problem.backend.workers, progress=progress,
    )  # fmt: skip
    return done and (done[0], sparse.Factors(pattern, done[1], operands))


def without_factor(problem: Problem, scaling) -> Factors:
    """Return factors that store the scaling alone, as `engines.base.Engine` says: no others are stored here."""
    return sparse.Factors(sparse.pattern_of(*problem.patterns), scaling, sparse.operands_of(problem))
