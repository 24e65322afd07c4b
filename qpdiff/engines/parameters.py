"""Every number of the method, by name.

The array engine reads them here, the compiled engine gets them as one struct of the same names. What differs in float32
is in `SINGLE`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..problem import least_distance

EPS, EPS_SINGLE = (float(np.finfo(kind).eps) for kind in (np.float64, np.float32))
"""The distance from 1 to the next larger number."""


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Parameters:
    """The numbers of the method for one floating point type."""

    # ---- defaults of a call
    max_iterations: int = 200
    """A problem that takes half as many seldom ends SOLVED."""
    tolerance: float = 1e-8
    """Absolute and relative, of the three residuals."""
    rho: float = 1e-6
    """Primal regularisation to begin with, in the scaled problem."""
    delta: float = 1e-4
    """Dual regularisation to begin with."""
    smallest: float = 1e-10
    """Lower limit of both."""
    certificate: float = 1e8
    """The ratio of |kᵀv| to ‖Kᵀv‖∞ that proves infeasibility, likewise for unboundedness."""
    tiny: float = 1e-200
    """Added to μ before it divides; lower limit of slacks and multipliers."""

    # ---- equilibration
    equilibration_passes: int = 4
    """Ruiz's scaling hardly changes after so many."""
    smallest_curvature: float = 1e-12
    """A diagonal entry of Q that is smaller against the largest is rounding, and no scale to begin with."""
    largest_ratio: float = 1e8
    """Limit on the squares of D and E against those that they begin with, for rows and columns of nothing but rounding.
    """
    row_rounding: float = 1e-13
    """Rounding error of the constraints of the scaled problem, relative to the largest variable there."""
    uncertainty: float = 100.0
    """Times further than the largest curvature says that x may go where other curvatures are smaller."""
    least_reach: float = 1e-8
    """Share of how far the cost of other variables would move those with curvature that counts where neither their own
    cost nor a right-hand side moves them."""
    loose: float = 10.0
    """A right-hand side this many times as far away as x is likely to go is that of a bound which means none."""

    # ---- the reduced KKT systems
    smallest_pivot: float = 1e-6
    """The dense dual form is safe where no pivot of Q is smaller against its diagonal entry."""
    smallest_scaled_curvature: float = 1e-6
    """The diagonal dual form is safe where no diagonal entry of the scaled Q is smaller."""
    diagonal_regularization: float = 1e-10
    """The diagonal dual form's own regularisation: so small a share of Q that it need not follow the solver's."""
    least_sparse_pivot: float = 1e-15
    """A pivot of the sparse KKT matrix that is smaller in the scaled problem, where none is smaller than ρ or δ, or of
    the wrong sign, is a rounding error."""
    sparse_pivot: float = 1e-6
    """What takes the place of such a pivot,"""
    sparse_pivot_growth: float = 100.0
    """or so many times its absolute value where that is more: the entries that it divides have errors as large."""
    sparse_pivot_errors: float = 30.0
    """A pivot of a row is significant above so many rounding errors of its terms. Where one is not, how dependent
    constraints share is not known, and the derivative takes another factor."""

    # ---- starting points
    least_centrality: float = 0.01
    """μ of the starting point against the square of the largest multiplier there, at least: 0 where all are equal."""
    large_multipliers: float = 10.0
    """Ratio of the multipliers of equalities to the variables from which on a start for a smaller cost is tried."""
    smaller_cost: float = 1e-5
    """The fraction of the cost."""
    closer: float = 0.8
    """It takes the place of the ordinary start where its primal residual is less than this share of that one's,"""
    less_multipliers: float = 0.1
    """and its ratio of multipliers to variables less than this share."""
    warm_centrality: float = 0.1
    """μ of a warm start against the residuals that the other solution leaves."""

    # ---- steps
    step_fraction: float = 0.995
    """Share of the step to the boundary of s > 0, z > 0 that is taken at least."""
    largest_step_fraction: float = 0.9999
    """And at most."""
    near_limit: float = 0.1
    """Distance from the limit that a price sets to a multiplier, against the price, up to which it is counted from
    there."""
    least_distance: float = least_distance(EPS)
    """Distance of a multiplier from such a limit in derivatives, against the price, at least (`limit_distances`)."""
    refine_relative: float = 1e-6
    """A linear solve is exact enough without refinement where it leaves so little of the residuals."""
    refine_absolute: float = 0.01
    """Or so little of the tolerance."""
    delta_share: float = 0.2
    """δ is limiting where it makes up this share of a residual of the constraints,"""
    delta_stuck: float = 0.5
    """of which a step leaves this share;"""
    delta_floor: float = 1e-4
    """then it falls to the ordinary limit times this."""
    fast_rate: float = 0.9
    """Rate at which δ falls there, and ρ and δ where there is no inequality and so no complementarity."""
    failure_growth: float = 100.0
    """Factor on ρ and δ after a step that could not be computed."""

    # ---- status
    solved_share: float = 0.1
    """Share of the tolerance that the iteration goes on to, while it makes progress."""
    worthwhile: float = 0.5
    """A step from a point within the tolerance is worth it where it leaves less than this share of the residuals."""
    improvement: float = 0.9
    """A residual improves where it falls below this share of the best so far,"""
    certificate_improvement: float = 1.1
    """and a certificate where it grows beyond this."""
    equal_steps_after: int = 3
    """Iterations without progress after which variables and multipliers move by the same step length."""
    least_centering: float = 0.1
    """Share of μ that a step aims at, at least, once as many and one more have made no progress."""
    stalled_after: int = 30
    """Iterations without progress after which a problem counts as stalled."""
    reached: float = 100.0
    """Up to so many times the right-hand sides, an iterate's size counts as that of a solution that is to be ruled out.
    """
    gap_rounding: float = 1e-4
    """Share of the rounding error of the duality gap that counts towards the gap."""
    product_rounding: float = 1e-13
    """Assumed error of products updated by recurrence in the dual space, relative to their terms."""
    certificate_rounding: float = 1e-8
    """A fall of the cost along a direction is rounding where it is so small against its terms."""
    late_certificate: float = 0.01
    """Share of `certificate` that is enough where the iteration ends without a solution."""
    ray_violation: float = 1e-4
    """Violation of the constraints, against their right-hand sides, up to which a direction may prove that the cost is
    unbounded below.
    """

    # ---- the derivative: the KKT system at the solution, where θ = s/z tends to 0 or to infinity
    nearly_active: float = 1.0
    """Constraints whose θ is less in the scaled problem count as nearly active; others are eliminated by theirs."""
    derivative_rounds: int = 3
    """Rounds of refinement with the last factor of the solve: where more are needed, a new factor is better."""
    refined: float = EPS**0.625
    """Residual of a refined solution, against its right-hand side,"""
    refined_moved: float = 10.0
    """and how many times that a next correction may be against the solution."""
    nearly_refined: float = 1e-5
    """A residual that has been computed, from which on what is expected of the next one is believed,"""
    well_refined: float = 0.1
    """where it is this share of `refined`."""
    factor_residual: float = 0.1 * EPS**0.5
    """The last factor is accurate enough where it leaves no more than this of the right-hand side,"""
    factor_moved: float = EPS**0.5
    """and a next correction is no more than this of the solution."""
    inactive: float = 1e8
    """The dense dual form need not factor constraints whose θ is so many times their entry of K Q⁻¹ Kᵀ."""
    least_theta: float = 1e-10
    """Lower limit on their θ in the scaled problem, lest dependent constraints leave its matrix singular."""
    derivative_accuracy: float = 1e-5
    """A correction of a solution by this share is the last; the next one would be as much smaller again."""
    afresh_smallest: float = 1e-6
    """θ of the nearly active inequalities in a factor made for the purpose, in the scaled problem: they are scaled up
    together, as dependent ones share what is asked of them in proportion to 1/θ; at least,"""
    afresh_largest: float = 1e-3
    """and at most."""
    afresh_equality: float = 1e-11
    """θ of the equalities, less than that: no inequality stands against them."""
    afresh_rho: float = 1e-9
    """Primal regularisation of such a factor to begin with."""
    afresh_growth: float = 100.0
    """Factor on it where the matrix is not definite,"""
    afresh_attempts: int = 4
    """with so many attempts."""
    afresh_levels: int = 3
    """How many values of θ of the equalities are tried, each so many times the one before, until a residual is as small
    as that of an accurate factor: beside a large 1/θ a small curvature is lost to rounding."""
    afresh_better: float = 0.1
    """A solution with a further one is taken where it leaves this share of what the best so far does."""
    afresh_rounds: int = 12
    """Rounds of refinement with it."""
    sparse_smallest: float = 1e-8
    """The same limits for the first factor of the sparse KKT matrix, with which refinement is fast;"""
    sparse_largest: float = 1e-5
    """and from above."""
    sparse_equality: float = 1e-9
    """A smaller one leaves less of the terms that cancel where an equality is eliminated before its variables."""
    sparse_settled: float = 1e-9
    """A second correction that moves the variables by no more than this against the solution changes nothing but how
    dependent constraints share."""
    sparse_better: float = 0.1
    """The solution with the first factor stays, accurate or not, where it leaves this share of what the second does."""


DOUBLE = Parameters()
SINGLE = replace(
    DOUBLE, tolerance=1e-4, rho=3e-4, delta=1e-3, smallest=3e-4, certificate=1e5, tiny=1e-30, smallest_pivot=1e-2,
    diagonal_regularization=1e-5, row_rounding=5e-7, refined=EPS_SINGLE**0.625, factor_residual=0.1 * EPS_SINGLE**0.5,
    factor_moved=EPS_SINGLE**0.5, inactive=1e4, least_theta=1e-5, derivative_accuracy=1e-3, afresh_smallest=1e-4,
    afresh_largest=1e-2, afresh_equality=1e-5, afresh_levels=1,
    afresh_rho=1e-5, least_distance=least_distance(EPS_SINGLE),
)  # fmt: skip


def parameters(problem) -> Parameters:
    """Return the numbers for the type that problems are computed in."""
    return SINGLE if problem.dtype == problem.backend.xp.float32 else DOUBLE
