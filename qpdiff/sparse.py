"""Sparse operands: matrices in compressed rows with one pattern for a batch, and what other libraries have of them."""

from __future__ import annotations

import operator
import sys
from collections.abc import Hashable
from functools import cache, lru_cache
from typing import Any, cast
from weakref import WeakValueDictionary

import numpy as np

from .backend import choose_backend
from .once import cached_property

REMEMBERED = 32
"""Number of patterns that are remembered, checked and with what depends on them alone."""
LARGE_MATRICES, SPARSE_SHARE = 2**17, 0.1
"""Numbers in Q, G and A from which on CVXPY's are kept sparse, and the share of them that is stored up to which they
are."""
LARGEST = np.iinfo(np.int32).max
"""Largest number of entries, of rows and of columns."""


class Sparse:
    """A sparse matrix, or a batch of them with the same pattern, in compressed rows (CSR).

    Any of Q, A and G of `qpdiff.solve_qp` may be one. An entry that is stored is part of the pattern and gets a
    gradient, also where its value is 0.

    Parameters
    ----------
    values : array (..., nnz)
        The entries, of any array library. Leading axes are batch axes, which broadcast with those of other operands.
    indices : integer array (nnz)
        The column of each entry.
    indptr : integer array (rows + 1)
        Row i has the entries from ``indptr[i]`` up to ``indptr[i + 1]``.
    shape : (int, int)
        Rows and columns of a matrix, without batch axes.

    Attributes
    ----------
    values : array (..., nnz)
        In the order of `indices`: by rows, sorted by columns in a row, entries that were given twice summed.
    indices, indptr : int32 arrays
        Read-only.
    shape : tuple of int
        With the batch axes: (..., rows, columns).

    Raises
    ------
    TypeError, ValueError
        For indices that are no pattern, naming the row, and values that do not fit it.

    Examples
    --------
    Two problems with matrices of one pattern, and the gradient of its entries:

    >>> import numpy as np
    >>> import qpdiff
    >>> places = {"indices": [0, 1], "indptr": [0, 1, 2], "shape": (2, 2)}
    >>> Q = qpdiff.Sparse(values=[[1.0, 2.0], [4.0, 2.0]], **places)
    >>> sol = qpdiff.solve_qp(Q, -np.ones(2))
    >>> sol.x.round(6).tolist()
    [[1.0, 0.5], [0.25, 0.5]]
    >>> grads = qpdiff.vjp(sol, x=[1.0, 0.0])
    >>> (grads.Q.values + 0.0).round(6).tolist(), grads.Q.indices is Q.indices
    ([[-1.0, 0.0], [-0.0625, 0.0]], True)
    """

    __slots__ = ("pattern", "values")
    values: Any
    pattern: Pattern

    def __init__(self, values, indices, indptr, shape):
        made = _from_rows("the matrix", values, indices, indptr, shape)
        self.values, self.pattern = made.values, made.pattern

    @classmethod
    def like(cls, matrix, values) -> Sparse:
        """Return matrices with the pattern of another one and other values.

        Parameters
        ----------
        matrix : Sparse, or a matrix that `qpdiff.solve_qp` takes
            For example a CSR, CSC or COO array of scipy.sparse.
        values : array (..., nnz)
            In the order in which the matrix stores its entries: that of ``matrix.data`` or ``matrix.values``.

        Examples
        --------
        >>> import numpy as np
        >>> import scipy.sparse as sp
        >>> import qpdiff
        >>> qpdiff.Sparse.like(sp.eye_array(3, format="csr"), np.ones((8, 3)))
        Sparse(shape=(8, 3, 3), nnz=3)
        """
        return _read("the matrix", matrix, values)

    @staticmethod
    def of_pattern(values, pattern: Pattern) -> Sparse:
        """Return matrices of a pattern that has been checked."""
        made = Sparse.__new__(Sparse)
        made.values, made.pattern = values, pattern
        return made

    def with_values(self, values) -> Sparse:
        """Return matrices of the same pattern with other values (..., nnz)."""
        return Sparse.of_pattern(values, self.pattern)

    @property
    def indices(self) -> np.ndarray:
        return self.pattern.indices

    @property
    def indptr(self) -> np.ndarray:
        return self.pattern.indptr

    @property
    def nnz(self) -> int:
        """The number of entries of each matrix."""
        return len(self.pattern.indices)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-1], *self.pattern.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self):
        """The type of the values."""
        return self.values.dtype

    def toarray(self):
        """Return the matrices as an array (..., rows, columns) of the library of the values."""
        return to_dense(choose_backend({"values": self.values})[0], self)

    def __repr__(self) -> str:
        return f"Sparse(shape={self.shape}, nnz={self.nnz})"

    def __reduce__(self):
        return Sparse.of_pattern, (self.values, self.pattern)


