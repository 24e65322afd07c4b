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

Nothing is scaled in memory. Equilibration enters as the metric of the proximal terms (`Metric`): for the scaled
variables x = D x̃ and the scaled rows E K D, terms ρ and δ of the same size for all are ρ/D² and δ/E² in the caller's
units. Shared operands thus stay shared, and residuals are in the caller's units throughout.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

from .engines.parameters import DOUBLE, parameters
from .problem import INFINITE, DeferredTake, Problem, concat_last, product, product_transposed, take


class System(NamedTuple):
    """The diagonals of a KKT matrix, each (B, ·); rows that do not exist have infinite θ."""

    theta: Any
    rho: Any
    delta: Any


class Metric(NamedTuple):
    """Equilibration: the variables x/D, the slacks E s and the multipliers v/E are those of the scaled problem."""

    variables: Any
    """D, (B or 1, n)."""
    rows: Any
    """E, (B or 1, rows)."""
    primal: Any
    """What the scaled primal residual E(Kx + s − k) is measured in, (B or 1, 1)."""
    dual: Any
    """What the scaled dual residual D(Qx + q + Kᵀv) is measured in, (B or 1, 1)."""
    reach: Any
    """How far x/D is likely to go at most, infinite where nothing is known of it, (B or 1, 1)."""


# ---- the reduced forms


ITERATIONS = 10
"""Of a typical solve."""


class PrimalForm:
    """The KKT system reduced to the variables: n × n, for any Q and any rows."""

    definite = False
    """Whether Q alone is safely positive definite, and needs no ρ."""

    def __init__(self, problem: Problem, constants=None):
        self.problem = problem
        self.constants = constants
        """What does not change in an iteration, beside the problem."""

    @classmethod
    def prepare(cls, problem: Problem) -> tuple[PrimalForm, Any]:
        """The form, and for which problems it is safe (None: for all)."""
        return cls(problem), None

    def select(self, problem: Problem, index) -> PrimalForm:
        """The same for part of the batch."""
        return PrimalForm(problem)

    @cached_property
    def _grams(self):
        """For A and G, where they are given: Kᵀ diag(w) K as a function of the weights, and their place in w."""
        problem = self.problem
        return [
            (problem.backend.gram(K), problem.blocks[name])
            for K, name in ((problem.A, "A"), (problem.G, "G"))
            if K is not None
        ]

    def factor(self, system: System):
        """Factor the reduced matrix; also whether it was positive definite, (B, 1)."""
        problem = self.problem
        weights = 1.0 / (system.theta + system.delta)
        M = problem.Q
        for gram, block in self._grams:
            M = M + gram(weights[:, block])
        diagonal = system.rho + _bound_weights(problem, weights)
        factor, positive = problem.backend.factor_sum(M, diagonal)
        return (factor, weights), positive

    def eliminate(self, factor, r_x):
        """What a solve needs of the right-hand side of the variables (B, n) alone: done once for many solves."""
        return r_x

    def solve_rows(self, factor, eliminated, r_v):
        """The multipliers of `solve`, which with a dense dual form come without the variables."""
        return self.solve(factor, eliminated, r_v)[1]

    def solve(self, factor, eliminated, r_v):
        """Solve for right-hand sides of the variables, after `eliminate`, and of the rows (B, rows)."""
        problem = self.problem
        reduced, weights = factor
        dx = problem.backend.solve(reduced, eliminated + problem.adjoint(weights * r_v))
        return dx, weights * (problem.constraints(dx) - r_v)


