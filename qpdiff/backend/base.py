"""Any library of the array API standard."""

from __future__ import annotations

import importlib
from collections.abc import Generator
from contextlib import nullcontext
from typing import Any

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
    launch_bound_bytes = 0
    """Size of the working set below which the number of calls, or of launched kernels, decides the time."""
    workers = 1
    """Chunks that are worked on at the same time."""
    traced = False
    """True where operations on arrays may be traced and compiled, so that no number decides what comes next."""

    def __init__(self, xp, device=None):
        self.xp = xp
        self.device = device

    @staticmethod
    def owns(value, xp) -> bool:
        """Return whether a value is an array of the namespace."""
        return array_api_compat.is_array_api_obj(value) and array_api_compat.array_namespace(value) is xp

    @staticmethod
    def device_of(array):
        """Return the device of an array, hashable; None where the library sees to that by itself."""
        return array_api_compat.device(array)

    @staticmethod
    def current_device(xp):
        """Return where arrays from the host go; None where the library or the backend sees to that by itself."""
        return None

    def __reduce__(self):
        return _restore, (type(self), self.xp.__name__, self.device)  # a module does not pickle

    @property
    def gpu(self) -> int | None:
        """The number of the NVIDIA GPU that the arrays are on; None where kernels of our own cannot work on them."""
        return None

    def stream(self) -> int:
        """Return the handle of the CUDA stream on which the library works now."""
        raise NotImplementedError

    def located(self, array) -> tuple[int, int, Any]:
        """Return where an array (B or 1, ...) is on a GPU, with the entries of each problem contiguous there.

        Returns
        -------
        address : int
        stride : int
            Numbers from one problem to the next, 0 where it is the same for all.
        owner : array
            The one whose memory it is: the array itself or a copy.
        """
        raise NotImplementedError

    def contiguous(self, array):
        """Return an array in C order, copied where it is not."""
        raise NotImplementedError

    @property
    def widest_float(self):
        """The widest floating point type of the library, in which residuals are computed."""
        return self.xp.float64

    def asarray(self, value, dtype=None):
        return self.xp.asarray(value, dtype=dtype, device=self.device)

    def to_host(self, array) -> Any:
        """Return the NumPy array of an array in the host's memory; None where the library, or the device, has none."""
        return None

    def full(self, shape, value, dtype):
        return self.xp.full(shape, value, dtype=dtype, device=self.device)

    def row_of(self, value: float, n: int, dtype):
        """Return a number n times, (1, n), which is not to be changed."""
        with self.context():  # where it overflows it is infinite
            return self.full((1, n), value, dtype)

    def empty(self, shape, dtype):
        return self.xp.empty(shape, dtype=dtype, device=self.device)

    def zeros_of_all(self, batch: int, n: int, dtype):
        """Return zeros (batch, n) that all problems share, as broadcasting makes them."""
        return self.xp.broadcast_to(self.full((1, n), 0.0, dtype), (batch, n))

    def eye(self, n, dtype):
        return self.xp.eye(n, dtype=dtype, device=self.device)

    def arange(self, stop):
        return self.xp.arange(stop, device=self.device)

    def map(self, function, items: list, workers: int) -> Generator:
        """Yield the function's value for each chunk of a batch, in order; closing the generator stops the work."""
        yield from map(function, items)

    def reuse_freed_memory(self) -> None:
        """Let the process use freed arrays again instead of giving them back to the system, where that takes a hint."""

    def context(self):
        """Return the context of all work on arrays, in which overflow, division by zero and NaN raise no warning."""
        return np.errstate(all="ignore")

    def no_grad(self):
        """Return a `context` in which the library also records no gradients."""
        return self.context()

    def reproducibly(self, dtype, products: int):
        """Return a context in which so many products of numbers do not depend on the number of threads."""
        return nullcontext()

    def while_loop(self, unfinished, body, carry: tuple, limit: int) -> tuple:
        """Apply ``carry = body(*carry)`` while the truth value ``unfinished(*carry)`` holds, at most `limit` times."""
        for _ in range(limit):
            if not bool(unfinished(*carry)):
                break
            carry = body(*carry)
        return carry

    def is_tracer(self, array) -> bool:
        """Return whether an array is a tracer without concrete values."""
        return False

    def warn_of_gradients(self, operands) -> None:
        """Warn of operands whose gradients the library records, which end in `qpdiff.solve_qp`."""

    def make_read_only(self, arrays) -> None:
        """Refuse changes of arrays in place, where the library has that; views that are made later refuse them too."""

    def known_all_false(self, mask) -> bool:
        """Return whether a mask, or numbers, are known to be all False, or 0, without a transfer to the host."""
        return False

    def count(self, mask, *others) -> tuple:
        """Count the True entries of a mask, and find whether each of the others has any, by one value for the host."""
        xp = self.xp
        code = xp.sum(xp.astype(mask, xp.int32))
        for other in others:
            code = 2 * code + xp.astype(xp.any(other), xp.int32)
        code, bits = int(code), reversed(range(len(others)))
        return code >> len(others), *(code >> bit & 1 == 1 for bit in bits)

    def factor(self, M):
        """Return F with M = F Fᵀ for each matrix of a stack, and whether each was positive definite, (B, 1)."""
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
        """Return `factor` of M + diag(d) for matrices (B or 1, n, n) and vectors d (B, n)."""
        return self.factor(M + self.eye(M.shape[-1], M.dtype) * diagonal[:, :, None])

    def pivots(self, factor):
        """Return the diagonal entries after the elimination of all other variables, or of those before in order.

        About 0 for one of them where M is singular.
        """
        return 1.0 / self.xp.sum(factor[0] ** 2, axis=-1)

    def solve(self, factor, r):
        """Return M⁻¹ r for vectors r (B, n)."""
        F = self.substitution(factor)
        return self.backward(F, self.forward(F, r))

    def substitution(self, factor):
        """Return what forward and backward substitution with a factor need: here F⁻¹ itself, (B or 1, n, n)."""
        return factor[0].mT

    def forward(self, F, r):
        """Solve F t = r by forward substitution: F⁻¹ r for vectors r (B, n), F from `substitution`."""
        return r @ F[0, :, :].mT if F.shape[0] == 1 else (F @ r[:, :, None])[:, :, 0]

    def backward(self, F, r):
        """Solve Fᵀ t = r by backward substitution: F⁻ᵀ r for vectors r (B, n)."""
        return r @ F[0, :, :] if F.shape[0] == 1 else (r[:, None, :] @ F)[:, 0, :]

    def forward_rows(self, F, K):
        """Solve by forward substitution for each row of matrices K (B or 1, k, n): K F⁻ᵀ."""
        return self.products(K, F.mT)

    def products(self, a, b):
        """Return the products of matrices (B or 1, k, n) and (B or 1, n, l)."""
        return a @ b

    def for_products(self, operands: dict) -> dict:
        """Return operands in a layout that products with them read without a copy."""
        return operands

    def gram(self, K):
        """Return a function of weights w (B, k) that gives Kᵀ diag(w) K, for matrices K (B or 1, k, n) that stay."""

        def weighted(weights):
            # A product of an array with its own transpose is a symmetric rank-k update to BLAS.
            S = K * self.xp.sqrt(weights)[:, :, None]
            return S.mT @ S

        return weighted

    def outer(self, pairs):
        """Return Σ a bᵀ over pairs of vectors (B, k) and (B, n)."""
        return self.xp.stack([a for a, _ in pairs], axis=-1) @ self.xp.stack([b for _, b in pairs], axis=-2)

    def symmetric_outer(self, a, b):
        """Return a bᵀ + b aᵀ for vectors (B, n), symmetric to the last bit."""
        half = self.outer([(a, b)])
        return half + self.xp.matrix_transpose(half)

    def clip(self, a, least=None, most=None):
        """Return the nearest values in an interval. (array-api-compat's clip indexes by masks, which halts a GPU.)"""
        a = a if least is None else self.xp.maximum(a, least)
        return a if most is None else self.xp.minimum(a, most)

    def dot(self, a, b):
        """Return aᵀb for vectors (B or 1, k), (B, 1)."""
        return self.xp.vecdot(a, b, axis=-1)[:, None]

    def total(self, a):
        """Return the sum of each vector (B, k), (B, 1)."""
        return self.xp.sum(a, axis=-1, keepdims=True)

    def largest(self, a):
        """Return the largest entry of each vector (B, k), 0 where there are none, (B, 1)."""
        return self.xp.max(a, axis=-1, keepdims=True) if a.shape[-1] else self.total(a)

    def norm(self, a):
        """Return the largest absolute value in each vector (B, k), (B, 1)."""
        return self.largest(self.xp.abs(a))

    def all_finite(self, a):
        """Return whether all entries of each vector (B, k) are finite, (B, 1)."""
        return self.xp.all(self.xp.isfinite(a), axis=-1, keepdims=True)


def _restore(kind, namespace: str, device) -> Backend:
    return kind(importlib.import_module(namespace), device)
