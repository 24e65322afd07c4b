"""Problems with sparse matrices of one pattern: its symbolic analysis, and a call for a batch of values."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from ...problem import MATRICES, OPERANDS, Problem
from ...sparse import Pattern as MatrixPattern
from ...sparse import Sparse, stored
from ..base import Linearization, Outcome, Settings, StartingPoint
from .engine import DERIVATIVE_COST, PARAMETERS, SCALARS, SOLVE_COST, _core, as_many_as_pay

LARGEST_LANES = 10**6
"""Entries of L from which on problems are solved one by one, as the factors of a lane group leave the cache."""
DENSE_SPEED = 0.1
"""Time of an operation of the dense engine against that of one in the factorisation of a sparse matrix."""


class Pattern:
    """The patterns of Q, which is symmetric, and of A and G, with all that depends on them alone."""

    def __init__(self, Q: MatrixPattern, A: MatrixPattern, G: MatrixPattern):
        self.Q, self.A, self.G = Q, A, G
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
        return kkt

    def __reduce__(self):
        return pattern_of, (self.Q, self.A, self.G)


def pays(pattern: Pattern) -> bool:
    """Return whether problems of this pattern are solved faster as sparse than as dense ones."""
    n, linear = pattern.Q.shape[0], pattern.K.shape[0]
    return pattern.kkt.operations < DENSE_SPEED * (n**3 / 3 + n * n * linear)


@lru_cache(maxsize=8)
def pattern_of(Q: MatrixPattern, A: MatrixPattern, G: MatrixPattern) -> Pattern:
    """Return the pattern made of these; the last ones are remembered, with their symbolic factorisations."""
    return Pattern(Q, A, G)


def solve(
    pattern: Pattern, operands: dict, count: int, settings: Settings, start: StartingPoint | None, *, check: bool,
    rounding: float, workers: int, progress=None,
) -> tuple[Outcome, np.ndarray] | None:  # fmt: skip
    """Solve a batch of problems of one pattern in float64.

    `operands` has the vectors (B or 1, size), lb and ub None where there are none, and the entries of Q, G and A
    (B or 1, nnz) in the order of the pattern, Q in full. With `check` their numbers are checked, but for convexity;
    that is checked unless `rounding`, the error to allow in Q relative to its largest entry, is infinite.

    Return the outcome, and the scaling D and E (B, n + rows); None where an operand may not be valid.
    """
    kkt, n = pattern.kkt, pattern.Q.shape[0]
    rows = pattern.K.shape[0] + n * sum(operands[name] is not None for name in ("lb", "ub"))
    x, v, s, scaling = (np.empty((count, size)) for size in (n, rows, rows, n + rows))
    outcome = Outcome(x, v, s, *[np.empty((count, 1), kind) for kind in SCALARS])
    if count == 0:
        return outcome, scaling
    operations = kkt.operations + 4 * kkt.size + 100 * (n + rows)
    workers = as_many_as_pay(workers, count, SOLVE_COST * operations)
    in_lanes = start is None and _in_lanes(kkt, count)
    valid = _core.solve_sparse(
        kkt, tuple(operands[name] for name in ("Q", "q", "G", "h", "A", "b", "lb", "ub")), (*outcome, scaling),
        (None, None, None) if start is None else tuple([np.ascontiguousarray(a) for a in start]), settings,
        PARAMETERS[x.dtype], check, rounding, in_lanes, workers, progress,
    )  # fmt: skip
    return (outcome, scaling) if valid else None


def _in_lanes(kkt, count: int) -> bool:
    """Return whether so many problems are worked on in lane groups."""
    return count >= _core.LANES and kkt.size <= LARGEST_LANES


class Factors(NamedTuple):
    """`engines.base.Factors` of problems with sparse matrices: the scaling alone, as each solve factors the KKT matrix
    at the solutions.
    """

    pattern: Pattern
    equilibration: np.ndarray
    """D and E of every problem, (B, n + rows)."""

    def solve(self, lin: Linearization, r_x, r_v, fill: float, matrices: Collection[str]):
        """Solve the KKT system, as `engines.base.Factors` says.

        The gradients of all matrices that are named come along: of the entries (B or 1, nnz) of a sparse one, in the
        order of its pattern, and of all (B or 1, ·, n) of a dense one.
        """
        problem, kkt, count = lin.problem, self.pattern.kkt, len(lin.x)
        operands = operands_of(problem)
        given = [np.ascontiguousarray(a, np.float64) for a in (lin.x, lin.v, lin.s, r_x, r_v)]
        u_x, u_v = (np.empty_like(a) for a in given[:2])
        gradients = {name: np.empty(operands[name].shape) for name in matrices}
        if count:
            operations = kkt.operations + 10 * kkt.size + 100 * (u_x.size + u_v.size) / count
            workers = as_many_as_pay(problem.backend.workers, count, DERIVATIVE_COST * operations)
            _core.solve_sparse_kkt(
                kkt, tuple(map(operands.get, OPERANDS)),
                (*given, np.ascontiguousarray(lin.status, np.int32), self.equilibration),
                (u_x, u_v, *[gradients.get(name) for name in MATRICES]), PARAMETERS[u_x.dtype],
                _in_lanes(kkt, count), fill, workers,
            )  # fmt: skip
        return u_x, u_v, {name: entries_as(problem.operands[name], a) for name, a in gradients.items()}

    def scaling(self, problem: Problem):
        """Return D and E of every problem, as `engines.base.Factors` says."""
        return self.equilibration


def operands_of(problem: Problem) -> dict:
    """Return the operands as `solve` takes them, with the entries of the matrices in the order of their patterns.

    A dense matrix has a full pattern.
    """
    given, arrays = problem.operands, {}
    for name in OPERANDS:
        value = given.get(name)
        if name in MATRICES and value is not None:
            value = stored(value)
            value = value.reshape(len(value), math.prod(value.shape[1:]))  # of an empty batch too
        arrays[name] = None if value is None else np.asarray(value, np.float64)
    return arrays


def entries_as(operand, entries):
    """Return an array like the entries of a matrix (B or 1, nnz) in the shape of its operand."""
    return entries if isinstance(operand, Sparse) else entries.reshape(-1, *operand.shape[1:])