class Pattern:
    """The places of the entries of a sparse matrix: valid, sorted in each row and without duplicates.

    Two that are equal are one object, as what depends on it is found by that.

    Parameters
    ----------
    indptr, indices : int32 arrays (rows + 1), (nnz)
    shape : (int, int)
    """

    def __init__(self, indptr: np.ndarray, indices: np.ndarray, shape: tuple[int, int]):
        self.indptr, self.indices, self.shape = indptr, indices, shape
        for array in (indptr, indices):
            array.setflags(write=False)

    def __reduce__(self):
        return _remembered, self.key

    @cached_property
    def key(self) -> tuple[bytes, bytes, tuple[int, int]]:
        """What tells it from other patterns, hashable."""
        return self.indptr.tobytes(), self.indices.tobytes(), self.shape

    @cached_property
    def rows(self) -> np.ndarray:
        """The row of each entry."""
        return np.repeat(np.arange(self.shape[0], dtype=np.int32), np.diff(self.indptr))

    @cached_property
    def _by_column(self) -> np.ndarray:
        return np.argsort(self.indices, kind="stable")

    @cached_property
    def row_sums(self) -> SegmentSums:
        """The sums of values (..., nnz) over the entries of each row."""
        return SegmentSums(self.indptr, np.arange(len(self.indices)))

    @cached_property
    def column_sums(self) -> SegmentSums:
        """The sums of values (..., nnz) over the entries of each column."""
        counts = np.bincount(self.indices, minlength=self.shape[1])
        return SegmentSums(np.concatenate([[0], np.cumsum(counts)]), self._by_column)

    @cached_property
    def mirror(self) -> np.ndarray:
        """The place of entry (j, i) for each entry (i, j) of a symmetric pattern.

        Raises
        ------
        ValueError
            For a pattern that is not symmetric, naming an entry without its mirror image; the subject of the sentence
            is for the caller to add.
        """
        order = self._by_column  # by columns, and by rows in each: the entries of the transpose as it would store them
        rows, columns = self.indices[order], self.rows[order]
        if np.array_equal(rows, self.rows) and np.array_equal(columns, self.indices):
            return order
        if not np.any(self.rows > self.indices):
            raise ValueError(
                "has entries in its upper triangle only; pass all of it, with scipy.sparse Q + triu(Q, 1).T"
            )
        if not np.any(self.rows < self.indices):
            raise ValueError(
                "has entries in its lower triangle only; pass all of it, with scipy.sparse Q + tril(Q, -1).T"
            )
        width = self.shape[1]
        there = self.indices.astype(np.int64) * width + self.rows  # keys of the mirror images
        i = np.flatnonzero(~np.isin(there, self.rows.astype(np.int64) * width + self.indices))[0]
        row, column = int(self.rows[i]), int(self.indices[i])
        raise ValueError(
            f"is not symmetric; pass (Q + Qᵀ)/2, which has the same objective: it has an entry at [{row}, {column}] "
            f"and none at [{column}, {row}]"
        )

    def dense_places(self) -> np.ndarray:
        """The entry at each place of the matrix, in row-major order; where there is none, their number."""
        places = np.full(self.shape[0] * self.shape[1], len(self.indices))
        places[self.rows.astype(np.int64) * self.shape[1] + self.indices] = np.arange(len(self.indices))
        return places


