"""The iterate of a sub-batch, and what does not change while it is iterated on."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...problem import Problem, take
from ..base import Settings
from ..parameters import DOUBLE, Parameters, parameters
from .equilibration import Scaling, equilibrate
from .kkt import Diagonals

RUNNING = -1


class State(NamedTuple):
    """The iterate of every problem; scalars have shape (B, 1). Residuals have the type of `SubBatch.wide_problem`."""

    x: Any
    v: Any
    """Multipliers of all constraints."""
    s: Any
    """Slack of all constraints, 0 where the constraint is no inequality."""
    mu: Any
    """Mean complementarity."""
    rho: Any
    delta: Any
    r_x: Any
    """−(Qx + q + Kᵀv)."""
    r_v: Any
    """k − Kx − s; at rows with a price k − Kx − s + t + σv."""
    Qx: Any
    Kx: Any
    objective: Any
    absolute: Residuals
    """In the caller's units."""
    primal: Any
    """The residuals in the units of the tolerance."""
    dual: Any
    gap: Any
    within_tolerance: Any
    """Mask of the problems whose iterate passes the stopping test."""
    worst: Any
    """Largest of the three residuals."""
    best: Residuals
    """The smallest of each so far."""
    refine: Any
    """Mask of the problems whose last linear solve was so inaccurate that the next one gets a round of refinement."""
    certificate: Any
    """The largest ratio of the iterates so far that may prove infeasibility or unboundedness."""
    without_progress: Any
    """Iterations since `best` or `certificate` last improved."""
    iterations: Any
    limit: Any
    """Iterations after which to give up."""
    status: Any
    elastic: ElasticState | None = None
    """Of the rows that may be violated at a price, where there are any."""
    implicit_x: Any = None
    """In steps in the dual space: what x is computed from (`dual_space.ImplicitX`); `x` is that of an earlier iterate.
    """


class ElasticState(NamedTuple):
    """What an iterate has of rows that may be violated at a linear price w: t ∘ r = μ beside s ∘ z = μ on the path."""

    t: Any
    """Violation beyond that of the quadratic price, positive; 0 in rows without a linear price."""
    z: Any
    """Distance of the multiplier from its lower limit, 0 (−w at an equality), of all rows with a slack; else 0."""
    r: Any
    """Distance from its upper limit w; 0 in rows without a linear price."""


class Residuals(NamedTuple):
    """Primal residual, dual residual and duality gap, (B, 1)."""

    primal: Any
    dual: Any
    gap: Any


class Unit(NamedTuple):
    """The scale that residuals are multiplied by and the size that they are divided by before they are tested."""

    scale: Any
    size: Any


class Units(NamedTuple):
    """The units of residuals of the variables and of the constraints, and of the gap; None: the caller's units."""

    x: Unit | None
    v: Unit | None
    gap: Any


class Sizes(NamedTuple):
    """Numbers of each problem's data, (B or 1, 1)."""

    inequalities: Any
    """The number of inequalities, at least 1."""
    pairs: Any
    """The number of pairs whose product is μ on the central path, at least 1: the same but for rows with a price."""
    q: Any
    """The largest |q| in the units of the tolerance."""
    scaled_k: Any
    """The largest |k| in the scaled problem but for loose constraints, at least what its residual is measured in."""
    scaled_q: Any
    """The largest |q| in the scaled problem, at least what the dual residual is measured in."""
    least_rate: Any
    """The least rate at which ρ and δ shrink: by themselves where there is no inequality and so no complementarity."""


class SubBatch(NamedTuple):
    """Problems that are iterated on together, with what does not change on the way."""

    form: Any
    """The reduced KKT system (`reduced_forms`)."""
    settings: Settings
    scaling: Scaling
    sizes: Sizes
    units: Units
    wide_problem: Problem
    """The problems in the library's widest type, in which residuals are computed: in float32 rounding would hide what
    is left of them."""

    @property
    def problem(self) -> Problem:
        return self.form.problem

    @property
    def parameters(self) -> Parameters:
        return parameters(self.problem)

    @property
    def launch_bound(self) -> bool:
        """Return whether so little is in work that the number of calls decides the time."""
        return self.problem.batch * self.problem.bytes_per_problem < self.problem.backend.launch_bound_bytes

    def select(self, index) -> SubBatch:
        """Return the problems at some positions."""
        problem = self.problem.select(index)
        wide = problem if self.wide_problem is self.problem else self.wide_problem.select(index)
        scaling, sizes, units = take(problem.backend.xp, (self.scaling, self.sizes, self.units), index)
        return SubBatch(self.form.select(problem, index), self.settings, scaling, sizes, units, wide)

    def diagonals(self, theta, rho, delta) -> Diagonals:
        """Return the diagonals of the KKT matrix, for ρ and δ of the scaled problem, (B, 1)."""
        theta = self.problem.where_exists(theta, float("inf"))
        return Diagonals(theta, rho / self.scaling.D**2, delta / self.scaling.E**2)


def make_sub_batch(form, settings: Settings) -> SubBatch:
    """Equilibrate the problems of a reduced form and find the units of their residuals."""
    problem, backend = form.problem, form.problem.backend
    xp, scaling, wide = backend.xp, equilibrate(problem), problem.astype(backend.widest_float)
    D, E, primal, dual, reach, _ = scaling
    units = Units(None, None, None) if settings.absolute else Units(Unit(D, dual), Unit(E, primal), primal * dual)
    count, k = backend.total(xp.astype(problem.inequality, problem.dtype)), E * wide.k
    inequalities = pairs = backend.clip(count, 1.0)
    if (elastic := problem.elastic) is not None:
        one_sided = problem.inequality & ~elastic.two_sided
        inequalities = backend.clip(backend.total(xp.astype(one_sided, problem.dtype)), 1.0)
        pairs = backend.clip(count + backend.total(xp.astype(elastic.limited, problem.dtype)), 1.0)
    sizes = Sizes(
        inequalities=inequalities, pairs=pairs, q=scaled_size(backend, units.x, wide.q),
        scaled_k=xp.maximum(backend.norm(xp.where(k <= DOUBLE.loose * reach, k, 0.0)), primal),
        scaled_q=xp.maximum(backend.norm(D * wide.q), dual),
        least_rate=xp.where(count > 0, 0.0 * count, DOUBLE.fast_rate),
    )  # fmt: skip
    return SubBatch(form, settings, scaling, sizes, units, wide)


def scaled_size(backend, unit: Unit | None, a):
    """Return the largest entry of residuals or of their terms, in the units of the tolerance, (B, 1)."""
    return backend.norm(a) if unit is None else backend.norm(unit.scale * a) / unit.size


def cast(xp, a, dtype):
    """Convert an array where its type is another."""
    return a if a.dtype == dtype else xp.astype(a, dtype)


def choose(xp, condition, new, old):
    """Take the arrays of one named tuple where a condition holds, else those of another."""
    if new is old:
        return new
    if isinstance(new, tuple):
        return type(new)(*(choose(xp, condition, a, b) for a, b in zip(new, old, strict=True)))
    return xp.where(condition, new, old)
