"""Connected components without curvature: the matrices leave the units of each open, which its vectors decide.

Variables are in one component where rows of A and G link them. Where all of them are in no entry of Q, D may grow and E
shrink there by any factor. One unit of residuals suits all components once the cost of each is as large as its
right-hand sides.
"""

from __future__ import annotations

from functools import reduce

import numpy as np

from ...problem import Problem


def balance_components(problem: Problem, D, rows, k, q, unsatisfied):
    """Return D, and E of A and of G, with max |Dq| as large as the right-hand sides in components without curvature.

    These are the largest Ek that x = 0 does not satisfy; where it satisfies all, the least that is not 0. Nothing
    changes where there is one component: curvature or `balance_cost` decide. None: that is known of all problems.

    Parameters
    ----------
    D, rows
        D, and E of A and of G, after `balance`.
    k, q
        Ek of all constraints and Dq, 0 where they say nothing.
    unsatisfied
        |Ek| where x = 0 does not satisfy the constraint, else 0.
    """
    xp, backend = problem.backend.xp, problem.backend
    flat = ~xp.any(problem.Q != 0, axis=-1)
    linked = {name: K != 0 for name, K in (("A", problem.A), ("G", problem.G)) if K is not None and K.shape[-2]}
    one = [xp.any(xp.all(M, axis=-1), axis=-1, keepdims=True) for M in linked.values()]
    wanted = xp.any(flat, axis=-1, keepdims=True) & ~reduce(xp.logical_or, one, xp.zeros_like(flat[:, :1]))

    def factors():
        return component_factors(problem, flat, linked, k, q, unsatisfied)

    if backend.traced:
        shape = _batch([k, q, *linked.values()]), problem.n
        times = backend.cond(xp.any(wanted), factors, lambda: xp.ones(shape, dtype=D.dtype))
    elif backend.count(wanted)[0]:
        times = factors()
    else:
        return None

    def of_rows(name):
        most = xp.max(xp.where(linked[name], times[:, None, :], 0.0), axis=-1)
        return xp.where(most > 0, most, 1.0)

    names = [name for name, K in (("A", problem.A), ("G", problem.G)) if K is not None]
    return times * D, [e / of_rows(name) if name in linked else e for name, e in zip(names, rows, strict=True)]


def component_factors(problem: Problem, flat, linked: dict, k, q, unsatisfied):
    """Return the factors on D, (B or 1, n).

    `flat` is a mask of the variables in no entry of Q, `linked` has masks of the entries of A and G.
    """
    xp = problem.backend.xp
    same = linked_variables(problem, list(linked.values()))
    several = ~xp.all(same, axis=(-2, -1))[:, None]

    def largest(a):
        """Return the largest entry in the component of each variable."""
        return xp.max(xp.where(same, a[:, None, :], 0.0), axis=-1)

    def largest_of_rows(a):
        """Do the same for constraints."""
        parts = {name: a[:, rows] for name, rows in problem.blocks.items() if rows.stop > rows.start}
        for name, M in linked.items():
            parts[name] = xp.max(xp.where(M, parts[name][:, :, None], 0.0), axis=-2)
        return largest(reduce(xp.maximum, parts.values(), 0.0 * q))

    length = xp.abs(k)
    needed, slope = largest_of_rows(unsatisfied), largest(xp.abs(q))
    nearest = largest_of_rows(xp.where(length > 0, 1.0 / xp.where(length > 0, length, 1.0), 0.0))
    size = xp.where(needed > 0, needed, xp.where(nearest > 0, 1.0 / xp.where(nearest > 0, nearest, 1.0), 0.0))
    free = several & (largest(xp.astype(~flat, q.dtype)) == 0) & (size > 0) & (slope > 0)
    return xp.where(free, xp.sqrt(xp.where(free, size, 1.0)) / xp.sqrt(xp.where(free, slope, 1.0)), 1.0)


def linked_variables(problem: Problem, linked: list):
    """Return which variables are in one component, (B or 1, n, n), by masks of the entries of A and G.

    Each component gets the number of its last variable, which is passed on until no number changes.
    """
    xp, backend = problem.backend.xp, problem.backend

    def pass_on(number, _):
        moved = number
        for M in linked:
            of_rows = xp.max(xp.where(M, number[:, None, :], -1), axis=-1)
            moved = xp.maximum(moved, xp.max(xp.where(M, of_rows[:, :, None], -1), axis=-2))
        return moved, xp.any(moved != number)

    number = xp.broadcast_to(backend.arange(problem.n), (_batch(linked), problem.n))
    number, _ = backend.while_loop(lambda _, changed: changed, pass_on, (number, xp.any(number >= 0)), problem.n + 1)
    return number[:, :, None] == number[:, None, :]


def _batch(arrays: list) -> int:
    """Return the length of the batch axis of what is computed of these arrays, each (B or 1, ...)."""
    return np.broadcast_shapes((1,), *[a.shape[:1] for a in arrays])[0]
