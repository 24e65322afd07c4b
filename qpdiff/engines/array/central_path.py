"""The central path: from the solution of s ∘ z = 0 to the point of s ∘ z = κ, which smooths the derivative."""

from __future__ import annotations

from typing import Any

from ...problem import Layout, take
from ...solution import Status
from ..base import Linearization, make_settings
from ..parameters import DOUBLE
from .batch import batch_order, in_batch, save_factor
from .derivative import Factors, pack, unpack, without_factor
from .loop import forms
from .start import center_on_path, make_origin, on_path
from .state import SubBatch, cast, make_sub_batch
from .status import residuals, violations
from .step import NewtonSystem, complementary_pairs, move_elastic, step_length, step_lengths

CENTERING_LIMIT = 50
"""Limit on the Newton steps to a point of the central path."""


def relax(lin: Linearization, kappa: float) -> Linearization:
    """Find the points where s ∘ z = κ instead of 0, from solutions by Newton's method, and their factors.

    A problem whose point is not found counts as STALLED.
    """
    if lin.problem.sparse:
        if lin.problem.is_elastic:
            raise ValueError(
                "smoothing takes no sparse matrices where violations have prices; pass Q, G and A as arrays"
            )
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
    settings = make_settings(problem, max_iterations=CENTERING_LIMIT)
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
    accuracy = xp.finfo(problem.dtype).eps ** 0.5
    v, s, _ = on_path(problem, E, lin.v, problem.where_inequality(lin.v / E - E * lin.s, 0.0), kappa)

    def move(x, v, s, *_):
        Qx, Kx, Kv, r_x, r_v = residuals(problem, x, v, s)
        excess = problem.where_inequality(s * v - kappa, 0.0)
        s_, z_ = (problem.where_inequality(a, float("inf")) for a in (s, v))
        terms_x = [backend.norm(D * a) for a in (Qx, Kv, problem.q)]
        terms_v = [backend.norm(E * a) for a in (Kx, problem.k, s)]
        found = (
            (backend.norm(D * r_x) <= accuracy * sum(terms_x))
            & (backend.norm(E * r_v) <= accuracy * sum(terms_v))
            & (backend.norm(excess) <= accuracy * kappa)
        )
        at = lin._replace(x=x, v=v, s=s)
        dx, dv, _ = lin.factors.solve(at, r_x, problem.where_inequality(r_v + excess / z_, r_v), 0.0, ())
        ds = problem.where_inequality(-(excess + s * dv) / z_, 0.0)
        alpha = xp.minimum(*(step_length(backend, a, da, DOUBLE.step_fraction) for a, da in ((s_, ds), (z_, dv))))
        alpha = xp.where(found | ~solved, 0.0, alpha)
        return x + alpha * dx, v + alpha * dv, s + alpha * ds, found | ~solved

    def unfinished(x, v, s, found):
        return ~xp.all(found)

    x, v, s, found = backend.while_loop(unfinished, move, move(lin.x, v, s), CENTERING_LIMIT)
    status = xp.where(found, lin.status, xp.full_like(lin.status, int(Status.STALLED)))
    return lin._replace(x=x, v=v, s=s, status=status)


def _center(sub: SubBatch, kappa: float, x, v, s):
    """Solve the KKT conditions with s ∘ z = κ by Newton's method.

    Returns
    -------
    point : list
        x, v, s, and for which problems they were found.
    factor
    """
    problem, settings, (D, E, primal, dual, *_) = sub.problem, sub.settings, sub.scaling
    backend, xp = problem.backend, problem.backend.xp
    difference = v / E - E * s
    if (elastic := problem.elastic) is not None:
        slack = E * (problem.k - problem.constraints(x) + elastic.compliance * v)
        difference = xp.where(elastic.limited, v / E - slack, difference)
    v, s, priced = center_on_path(sub, v, problem.where_inequality(difference, 0.0), kappa)
    state = make_origin(sub)._replace(x=x, v=v, s=s, elastic=priced)
    smallest = xp.full_like(x[:, :1], settings.smallest)
    accuracy = xp.finfo(problem.dtype).eps ** 0.5

    def move(x, v, s, priced, *_):
        wide, pairs = sub.wide_problem, complementary_pairs(sub, state._replace(v=v, s=s, elastic=priced))
        slack = s if priced is None else s - violations(problem, v, priced.t)
        *_, r_x, r_v = residuals(wide, *(cast(xp, a, wide.dtype) for a in (x, v, slack)))
        r_x, r_v = (cast(xp, a, problem.dtype) for a in (r_x, r_v))
        system = NewtonSystem(sub, pairs, r_x, r_v, (smallest, smallest))
        excess = [xp.where(xp.isfinite(pair.positive_a), pair.a * pair.b - kappa, 0.0) for pair in pairs]
        found = (backend.norm(D * r_x) <= accuracy * (dual + backend.norm(D * problem.q))) & (
            backend.norm(E * r_v) <= accuracy * (primal + backend.norm(E * problem.k))
        )
        for each in excess:
            found = found & (backend.norm(each) <= accuracy * kappa)
        dx, dv, directions = system.solve(excess, smallest > 0)
        alpha = xp.where(found, 0.0, xp.minimum(*step_lengths(backend, pairs, directions, DOUBLE.step_fraction)))
        x, v, s = x + alpha * dx, v + alpha * dv, s + alpha * directions[0][0]
        if priced is not None:
            v, priced = move_elastic(sub, priced, directions[1][0], dv, alpha, alpha, v)
        return x, v, s, priced, found, system.factor

    def unfinished(x, v, s, priced, found, factor):
        return ~xp.all(found)

    carry = problem.backend.while_loop(unfinished, move, move(x, v, s, priced), settings.max_iterations)
    x, v, s, _, found, factor = carry
    return (x, v, s, found), factor