class SegmentSums:
    """Sums of groups of entries along the last axis of arrays of any library.

    The array API standard has no sparse matrices and no scatter. So the entries of a group are gathered and summed, all
    groups of about the same number of entries at once: a few operations that every library has, and that those which
    differentiate and trace do so with.

    Parameters
    ----------
    starts : integer array (groups + 1)
        Group i has the entries ``order[starts[i] : starts[i + 1]]``.
    order : integer array
    """

    def __init__(self, starts: np.ndarray, order: np.ndarray):
        self.starts, self.order = starts, order

    def sums(self, backend, values):
        """Return the sums (..., groups) of values (..., entries)."""
        xp, (blocks, place) = backend.xp, self._blocks
        padded, sums = with_zero(backend, values), []
        for index in blocks:
            gathered = gather(backend, padded, index.ravel())
            sums.append(xp.sum(xp.reshape(gathered, (*values.shape[:-1], *index.shape)), axis=-1))
        return gather(backend, xp.concat([*sums, padded[..., -1:]], axis=-1), place)

    @cached_property
    def _blocks(self):
        """The entries of groups of about the same number of them, and the place of each group, as `by_length` says.

        What a group lacks is an entry after the last, which is zero.
        """
        blocks, place = by_length(self.starts)
        order = np.append(self.order, len(self.order))
        return [order[numbers] for numbers in blocks], place


