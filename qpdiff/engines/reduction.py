"""Choose the reduced KKT system with the fewest operations for the sizes of a problem."""

from __future__ import annotations

import enum

from ..problem import Problem

TYPICAL_ITERATIONS = 10
"""Iterations of a typical solve, over which work that is done once is spread."""


class Form(enum.IntEnum):
    """The reduced KKT systems, by the numbers that they have in C++ too."""

    PRIMAL = 0
    """Reduced to the variables, for any Q and any constraints."""
    DENSE_DUAL = 1
    """Reduced to the rows of A and G, for an invertible Q and no bounds."""
    DIAGONAL_DUAL = 2
    """Reduced to the rows of A and G, for a diagonal Q and bounds."""


def prefers_dense(problem: Problem) -> bool:
    """Return whether the dense dual form has the fewest operations in a typical solve."""
    n, linear = problem.n, problem.p + problem.m
    if linear == 0 or problem.lb is not None or problem.ub is not None:
        return False
    once = n**3 / 3 + n**2 * linear + n * linear**2
    return linear**3 / 3 + once / TYPICAL_ITERATIONS < n**3 / 3 + n**2 * linear


def preferred_form(problem: Problem, diagonal: bool | None = None) -> Form:
    """Return the form with the fewest operations in a typical iteration.

    `diagonal` says whether every Q is diagonal. None: find out where that decides, at the cost of a transfer to the
    host.
    """
    n, linear = problem.n, problem.p + problem.m
    if prefers_dense(problem):
        return Form.DENSE_DUAL
    bounded = problem.lb is not None or problem.ub is not None
    if linear and bounded and linear**3 / 3 + n * linear**2 < n**3 / 3 + n**2 * linear:
        if diagonal is None:
            diagonal = not bool(problem.backend.xp.any(has_off_diagonal(problem)))
        if diagonal:
            return Form.DIAGONAL_DUAL
    return Form.PRIMAL


def has_off_diagonal(problem: Problem):
    """Return which Q of the batch have entries off their diagonal, (B or 1,)."""
    xp = problem.backend.xp
    return xp.count_nonzero(problem.Q, axis=(-2, -1)) > xp.count_nonzero(xp.linalg.diagonal(problem.Q), axis=-1)
