"""Problems with sparse matrices of one pattern: its symbolic analysis, and a call for a batch of values."""

from __future__ import annotations

from collections.abc import Collection
from itertools import count as counter
from typing import Any, NamedTuple

import numpy as np

from ...once import cached_property
from ...problem import OPERANDS, Problem
from ...sparse import LARGEST, stored
from ...sparse import Pattern as MatrixPattern
from ..base import Linearization, Outcome, Settings, StartingPoint
from ..reduction import Form, is_fewer, operations
from .engine import DERIVATIVE_COST, PARAMETERS, SCALARS, SOLVE_COST, _core, arrays_of, as_many_as_pay

LARGEST_LANES = 10**6
"""Entries of L from which on problems are solved one by one, as the factors of a lane group leave the cache."""
DENSE_SPEED = 0.4
"""Time of an operation of the dense engine against that of one in the factorisation of a sparse matrix,"""
ENTRY_COST = 25
"""that of all else that is done with an entry of L in an iteration,"""
CONVERSION_COST, CALL_COST = 3, 60_000
"""and those of making an entry dense and of the calls for that, spread over the iterations of a solve."""
MOST_REMEMBERED = 8
"""Patterns that are remembered with their symbolic factorisations,"""
LARGEST_REMEMBERED = 10**7
"""as long as these have no more entries of L together, each of which takes 4 bytes and more; the last one in any case.
"""
DOUBLES = PARAMETERS[np.dtype(np.float64)]
PLACES = {name: place for place, name in enumerate(OPERANDS)}


