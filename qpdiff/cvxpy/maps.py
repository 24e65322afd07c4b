"""Linear and affine maps with constant sparse matrices, for arrays of any library."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from ..once import cached_property

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
        """Rows by the number of their entries, up to a power of two, and the place of each row among all of these.

        The place of an empty row is after the last. It is None where the only block has all rows in their order.
        """
        counts, (rows, columns) = np.diff(self.matrix.indptr), self.matrix.shape
        widths = np.where(counts > 0, 2 ** np.ceil(np.log2(np.maximum(counts, 1))), 0).astype(int)
        blocks, place, done = [], np.full(rows, np.sum(counts > 0)), 0
        for width in np.unique(widths[counts > 0]):
            (members,) = np.nonzero(widths == width)
            entry = np.arange(width) < counts[members, None]
            source = (self.matrix.indptr[members, None] + np.arange(width))[entry]
            index, values = np.full(entry.shape, columns), np.zeros(entry.shape)
            index[entry], values[entry] = self.matrix.indices[source], self.matrix.data[source]
            place[members] = done + np.arange(len(members))
            each = [None if np.all(row == 1.0) else row for row in values.T.copy()] if width <= FEW else values.T
            blocks.append(_Block(index.T.copy(), each, not entry.all()))
            done += len(members)
        return blocks, None if len(blocks) == 1 and done == rows else place


class _Block(NamedTuple):
    """Rows of about the same number of entries."""

    columns: np.ndarray
    """(entries, rows)."""
    values: Any
    """Likewise, or a list that has None for entries that are all 1."""
    padded: bool
    """Some rows have fewer entries; what they lack is in a column after the last, which is zero."""


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