class DenseDualForm:
    """The KKT system reduced to the rows, for problems without bounds whose Q = F Fᵀ is safely invertible.

    S = K Q⁻¹ Kᵀ is computed once, and once for the whole batch where Q, A and G are shared.
    """

    definite = True

    def __init__(self, problem: Problem, constants):
        self.problem = problem
        self._later, self.S = constants
        """The backend's root of Q and V = K F⁻ᵀ, to be asked for, and S = V Vᵀ."""

    @classmethod
    def prepare(cls, problem: Problem) -> tuple[DenseDualForm, Any]:
        """The form, and for which problems Q is well enough conditioned for it, (B or 1,)."""
        xp, backend = problem.backend.xp, problem.backend
        diagonal = xp.linalg.diagonal(problem.Q)
        factor, positive = backend.factor(problem.Q)
        blocks = [K for K in (problem.A, problem.G) if K is not None]
        root = backend.root(factor)
        V = backend.whiten_rows(root, _stack(xp, blocks))
        enough = parameters(problem).smallest_pivot
        good = positive & (diagonal > 0) & (backend.pivots(factor) > enough * diagonal)
        return cls(problem, (DeferredTake((root, V)), backend.products(V, V.mT))), xp.all(good, axis=-1)

    @cached_property
    def whitening(self):
        """The backend's root of Q and V, which a step in the rows alone does not ask for."""
        return self._later.evaluate(self.problem.backend.xp)

    @property
    def constants(self):
        return DeferredTake(self.whitening), self.S

    def select(self, problem: Problem, index) -> DenseDualForm:
        xp = self.problem.backend.xp
        return DenseDualForm(problem, (self._later.select(xp, index), take(xp, self.S, index)))

    def factor(self, system: System):
        return self.factor_rows(system.theta + system.delta)

    def factor_rows(self, theta):
        """Factor S + diag(θ)."""
        return _factor_rows(self.problem, self.S, theta)

    def eliminate(self, factor, r_x):
        """F⁻¹ r_x, and K Q⁻¹ r_x."""
        root, V = self.whitening
        whitened = self.problem.backend.whiten(root, r_x)
        return whitened, product(V, whitened)

    def solve_rows(self, factor, eliminated, r_v):
        return self.problem.backend.solve(factor, eliminated[1] - r_v)

    def solve(self, factor, eliminated, r_v):
        dv = self.solve_rows(factor, eliminated, r_v)
        return self.variables(eliminated[0], dv), dv

    def variables(self, whitened, v):
        """Q⁻¹ (r_x − Kᵀv) for F⁻¹ r_x."""
        root, V = self.whitening
        return self.problem.backend.unwhiten(root, whitened - product_transposed(V, v))


class DiagonalDualForm:
    """The KKT system reduced to the rows of A and G, for a diagonal Q, to which bounds only add."""

    definite = False

    def __init__(self, problem: Problem, constants):
        self.problem = problem
        self.constants = constants
        """The diagonal of Q, and the rows of A and G."""
        self.gram = problem.backend.gram(constants[1].mT)

    @classmethod
    def prepare(cls, problem: Problem) -> tuple[DiagonalDualForm, Any]:
        """The form, and for which problems every variable has enough curvature, (B or 1,).

        Without, the weight of a variable that is away from its bounds tends to ρ, and its inverse drowns the rest.
        """
        xp = problem.backend.xp
        diagonal = xp.linalg.diagonal(problem.Q)
        scaled = diagonal * balance(problem).D ** 2
        rows = _stack(xp, [K for K in (problem.A, problem.G) if K is not None])
        safe = xp.all(scaled > DOUBLE.smallest_scaled_curvature, axis=-1)
        return cls(problem, (diagonal + _own_terms(problem, diagonal), rows)), safe

    def select(self, problem: Problem, index) -> DiagonalDualForm:
        return DiagonalDualForm(problem, take(self.problem.backend.xp, self.constants, index))

    def factor(self, system: System):
        problem, linear = self.problem, self.problem.p + self.problem.m
        theta = system.theta + system.delta
        weights = 1.0 / theta
        hessian = self.constants[0] + _bound_weights(problem, weights)
        factor, positive = _factor_rows(problem, self.gram(1.0 / hessian), theta[:, :linear])
        return (factor, hessian, weights[:, linear:]), positive

    def eliminate(self, factor, r_x):
        return r_x

    def solve_rows(self, factor, eliminated, r_v):
        return self.solve(factor, eliminated, r_v)[1]

    def solve(self, factor, eliminated, r_v):
        problem, (reduced, hessian, weights), (_, rows) = self.problem, factor, self.constants
        linear = problem.p + problem.m
        bounds = r_v[:, linear:]
        r_x = eliminated + self._bounds_adjoint(weights * bounds)
        dv = problem.backend.solve(reduced, product(rows, r_x / hessian) - r_v[:, :linear])
        dx = (r_x - product_transposed(rows, dv)) / hessian
        of_bounds = weights * (problem.constraints(dx)[:, linear:] - bounds)
        return dx, problem.backend.xp.concat([dv, of_bounds], axis=-1)

    def _bounds_adjoint(self, v):
        problem = self.problem
        if problem.lb is None:
            return v
        if problem.ub is None:
            return -v
        return v[:, problem.n :] - v[:, : problem.n]


def prefers_dense(problem: Problem) -> bool:
    """Whether the dense dual form has the fewest operations in a typical solve."""
    n, linear = problem.n, problem.p + problem.m
    if linear == 0 or problem.lb is not None or problem.ub is not None:
        return False
    once = n**3 / 3 + n**2 * linear + n * linear**2
    return linear**3 / 3 + once / ITERATIONS < n**3 / 3 + n**2 * linear


