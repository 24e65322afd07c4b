"""The solution of every problem of a batch, and its status."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

from .once import cached_field


class Status(enum.IntEnum):
    """The status of a problem at the end of a solve.

    Examples
    --------
    >>> Status(0).name
    'SOLVED'
    """

    SOLVED = 0
    """Primal residual, dual residual and duality gap are within the tolerance."""
    MAX_ITERATIONS = 1
    """The limit on iterations came first."""
    PRIMAL_INFEASIBLE = 2
    """No point satisfies the constraints: y, z, z_lb, z_ub are a Farkas certificate."""
    DUAL_INFEASIBLE = 3
    """The objective is unbounded below (or no multipliers exist): x is a direction of unbounded descent."""
    STALLED = 4
    """No further progress in this floating point type, or a number overflowed."""


class Violation(NamedTuple):
    """How far a point violates the constraints, row by row: |Ax − b|, (Gx − h)₊, (lb − x)₊ and (x − ub)₊.

    None where there are no such constraints.
    """

    A: Any
    G: Any
    lb: Any
    ub: Any


def violation_at(problem, x) -> Violation:
    """Return how far points (B, n) violate the constraints of a problem, in the caller's shape."""
    xp, backend = problem.backend.xp, problem.backend

    def shaped(value, positive=True):
        value = problem.returned(backend.clip(value, 0.0) if positive else xp.abs(value))
        return xp.reshape(value, (*problem.batch_shape, value.shape[-1]))

    return Violation(
        A=None if problem.A is None else shaped(problem.product(problem.A, x) - problem.b, False),
        G=None if problem.G is None else shaped(problem.product(problem.G, x) - problem.h),
        lb=None if problem.lb is None else shaped(problem.lb - x),
        ub=None if problem.ub is None else shaped(x - problem.ub),
    )


@cached_field
def _violation(sol: Solution) -> Violation | None:
    lin = sol.linearization
    if lin is None or not lin.problem.is_elastic:
        return None
    with lin.problem.backend.no_grad(), lin.problem.reproducibly():
        return violation_at(lin.problem, lin.x)


@dataclass(frozen=True)
class Solution:
    """The solution of a batch of quadratic programs.

    Arrays are of the caller's library; `batch` stands for the broadcast batch axes of the operands. The variables, the
    multipliers and the slack are in the type that `qpdiff.solve_qp` returns; the objective, the residuals and the gap
    are those of the point before it was rounded to that, in float64 where the library has it.

    The derivative reads x, the multipliers, s and the status again. On NumPy, those of `qpdiff.solve_qp` that share
    memory with what it reads are read-only; change a copy, such as ``sol.x.copy()``.

    Attributes
    ----------
    x : array (*batch, n)
        Variables. Where DUAL_INFEASIBLE a ray instead, scaled to qᵀx = −1: Qx = 0, Ax = 0, Gx ≤ 0, and x ≥ 0 (≤ 0)
        where there is a lower (upper) bound, to within about 1e-8 in the scaled problem. It may violate constraints
        with a linear price, which then counts in the −1.
    y : array (*batch, p)
        Multipliers of A x = b.
    z : array (*batch, m)
        Multipliers of G x ≤ h, nonnegative.
    z_lb, z_ub : array (*batch, n)
        Multipliers of the bounds, nonnegative, zero where a bound is infinite. Where PRIMAL_INFEASIBLE all multipliers
        are a Farkas certificate instead, scaled to bᵀy + hᵀz − lbᵀz_lb + ubᵀz_ub = −1: Aᵀy + Gᵀz − z_lb + z_ub = 0 to
        within about 1e-8 in the scaled problem, so that the constraints add up to 0 ≤ −1.
    s : array (*batch, m)
        Slack h − G x of the interior-point iterate, positive (infinite where h is); where a violation has a price, what
        it leaves.
    status : integer array (*batch)
        `Status` codes.
    iterations : integer array (*batch)
        Interior-point iterations.
    objective : array (*batch)
        ½ xᵀQx + qᵀx, and the price of violations where they have one.
    primal_residual : array (*batch)
        Largest violation of a constraint, ‖(Ax − b, (Gx − h)₊, (lb − x)₊, (x − ub)₊)‖∞, beyond the violation that its
        price is paid for.
    dual_residual : array (*batch)
        ‖Qx + q + Aᵀy + Gᵀz − z_lb + z_ub‖∞.
    duality_gap : array (*batch)
        |xᵀQx + qᵀx + bᵀy + hᵀz − lbᵀz_lb + ubᵀz_ub|, infinite bounds left out, with prices + Σ w·(violation beyond
        σ|v|) + Σ σv². Of a problem that is not SOLVED the residuals and the objective are those of the last iterate,
        also where a certificate has taken its place.
    violation : Violation or None
        With `elastic` or `elastic_quadratic`, how far x violates the constraints: `violation.A` (*batch, p),
        `violation.G` (*batch, m), `violation.lb` and `violation.ub` (*batch, n), None where there are none. Computed of
        the operands when it is first asked for.
    """

    x: Any
    y: Any
    z: Any
    z_lb: Any
    z_ub: Any
    s: Any
    status: Any
    iterations: Any
    objective: Any
    primal_residual: Any
    dual_residual: Any
    duality_gap: Any
    violation: Any = _violation
    linearization: Any = field(default=None, repr=False, compare=False)
    """The problem and the last factorisation, for the derivative (not part of the public interface)."""

    def __getstate__(self):
        """Add the names of the arrays that are read-only, which NumPy's own pickles and copies do not tell."""
        return self.__dict__ | {_READ_ONLY: [name for name in FIELDS if _is_read_only(getattr(self, name))]}

    def __setstate__(self, state):
        names = state.pop(_READ_ONLY, ())
        self.__dict__.update(state)
        arrays = [getattr(self, name) for name in names]
        if names and self.linearization is not None:  # whose x, v, s and status no longer share memory with all of them
            arrays += self.linearization[2:]
        for array in arrays:
            array.setflags(write=False)


