"""NumPy arrays."""

from __future__ import annotations

import contextvars
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from .base import Backend
from .threads import THREADS, pool, single_threaded_blas

LARGE = 64
"""Size from which on the matrices of a batch take less time one after the other."""
FORWARD, BACKWARD = 1, 0
"""Transpose the triangle that BLAS sees, which is Lᵀ, or not."""
SHORT = 32
"""Entries up to which a row counts as short."""
ITEMS_PER_THREAD = 4
"""Work items for each thread, so that a thread that begins late has less to do."""
ONE_THREAD_PRODUCTS = 2**18
"""Products of numbers up to which OpenBLAS wakes no threads."""
THREAD_OPERATIONS = 2.5e6
"""Operations of BLAS and LAPACK on a stack that are worth waking a thread for."""


@cache
def raise_mmap_threshold() -> None:
    """Allocate and free 32 MiB, once: by that glibc raises its dynamic mmap threshold (mallopt(3), M_MMAP_THRESHOLD).

    It then uses freed memory of up to twice this size again. Else it gives the arrays of an iteration back to the
    system, which clears every page anew: more than a third of the time of some solves.
    """
    np.empty(2**25 - 2**13, np.uint8)


_NOTHING = nullcontext()


class _Substitution(NamedTuple):
    """Hold L⁻¹ where the batch shares it, else the triangles."""

    inverse: Any
    triangles: Any


