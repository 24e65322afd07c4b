"""The KKT system: assemble, factor, solve, refine.

Every linear system of the solver and of the derivative of its solution has the matrix

    [ Q + diag(ρ)       Kᵀ      ]
    [     K       −diag(θ + δ)  ]

with one row of K for each constraint, θ = s/z at an inequality and θ = 0 at an equality. The proximal terms ρ, δ > 0
make it quasidefinite whatever Q and K are, so either diagonal block can be eliminated and what is left is positive
definite:

* `PrimalForm` eliminates the rows: n × n, Q + diag(ρ) + Kᵀ diag(1/(θ + δ)) K;
* `DenseDualForm` and `DiagonalDualForm` eliminate the variables: one row and column for each row of A and G,
  K (Q + diag(ρ))⁻¹ Kᵀ + diag(θ + δ), where Q is factored once, or is diagonal and takes the bounds with it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ...problem import Problem


class System(NamedTuple):
    """The diagonals of a KKT matrix, each (B, ·); rows that do not exist have infinite θ."""

    theta: Any
    rho: Any
    delta: Any


def residual(problem: Problem, system: System, r_x, r_v, dx, dv):
    """What a step (dx, dv) leaves of the right-hand side of the KKT system."""
    xp = problem.backend.xp
    e_x = r_x - problem.hessian(dx) - system.rho * dx - problem.adjoint(dv)
    e_v = r_v - problem.constraints(dx) + (system.theta + system.delta) * dv
    return e_x, xp.where(xp.isfinite(system.theta), e_v, xp.zeros_like(e_v))


def refined(form, system: System, factor, r_x, r_v, dx, dv, problems):
    """A solution of the KKT system after a round of refinement for the problems of a mask (B, 1)."""
    e_x, e_v = residual(form.problem, system, r_x, r_v, dx, dv)
    cx, cv = form.solve(factor, form.eliminate(factor, e_x), e_v)
    xp = form.problem.backend.xp
    return xp.where(problems, dx + cx, dx), xp.where(problems, dv + cv, dv)