class Pattern:
    """The patterns of Q, which is symmetric, and of A and G, with all that depends on them alone."""

    def __init__(self, Q: MatrixPattern, A: MatrixPattern, G: MatrixPattern):
        self.Q, self.A, self.G = Q, A, G
        entries = int(A.indptr[-1]) + int(G.indptr[-1])
        if entries > LARGEST:
            raise ValueError(f"A and G have {entries} entries together, more than {LARGEST}")
        self.analysed = 0  # entries of L, once they are known
        self.last_use = next(_uses)
        indptr = np.concatenate([A.indptr, A.indptr[-1] + G.indptr[1:]])
        shape = A.shape[0] + G.shape[0], Q.shape[0]
        self.K = MatrixPattern(indptr, np.concatenate([A.indices, G.indices]), shape)

    @cached_property
    def kkt(self) -> Any:
        """The symbolic factorisation of the KKT matrix."""
        indices = self.Q.indptr, self.Q.indices, self.K.indptr, self.K.indices
        kkt = _core.SparseKkt(self.A.shape[0], *[np.ascontiguousarray(a, np.int32) for a in indices])
        if not kkt.fits:
            raise ValueError("the KKT matrix of this pattern has too many entries in its factor; pass dense operands")
        self.analysed = kkt.size
        _forget()
        return kkt

    @cached_property
    def size(self) -> int:
        """Entries of L."""
        return self.kkt.size

    @cached_property
    def operations(self) -> float:
        """Multiplications of a factorisation."""
        return self.kkt.operations

    def pays(self, bounded: bool, count: int) -> bool:
        """Return whether so many problems, with bounds or without, are solved faster as sparse than as dense."""
        return self._saved[bounded] + CALL_COST / max(count, 1) > 0

    @cached_property
    def _saved(self) -> tuple[float, float]:
        """The operations that a problem without bounds, and one with bounds, saves in an iteration by being sparse.

        The dense engine's form is that with the fewest operations, a dual one where the pattern of Q has the diagonal.
        """
        n, linear = self.Q.shape[0], self.K.shape[0]
        on_diagonal = int(np.count_nonzero(self.Q.indices == self.Q.rows))
        dual = {Form.DENSE_DUAL: on_diagonal == n, Form.DIAGONAL_DUAL: on_diagonal == n == len(self.Q.indices)}

        def saved(form: Form) -> float:
            form = form if dual[form] and is_fewer(form, n, linear) else Form.PRIMAL
            dense = DENSE_SPEED * operations(form, n, linear) + CONVERSION_COST * n * (n + linear)
            return dense - self.operations - ENTRY_COST * self.size

        return saved(Form.DENSE_DUAL), saved(Form.DIAGONAL_DUAL)

    def workers(self, most: int, count: int, lanes: bool, cost: float, solves: int) -> int:
        """Return up to `most` threads for so many problems, whose cost is in so many factorisations and solves."""
        if count <= 1:
            return 1
        rows = self.K.shape[0] + 2 * self.Q.shape[0]
        operations = cost * (self.operations + solves * self.size + 100 * (self.Q.shape[0] + rows))
        unit = _core.LANES if lanes else 1  # a lane group stays on one thread
        return as_many_as_pay(most, -(-count // unit), unit * operations)

    def in_lanes(self, count: int) -> bool:
        """Return whether so many problems are worked on in lane groups."""
        return count >= _core.LANES and self.size <= LARGEST_LANES

    def __reduce__(self):
        return pattern_of, (self.Q, self.A, self.G)


_remembered: dict[tuple[MatrixPattern, MatrixPattern, MatrixPattern], Pattern] = {}
_uses = counter()


def pattern_of(Q: MatrixPattern, A: MatrixPattern, G: MatrixPattern) -> Pattern:
    """Return the pattern made of these; the last ones are remembered, with their symbolic factorisations."""
    pattern = _remembered.get((Q, A, G))
    if pattern is None:
        pattern = _remembered.setdefault((Q, A, G), Pattern(Q, A, G))
        _forget()
    pattern.last_use = next(_uses)
    return pattern


def _forget() -> None:
    """Forget the patterns whose last use is longest ago, until the others are within the limits."""
    patterns = sorted(_remembered.copy().values(), key=lambda pattern: pattern.last_use)
    while len(patterns) > MOST_REMEMBERED or (
        len(patterns) > 1 and sum(pattern.analysed for pattern in patterns) > LARGEST_REMEMBERED
    ):
        first = patterns.pop(0)
        _remembered.pop((first.Q, first.A, first.G), None)


def solve(
    pattern: Pattern, operands: tuple, count: int, settings: Settings, start: StartingPoint | None, *, check: bool,
    rounding: float, workers: int, progress=None,
) -> tuple[Outcome, np.ndarray] | None:  # fmt: skip
    """Solve a batch of problems of one pattern in float64.

    `operands` are those of `operands_of`. With `check` their numbers are checked, but for convexity;
    that is checked unless `rounding`, the error to allow in Q relative to its largest entry, is infinite.

    Return the outcome, and the scaling D and E (B, n + rows); None where an operand may not be valid.
    """
    n, lb, ub = pattern.Q.shape[0], operands[PLACES["lb"]], operands[PLACES["ub"]]
    rows = pattern.K.shape[0] + n * ((lb is not None) + (ub is not None))
    x, v, s, scaling = [np.empty((count, size)) for size in (n, rows, rows, n + rows)]
    outcome = Outcome(x, v, s, *[np.empty((count, 1), kind) for kind in SCALARS])
    if count == 0:
        return outcome, scaling
    lanes = pattern.in_lanes(count)
    valid = _core.solve_sparse(
        pattern.kkt, operands, (*outcome, scaling),
        (None, None, None) if start is None else tuple([np.ascontiguousarray(a) for a in start]), settings,
        DOUBLES, check, rounding, lanes, pattern.workers(workers, count, lanes, SOLVE_COST, 4), progress,
    )  # fmt: skip
    return (outcome, scaling) if valid else None


class Factors(NamedTuple):
    """`engines.base.Factors` of problems with sparse matrices: the scaling alone, as each solve factors the KKT matrix
    at the solutions.
    """

    pattern: Pattern
    equilibration: np.ndarray
    """D and E of every problem, (B, n + rows)."""
    operands: tuple
    """Those of `operands_of`."""

    def solve(self, lin: Linearization, r_x, r_v, fill: float, names: Collection[str]):
        """Solve the KKT system, as `engines.base.Factors` says; the gradients of all but prices come along."""
        problem, pattern, operands, count = lin.problem, self.pattern, self.operands, len(lin.x)
        u_x, u_v = np.empty(lin.x.shape), np.empty(lin.v.shape)
        gradients = {name: np.empty(operands[PLACES[name]].shape) for name in names if name in PLACES}
        if count:
            lanes = pattern.in_lanes(count)
            if r_v.strides != (0, r_v.itemsize):  # that of cotangents of x alone is one row of zeros for all problems
                r_v = np.ascontiguousarray(r_v)
            x, v, s, r_x, status = [np.ascontiguousarray(a) for a in (lin.x, lin.v, lin.s, r_x, lin.status)]
            _core.solve_sparse_kkt(
                pattern.kkt, operands, (x, v, s, r_x, r_v, status, self.equilibration),
                (u_x, u_v, *map(gradients.get, OPERANDS)), DOUBLES, lanes, fill,
                problem.fixed is not None,
                pattern.workers(problem.backend.workers, count, lanes, DERIVATIVE_COST, 10),
            )  # fmt: skip
        return u_x, u_v, gradients

    def scaling(self, problem: Problem):
        """Return D and E of every problem, as `engines.base.Factors` says."""
        return self.equilibration


def operands_of(problem: Problem) -> tuple:
    """Return arrays in the order of C++, None where there is none: vectors (B or 1, size), and of matrices the entries
    (B or 1, nnz) in the order of their patterns, Q in full.

    A dense matrix (B or 1, ·, n) has a full pattern, so that in C order it is its own entries.
    """
    arrays = map(stored, arrays_of(problem))
    return tuple([a if a is None or a.ndim == 2 else np.ascontiguousarray(a) for a in arrays])
