"""The solution as a function of the operands that JAX differentiates, to any order and in both modes.

The tangent of a solution is a `lax.custom_linear_solve` with the KKT matrix at it, which JAX transposes and
differentiates again.
"""

from __future__ import annotations

from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from .. import solver
from ..adjoint import complementarity, filled, masked, objective_jvp, relaxed_price, right_hand_sides
from ..differentiation import FILL, solve_kkt
from ..engines.base import Linearization, Outcome
from ..problem import Problem
from ..solution import Status
from .callbacks import Compiled, Stored
from .kernels import Kernels
from .traced import Traced

Method: TypeAlias = Traced | Compiled | Kernels


@partial(jax.jit, static_argnums=(0, 1, 2))
def solve(method: Method, unsolved: str, kappa: float | None, operands, start):
    outcome, extra = _iterate(method, unsolved, operands, start)
    problem, moving, shown = method.layout.problem(operands), outcome, outcome
    if kappa is not None:
        moving, _ = _relaxed(method, unsolved, kappa, operands, *jax.lax.stop_gradient((outcome, extra)))
        solved = _solved(moving)
        x, v = masked(jnp, solved, moving.x, moving.v)
        value = jnp.sum(x * (problem.hessian(x) / 2 + problem.q), axis=-1, keepdims=True)
        if problem.is_elastic:
            value = value + relaxed_price(problem, x, v, kappa)
        value = filled(jnp, solved, value, FILL[_fill(unsolved)])
        moves = {"x": moving.x, "v": moving.v, "objective": value.astype(outcome.objective.dtype)}
        shown = outcome._replace(**{name: _with_value(getattr(outcome, name), part) for name, part in moves.items()})
    return solver.make_solution(problem, shown, None), outcome, extra, moving.status


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _iterate(method: Method, unsolved: str, operands, start):
    return method.solve(operands, start)


@_iterate.defjvp
def _iterate_jvp(method, unsolved, primals, tangents):
    storing = method._replace(stores=True) if isinstance(method, Compiled) else method
    result = _iterate(storing, unsolved, *primals)
    moved = _tangent(storing, unsolved, 0.0, primals[0], tangents[0], *result)
    if storing == method:
        return result, moved
    (outcome, stored), (of_outcome, of_stored) = result, moved
    return (outcome, Stored(scaling=stored.scaling)), (of_outcome, Stored(scaling=of_stored.scaling))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _relaxed(method: Method, unsolved: str, kappa: float, operands, outcome: Outcome, extra):
    return method.relax(method.layout.problem(operands), outcome, extra, kappa)


@_relaxed.defjvp
def _relaxed_jvp(method, unsolved, kappa, primals, tangents):
    result = _relaxed(method, unsolved, kappa, *primals)
    return result, _tangent(method, unsolved, kappa, primals[0], tangents[0], *result)


@jax.custom_jvp
def _with_value(value, moving):
    """Return a value that differentiates as another one does."""
    return value


@_with_value.defjvp
def _with_value_jvp(primals, tangents):
    return _with_value(*primals), tangents[1]


def _tangent(method: Method, unsolved: str, kappa: float, operands, tangents, outcome: Outcome, extra):
    """Return the tangents of the outcome at a solution, or at its relaxed point for κ, and of what comes with it."""
    problem, solved = method.layout.problem(operands), _solved(outcome)
    x, v = masked(jnp, solved, outcome.x, outcome.v)
    exists = problem.exists
    parts = [(r_x, jnp.where(exists, r_v, 0.0)) for r_x, r_v in right_hand_sides(problem, x, v, tangents, kappa)]
    right = [sum(r[1:], r[0]) for r in zip(*parts, strict=True)]
    dx, dv = _solve_kkt(problem, outcome, method.linearization(problem, outcome, extra), unsolved, kappa, *right)
    still, others = jax.tree.map(_zero_tangent, (outcome, extra))
    value = objective_jvp(problem, x, jnp.where(exists, v, 0.0), tangents, *parts)
    value = filled(jnp, solved, value, FILL[_fill(unsolved)])
    return still._replace(x=dx, v=dv, objective=value.astype(outcome.objective.dtype)), others


def _solved(outcome: Outcome):
    """Return the mask (B, 1) of the problems that are SOLVED."""
    return outcome.status == int(Status.SOLVED)


def _fill(unsolved: str) -> str:
    """Return what problems that are not SOLVED contribute; under `jit` "raise" cannot raise."""
    return "zero" if unsolved == "zero" else "nan"


def _solve_kkt(problem: Problem, outcome: Outcome, lin: Linearization, unsolved: str, kappa: float, r_x, r_v):
    """K⁻¹ r as an operation that JAX transposes, since K is symmetric, and differentiates by what K is made of."""
    solved, exists, inequality = _solved(outcome), problem.exists, problem.inequality
    x, v = masked(jnp, solved, outcome.x, outcome.v)
    if problem.is_elastic:
        theta = complementarity(problem, x, v, kappa).theta
    else:  # s is known better than k − Kx, but it moves as that does
        slack = problem.k - problem.constraints(x)
        s = outcome.s + (slack - jax.lax.stop_gradient(slack))
        theta = jnp.where(inequality, s / jnp.where(inequality & solved, v, 1.0), 0.0)

    def split(u):
        return u[:, : problem.n], u[:, problem.n :]

    def matvec(u):
        u_x, u_v = split(u)
        u_rows = jnp.where(exists, u_v, 0.0)
        right_v = jnp.where(exists, problem.constraints(u_x) - theta * u_rows, u_v)
        return jnp.concat([problem.hessian(u_x) + problem.adjoint(u_rows), right_v], axis=-1)

    def solve(_, r):
        return jnp.concat(solve_kkt(lin, *split(r), unsolved=_fill(unsolved)), axis=-1)

    # In one array: JAX transposes a solve whose right-hand sides are all linear in what it transposes for.
    right = jnp.concat([r_x, r_v], axis=-1)
    return split(jax.lax.custom_linear_solve(matvec, right, solve, symmetric=True))


def _zero_tangent(value):
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    return jnp.zeros_like(value) if floating else np.zeros(value.shape, jax.dtypes.float0)
