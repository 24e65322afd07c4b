"""The central path: from the solution of s ∘ z = 0 to the point of s ∘ z = κ, which smooths the derivative."""

from __future__ import annotations

from typing import Any

from ...problem import Layout, Problem, limit_distances, take
from ...solution import Status
from ..base import Linearization, make_settings
from ..parameters import DOUBLE, parameters
from .batch import batch_order, in_batch, save_factor
from .derivative import Factors, pack, unpack, without_factor
from .loop import forms
from .start import center_on_path, on_path
from .state import SubBatch, cast, make_sub_batch
from .status import residuals, violations
from .step import (
    NewtonSystem,
    Pair,
    complementary_pairs,
    directions_of_pairs,
    move_elastic,
    right_of_constraints,
    step_lengths,
)

CENTERING_LIMIT = 50
"""Limit on the Newton steps to a point of the central path."""


def relax(lin: Linearization, kappa: float) -> Linearization:
    """Find the points where s ∘ z = κ instead of 0, from solutions by Newton's method, and their factors.

    A problem whose point is not found counts as STALLED.
    """
    if lin.problem.sparse:
        return _relax_by_derivative(lin, kappa)
    backend: Any = lin.problem.backend
    if backend.traced:
        if not isinstance(lin.factors, Factors):  # those of another engine, of which the scaling is enough here
            lin = lin._replace(factors=without_factor(lin.problem, lin.factors.scaling(lin.problem)))
        arrays, layout = pack(lin)
        return unpack(backend.jit(_relax_traced)(arrays, None, layout, kappa), layout)
    return _relax(lin, kappa)


def _relax_traced(arrays, _, layout: Layout, kappa: float):
    return pack(_relax(unpack(arrays, layout), kappa))[0]


def _relax(lin: Linearization, kappa: float) -> Linearization:
    problem = lin.problem
    xp, backend = problem.backend.xp, problem.backend
    settings = make_settings(problem)
    saved, points = [], []
    for chunk in problem.chunks():
        for form, where in forms(problem.select(chunk)):
            at = in_batch(backend, chunk, where)
            sub = make_sub_batch(form, settings)
            point, factor = _center(sub, kappa, *take(xp, (lin.x, lin.v, lin.s), at))
            saved.append(save_factor(problem, sub, at, factor))
            points.append(point)
    if not points:
        return lin
    x, v, s, found = (xp.concat(column, axis=0) for column in zip(*points, strict=True))
    order = batch_order(backend, saved)
    if order is not None:
        x, v, s, found = (xp.take(a, order, axis=0) for a in (x, v, s, found))
    lost = ~found & (lin.status == int(Status.SOLVED))
    return Linearization(
        problem, Factors(saved), x, v, s, xp.where(lost, xp.full_like(lin.status, int(Status.STALLED)), lin.status)
    )


def _relax_by_derivative(lin: Linearization, kappa: float) -> Linearization:
    """Find the same points with nothing but the solves of the derivative, whose matrix is that of Newton's method too.

    For sparse problems, whose factors are made anew at each point.
    """
    problem, xp, backend = lin.problem, lin.problem.backend.xp, lin.problem.backend
    scaling = lin.factors.scaling(problem)
    D, E = scaling[:, : problem.n], scaling[:, problem.n :]
    solved = lin.status == int(Status.SOLVED)
    tiny, accuracy = parameters(problem).tiny, xp.finfo(problem.dtype).eps ** 0.5
    v, s, priced = on_path(problem, E, lin.v, _difference(problem, E, *lin[2:5]), kappa)

    def move(x, v, s, priced, *_):
        pairs = complementary_pairs(problem, v, s, priced)
        left = s if priced is None else s - violations(problem, v, priced.t)
        Qx, Kx, Kv, r_x, r_v = residuals(problem, x, v, left)
        excess = _excess(xp, pairs, kappa)
        terms_x = [backend.norm(D * a) for a in (Qx, Kv, problem.q)]
        terms_v = [backend.norm(E * a) for a in (Kx, problem.k, left)]
        found = (backend.norm(D * r_x) <= accuracy * sum(terms_x)) & (backend.norm(E * r_v) <= accuracy * sum(terms_v))
        for each in excess:
            found = found & (backend.norm(each) <= accuracy * kappa)
        at = lin._replace(x=x, v=v, s=_slack_with(problem, x, v, s, pairs))
        dx, dv, _ = lin.factors.solve(at, r_x, right_of_constraints(pairs, r_v, excess), 0.0, ())
        directions = directions_of_pairs(pairs, excess, dv)
        alpha = xp.minimum(*step_lengths(backend, pairs, directions, DOUBLE.step_fraction))
        alpha = xp.where(found | ~solved, 0.0, alpha)
        x, v, s = x + alpha * dx, v + alpha * dv, s + alpha * directions[0][0]
        if priced is not None:
            v, priced = move_elastic(problem, tiny, priced, directions[1][0], dv, alpha, alpha, v)
        return x, v, s, priced, found | ~solved

    def unfinished(x, v, s, priced, found):
        return ~xp.all(found)

    carry = backend.while_loop(unfinished, move, move(lin.x, v, s, priced), CENTERING_LIMIT)
    x, v, s, _, found = carry
    status = xp.where(found, lin.status, xp.full_like(lin.status, int(Status.STALLED)))
    return lin._replace(x=x, v=v, s=s, status=status)