def by_length(starts: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Divide groups of entries into blocks by the number of these, up to a power of two.

    Parameters
    ----------
    starts : integer array (groups + 1)
        Group i has the entries from ``starts[i]`` to ``starts[i + 1]``.

    Returns
    -------
    blocks : list of integer array (groups, entries)
        Numbers of entries; those that a group lacks are all the number after the last.
    place : integer array (groups)
        The place of each group among those of all blocks; that of an empty group is after the last.
    """
    counts = np.diff(starts)
    widths = np.where(counts > 0, 2 ** np.ceil(np.log2(np.maximum(counts, 1))), 0).astype(int)
    blocks, place, done = [], np.full(len(counts), np.sum(counts > 0)), 0
    for width in np.unique(widths[counts > 0]):
        (members,) = np.nonzero(widths == width)
        entry = np.arange(width)
        blocks.append(np.where(entry < counts[members, None], starts[members, None] + entry, starts[-1]))
        place[members] = done + np.arange(len(members))
        done += len(members)
    return blocks, place


def gather(backend, a, index: np.ndarray):
    """Return the entries of an array (..., k) at places on its last axis."""
    return backend.xp.take(a, backend.asarray(index), axis=-1)


def with_zero(backend, a):
    """Return an array (..., k) with one more entry on its last axis, 0."""
    return backend.xp.concat([a, backend.full((*a.shape[:-1], 1), 0.0, a.dtype)], axis=-1)


def apply(function, value):
    """Apply a function of arrays to an array, or to the values of a `Sparse`."""
    return value.with_values(function(value.values)) if isinstance(value, Sparse) else function(value)


def with_array(operand, array):
    """Return an operand with another array in place of its own, in the same form."""
    return Sparse.of_pattern(array, operand.pattern) if type(operand) is Sparse else array


def stored(value):
    """Return an operand's array: the values of a `Sparse`, or the array that it is."""
    return value.values if type(value) is Sparse else value


def to_dense(backend, matrix: Sparse):
    """Return sparse matrices as an array (..., rows, columns)."""
    flat = gather(backend, with_zero(backend, matrix.values), matrix.pattern.dense_places())
    return backend.xp.reshape(flat, matrix.shape)


def pattern_at(places: np.ndarray, shape: tuple[int, int]) -> Pattern:
    """Return the pattern of entries at sorted places in row-major order, without duplicates."""
    starts = np.searchsorted(places, np.arange(shape[0] + 1) * shape[1])
    return _from_rows("the matrix", np.ones(len(places)), places % shape[1], starts, shape).pattern


def keeps_sparse(numbers: int, entries: int) -> bool:
    """Return whether matrices of so many numbers, of which so many are not always 0, are sparse where nobody asks."""
    return numbers >= LARGE_MATRICES and entries <= SPARSE_SHARE * numbers


@lru_cache(maxsize=REMEMBERED)
def full_pattern(rows: int, columns: int) -> Pattern:
    """Return the pattern of a matrix that stores all of its entries."""
    if rows * columns > LARGEST:
        raise ValueError(f"a dense matrix of shape {rows, columns} beside sparse ones has more than {LARGEST} entries")
    indptr = np.arange(rows + 1, dtype=np.int32) * columns
    indices = np.tile(np.arange(columns, dtype=np.int32), rows)
    return _remembered(indptr.tobytes(), indices.tobytes(), (rows, columns))


# ---- what other libraries have of them

_FAMILIES = {"scipy.sparse": "scipy", "cupyx.scipy.sparse": "scipy", "jax.experimental.sparse": "jax", "torch": "torch"}
"""The packages whose sparse matrices are taken, none of which is imported here, and the names of their forms."""


@cache
def _family(kind: Hashable) -> str | None:
    """Return the form of the sparse matrices that a type is of; None: of none."""
    for base in cast(type, kind).__mro__:
        for package, family in _FAMILIES.items():
            if f"{base.__module__}.".startswith(f"{package}."):
                return family
    return None


def is_sparse(value) -> bool:
    """Return whether a value is a sparse matrix, of whatever format."""
    if isinstance(value, Sparse):
        return True
    family = _family(type(value))  # type: ignore[arg-type]  # of type itself
    if family == "torch":
        dense = sys.modules["torch"].strided
        return getattr(value, "layout", dense) is not dense
    return family is not None


def read_sparse(name: str, value) -> Sparse:
    """Return a sparse matrix of any library as a `Sparse`, with its values in that library.

    Raises
    ------
    TypeError, ValueError
        Naming the operand, for a format that is not taken, or what `Sparse` refuses.
    """
    return value if isinstance(value, Sparse) else _read(name, value)


def check_pattern(name: str, matrix: Sparse, pattern: Pattern) -> None:
    """Refuse a tangent that has another pattern than its operand."""
    if matrix.pattern.key != pattern.key:
        raise ValueError(f"{name} has another pattern than the operand; pass its values, (..., {len(pattern.indices)})")


def _read(name: str, matrix, values=None) -> Sparse:
    """Return a sparse matrix, or other values in the order of its own, as a `Sparse`."""
    if isinstance(matrix, Sparse):
        return _from_rows(name, values, matrix.indices, matrix.indptr, matrix.pattern.shape)
    family = _family(type(matrix))  # type: ignore[arg-type]
    if family is None or not is_sparse(matrix):
        raise TypeError(f"{name} is a {_type(matrix)}; expected a qpdiff.Sparse or a sparse matrix of another library")
    return {"scipy": _read_scipy, "torch": _read_torch, "jax": _read_jax}[family](name, matrix, values)


def _read_scipy(name: str, matrix, values) -> Sparse:
    if matrix.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(matrix.shape)}; expected two axes; a batch is a qpdiff.Sparse")
    if matrix.format not in ("csr", "csc", "coo"):
        raise TypeError(f"{name} is a sparse matrix in {matrix.format.upper()} format; pass {name}.tocsr()")
    values = matrix.data if values is None else values
    if matrix.format == "coo":
        return _from_places(name, values, _on_host(name, matrix.row), _on_host(name, matrix.col), matrix.shape)
    if matrix.format == "csr":
        return _from_rows(name, values, matrix.indices, matrix.indptr, matrix.shape)
    starts, rows = (_on_host(name, a) for a in (matrix.indptr, matrix.indices))
    columns = np.repeat(np.arange(matrix.shape[1]), np.diff(starts))
    return _from_places(name, values, rows, columns, matrix.shape)


def _read_torch(name: str, matrix, values) -> Sparse:
    if str(matrix.layout) != "torch.sparse_csr":
        raise TypeError(f"{name} is a sparse tensor in the layout {matrix.layout}; pass {name}.to_sparse_csr()")
    values = matrix.values() if values is None else values
    return _of_batch(name, values, matrix.col_indices(), matrix.crow_indices(), tuple(matrix.shape[-2:]))