def preferred_form(problem: Problem, diagonal: bool | None = None):
    """What makes the form with fewer operations in a typical iteration; `diagonal` is whether Q is, None: look."""
    n, linear = problem.n, problem.p + problem.m
    if prefers_dense(problem):
        return DenseDualForm
    bounded = problem.lb is not None or problem.ub is not None
    if linear and bounded and linear**3 / 3 + n * linear**2 < n**3 / 3 + n**2 * linear:
        if diagonal is None:
            diagonal = not bool(problem.backend.xp.any(_off_diagonal(problem)))  # one truth value to the host
        if diagonal:
            return DiagonalDualForm
    return PrimalForm


def choose_form(problem: Problem):
    """The preferred form, and for which problems it is safe (None: for all)."""
    return preferred_form(problem).prepare(problem)


def choose_traced_form(problem: Problem):
    """The form that the shapes prefer, and one truth value: whether it is safe for all problems (None: it is)."""
    xp = problem.backend.xp
    form, safe = preferred_form(problem, diagonal=True).prepare(problem)
    if safe is None:
        return form, None
    return form, xp.all(safe) & ~xp.any(_off_diagonal(problem)) if not form.definite else xp.all(safe)


def _off_diagonal(problem: Problem):
    """Which Q of the batch have entries off their diagonal."""
    xp = problem.backend.xp
    return xp.count_nonzero(problem.Q, axis=(-2, -1)) > xp.count_nonzero(xp.linalg.diagonal(problem.Q), axis=-1)


# ---- solving with a factor


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


def solve_nearby(form, system: System, factor, metric: Metric, heavy, r_x, r_v, refinements: int):
    """Solve a KKT system with the factor of another one; also how far that got.

    The factor's θ may come from an earlier interior-point iterate. Along the central path θ tends to 0 at the active
    rows (`heavy`) and to infinity at the others. At the active rows two such θ differ little against K M⁻¹ Kᵀ; the
    other rows are eliminated with the θ of the system itself, after which what differs is the weight 1/θ, which is
    small in both. The refinement contracts by about the larger of the two differences a round, unless the active rows
    are dependent or what the matrix cannot reach is asked of it.

    Returns
    -------
    dx, dv
    left, moved : (B, 1)
        The residual against the right-hand side, and what a next correction is likely to be against the solution, in
        the scaled problem.
    """
    problem, xp = form.problem, form.problem.backend.xp
    weights = 1.0 / (system.theta + system.delta)
    zero = xp.zeros_like(r_v)
    D, E, *_ = metric

    def size(a_x, a_v, x_scale, v_scale):
        parts = [xp.abs(x_scale * a_x), xp.abs(v_scale * xp.where(heavy, a_v, zero))]
        return problem.backend.largest(xp.concat(parts, axis=-1))

    def correction(e_x, e_v):
        b_x, b_v = e_x + problem.adjoint(xp.where(heavy, zero, weights * e_v)), xp.where(heavy, e_v, zero)
        cx, cv = form.solve(factor, form.eliminate(factor, b_x), b_v)
        return cx, xp.where(heavy, cv, weights * (problem.constraints(cx) - e_v)), size(b_x, b_v, D, E)

    def ratio(a, b):
        return a / xp.where(b > 0, b, xp.ones_like(b))

    dx, dv, asked = correction(r_x, r_v)
    e_x, e_v = residual(problem, system, r_x, r_v, dx, dv)
    left = ratio(size(e_x, e_v, D, E), asked)
    accuracy, further = parameters(problem).refined, DOUBLE.refined_moved

    def inaccurate(dx, dv, e_x, e_v, left, moved, last):
        return ~xp.all((left <= accuracy) & (moved <= further * accuracy))

    def refine(dx, dv, e_x, e_v, left, moved, last):
        cx, cv, _ = correction(e_x, e_v)
        d_x, d_v = residual(problem, system, r_x, r_v, dx + cx, dv + cv)
        after = ratio(size(d_x, d_v, D, E), asked)
        # A factor too far off makes it worse from round to round; the best is kept.
        better = after < left
        now = ratio(size(cx, cv, 1.0 / D, 1.0 / E), size(dx, dv, 1.0 / D, 1.0 / E))
        pairs = ((dx + cx, dx), (dv + cv, dv), (d_x, e_x), (d_v, e_v), (after, left))
        return (*(xp.where(better, new, old) for new, old in pairs), ratio(now * now, last), now)

    start = (dx, dv, e_x, e_v, left, xp.ones_like(left), xp.ones_like(left))
    dx, dv, _, _, left, moved, _ = problem.backend.while_loop(inaccurate, refine, start, refinements)
    return dx, dv, left, moved


