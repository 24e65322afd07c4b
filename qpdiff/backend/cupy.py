"""CuPy arrays."""

from __future__ import annotations

from .base import Backend, _restore


class CuPyBackend(Backend):
    """CuPy arrays: batched Cholesky and triangular solves of cuSOLVER and cuBLAS, failures flagged on the device."""

    chunk_bytes = 2 * 2**30

    def __reduce__(self):
        # Without the device: an array goes to the current one where it is unpickled, as in another process.
        return _restore, (type(self), self.xp.__name__, None)

    def factor(self, M):
        xp = self.xp
        L = xp.linalg.cholesky(M)
        # A failed matrix leaves unspecified numbers behind, so look at all of the factor's diagonal and at NaN.
        diagonal = xp.linalg.diagonal(L)
        positive = xp.all(xp.isfinite(diagonal) & (diagonal > 0), axis=-1) & xp.all(xp.isfinite(L), axis=(-2, -1))
        eye = self.eye(M.shape[-1], M.dtype)
        return (xp.where(positive[:, None, None], xp.tril(L), eye),), positive[:, None]

    def pivots(self, factor):
        return self.xp.linalg.diagonal(factor[0]) ** 2

    def solve(self, factor, r):
        (L,) = factor
        R = r.T[None] if L.shape[0] == 1 else r[:, :, None]
        out = self._triangular(L, self._triangular(L, R, trans=0), trans=1)
        return out[0].T if L.shape[0] == 1 else out[:, :, 0]

    def inverse(self, factor):
        (L,) = factor
        eye = self.eye(L.shape[-1], L.dtype)
        return self._triangular(L, self.xp.broadcast_to(eye, L.shape).copy(), trans=0)

    @staticmethod
    def _triangular(L, R, trans):
        from cupyx.scipy.linalg import solve_triangular

        return solve_triangular(L, R, lower=True, trans=trans, check_finite=False)
