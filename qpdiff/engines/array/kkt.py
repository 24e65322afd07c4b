"""The KKT system: its diagonals, residuals and refinement.

Every linear system of the solver and of the derivative of its solution has the matrix

    [ Q + diag(ρ)       Kᵀ      ]
    [     K       −diag(θ + δ)  ]

with one row of K for each constraint, θ = s/z at an inequality and θ = 0 at an equality. The primal and dual
regularisation ρ, δ > 0 makes it quasidefinite whatever Q and K are, so either diagonal block can be eliminated and what
is left is positive definite (`reduced_forms`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ...problem import Problem


class Diagonals(NamedTuple):
    """The diagonals of a KKT matrix, each (B, ·); constraints that do not exist have infinite θ."""

    theta: Any
    rho: Any
    delta: Any


def residual(problem: Problem, diagonals: Diagonals, r_x, r_v, dx, dv):
    """Return what a step (dx, dv) leaves of the right-hand side of the KKT system."""
    xp = problem.backend.xp
    e_x = r_x - problem.hessian(dx) - diagonals.rho * dx - problem.adjoint(dv)
    e_v = r_v - problem.constraints(dx) + (diagonals.theta + diagonals.delta) * dv
    return e_x, xp.where(xp.isfinite(diagonals.theta), e_v, xp.zeros_like(e_v))


def solve_refined(form, diagonals: Diagonals, factor, right, refine=None):
    """Solve the KKT system, with one round of refinement for the problems of a mask.

    Parameters
    ----------
    form
        A reduced form (`reduced_forms`), and `factor` what its `factor` made of the diagonals.
    right : tuple
        r_x, what `form.eliminate` made of it, and r_v.
    refine : array (B, 1), optional
        None: no problem is refined.

    Returns
    -------
    dx, dv
    """
    r_x, eliminated, r_v = right
    dx, dv = form.solve(factor, eliminated, r_v)
    if refine is None:
        return dx, dv
    e_x, e_v = residual(form.problem, diagonals, r_x, r_v, dx, dv)
    cx, cv = form.solve(factor, form.eliminate(factor, e_x), e_v)
    xp = form.problem.backend.xp
    return xp.where(refine, dx + cx, dx), xp.where(refine, dv + cv, dv)