# ---- equilibration


def equilibrate(problem: Problem) -> Metric:
    """Scales of the variables and the constraints, and the sizes that residuals of the scaled problem are measured in.

    D and E are those of `balance`. Without curvature they leave open how large the cost is against the constraints:
    then they also make max |Dq| about as large as the entries of Ek.
    """
    xp, backend = problem.backend.xp, problem.backend
    balanced = balance(problem)
    D, occupied, curvature = balanced.D, balanced.occupied, balanced.curvature
    boxed = problem.lb is not None and problem.ub is not None
    rows, bounds = balanced.E, [bound for bound in (problem.lb, problem.ub) if bound is not None]

    def of_all_rows(rows, D):
        return _together(xp, [*rows, *(1.0 / D for _ in bounds)], D)

    # A variable in no row and not in Q takes the scale of its bounds, so that they say nothing of the others.
    counts = _together(xp, [*balanced.filled, *(occupied if boxed else occupied | True for _ in bounds)], occupied)

    def scaled(rows, D):
        """E, and Ek and Dq with what they say of the sizes of residuals."""
        E = of_all_rows(rows, D)
        k, q = xp.where(problem.exists & counts, E * problem.k, 0.0), D * problem.q
        return E, k, q, residual_units(problem, k, q, curvature, balanced.least_curvature)

    E, k, q, units = scaled(rows, D)
    times = _flat_scale(backend, balanced, q, curvature * units[0])
    if not backend.none(times > 1.0):
        D = xp.where(balanced.flat, times * D, D)
        rows = [xp.where(touched, e / times, e) for e, touched in zip(rows, balanced.touched, strict=True)]
        E, k, q, units = scaled(rows, D)
    primal, dual, reach = units
    if boxed:
        span = problem.ub - problem.lb
        bounded = ~occupied & (span > 0) & (span < INFINITE)
        if not backend.none(bounded):
            D = xp.where(bounded, span / primal, D)
            E = of_all_rows(rows, D)
    metric, slope = Metric(D, E, primal, dual, reach), backend.norm(q)
    flat = (curvature == 0) & (slope > 0)
    if backend.none(flat):
        return metric
    return with_cost(metric, xp.where(flat, _mean_size(backend, k) / xp.where(slope > 0, slope, 1.0), 1.0))


def _flat_scale(backend, balanced: Balance, q, curved):
    """What to multiply the scales of the variables without curvature by, (B or 1, 1), where others have some.

    The matrices leave open how large these variables and their linear cost are against the others: the cost should not
    be small against curvature times the size of x.
    """
    xp = backend.xp
    slope = backend.norm(xp.where(balanced.flat, q, 0.0))
    small = (slope > 0) & (curved > slope)
    return xp.where(small, xp.sqrt(xp.where(small, curved, 1.0) / xp.where(small, slope, 1.0)), 1.0)


def _together(xp, parts, like):
    """Arrays (B or 1, ·) side by side; of none, one without columns."""
    return concat_last(xp, parts) if parts else like[:, :0]


def with_cost(metric: Metric, c) -> Metric:
    """The scaling of the problem whose cost is c times as large."""
    D, E, primal, dual, reach = metric
    root = c**0.5
    return Metric(root * D, E / root, primal / root, root * dual, reach / root)


def residual_units(problem: Problem, k, q, curvature, least_curvature):
    """What the residuals of the scaled problem are measured in, and how far x is likely to go at most.

    Residuals are measured in lower estimates of how large their terms are. A solution is at least as large as the
    right-hand sides that x = 0 does not satisfy. Where it satisfies all, the solution is where the cost is least, or
    the first constraint on the way there stops it.
    """
    xp, backend = problem.backend.xp, problem.backend
    length, infinite = xp.abs(k), float("inf")

    def where_positive(a, value, other):
        return xp.where(a > 0, value / xp.where(a > 0, a, 1.0), other)

    needed = backend.largest(xp.where(problem.equality, length, backend.clip(-k, 0.0)))
    nearest = backend.largest(where_positive(length, 1.0, 0.0))
    slope = backend.norm(q)
    free = where_positive(curvature, slope, 0.0)
    least = xp.minimum(where_positive(nearest, 1.0, infinite), xp.where(free > 0, free, infinite))
    primal = xp.where(needed > 0, needed, least)
    primal = xp.where(primal < infinite, primal, 1.0)
    curved = curvature * primal
    between = xp.sqrt(slope) * xp.sqrt(xp.where(curved > 0, curved, slope))
    # Curvature along some variables says nothing of the others, which may have a linear cost alone.
    all_curved = xp.where(slope > 0, xp.maximum(least_curvature * primal, slope), curved)
    dual = xp.where(curved < slope, between, all_curved)
    reach = xp.minimum(where_positive(least_curvature, slope, infinite), DOUBLE.uncertainty * free)
    reach = xp.maximum(needed, reach)
    return primal, xp.where(dual > 0, dual, primal), xp.where(reach > 0, reach, infinite)


