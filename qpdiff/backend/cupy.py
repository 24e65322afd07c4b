"""CuPy arrays."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from .base import Backend, _restore


class CuPyBackend(Backend):
    """CuPy arrays: Cholesky and triangular solves of cuSOLVER and cuBLAS, failures flagged on the device.

    The device is the number of a GPU; None is the current one.
    """

    chunk_bytes = 2 * 2**30
    launch_bound_bytes = 2**28

    @staticmethod
    def device_of(array):
        return array.device.id  # a `cupy.cuda.Device` has no hash

    @staticmethod
    def current_device(xp):
        if not xp.cuda.is_available():
            raise RuntimeError("backend='cupy' needs an NVIDIA GPU with its driver; CuPy finds none")
        return xp.cuda.runtime.getDevice()

    def __reduce__(self):
        # Without the device: an array goes to the current one where it is unpickled, as in another process.
        return _restore, (type(self), self.xp.__name__, None)

    @property
    def gpu(self) -> int | None:
        runtime = self.xp.cuda.runtime
        if runtime.is_hip:
            return None
        return runtime.getDevice() if self.device is None else self.device

    def stream(self) -> int:
        return self.xp.cuda.get_current_stream().ptr

    def located(self, array) -> tuple[int, int, Any]:
        if not (array.flags.c_contiguous or array[0].flags.c_contiguous):
            array = self.xp.ascontiguousarray(array)
        return array.data.ptr, array.strides[0] // array.itemsize if array.shape[0] > 1 else 0, array

    def contiguous(self, array):
        return self.xp.ascontiguousarray(array)

    def context(self):
        from cupyx import errstate

        stack = ExitStack()
        # CuPy works on the current GPU wherever the arrays are, and array-api-compat ignores the device of new ones.
        stack.enter_context(self.xp.cuda.Device(self.device))
        # The caller's setting may be to read the flags of every factorisation on the host, and to raise.
        stack.enter_context(errstate(linalg="ignore"))
        return stack

    def for_products(self, operands: dict) -> dict:
        with self.context():
            return {name: self.xp.ascontiguousarray(value) for name, value in operands.items()}

    def gram(self, K):
        # A batched matmul copies what is not contiguous, every time; so the transposes are made once.
        K, Kt = self.xp.ascontiguousarray(K), self.xp.ascontiguousarray(K.mT)
        return lambda weights: (Kt * weights[:, None, :]) @ K

    def dot(self, a, b):
        # array-api-compat's vecdot is a batch of matrix products, six operations.
        return self.xp.sum(a * b, axis=-1, keepdims=True)

    def factor(self, M):
        xp = self.xp
        # A stack goes to the routine for many small matrices, whatever its length; one matrix alone has its own.
        L = xp.linalg.cholesky(M[0, :, :])[None, :, :] if M.shape[0] == 1 else xp.linalg.cholesky(M)
        # What a failed matrix leaves behind is unspecified and its flag out of reach. But the rows of a factor are as
        # long as the diagonal of the matrix says, and NaN never is.
        diagonal, wanted = xp.linalg.diagonal(L), xp.linalg.diagonal(M)
        amiss = xp.abs(xp.sum(L * L, axis=-1) - wanted)
        positive = xp.all((diagonal > 0) & (amiss <= xp.finfo(M.dtype).eps ** 0.5 * wanted), axis=-1)
        return (xp.where(positive[:, None, None], L, self.eye(M.shape[-1], M.dtype)),), positive[:, None]

    def pivots(self, factor):
        return self.xp.linalg.diagonal(factor[0]) ** 2

    def solve(self, factor, r):
        (L,) = factor
        if L.shape[0] == 1:
            return _solve_lower(L, _solve_lower(L, r.T[None, :, :]), transposed=True)[0, :, :].T
        return _solve_lower(L, _solve_lower(L, r[:, :, None]), transposed=True)[:, :, 0]

    def substitution(self, factor):
        (L,) = factor
        eye = self.xp.broadcast_to(self.eye(L.shape[-1], L.dtype), L.shape)
        return self.xp.ascontiguousarray(_solve_lower(L, eye))  # the triangular solve returns columns


def _solve_lower(L, R, *, transposed=False):
    """Compute L⁻¹ R or L⁻ᵀ R for stacks of matrices of the same length."""
    from cupyx.scipy.linalg import solve_triangular

    if L.shape[0] == 1:  # the routine for one matrix, which reads it by columns
        return solve_triangular(L[0, :, :].T, R[0, :, :], lower=False, trans=int(not transposed))[None, :, :]
    return solve_triangular(L, R, lower=True, trans=int(transposed))
