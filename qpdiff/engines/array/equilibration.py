"""Equilibration: scales of the variables and the constraints, and the sizes that residuals are measured in.

Nothing is scaled in memory. Equilibration enters by the regularisation: for the scaled variables x = D x̃ and the
scaled constraints E K D, a ρ and a δ of the same size for all are ρ/D² and δ/E² in the caller's units. Shared operands
thus stay shared, and residuals are in the caller's units throughout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ...problem import INFINITE, Problem, concat_last, product, product_transposed
from ..parameters import DOUBLE
from .components import balance_components


class Scaling(NamedTuple):
    """The equilibration: the scaled problem has variables x/D, slacks E s and multipliers v/E."""

    D: Any
    """(B or 1, n)."""
    E: Any
    """(B or 1, constraints)."""
    primal: Any
    """The unit of the scaled primal residual E(Kx + s − k), (B or 1, 1)."""
    dual: Any
    """The unit of the scaled dual residual D(Qx + q + Kᵀv), (B or 1, 1)."""
    reach: Any
    """The largest distance from 0 that x/D is likely to go, infinite where nothing is known of it, (B or 1, 1)."""
    cost: Any
    """How many times as large the cost counts (`scale_cost`), (B or 1, 1)."""


def equilibrate(problem: Problem) -> Scaling:
    """Find the scales of the variables and the constraints, and what residuals of the scaled problem are measured in.

    D and E are those of `balance`. Without curvature they leave open how large the cost is against the constraints:
    then they also make max |Dq| about as large as the entries of Ek.
    """
    xp, backend = problem.backend.xp, problem.backend
    balanced = balance(problem)
    D, rows, occupied, curvature = balanced.D, balanced.E, balanced.occupied, balanced.curvature
    bounds = [bound for bound in (problem.lb, problem.ub) if bound is not None]

    def scale_bounds(rows, D):
        """Return E: the scale of a bound is that of its variable."""
        return join_columns(xp, [*rows, *(1.0 / D for _ in bounds)], D)

    # A variable in no row and not in Q takes the scale of its bounds, or that of others where these are 0 or infinite,
    # and says nothing of them.
    counts = join_columns(xp, [*balanced.filled, *(occupied for _ in bounds)], occupied)

    def scaled_vectors(rows, D):
        """Return E, Ek and Dq."""
        E = scale_bounds(rows, D)
        return E, xp.where(problem.exists & counts, E * problem.k, 0.0), xp.where(occupied, D * problem.q, 0.0)

    E, k, q = scaled_vectors(rows, D)
    if not backend.known_all_false(balanced.flat):
        moved = balance_components(problem, D, rows, k, q, unsatisfied_at_0(problem, k))
        if moved is not None:
            D, rows = moved
            E, k, q = scaled_vectors(rows, D)
    units = measure_residual_units(problem, E, k, q, balanced)
    enlarged = enlarge_flat(backend, balanced, D, rows, q, curvature * units[0])
    if enlarged is not None:
        D, rows = enlarged
        E, k, q = scaled_vectors(rows, D)
        units = measure_residual_units(problem, E, k, q, balanced)
    primal, dual, reach = units
    if not backend.known_all_false(~occupied):
        size = size_of_bounds(problem)
        D, known = xp.where(occupied, D, size / primal), occupied | (size > 0)
        largest = backend.largest(xp.where(known, D, 0.0))
        D = xp.where(known, D, xp.where(largest > 0, largest, 1.0))
        E = scale_bounds(rows, D)
        # Where no other has a cost, these decide how large it is.
        slope = backend.norm(D * problem.q)
        decides = (curvature == 0) & (backend.norm(q) == 0) & (slope > 0)
        dual, q = xp.where(decides, slope, dual), xp.where(decides, D * problem.q, q)
    unscaled = Scaling(D, E, primal, dual, reach, xp.ones_like(primal))
    return balance_cost(backend, unscaled, curvature, k, q)


def size_of_bounds(problem: Problem):
    """Return how large the bounds say that each variable is, (B or 1, n): their distance, or that of one from 0."""
    xp = problem.backend.xp
    size = xp.zeros_like(problem.q)
    for bound in (problem.lb, problem.ub):
        if bound is not None:
            length = xp.abs(bound)
            size = xp.maximum(size, xp.where(length < INFINITE, length, 0.0))
    if problem.lb is None or problem.ub is None:
        return size
    span = xp.abs(problem.ub - problem.lb)
    return xp.where((span > 0) & (span < INFINITE), span, size)


def balance_cost(backend, scaling: Scaling, curvature, k, q) -> Scaling:
    """Without curvature, make the cost about as large as the right-hand sides, for Ek and Dq."""
    xp, slope = backend.xp, backend.norm(q)
    flat = (curvature == 0) & (slope > 0)
    if backend.known_all_false(flat):
        return scaling
    return scale_cost(scaling, xp.where(flat, mean_size(backend, k) / xp.where(slope > 0, slope, 1.0), 1.0))


def enlarge_flat(backend, balanced: Balance, D, rows, q, curved):
    """Enlarge the scales of variables without curvature, where others have some; return D, and E of A and of G.

    The matrices leave open how large these variables and their linear cost are against the others: the cost should not
    be small against curvature times the size of x, which is `curved`. None: that is so.
    """
    xp = backend.xp
    slope = backend.norm(xp.where(balanced.flat, q, 0.0))
    small = (slope > 0) & (curved > slope)
    times = xp.where(small, xp.sqrt(xp.where(small, curved, 1.0) / xp.where(small, slope, 1.0)), 1.0)
    if backend.known_all_false(times > 1.0):
        return None
    E = [xp.where(touched, e / times, e) for e, touched in zip(rows, balanced.touched, strict=True)]
    return xp.where(balanced.flat, times * D, D), E


def mean_size(backend, k):
    """Return the geometric mean of the entries that are not 0, which no single one decides; 1 where there are none."""
    xp = backend.xp
    length = xp.abs(k)
    count = backend.total(xp.astype(length > 0, k.dtype))
    return xp.exp(backend.total(xp.log(xp.where(length > 0, length, 1.0))) / backend.clip(count, 1.0))


def join_columns(xp, parts, like):
    """Join arrays (B or 1, ·) along their last axis; of none, return one without columns."""
    return concat_last(xp, parts) if parts else like[:, :0]


def scale_cost(scaling: Scaling, c) -> Scaling:
    """Return the scaling as if the cost were c times as large; what residuals are compared with does not change."""
    D, E, primal, dual, reach, cost = scaling
    root = c**0.5
    return Scaling(root * D, E / root, primal / root, root * dual, reach / root, cost * c)


def measure_residual_units(problem: Problem, E, k, q, balanced: Balance):
    """Find what the residuals of the scaled problem are measured in, and how far x is likely to go at most.

    Residuals are measured in lower estimates of how large their terms are. A solution is at least as large as the
    right-hand sides that x = 0 does not satisfy, those with a price as far as the price may move it. Where it satisfies
    all, the solution is where the cost is least, or the first constraint on the way there stops it.
    """
    xp, backend = problem.backend.xp, problem.backend
    curvature, least_curvature = balanced.curvature, balanced.least_curvature
    length, infinite = xp.abs(k), float("inf")

    def where_positive(a, value, other):
        return xp.where(a > 0, value / xp.where(a > 0, a, 1.0), other)

    unsatisfied = unsatisfied_at_0(problem, k)
    if (elastic := problem.elastic) is not None:
        pull = xp.where(elastic.limited, elastic.upper, 1.0) / E
        moved = xp.where(elastic.limited & (curvature > 0), where_positive(curvature, pull, 1.0), infinite)
        unsatisfied = xp.minimum(unsatisfied, moved)
    needed = backend.largest(unsatisfied)
    nearest = backend.largest(where_positive(length, 1.0, 0.0))
    slope = backend.norm(q)
    free = where_positive(curvature, slope, 0.0)
    # The cost of variables without curvature says nothing of where that of the others is least.
    of_curved = where_positive(curvature, backend.norm(xp.where(balanced.flat, 0.0, q)), 0.0)
    least = xp.minimum(where_positive(nearest, 1.0, infinite), xp.where(of_curved > 0, of_curved, infinite))
    primal = xp.where(needed > 0, needed, least)
    primal = xp.where(primal < infinite, primal, xp.where(free > 0, DOUBLE.least_reach * free, 1.0))
    curved = curvature * primal
    between = xp.sqrt(slope) * xp.sqrt(xp.where(curved > 0, curved, slope))
    # Curvature along some variables says nothing of the others, which may have a linear cost alone.
    all_curved = xp.where(slope > 0, xp.maximum(least_curvature * primal, slope), curved)
    dual = xp.where(curved < slope, between, all_curved)
    reach = xp.minimum(where_positive(least_curvature, slope, infinite), DOUBLE.uncertainty * free)
    reach = xp.maximum(needed, reach)
    return primal, xp.where(dual > 0, dual, primal), xp.where(reach > 0, reach, infinite)


def unsatisfied_at_0(problem: Problem, k):
    """Return the sizes of the right-hand sides that x = 0 does not satisfy, 0 for those that it does."""
    xp = problem.backend.xp
    both = problem.equality if problem.elastic is None else problem.equality | problem.elastic.two_sided
    return xp.where(both, xp.abs(k), problem.backend.clip(-k, 0.0))


class Balance(NamedTuple):
    """The result of `balance`."""

    D: Any
    """(B or 1, n)."""
    E: list
    """E of the rows of A, and of G, where they are given."""
    filled: list
    """Masks of the rows that have an entry that is not 0."""
    touched: list
    """Masks of the rows that have one at a variable without curvature."""
    flat: Any
    """Mask of the variables without curvature, (B or 1, n)."""
    occupied: Any
    """Mask of the variables that are in Q or in a row of A and G, (B or 1, n)."""
    curvature: Any
    """The largest length of a row of DQD, (B or 1, 1)."""
    least_curvature: Any


def balance(problem: Problem) -> Balance:
    """Find D and E such that the rows of [[DQD, DKᵀE], [EKD, 0]] are of about unit length (Ruiz, 2001, in the 2-norm).

    Each scale begins with the curvature of its variable, or else with the largest entry of its row or column, so that
    the units of the data do not matter, nor overflow.
    """
    xp, backend = problem.backend.xp, problem.backend
    matrices = [K for K in (problem.A, problem.G) if K is not None]

    def reciprocal(length, usable):
        return xp.where(usable, 1.0 / xp.where(usable, length, xp.ones_like(length)), xp.ones_like(length))

    diagonal = xp.linalg.diagonal(problem.Q)
    curved = diagonal > DOUBLE.smallest_curvature * backend.largest(diagonal)
    curved = curved & xp.isfinite(diagonal)
    first_D = reciprocal(xp.sqrt(xp.where(curved, diagonal, 1.0)), curved)
    known = xp.where(curved, first_D, 0.0)
    first_E, filled, touched, flat = [], [], [], ~curved
    for K in matrices:
        size = xp.abs(K)
        some = xp.max(size * known[:, None, :], axis=-1) if K.shape[-2] else K[..., 0]
        every = xp.max(size, axis=-1) if K.shape[-2] else K[..., 0]
        length = xp.where(some > 0, some, every)
        filled.append((length > 0) & xp.isfinite(length))
        touched.append(product(size, xp.astype(flat, size.dtype)) > 0)
        first_E.append(reciprocal(length, filled[-1]))
    columns = [
        xp.max(xp.abs(K) * e[:, :, None], axis=-2) for K, e in zip(matrices, first_E, strict=True) if K.shape[-2]
    ]
    if columns:
        length = columns[0] if len(columns) == 1 else xp.maximum(*columns)
        first_D = xp.where(curved, first_D, reciprocal(length, (length > 0) & xp.isfinite(length)))
    Q2 = (first_D[:, :, None] * problem.Q * first_D[:, None, :]) ** 2
    K2 = [(K * e[:, :, None] * first_D[:, None, :]) ** 2 for K, e in zip(matrices, first_E, strict=True)]
    batch = max(M.shape[0] for M in (Q2, *K2))
    D2 = backend.full((batch, problem.n), 1.0, problem.dtype)
    E2 = [backend.full((batch, K.shape[-2]), 1.0, problem.dtype) for K in matrices]

    def rescaled(scale, length2):
        usable = xp.isfinite(length2) & (length2 > 0)
        one = xp.ones_like(length2)
        value = xp.where(usable, scale / xp.sqrt(xp.where(usable, length2, one)), one)
        return backend.clip(value, 1.0 / DOUBLE.largest_ratio, DOUBLE.largest_ratio)

    occupied = D2 < 0
    for _ in range(DOUBLE.equilibration_passes):
        curved = D2 * product(Q2, D2)
        columns = sum((D2 * product_transposed(K, e) for K, e in zip(K2, E2, strict=True)), curved)
        rows = [e * product(K, D2) for K, e in zip(K2, E2, strict=True)]
        occupied = columns > 0
        before, D2 = D2, rescaled(D2, columns)
        curved = curved * (D2 / before)
        E2 = [rescaled(e, r) for e, r in zip(E2, rows, strict=True)]
    D = xp.sqrt(D2) * first_D
    E = [xp.sqrt(e) * first for e, first in zip(E2, first_E, strict=True)]
    flattest = xp.min(curved, axis=-1, keepdims=True)
    return Balance(D, E, filled, touched, flat, occupied, xp.sqrt(backend.largest(curved)), xp.sqrt(flattest))
