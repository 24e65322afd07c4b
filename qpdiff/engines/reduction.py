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


def operations(form: Form, n: int, linear: int) -> float:
    """Return the multiplications of an iteration of a typical solve, for so many variables and rows of A and G."""
    primal = n**3 / 3 + n**2 * linear
    if form == Form.PRIMAL:
        return primal
    if form == Form.DENSE_DUAL:
        return linear**3 / 3 + (primal + n * linear**2) / TYPICAL_ITERATIONS
    return linear**3 / 3 + n * linear**2


def is_fewer(form: Form, n: int, linear: int) -> bool:
    """Return whether a dual form has fewer operations than the primal one."""
    return linear > 0 and operations(form, n, linear) < operations(Form.PRIMAL, n, linear)


def prefers_dense(problem: Problem) -> bool:
    """Return whether the dense dual form has the fewest operations in a typical solve."""
    bounded = problem.lb is not None or problem.ub is not None
    return not bounded and is_fewer(Form.DENSE_DUAL, problem.n, problem.p + problem.m)


def preferred_form(problem: Problem, diagonal: bool | None = None) -> Form:
    """Return the form with the fewest operations in a typical iteration.

    `diagonal` says whether every Q is diagonal. None: find out where that decides, at the cost of a transfer to the
    host.
    """
    if prefers_dense(problem):
        return Form.DENSE_DUAL
    bounded = problem.lb is not None or problem.ub is not None
    if bounded and is_fewer(Form.DIAGONAL_DUAL, problem.n, problem.p + problem.m):
        if diagonal is None:
            diagonal = not bool(problem.backend.xp.any(has_off_diagonal(problem)))
        if diagonal:
            return Form.DIAGONAL_DUAL
    return Form.PRIMAL


def has_off_diagonal(problem: Problem):
    """Return which Q of the batch have entries off their diagonal, (B or 1,)."""
    xp = problem.backend.xp
    return xp.count_nonzero(problem.Q, axis=(-2, -1)) > xp.count_nonzero(xp.linalg.diagonal(problem.Q), axis=-1)