class NumPyBackend(Backend):
    """NumPy arrays, with LAPACK's Cholesky factorisation through NumPy and SciPy."""

    chunk_bytes = 56 * 2**20
    launch_bound_bytes = 2**21

    @property
    def workers(self):
        return THREADS.get()

    def asarray(self, value, dtype=None):
        return np.asarray(value, dtype=dtype)

    def full(self, shape, value, dtype):
        return np.full(shape, value, dtype)

    zeros_of_all = lru_cache(maxsize=16)(Backend.zeros_of_all)  # read-only, and a good part of a small solve to make

    def _read_only_row(self, value: float, n: int, dtype):
        row = super().row_of(value, n, dtype)
        row.setflags(write=False)
        return row

    row_of = lru_cache(maxsize=16)(_read_only_row)

    def make_read_only(self, arrays) -> None:
        for array in arrays:
            if array.size:  # an engine may use one empty array for all calls
                array.setflags(False)  # the argument by position: its name takes as long as the call

    def reuse_freed_memory(self) -> None:
        raise_mmap_threshold()

    def map(self, function, items: list, workers: int) -> Generator:
        """Work on the chunks on one thread a processor each: NumPy's loops release the interpreter lock."""
        if len(items) < 2 or workers < 2:
            yield from super().map(function, items, workers)
            return
        with single_threaded_blas(), ThreadPoolExecutor(workers) as threads:
            try:
                futures = [threads.submit(_on_one_thread(function), item) for item in items]
            except RuntimeError:  # no memory for a thread
                threads.shutdown(cancel_futures=True)
                yield from super().map(function, items, 1)
                return
            try:
                for future in futures:
                    yield future.result()
            finally:
                threads.shutdown(cancel_futures=True)

    def reproducibly(self, dtype, products: int):
        # In float32 what the threads of BLAS add up in another order decides where the iteration ends.
        return single_threaded_blas() if products > ONE_THREAD_PRODUCTS and dtype == np.float32 else _NOTHING

    def _work_items(self, count: int, operations: float) -> list[slice]:
        """Divide a stack of so many into work items, for as many threads as the operations on it are worth."""
        threads = min(self.workers, count, int(operations / THREAD_OPERATIONS))
        items = min(ITEMS_PER_THREAD * threads, count) if threads > 1 else 1
        return [slice(count * i // items, count * (i + 1) // items) for i in range(items)]

    def _on_threads(self, function, items: list[slice]) -> None:
        """Call a function for each work item of a stack, on as many threads as help.

        It is for what releases the interpreter lock for long. Whole chunks on threads are better only where all of a
        step does so: to hand the lock on takes longer than an operation on small arrays.
        """
        left = iter(items)

        def work():
            for item in left:  # that no other thread has taken
                function(item)

        threads = -(-len(items) // ITEMS_PER_THREAD)
        if threads == 1:
            work()
            return
        with single_threaded_blas():
            helpers: list[Future] = []
            with suppress(RuntimeError):  # no memory for a thread: with fewer
                helpers += (pool().submit(_on_one_thread(work)) for _ in range(threads - 1))
            work()
            for helper in helpers:
                if not helper.cancel():  # it has begun
                    helper.result()

    def known_all_false(self, mask) -> bool:
        return np.count_nonzero(mask) == 0

    def count(self, mask, *others) -> tuple:
        return np.count_nonzero(mask), *(bool(other.any()) for other in others)

    # NumPy reduces row by row, which for short rows takes longer than to copy them to columns, or to ask BLAS.

    def total(self, a):
        return np.vecdot(a, _constant(a.shape[-1], 1.0, a.dtype))[:, None]

    def largest(self, a):
        if not 0 < a.shape[-1] <= SHORT < a.shape[0]:
            return super().largest(a)
        return np.maximum.reduce(a.T.copy(), axis=0)[:, None]

    def all_finite(self, a):
        return np.vecdot(a, _constant(a.shape[-1], 0.0, a.dtype))[:, None] == 0.0  # 0·∞ is NaN

    def factor(self, M):
        return self._factor(M.shape, M.dtype, lambda item: M[item])

    def factor_sum(self, M, diagonal):
        count, n = diagonal.shape

        def sums(item: slice):
            out = np.array(np.broadcast_to(M[item] if len(M) > 1 else M, (item.stop - item.start, n, n)), order="C")
            out.reshape(-1, n * n)[:, :: n + 1] += diagonal[item]
            return out

        return self._factor((count, n, n), M.dtype, sums)

    def _factor(self, shape, dtype, matrices):
        """Factor the matrices of work items: L, where it is small under a row of zeros, (B, n + 1, n)."""
        count, n = shape[:2]
        above, items = int(n < LARGE), self._work_items(count, count * n**3 / 3)
        if above or len(items) > 1:
            triangles = np.empty((count, above + n, n), dtype)
            triangles[:, :above] = 0.0

            def fill(item: slice):
                triangles[item, above:] = _cholesky_or_nan(matrices(item))

            self._on_threads(fill, items)
        else:
            triangles = _cholesky_or_nan(matrices(items[0]))
        L = _lower(triangles)
        positive = self.all_finite(np.linalg.diagonal(L))
        if not positive.all():
            L[~positive[:, 0]] = np.eye(n, dtype=dtype)
        return (triangles,), positive

    def pivots(self, factor):
        return np.linalg.diagonal(_lower(factor[0])) ** 2

    def solve(self, factor, r):
        (triangles,) = factor
        if len(triangles) == 1:
            return _lapack("potrs", triangles.dtype)(_lower(triangles)[0].T, r.T, lower=0)[0].T
        return _substitute(triangles, r, FORWARD, BACKWARD)

    def substitution(self, factor):
        (triangles,) = factor
        if len(triangles) > 1:
            return _Substitution(None, triangles)
        return _Substitution(_lapack("trtri", triangles.dtype)(_lower(triangles)[0].T, lower=0)[0].T[None], None)

    def forward(self, F, r):
        return super().forward(F.inverse, r) if F.triangles is None else _substitute(F.triangles, r, FORWARD)

    def backward(self, F, r):
        return super().backward(F.inverse, r) if F.triangles is None else _substitute(F.triangles, r, BACKWARD)

    def forward_rows(self, F, K):
        if F.triangles is None:
            return super().forward_rows(F.inverse, K)
        out = np.array(np.broadcast_to(K, (len(F.triangles), *K.shape[1:])), order="C")
        trsm = _blas("trsm", out.dtype)
        with single_threaded_blas():  # SciPy's BLAS has threads of its own, for which NumPy's would have to make room
            for L, rows in zip(_lower(F.triangles), out, strict=True):
                trsm(1.0, L.T, rows.T, trans_a=1, overwrite_b=True)
        return out

    def products(self, a, b):
        out = np.empty((max(len(a), len(b)), a.shape[-2], b.shape[-1]), a.dtype)

        def fill(item: slice):
            np.matmul(a if len(a) == 1 else a[item], b if len(b) == 1 else b[item], out=out[item])

        self._on_threads(fill, self._work_items(len(out), out.size * a.shape[-1]))
        return out

    def outer(self, pairs):
        if pairs[0][1].shape[-1] >= LARGE:
            return self._outer_of_each(pairs)
        if len(pairs) == 1:  # for which matmul takes several times as long as for two
            return np.einsum("bi,bj->bij", *pairs[0])
        return super().outer(pairs)

    def symmetric_outer(self, a, b):
        return self._outer_of_each([(a, b), (b, a)]) if a.shape[-1] >= LARGE else super().symmetric_outer(a, b)

    def _outer_of_each(self, pairs):
        """Add up the products of one problem after the other, so that what is added is still in the cache."""
        (first, other), *rest = pairs
        out = np.empty((len(first), first.shape[-1], other.shape[-1]), first.dtype)

        def fill(item: slice):
            term = np.empty(out.shape[1:], out.dtype)
            for i in range(item.start, item.stop):
                np.multiply.outer(first[i], other[i], out=out[i])
                for a, b in rest:
                    out[i] += np.multiply.outer(a[i], b[i], out=term)

        self._on_threads(fill, self._work_items(len(out), 10 * out.size))  # by the time it takes
        return out


def _on_one_thread(function):
    """Bind a function to a copy of the context, with np.errstate as it is; what it calls wakes no threads."""
    context = contextvars.copy_context()
    context.run(THREADS.set, 1)
    return partial(context.run, function)


def _cholesky_or_nan(M):
    try:
        return np.linalg.cholesky(M)
    except np.linalg.LinAlgError:
        return np.stack([_cholesky_or_nan(matrix) for matrix in M]) if M.ndim > 2 else np.full_like(M, np.nan)


def _lower(triangles):
    """Return the factors L without what is above them."""
    return triangles[:, -triangles.shape[2] :]


def _substitute(triangles, r, *directions):
    """Compute L⁻¹ r (FORWARD) or L⁻ᵀ r (BACKWARD), or one after the other, for as many vectors as triangles.

    Set on the diagonal of one matrix the triangles make a banded one. To BLAS, which reads by columns, it is Lᵀ, and a
    column of the band, up to the diagonal, is what lies in memory since the diagonal entry of the column before: the
    zeros beside L, then a row of it. So a batch of small triangles takes one call.
    """
    count, n = r.shape
    out = np.array(r, order="C")
    if n < LARGE:
        tbsv, band, x = _blas("tbsv", out.dtype), triangles.reshape(count * n, n + 1).T, out.reshape(-1)
        for direction in directions:
            tbsv(n, band, x, trans=direction, overwrite_x=1)
        if np.isfinite(out).all():
            return out
        out[...] = r  # what is not finite does not stay in its problem where it is multiplied by zeros
    trsv = _blas("trsv", out.dtype)
    for L, x in zip(_lower(triangles), out, strict=True):
        for direction in directions:
            trsv(L.T, x, trans=direction, overwrite_x=1)
    return out


@lru_cache(maxsize=16)
def _constant(n: int, value: float, dtype):
    return np.full(n, value, dtype)


@cache
def _blas(name: str, dtype):
    from scipy.linalg import get_blas_funcs  # at first use, because the import starts threads

    return get_blas_funcs((name,), dtype=dtype)[0]


@cache
def _lapack(name: str, dtype):
    from scipy.linalg import get_lapack_funcs

    return get_lapack_funcs((name,), dtype=dtype)[0]
