"""NumPy arrays."""

from __future__ import annotations

import contextvars
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import get_blas_funcs, get_lapack_funcs

from .base import Backend
from .threads import THREADS, pool, single_threaded_blas

INVERTED = 20
"""Up to this size the Cholesky factors of a batch are inverted."""
SMALL = 10
"""Up to this size triangular matrices are inverted row by row, all problems at once."""
LARGE = 64
"""From this size on LAPACK's solve with one right-hand side takes longer than two of BLAS with a triangle."""
SOLVED = 192
"""From this size on to solve with a triangle takes less time than a product with its inverse, and to make that."""
FEW = 16
"""So few matrices take less time one after the other."""
PARTS = 4
"""In how many parts a thread does its work, so that the last to begin has less of it."""
WORTH_A_THREAD = 2.5e6
"""Operations of BLAS and LAPACK on a stack for which it is worth while to wake a thread."""

np.empty(2**25 - 2**13, np.uint8)
"""Freed at once, and by that the C library of Linux learns to keep freed memory of up to twice this size for what comes
next (mallopt(3), M_MMAP_THRESHOLD). Else it gives the arrays of an iteration back to the system, which clears every
page anew: half of the time of some solves."""


class _Root(NamedTuple):
    """L⁻¹, or L itself where that is better."""

    inverse: Any
    L: Any


