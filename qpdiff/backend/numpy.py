"""NumPy arrays."""

from __future__ import annotations

import contextvars
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import get_blas_funcs, get_lapack_funcs

from .base import Backend
from .threads import THREADS, single_threaded_blas

INVERTED = 24
"""Up to this size the Cholesky factors of a batch are inverted."""
SMALL = 10
"""Up to this size triangular matrices are inverted row by row, all problems at once."""
LARGE = 64
"""From this size on LAPACK's solve with one right-hand side takes longer than two of BLAS with a triangle."""
SOLVED = 192
"""From this size on to solve with a triangle takes less time than a product with its inverse, and to make that."""
FEW = 16
"""So few matrices take less time one after the other."""
WORTH_A_THREAD = 2**22
"""Bytes of a result from which on threads share in it."""


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

    def map(self, function, items: list, workers: int) -> list:
        """NumPy's loops release the interpreter lock, so that a thread a processor works on a chunk each."""
        if len(items) < 2 or workers < 2:
            return super().map(function, items, workers)
        with single_threaded_blas(), ThreadPoolExecutor(workers) as pool:
            # A copy of the context for each: it holds the caller's np.errstate.
            futures = [pool.submit(contextvars.copy_context().run, function, item) for item in items]
            return [future.result() for future in futures]

    def none(self, mask) -> bool:
        return not mask.any()

    def factor(self, M):
        try:
            L = np.linalg.cholesky(M)
        except np.linalg.LinAlgError:
            L = np.stack([_cholesky_or_nan(matrix) for matrix in M])
        diagonal = np.linalg.diagonal(L)
        positive = np.isfinite(diagonal).all(axis=-1, keepdims=True)
        if not positive.all():
            L = np.where(positive[:, :, None], L, np.eye(M.shape[-1], dtype=M.dtype))
        return (_inverse_lower(L) if _is_inverted(L) else L,), positive

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
        if L.shape[-1] >= LARGE:
            return _solve_lower(L, _solve_lower(L, r), transposed=True)
        out = np.empty_like(r)
        for i in range(r.shape[0]):
            out[i] = potrs(L[i].T, r[i], lower=0)[0]
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

    def outer(self, pairs):
        return self._outer_of_each(pairs) if pairs[0][1].shape[-1] >= LARGE else super().outer(pairs)

    def symmetric_outer(self, a, b):
        return self._outer_of_each([(a, b), (b, a)]) if a.shape[-1] >= LARGE else super().symmetric_outer(a, b)

    def _outer_of_each(self, pairs):
        """One problem after the other, so that what is added is still in the cache."""
        (first, other), *rest = pairs
        out = np.empty((len(first), first.shape[-1], other.shape[-1]), first.dtype)

        def fill(problems: slice):
            term = np.empty(out.shape[1:], out.dtype)
            for i in range(problems.start, problems.stop):
                np.multiply.outer(first[i], other[i], out=out[i])
                for a, b in rest:
                    out[i] += np.multiply.outer(a[i], b[i], out=term)

        workers = self.workers if out.nbytes >= WORTH_A_THREAD else 1
        edges = [len(out) * i // workers for i in range(workers + 1)]
        self.map(fill, [slice(*ends) for ends in itertools.pairwise(edges)], workers)
        return out

    def add_diagonal(self, M, diagonal):
        n = M.shape[-1]
        out = np.empty((max(len(M), len(diagonal)), n, n), dtype=M.dtype)
        out[...] = M
        out.reshape(len(out), n * n)[:, :: n + 1] += diagonal
        return out


def _cholesky_or_nan(M):
    try:
        return np.linalg.cholesky(M)
    except np.linalg.LinAlgError:
        return np.full_like(M, np.nan)


def _solve_lower(L, r, *, transposed=False):
    """L⁻¹ r or L⁻ᵀ r for as many vectors r as matrices L."""
    (trsv,) = get_blas_funcs(("trsv",), (L,))
    out = np.empty_like(r)
    for i in range(len(r)):
        # Lᵀ is what BLAS sees of a row-major L without a copy.
        out[i] = trsv(L[i].T, r[i], trans=0 if transposed else 1)
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