def _mean_size(backend, k):
    """The geometric mean of the entries that are not zero, which no single one decides; 1 where there are none."""
    xp = backend.xp
    length = xp.abs(k)
    count = backend.total(xp.astype(length > 0, k.dtype))
    return xp.exp(backend.total(xp.log(xp.where(length > 0, length, 1.0))) / backend.clip(count, 1.0))


class Balance(NamedTuple):
    """What `balance` finds."""

    D: Any
    """(B or 1, n)."""
    E: list
    """Those of the rows of A, and of G, where they are given."""
    filled: list
    """Which of these rows have an entry that is not 0."""
    touched: list
    """Which have one at a variable without curvature."""
    flat: Any
    """Which variables have none, (B or 1, n)."""
    occupied: Any
    """Which variables are in Q or in a row of A and G, (B or 1, n)."""
    curvature: Any
    """The largest length of a row of DQD, (B or 1, 1)."""
    least_curvature: Any


def balance(problem: Problem) -> Balance:
    """D and E such that the rows of [[DQD, DKᵀE], [EKD, 0]] are of about unit length (Ruiz, 2001, in the 2-norm).

    Each scale begins with the curvature of its variable, or else with the largest entry of its row or column, so that
    the units of the data do not matter, nor overflow.
    """
    xp, backend = problem.backend.xp, problem.backend
    matrices = [K for K in (problem.A, problem.G) if K is not None]

    def inverse(length, usable):
        return xp.where(usable, 1.0 / xp.where(usable, length, xp.ones_like(length)), xp.ones_like(length))

    diagonal = xp.linalg.diagonal(problem.Q)
    curved = diagonal > DOUBLE.smallest_curvature * backend.largest(diagonal)
    curved = curved & xp.isfinite(diagonal)
    first_D = inverse(xp.sqrt(xp.where(curved, diagonal, 1.0)), curved)
    known = xp.where(curved, first_D, 0.0)
    first_E, filled, touched, flat = [], [], [], ~curved
    for K in matrices:
        size = xp.abs(K)
        some = xp.max(size * known[:, None, :], axis=-1) if K.shape[-2] else K[..., 0]
        every = xp.max(size, axis=-1) if K.shape[-2] else K[..., 0]
        length = xp.where(some > 0, some, every)
        filled.append((length > 0) & xp.isfinite(length))
        touched.append(product(size, xp.astype(flat, size.dtype)) > 0)
        first_E.append(inverse(length, filled[-1]))
    columns = [
        xp.max(xp.abs(K) * e[:, :, None], axis=-2) for K, e in zip(matrices, first_E, strict=True) if K.shape[-2]
    ]
    if columns:
        length = columns[0] if len(columns) == 1 else xp.maximum(*columns)
        first_D = xp.where(curved, first_D, inverse(length, (length > 0) & xp.isfinite(length)))
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


# ---- small pieces


def _factor_rows(problem: Problem, S, theta):
    """Factor S + diag(θ), where rows that do not exist have infinite θ; and whether it was positive definite."""
    xp, backend = problem.backend.xp, problem.backend
    # They get a diagonal that is huge but harmless to the factorisation.
    theta = backend.clip(theta, most=xp.finfo(problem.dtype).max ** 0.5)
    return backend.factor_sum(S, theta)


def _stack(xp, matrices):
    """The rows of matrices (B or 1, ·, n) as those of one."""
    if len(matrices) == 1:
        return matrices[0]
    batch = max(M.shape[0] for M in matrices)
    return xp.concat([xp.broadcast_to(M, (batch, *M.shape[1:])) for M in matrices], axis=-2)


def _bound_weights(problem: Problem, weights):
    parts = [weights[:, problem.blocks[name]] for name in ("lb", "ub") if getattr(problem, name) is not None]
    return sum(parts[1:], parts[0]) if parts else 0.0


def _own_terms(problem: Problem, diagonal):
    """The dual forms' proximal terms on the variables: so small a share of Q that they need not follow the solver's."""
    xp = problem.backend.xp
    return parameters(problem).diagonal_regularization * diagonal + xp.finfo(problem.dtype).smallest_normal
