"""The iterate of a sub-batch, and what does not change while it is iterated on."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...problem import Problem, take
from ..base import Settings
from ..parameters import DOUBLE
from .equilibration import Metric, equilibrate
from .kkt import System

RUNNING = -1


class State(NamedTuple):
    """The iterate of every problem; scalars have shape (B, 1). Residuals have the type of `Part.exact`."""

    x: Any
    v: Any
    """Multipliers of all rows."""
    s: Any
    """Slack of all rows, 0 where the row is no inequality."""
    mu: Any
    rho: Any
    delta: Any
    r_x: Any
    """−(Qx + q + Kᵀv)."""
    r_v: Any
    """k − Kx − s."""
    Qx: Any
    Kx: Any
    objective: Any
    found: Residuals
    """In the caller's units."""
    primal: Any
    """The residuals in the units of the tolerance."""
    dual: Any
    gap: Any
    near: Any
    """Whether the iterate is within the tolerance."""
    worst: Any
    """Largest of the three residuals."""
    best: Residuals
    """The smallest of each so far."""
    inexact: Any
    """Whether the last step was not accurate enough to go without refinement."""
    proof: Any
    """How near to a certificate of infeasibility or unboundedness the iterates have come."""
    waiting: Any
    """Iterations since `best` or `proof` last improved."""
    iterations: Any
    limit: Any
    """Iterations after which to give up."""
    status: Any
    seen: Any = None
    """What `dual_space` knows of x where x itself is that of an earlier iterate."""


class Residuals(NamedTuple):
    """Primal residual, dual residual and duality gap, (B, 1)."""

    primal: Any
    dual: Any
    gap: Any


class Unit(NamedTuple):
    """Residuals are multiplied by a scale and divided by a size before they are compared with the tolerance."""

    scale: Any
    size: Any


class Units(NamedTuple):
    """Those of the variables and the constraints, and the size of the gap; None: residuals in the caller's units."""

    x: Unit | None
    rows: Unit | None
    gap: Any


class Sizes(NamedTuple):
    """Numbers of each problem's data, (B or 1, 1)."""

    inequalities: Any
    """How many there are, at least 1."""
    q: Any
    """The largest |q| in the units of the tolerance."""
    scaled_k: Any
    """The largest |k| in the scaled problem but for loose constraints, at least what its residual is measured in."""
    scaled_q: Any
    least_rate: Any
    """How fast ρ and δ shrink at least: by themselves where there is no inequality and so no complementarity."""


class Part(NamedTuple):
    """Problems that are iterated on together, with what does not change on the way."""

    form: Any
    metric: Metric
    sizes: Sizes
    units: Units
    exact: Problem
    """The problems in float64, in which residuals are computed: in float32 rounding would hide what is left."""

    @property
    def problem(self) -> Problem:
        return self.form.problem

    @property
    def idle(self) -> bool:
        """Whether so little is in work that the device waits for calls: then it is their number that counts."""
        return self.problem.batch * self.problem.bytes_per_problem < self.problem.backend.launch_bound_bytes

    def select(self, index) -> Part:
        problem = self.problem.select(index)
        exact = problem if self.exact is self.problem else self.exact.select(index)
        xp = problem.backend.xp
        metric, sizes, units = take(xp, (self.metric, self.sizes, self.units), index)
        return Part(self.form.select(problem, index), metric, sizes, units, exact)


def make_part(form, settings: Settings) -> Part:
    """The problems of a reduced form, ready to iterate on."""
    problem, backend = form.problem, form.problem.backend
    xp, metric, exact = backend.xp, equilibrate(problem), problem.astype(backend.widest_float)
    D, E, primal, dual, reach = metric
    units = Units(None, None, None) if settings.absolute else Units(Unit(D, dual), Unit(E, primal), primal * dual)
    count, k = backend.total(xp.astype(problem.inequality, problem.dtype)), E * exact.k
    sizes = Sizes(
        inequalities=backend.clip(count, 1.0), q=measured(backend, units.x, exact.q),
        scaled_k=xp.maximum(backend.norm(xp.where(k <= DOUBLE.loose * reach, k, 0.0)), primal),
        scaled_q=xp.maximum(backend.norm(D * exact.q), dual),
        least_rate=xp.where(count > 0, 0.0 * count, DOUBLE.fast_rate),
    )  # fmt: skip
    return Part(form, metric, sizes, units, exact)


def make_system(part: Part, theta, rho, delta) -> System:
    theta = part.problem.where_exists(theta, float("inf"))
    return System(theta, rho / part.metric.variables**2, delta / part.metric.rows**2)


def measured(backend, unit: Unit | None, a):
    """The largest entry of residuals or of their terms, in the units of the tolerance."""
    return backend.norm(a) if unit is None else backend.norm(unit.scale * a) / unit.size


def cast(xp, a, dtype):
    return a if a.dtype == dtype else xp.astype(a, dtype)


def choose(xp, condition, new, old):
    """The arrays of one named tuple where a condition holds, else those of another."""
    if new is old:
        return new
    if isinstance(new, tuple):
        return type(new)(*(choose(xp, condition, a, b) for a, b in zip(new, old, strict=True)))
    return xp.where(condition, new, old)