class NumPyBackend(Backend):
    """NumPy arrays, with LAPACK's Cholesky factorisation through NumPy and SciPy."""

    chunk_bytes = 56 * 2**20
    idle_bytes = 2**21

    @property
    def workers(self):
        return THREADS.get()

    def asarray(self, value, dtype=None):
        return np.asarray(value, dtype=dtype)

    def map(self, function, items: list, workers: int) -> Generator:
        """NumPy's loops release the interpreter lock, so that a thread a processor works on a chunk each."""
        if len(items) < 2 or workers < 2:
            yield from super().map(function, items, workers)
            return
        with single_threaded_blas(), ThreadPoolExecutor(workers) as threads:
            try:
                for future in [threads.submit(_on_one_thread(function), item) for item in items]:
                    yield future.result()
            finally:
                threads.shutdown(cancel_futures=True)

    def _parts(self, count: int, operations: float) -> list[slice]:
        """Parts of a stack of so many, some for each thread that it is worth while to wake for the operations on it."""
        threads = min(self.workers, count, int(operations / WORTH_A_THREAD))
        parts = min(PARTS * threads, count) if threads > 1 else 1
        return [slice(count * i // parts, count * (i + 1) // parts) for i in range(parts)]

    def _on_threads(self, function, parts: list[slice]) -> None:
        """Call a function for each part of a stack, on as many threads as help.

        It is for what releases the interpreter lock for long. Whole chunks on threads are better only where all of a
        step does so: to hand the lock on takes longer than an operation on small arrays.
        """
        left = iter(parts)

        def work():
            for part in left:  # that no other thread has taken
                function(part)

        threads = -(-len(parts) // PARTS)
        if threads == 1:
            work()
            return
        with single_threaded_blas():
            helpers = [pool().submit(_on_one_thread(work)) for _ in range(threads - 1)]
            work()
            for helper in helpers:
                if not helper.cancel():  # it has begun
                    helper.result()

    def none(self, mask) -> bool:
        return not mask.any()

    def factor(self, M):
        L = self._cholesky(M)
        positive = np.isfinite(np.linalg.diagonal(L)).all(axis=-1, keepdims=True)
        if not positive.all():
            L = np.where(positive[:, :, None], L, np.eye(M.shape[-1], dtype=M.dtype))
        return (_inverse_lower(L) if _is_inverted(L) else L,), positive

    def factor_sum(self, M, diagonal):
        count, n = diagonal.shape
        out = np.empty((count, n, n), M.dtype)
        out[...] = M
        out.reshape(count, n * n)[:, :: n + 1] += diagonal
        return self.factor(out)

    def _cholesky(self, M):
        parts = self._parts(len(M), len(M) * M.shape[-1] ** 3 / 3)
        if len(parts) == 1:
            return _cholesky_or_nan(M)
        out = np.empty(M.shape, M.dtype)

        def fill(part: slice):
            out[part] = _cholesky_or_nan(M[part])

        self._on_threads(fill, parts)
        return out

    def pivots(self, factor):
        (L,) = factor
        return np.linalg.diagonal(L) ** (-2.0 if _is_inverted(L) else 2.0)

    def solve(self, factor, r):
        (L,) = factor
        if _is_inverted(L):
            return super().unwhiten(L, super().whiten(L, r))
        (potrs,) = get_lapack_funcs(("potrs",), (L,))
        if L.shape[0] == 1:
            return potrs(L[0].T, r.T, lower=0)[0].T
        out = np.array(r, order="C")
        if L.shape[-1] < LARGE:
            for U, x in zip(L.mT, out[:, :, None], strict=True):
                potrs(U, x, lower=0, overwrite_b=True)
        else:
            (trsv,) = get_blas_funcs(("trsv",), (L,))
            for U, x in zip(L.mT, out, strict=True):
                trsv(U, x, trans=1, overwrite_x=True)
                trsv(U, x, overwrite_x=True)
        return out

    def root(self, factor):
        (L,) = factor
        if L.shape[-1] >= SOLVED and len(L) > 1:
            return _Root(None, L)
        return _Root(L if _is_inverted(L) else _inverse_lower(L), None)

    def whiten(self, root, r):
        return _solve_lower(root.L, r) if root.inverse is None else super().whiten(root.inverse, r)

    def unwhiten(self, root, r):
        return _solve_lower(root.L, r, transposed=True) if root.inverse is None else super().unwhiten(root.inverse, r)

    def whiten_rows(self, root, K):
        if root.inverse is not None:
            return super().whiten_rows(root.inverse, K)
        out = np.array(np.broadcast_to(K, (len(root.L), *K.shape[1:])), order="C")
        (trsm,) = get_blas_funcs(("trsm",), (out,))
        with single_threaded_blas():  # SciPy's BLAS has threads of its own, for which NumPy's would have to make room
            for L, rows in zip(root.L, out, strict=True):
                trsm(1.0, L.T, rows.T, trans_a=1, overwrite_b=True)
        return out

    def products(self, a, b):
        out = np.empty((max(len(a), len(b)), a.shape[-2], b.shape[-1]), a.dtype)

        def fill(part: slice):
            np.matmul(a if len(a) == 1 else a[part], b if len(b) == 1 else b[part], out=out[part])

        self._on_threads(fill, self._parts(len(out), out.size * a.shape[-1]))
        return out

    def outer(self, pairs):
        return self._outer_of_each(pairs) if pairs[0][1].shape[-1] >= LARGE else super().outer(pairs)

    def symmetric_outer(self, a, b):
        return self._outer_of_each([(a, b), (b, a)]) if a.shape[-1] >= LARGE else super().symmetric_outer(a, b)

    def _outer_of_each(self, pairs):
        """One problem after the other, so that what is added is still in the cache."""
        (first, other), *rest = pairs
        out = np.empty((len(first), first.shape[-1], other.shape[-1]), first.dtype)

        def fill(part: slice):
            term = np.empty(out.shape[1:], out.dtype)
            for i in range(part.start, part.stop):
                np.multiply.outer(first[i], other[i], out=out[i])
                for a, b in rest:
                    out[i] += np.multiply.outer(a[i], b[i], out=term)

        self._on_threads(fill, self._parts(len(out), 10 * out.size))  # by the time it takes
        return out


def _on_one_thread(function):
    """The function in a copy of the context, which holds the caller's np.errstate; what it calls wakes no threads."""
    context = contextvars.copy_context()
    context.run(THREADS.set, 1)
    return partial(context.run, function)


def _cholesky_or_nan(M):
    try:
        return np.linalg.cholesky(M)
    except np.linalg.LinAlgError:
        return np.stack([_cholesky_or_nan(matrix) for matrix in M]) if M.ndim > 2 else np.full_like(M, np.nan)


def _solve_lower(L, r, *, transposed=False):
    """L⁻¹ r or L⁻ᵀ r for as many vectors r as matrices L."""
    (trsv,) = get_blas_funcs(("trsv",), (L,))
    out = np.array(r, order="C")
    # Lᵀ is what BLAS sees of a row-major L without a copy.
    for U, x in zip(L.mT, out, strict=True):
        trsv(U, x, trans=0 if transposed else 1, overwrite_x=True)
    return out


def _is_inverted(L) -> bool:
    """Whether a factor is kept as L⁻¹: products with it take far less time than a call of LAPACK for each problem."""
    return L.shape[-1] <= INVERTED


def _inverse_lower(L):
    """L⁻¹ of lower triangular matrices: of few by LAPACK, of small ones row by row, of large ones by halves."""
    batch, n = L.shape[:2]
    out = np.zeros_like(L, order="C")
    if batch < FEW:
        (trtri,) = get_lapack_funcs(("trtri",), (L,))
        for i in range(batch):
            out[i] = trtri(L[i].T, lower=0)[0].T
    elif n <= SMALL:
        diagonal = 1.0 / np.linalg.diagonal(L)
        for i in range(n):
            np.matmul(L[:, i : i + 1, :i], out[:, :i, :i], out=out[:, i : i + 1, :i])
            out[:, i, :i] *= -diagonal[:, i : i + 1]
            out[:, i, i] = diagonal[:, i]
    else:
        half = n // 2
        out[:, :half, :half] = first = _inverse_lower(L[:, :half, :half])
        out[:, half:, half:] = second = _inverse_lower(L[:, half:, half:])
        np.matmul(-second, L[:, half:, :half] @ first, out=out[:, half:, :half])
    return out
