"""Linear and affine maps with constant sparse matrices, for arrays of any library."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from ..once import cached_property
from ..sparse import by_length

FEW = 8
"""Number of entries up to which a row counts as one with few."""


class SparseMatrix:
    """A constant sparse matrix, applied to the last axis of arrays.

    The array API standard has no sparse matrices and no scatter. So the entries of a row are gathered and summed, all
    rows of about the same number of entries at once: a few operations that every library has, and that those which
    differentiate and trace do so with. Of rows with few entries, as most are that CVXPY makes, one entry of each row is
    gathered after the other: sums along a short axis take many times as long.
    """

    def __init__(self, matrix):
        self.matrix = sp.csr_array(matrix)
        self.matrix.sum_duplicates()
        self.matrix.eliminate_zeros()

    @cached_property
    def T(self) -> SparseMatrix:
        return SparseMatrix(self.matrix.T)

    def product(self, backend, x):
        """Compute M x for vectors x (..., columns)."""
        xp, (blocks, place) = backend.xp, self._blocks
        needed = place is not None or blocks[0].padded
        zero = backend.full((*x.shape[:-1], 1), 0.0, x.dtype) if needed else None
        if any(block.padded for block in blocks):
            x = xp.concat([x, zero], axis=-1)
        sums = []
        for columns, values, _ in blocks:
            if len(columns) <= FEW:
                terms = [_term(backend, x, *each) for each in zip(columns, values, strict=True)]
                sums.append(sum(terms[1:], terms[0]))
            else:
                shape = columns.T.shape
                gathered = xp.reshape(_term(backend, x, columns.T.ravel(), values.T.ravel()), (*x.shape[:-1], *shape))
                sums.append(xp.sum(gathered, axis=-1))
        if place is None:
            return sums[0]
        return xp.take(xp.concat([*sums, zero], axis=-1), backend.asarray(place), axis=-1)

    @cached_property
    def _blocks(self):
        """The rows of about the same number of entries, and the place of each row, as `by_length` says.

        That is None where the only block has all rows in their order.
        """
        blocks, place = by_length(self.matrix.indptr)
        columns, data = np.append(self.matrix.indices, self.matrix.shape[1]), np.append(self.matrix.data, 0.0)
        whole = len(blocks) == 1 and len(blocks[0]) == len(place)
        return [_block(numbers, columns, data) for numbers in blocks], None if whole else place


class _Block(NamedTuple):
    """Rows of about the same number of entries."""

    columns: np.ndarray
    """(entries, rows)."""
    values: Any
    """Likewise, or a list that has None for entries that are all 1."""
    padded: bool
    """Some rows have fewer entries; what they lack is in a column after the last, which is zero."""


def _block(numbers: np.ndarray, columns: np.ndarray, data: np.ndarray) -> _Block:
    """Return the block of entries with these numbers (rows, entries); the last of `columns` and `data` is padding."""
    of_block, values = columns[numbers].T, data[numbers].T
    padded = bool(np.any(numbers == len(data) - 1))
    if len(of_block) > FEW:
        return _Block(of_block, values, padded)
    return _Block(of_block.copy(), [None if np.all(row == 1.0) else row for row in values.copy()], padded)


def _term(backend, x, columns, values):
    """Gather entries of x, and multiply them by those of the matrix."""
    gathered = backend.xp.take(x, backend.asarray(columns), axis=-1)
    return gathered if values is None else gathered * backend.asarray(values, dtype=x.dtype)


class AffineMap(NamedTuple):
    """An array as a function of parameters: a constant, and a matrix for each parameter that moves it."""

    shape: tuple[int, ...]
    constant: np.ndarray
    """Flat, as the parameters are: in row-major order."""
    matrices: dict[int, SparseMatrix]
    """By the position of the parameter."""

    def value(self, backend, dtype, parameters):
        """Return the array (..., *shape) at parameters {position: (..., size)}; their leading axes broadcast."""
        constant = backend.asarray(self.constant.reshape(self.shape), dtype=dtype)
        linear = self.linear(backend, parameters)
        return constant if linear is None else constant + linear

    def linear(self, backend, parameters):
        """Return what some of the parameters add to the constant; None if nothing."""
        parts = [matrix.product(backend, parameters[i]) for i, matrix in self.matrices.items() if i in parameters]
        if not parts:
            return None
        total = sum(parts[1:], parts[0])
        return backend.xp.reshape(total, (*total.shape[:-1], *self.shape))