def _read_jax(name: str, matrix, values) -> Sparse:
    kind = type(matrix).__name__
    if kind not in ("BCSR", "BCOO"):
        raise TypeError(f"{name} is a {_type(matrix)}; expected a BCSR or a BCOO")
    if matrix.n_dense or len(matrix.shape) - matrix.n_batch != 2:
        raise ValueError(
            f"{name} is a {kind} of shape {tuple(matrix.shape)} with n_batch={matrix.n_batch} and "
            f"n_dense={matrix.n_dense}; expected all axes but the last two as batch axes"
        )
    values, shape = matrix.data if values is None else values, tuple(matrix.shape[-2:])
    if kind == "BCSR":
        return _of_batch(name, values, matrix.indices, matrix.indptr, shape)
    places = _on_host(name, matrix.indices)
    places = places.reshape(-1, *places.shape[-2:])
    differs = np.flatnonzero(np.any(places != places[:1], axis=(1, 2)))
    if len(differs):
        first = differs[0]
        entry = np.flatnonzero(np.any(places[first] != places[0], axis=-1))[0]
        raise _differs(name, first, int(min(places[first][entry, 0], places[0][entry, 0])))
    rows, columns = places[0].T
    filled = (rows < shape[0]) & (columns < shape[1])  # JAX fills up with entries outside of the matrix
    if not filled.all():
        values = gather(_backend_of(name, values), values, np.flatnonzero(filled))
    return _from_places(name, values, rows[filled], columns[filled], shape)


def _type(value) -> str:
    return f"{type(value).__module__}.{type(value).__name__}"


def _differs(name: str, problem, row) -> ValueError:
    return ValueError(
        f"{name} has another pattern in problem {problem} of the batch than in problem 0, in row {row}; a batch has "
        "one pattern: store zeros where a problem lacks an entry"
    )


def _on_host(name: str, value) -> np.ndarray:
    """Return indices of any library as integers of NumPy."""
    if hasattr(value, "get") and not isinstance(value, dict):  # CuPy
        value = value.get()
    elif hasattr(value, "detach"):  # torch
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except Exception as error:  # of JAX's tracers, ragged lists
        if "Tracer" in type(error).__name__:
            raise TypeError(
                f"{name} has indices that JAX traces; let the function close over them, or pass it a qpdiff.Sparse, a "
                "pytree of which only the values are traced"
            ) from error
        raise TypeError(f"{name} has indices that are no array of numbers: {error}") from error
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} has indices of dtype {array.dtype}; expected integers")
    return array


def _of_batch(name: str, values, indices, indptr, shape) -> Sparse:
    """Read compressed rows whose indices may have batch axes."""
    indices, indptr = _on_host(name, indices), _on_host(name, indptr)
    starts, columns = indptr.reshape(-1, indptr.shape[-1]), indices.reshape(-1, indices.shape[-1])
    for other in np.flatnonzero(np.any(starts != starts[:1], axis=-1)):
        raise _differs(name, other, int(np.flatnonzero(starts[other] != starts[0])[0]) - 1)
    for other in np.flatnonzero(np.any(columns != columns[:1], axis=-1)):
        entry = np.flatnonzero(columns[other] != columns[0])[0]
        raise _differs(name, other, int(np.searchsorted(starts[0], entry, side="right")) - 1)
    return _from_rows(name, values, columns[0], starts[0], shape)


def _from_places(name: str, values, rows: np.ndarray, columns: np.ndarray, shape) -> Sparse:
    """Read entries in any order, with the row and the column of each."""
    outside = np.flatnonzero((rows < 0) | (rows >= shape[0]))
    if len(outside):
        raise ValueError(f"{name} has an entry in row {rows[outside[0]]}; expected rows from 0 to {shape[0] - 1}")
    order = np.argsort(rows, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shape[0]))])
    values = _checked_values(name, values, len(rows))
    if not np.array_equal(order, np.arange(len(order))):
        values = gather(_backend_of(name, values), values, order)
    return _from_rows(name, values, columns[order], starts, shape)


def _from_rows(name: str, values, indices, indptr, shape) -> Sparse:
    """Read compressed rows, sort them and sum entries of the same place."""
    sizes = _sizes(name, shape)
    starts, columns = _int32(name, _on_host(name, indptr)), _int32(name, _on_host(name, indices))
    values = _checked_values(name, values, len(columns))
    try:
        pattern, change = _compressed(starts.tobytes(), columns.tobytes(), sizes)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
    if change is not None:
        backend = _backend_of(name, values)
        values = change.sums(backend, values) if isinstance(change, SegmentSums) else gather(backend, values, change)
    return Sparse.of_pattern(values, pattern)