_READ_ONLY = "read-only fields"


def _is_read_only(value) -> bool:
    return isinstance(value, np.ndarray) and not value.flags.writeable


POINT = ("x", "y", "z", "z_lb", "z_ub", "s")
"""The fields of a solution that are in the type of the results; what tells how exact it is, is in float64."""
FIELDS = tuple(each.name for each in fields(Solution) if each.name not in ("violation", "linearization"))
"""The public fields that every solution has."""


def whole_solution(values: dict[str, Any]) -> Solution:
    """Make a solution of its fields by name, at once; its constructor, as the class is frozen, sets each by a call."""
    sol = Solution.__new__(Solution)
    sol.__dict__.update(values)
    return sol


def check_unsolved(unsolved: str) -> None:
    """Raise a ValueError for an unknown treatment of problems that are not SOLVED."""
    if unsolved not in ("raise", "nan", "zero"):
        raise ValueError(f"unsolved is {unsolved!r}; expected 'raise', 'nan' or 'zero'")


GO_ON = "Call solve_qp with unsolved='nan' or 'zero' to go on without their gradients"
"""Advice to the callers of an adapter whose `solve_qp` takes `unsolved`, as its layers may not."""


def raise_if_unsolved(status: np.ndarray, *, relaxed: bool = False, advice: str = GO_ON) -> None:
    """Raise a RuntimeError that counts the problems that are not SOLVED and names the first, if there are any.

    With `relaxed` the status tells for which of problems that are SOLVED the relaxed point was found.
    """
    if not np.count_nonzero(status):  # SOLVED is 0, and this is called in every small solve
        return
    bad = np.argwhere(np.atleast_1d(status) != Status.SOLVED)
    first = tuple(bad[0].tolist())
    name = Status(int(np.atleast_1d(status)[first])).name
    where = f"; the first is problem {first[0] if len(first) == 1 else first}" if status.ndim else ""
    if relaxed:
        raise RuntimeError(
            f"relaxed point of {len(bad)} of {status.size} problems not found{where}. With a smaller smoothing it is "
            f"closer to the solution. {advice}"
        )
    raise RuntimeError(f"{len(bad)} of {status.size} problems not solved{where}: {name}. {advice}")
