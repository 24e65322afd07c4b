"""Any library of the array API standard."""

from __future__ import annotations

import importlib
from collections.abc import Generator
from contextlib import nullcontext

import array_api_compat
import numpy as np


class Backend:
    """Any library of the array API standard, with nothing but the standard.

    The standard's ``cholesky`` may raise for a whole stack when one matrix fails, and it has no triangular solve, so
    the factorisation is the eigendecomposition of the matrix scaled to unit diagonal: M = D V Λ Vᵀ D. It is slower than
    Cholesky, never fails, and keeps the accuracy that badly scaled positive definite matrices have under Cholesky.

    Parameters
    ----------
    xp : namespace
        The array namespace.
    device : device or None
        Where new arrays go.
    """

    chunk_bytes = 64 * 2**20
    """Working memory that the chunks in work may take together; large batches are solved chunk by chunk."""
    idle_bytes = 0
    """Bytes in work below which the device has done a call before the next one comes."""
    workers = 1
    """Chunks that are worked on at the same time."""
    traced = False
    """Whether what happens to arrays may be recorded and compiled, so that no number decides what comes next."""

    def __init__(self, xp, device=None):
        self.xp = xp
        self.device = device

    @staticmethod
    def device_of(array):
        """Where an array is, hashable; None where the library sees to that by itself."""
        return array_api_compat.device(array)

    @staticmethod
    def current_device(xp):
        """Where arrays from the host go; None where the library or the backend sees to that by itself."""
        return None

    def __reduce__(self):
        return _restore, (type(self), self.xp.__name__, self.device)  # a module does not pickle

    @property
    def exact(self):
        """The floating point type in which residuals are computed."""
        return self.xp.float64

    def asarray(self, value, dtype=None):
        return self.xp.asarray(value, dtype=dtype, device=self.device)

    def full(self, shape, value, dtype):
        return self.xp.full(shape, value, dtype=dtype, device=self.device)

    def zeros_of_all(self, batch: int, n: int, dtype):
        """Zeros (batch, n) that all problems share, as broadcasting makes them."""
        return self.xp.broadcast_to(self.full((1, n), 0.0, dtype), (batch, n))

    def eye(self, n, dtype):
        return self.xp.eye(n, dtype=dtype, device=self.device)

    def arange(self, stop):
        return self.xp.arange(stop, device=self.device)

    def map(self, function, items: list, workers: int) -> Generator:
        """The function's value for each chunk of a batch, in order, as they come; to close it stops the work."""
        yield from map(function, items)

    def context(self):
        """The context of all work on arrays, in which overflow, division by zero and NaN pass without a word."""
        return np.errstate(all="ignore")

    def quietly(self):
        """The context of work that is not to be differentiated by the library itself."""
        return self.context()

    def reproducibly(self, dtype, products: int):
        """The context of work with so many products of numbers whose results the number of threads must not change."""
        return nullcontext()

    def while_loop(self, unfinished, body, carry: tuple, limit: int) -> tuple:
        """Apply ``carry = body(*carry)`` while the truth value ``unfinished(*carry)`` holds, at most `limit` times."""
        for _ in range(limit):
            if not bool(unfinished(*carry)):
                break
            carry = body(*carry)
        return carry

    def abstract(self, array) -> bool:
        """Whether an array stands for numbers that are not there yet."""
        return False

    def none(self, mask) -> bool:
        """Whether a mask is known to have no True entry; False where that would take a transfer to the host."""
        return False

    def count(self, mask, *others) -> tuple:
        """How many problems a mask names and whether each of the others names any, in one value for the host."""
        xp = self.xp
        code = xp.sum(xp.astype(mask, xp.int32))
        for other in others:
            code = 2 * code + xp.astype(xp.any(other), xp.int32)
        code, bits = int(code), reversed(range(len(others)))
        return code >> len(others), *(code >> bit & 1 == 1 for bit in bits)

    def factor(self, M):
        """F with M = F Fᵀ for each matrix of a stack, and whether each was positive definite, shape (B, 1)."""
        xp = self.xp
        diagonal = xp.linalg.diagonal(M)
        positive = xp.all(xp.isfinite(M), axis=(-2, -1)) & xp.all(diagonal > 0, axis=-1)
        one = xp.ones_like(diagonal)
        scale = xp.sqrt(xp.where(positive[:, None], diagonal, one))
        eye = self.eye(M.shape[-1], M.dtype)
        unit = xp.where(positive[:, None, None], M / scale[:, :, None] / scale[:, None, :], eye)
        values, vectors = xp.linalg.eigh(unit)
        positive = positive & xp.all(values > 0, axis=-1)
        values = xp.where(positive[:, None], values, one)
        return (vectors / xp.sqrt(values)[:, None, :] / scale[:, :, None],), positive[:, None]

    def factor_sum(self, M, diagonal):
        """`factor` of M + diag(d) for matrices (B or 1, n, n) and vectors d (B, n)."""
        return self.factor(M + self.eye(M.shape[-1], M.dtype) * diagonal[:, :, None])

    def pivots(self, factor):
        """What is left of diagonal entries once other variables are eliminated: all others, or those before in order.

        About 0 for one of them where M is singular.
        """
        return 1.0 / self.xp.sum(factor[0] ** 2, axis=-1)

    def solve(self, factor, r):
        """M⁻¹ r for vectors r (B, n)."""
        root = self.root(factor)
        return self.unwhiten(root, self.whiten(root, r))

    def root(self, factor):
        """What is kept of a factor F to multiply by F⁻¹: F⁻¹ itself, (B or 1, n, n)."""
        return factor[0].mT

    def whiten(self, root, r):
        """F⁻¹ r for vectors r (B, n)."""
        return r @ root[0, :, :].mT if root.shape[0] == 1 else (root @ r[:, :, None])[:, :, 0]

    def unwhiten(self, root, r):
        """F⁻ᵀ r for vectors r (B, n)."""
        return r @ root[0, :, :] if root.shape[0] == 1 else (r[:, None, :] @ root)[:, 0, :]

    def whiten_rows(self, root, K):
        """K F⁻ᵀ for matrices K (B or 1, k, n)."""
        return self.products(K, root.mT)

    def products(self, a, b):
        """The products of matrices (B or 1, k, n) and (B or 1, n, l)."""
        return a @ b

    def for_products(self, operand):
        """An operand in a layout that products with it read without a copy."""
        return operand

    def gram(self, K):
        """Kᵀ diag(w) K as a function of weights w (B, k), for matrices K (B or 1, k, n) that stay."""

        def weighted(weights):
            # A product of an array with its own transpose is a symmetric rank-k update to BLAS.
            S = K * self.xp.sqrt(weights)[:, :, None]
            return S.mT @ S

        return weighted

    def outer(self, pairs):
        """Σ a bᵀ over pairs of vectors (B, k) and (B, n)."""
        return self.xp.stack([a for a, _ in pairs], axis=-1) @ self.xp.stack([b for _, b in pairs], axis=-2)

    def symmetric_outer(self, a, b):
        """The sum a bᵀ + b aᵀ for vectors (B, n), symmetric to the last bit."""
        half = self.outer([(a, b)])
        return half + self.xp.matrix_transpose(half)

    def clip(self, a, least=None, most=None):
        """The nearest values in an interval. (array-api-compat's clip indexes by masks, which halts a GPU.)"""
        a = a if least is None else self.xp.maximum(a, least)
        return a if most is None else self.xp.minimum(a, most)

    def dot(self, a, b):
        """aᵀb for vectors (B or 1, k), (B, 1)."""
        return self.xp.vecdot(a, b, axis=-1)[:, None]

    def total(self, a):
        """The sum of each vector (B, k), (B, 1)."""
        return self.xp.sum(a, axis=-1, keepdims=True)

    def largest(self, a):
        """The largest entry of each vector (B, k), 0 where there are none, (B, 1)."""
        return self.xp.max(a, axis=-1, keepdims=True) if a.shape[-1] else self.total(a)

    def norm(self, a):
        """The largest absolute value in each vector (B, k), (B, 1)."""
        return self.largest(self.xp.abs(a))

    def all_finite(self, a):
        """Whether all entries of each vector (B, k) are finite, (B, 1)."""
        return self.xp.all(self.xp.isfinite(a), axis=-1, keepdims=True)


def _restore(kind, namespace: str, device) -> Backend:
    return kind(importlib.import_module(namespace), device)