def _sizes(name: str, shape) -> tuple[int, int]:
    try:
        rows, columns = map(operator.index, shape)
    except (TypeError, ValueError):
        raise ValueError(f"{name} has shape {shape!r}; expected rows and columns, without batch axes") from None
    if not (0 <= rows <= LARGEST and 0 <= columns <= LARGEST):
        raise ValueError(f"{name} has shape {shape!r}; expected from 0 to {LARGEST} rows and columns")
    return rows, columns


def _int32(name: str, array: np.ndarray) -> np.ndarray:
    if array.ndim != 1:
        raise ValueError(f"{name} has indices of shape {array.shape}; expected one axis: the batch has one pattern")
    if array.dtype != np.int32 and array.size and (array.max() > LARGEST or array.min() < -LARGEST):
        raise ValueError(f"{name} has indices beyond {LARGEST}")
    return array.astype(np.int32, copy=False)


def _checked_values(name: str, values, count: int):
    if not hasattr(values, "shape"):
        try:
            values = np.asarray(values)
        except ValueError as error:
            raise ValueError(f"{name} has values that are not a regular array: {error}") from error
    if values.ndim < 1 or values.shape[-1] != count:
        raise ValueError(
            f"{name} has values of shape {tuple(values.shape)}; expected (..., {count}), one for each of its indices"
        )
    return values


def _backend_of(name: str, values):
    """Return the backend that brings values in another order."""
    try:
        return choose_backend({name: values})[0]
    except (AttributeError, TypeError) as error:  # array-api-compat takes autograd's boxes for arrays
        raise TypeError(
            f"{name} has values of the type {_type(values)}, which are not sorted here; give the entries by rows, by "
            "columns in each, and once"
        ) from error


@lru_cache(maxsize=REMEMBERED)
def _compressed(indptr: bytes, indices: bytes, shape: tuple[int, int]):
    """Check compressed rows and return their pattern, and what is to be done with the values.

    That is nothing (None), an order to gather them in, or sums of those of the same place.
    """
    starts, columns = np.frombuffer(indptr, np.int32), np.frombuffer(indices, np.int32)
    count = len(columns)
    if len(starts) != shape[0] + 1:
        raise ValueError(f"has an indptr of {len(starts)} numbers; expected {shape[0] + 1}, one more than its rows")
    if starts[0] != 0 or starts[-1] != count:
        raise ValueError(
            f"has an indptr from {starts[0]} to {starts[-1]}; expected 0 to {count}, as it has so many indices"
        )
    if np.any(falls := np.diff(starts) < 0):
        raise ValueError(f"has an indptr that decreases after row {int(np.argmax(falls))}; expected one that does not")
    rows = np.repeat(np.arange(shape[0]), np.diff(starts))
    if np.any(outside := (columns < 0) | (columns >= shape[1])):
        first = int(np.argmax(outside))
        raise ValueError(
            f"has the index {columns[first]} in row {rows[first]}; expected 0 to {shape[1] - 1}, as it has "
            f"{shape[1]} columns"
        )
    step = np.diff(columns.astype(np.int64) + rows * np.int64(shape[1]))
    if np.all(step > 0):
        return _remembered(indptr, indices, shape), None
    order = np.lexsort((columns, rows))
    leads = np.concatenate([[True], (np.diff(rows[order]) > 0) | (np.diff(columns[order]) > 0)])
    columns = columns[order][leads]
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows[order][leads], minlength=shape[0]))]).astype(np.int32)
    pattern = _remembered(starts.tobytes(), columns.tobytes(), shape)
    return pattern, order if leads.all() else SegmentSums(np.append(np.flatnonzero(leads), count), order)


_patterns: WeakValueDictionary[tuple, Pattern] = WeakValueDictionary()
"""All patterns in use, also those that are no longer remembered."""


@lru_cache(maxsize=REMEMBERED)
def _remembered(indptr: bytes, indices: bytes, shape: tuple[int, int]) -> Pattern:
    pattern = Pattern(np.frombuffer(indptr, np.int32), np.frombuffer(indices, np.int32), shape)
    return _patterns.setdefault(pattern.key, pattern)