def _difference(problem: Problem, E, x, v, s):
    """Return v − s of solutions in the scaled constraints, with prices v − s + t, 0 at equalities."""
    difference = v / E - E * s
    if (elastic := problem.elastic) is not None:
        difference = problem.backend.xp.where(elastic.limited, v / E - E * _left(problem, x, v), difference)
    return problem.where_inequality(difference, 0.0)


def _left(problem: Problem, x, v):
    """Return k − Kx + σv, s − t at a solution: what constraints leave beside the violation of the quadratic price."""
    return problem.k - problem.constraints(x) + problem.elastic.compliance * v


def _excess(xp, pairs: list[Pair], kappa: float):
    """Return how far the product of every pair is above κ."""
    return [xp.where(xp.isfinite(pair.positive_a), pair.a * pair.b - kappa, 0.0) for pair in pairs]


def _slack_with(problem: Problem, x, v, s, pairs: list[Pair]):
    """Return the slacks of which the derivative's solves make the θ of these pairs.

    Where violations have a linear price they take for the violation what the constraint leaves, and compute distances
    from the limits afresh.
    """
    if (elastic := problem.elastic) is None:
        return s
    xp, theta, (z, r) = problem.backend.xp, pairs[0].theta + pairs[1].theta, limit_distances(problem, v)
    slack = _left(problem, x, v)
    violated = (theta + slack / r) / (1.0 / z + 1.0 / r)
    return xp.where(elastic.limited, xp.where(violated > slack, violated, theta * z), s)


def _center(sub: SubBatch, kappa: float, x, v, s):
    """Solve the KKT conditions with s ∘ z = κ by Newton's method.

    Returns
    -------
    point : list
        x, v, s, and for which problems they were found.
    factor
    """
    problem, P, (D, E, primal, dual, *_) = sub.problem, sub.parameters, sub.scaling
    backend, xp = problem.backend, problem.backend.xp
    v, s, priced = center_on_path(sub, v, _difference(problem, E, x, v, s), kappa)
    smallest = xp.full_like(x[:, :1], P.smallest)
    accuracy = xp.finfo(problem.dtype).eps ** 0.5

    def move(x, v, s, priced, *_):
        wide, pairs = sub.wide_problem, complementary_pairs(problem, v, s, priced)
        slack = s if priced is None else s - violations(problem, v, priced.t)
        *_, r_x, r_v = residuals(wide, *(cast(xp, a, wide.dtype) for a in (x, v, slack)))
        r_x, r_v = (cast(xp, a, problem.dtype) for a in (r_x, r_v))
        system = NewtonSystem(sub, pairs, r_x, r_v, (smallest, smallest))
        excess = _excess(xp, pairs, kappa)
        found = (backend.norm(D * r_x) <= accuracy * (dual + backend.norm(D * problem.q))) & (
            backend.norm(E * r_v) <= accuracy * (primal + backend.norm(E * problem.k))
        )
        for each in excess:
            found = found & (backend.norm(each) <= accuracy * kappa)
        dx, dv, directions = system.solve(excess, smallest > 0)
        alpha = xp.where(found, 0.0, xp.minimum(*step_lengths(backend, pairs, directions, DOUBLE.step_fraction)))
        x, v, s = x + alpha * dx, v + alpha * dv, s + alpha * directions[0][0]
        if priced is not None:
            v, priced = move_elastic(problem, P.tiny, priced, directions[1][0], dv, alpha, alpha, v)
        return x, v, s, priced, found, system.factor

    def unfinished(x, v, s, priced, found, factor):
        return ~xp.all(found)

    carry = problem.backend.while_loop(unfinished, move, move(x, v, s, priced), CENTERING_LIMIT)
    x, v, s, _, found, factor = carry
    return (x, v, s, found), factor
