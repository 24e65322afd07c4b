"""Operands of a batch in a file: arrays, and matrices of one sparse pattern."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

MATRICES = ("Q", "G", "A")


class Matrices(NamedTuple):
    """Sparse matrices of one pattern, in compressed rows; Q is given in full."""

    values: np.ndarray
    """(B or 1, nnz)"""
    indices: np.ndarray
    indptr: np.ndarray
    shape: tuple[int, int]

    def at(self, b: int) -> sp.csr_array:
        """Return the matrix of problem b."""
        values = self.values[b if len(self.values) > 1 else 0]
        return sp.csr_array((values, self.indices, self.indptr), shape=self.shape)


def pattern_of(matrices: list[sp.sparray]) -> Matrices:
    """Return matrices that have the same pattern as one, or raise an AssertionError; all equal ones are shared."""
    rows = [sp.csr_array(matrix) for matrix in matrices]
    for row in rows:
        row.sort_indices()
    first = rows[0]
    for row in rows:
        assert np.array_equal(row.indptr, first.indptr)
        assert np.array_equal(row.indices, first.indices)
    values = np.stack([row.data for row in rows])
    values = values[:1] if np.all(values == values[0]) else values
    return Matrices(values, first.indices.astype(np.int32), first.indptr.astype(np.int32), first.shape)


def save(file: Path, operands: dict) -> None:
    """Write operands to a file, each field of a `Matrices` as an array."""
    arrays = {}
    for name, value in operands.items():
        if isinstance(value, Matrices):
            arrays |= {f"{name}.{field}": array for field, array in value._asdict().items()}
        else:
            arrays[name] = value
    np.savez(file, **arrays)


def load(file: Path) -> dict:
    """Read what `save` wrote."""
    with np.load(file) as arrays:
        operands = {name: arrays[name] for name in arrays.files if "." not in name}
        for name in MATRICES:
            if f"{name}.values" in arrays.files:
                fields = [arrays[f"{name}.{field}"] for field in Matrices._fields]
                operands[name] = Matrices(*fields[:3], tuple(fields[3].tolist()))
    return operands


def problem(operands: dict, b: int) -> dict:
    """Return all eight operands of problem b, matrices as CSR arrays, infinite bounds for those that are absent."""
    n = operands["q"].shape[-1]
    absent = {"G": sp.csr_array((0, n)), "h": np.zeros(0), "A": sp.csr_array((0, n)), "b": np.zeros(0)}
    absent |= {"lb": np.full(n, -np.inf), "ub": np.full(n, np.inf)}
    own = {}
    for name, value in operands.items():
        own[name] = value.at(b) if isinstance(value, Matrices) else value[b if len(value) > 1 else 0].copy()
    return absent | own
