"""JAX arrays, concrete or traced."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import cache

import jax
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular

from .base import Backend


class JAXBackend(Backend):
    """JAX arrays: every loop is one of XLA's, so that a solve compiles as a whole and runs on any device of JAX's."""

    traced = True

    @staticmethod
    def device_of(array):
        return None  # a traced array is nowhere yet

    @property
    def widest_float(self):
        return self.xp.float64 if jax.config.jax_enable_x64 else self.xp.float32

    def context(self):
        return nullcontext()

    def to_host(self, array):
        return None if self.is_tracer(array) else np.asarray(array)

    def is_tracer(self, array) -> bool:
        return isinstance(array, jax.core.Tracer)

    def while_loop(self, unfinished, body, carry: tuple, limit: int) -> tuple:
        def not_over(counted):
            count, carry = counted
            return (count < limit) & unfinished(*carry)

        return jax.lax.while_loop(not_over, lambda counted: (counted[0] + 1, body(*counted[1])), (0, carry))[1]

    def cond(self, condition, yes, no):
        """Return the value of one of two functions without arguments, whose results have the same shapes."""
        return jax.lax.cond(condition, yes, no)

    @staticmethod
    @cache
    def jit(function):
        """Compile a function whose last two arguments are hashable and known when it is traced."""
        return jax.jit(function, static_argnums=(2, 3))

    def factor(self, M):
        xp = self.xp
        L = jax.lax.linalg.cholesky(M, symmetrize_input=False)  # NaN where it fails
        positive = xp.all(xp.isfinite(xp.linalg.diagonal(L)), axis=-1)
        return (xp.where(positive[:, None, None], L, self.eye(M.shape[-1], M.dtype)),), positive[:, None]

    def pivots(self, factor):
        return self.xp.linalg.diagonal(factor[0]) ** 2

    def solve(self, factor, r):
        (L,) = factor
        if L.shape[0] == 1:
            return cho_solve((L[0], True), r.T).T
        return cho_solve((L, True), r[:, :, None])[:, :, 0]

    def substitution(self, factor):
        (L,) = factor
        return solve_triangular(L, self.xp.broadcast_to(self.eye(L.shape[-1], L.dtype), L.shape), lower=True)


class BufferBackend(Backend):
    """The buffers on an NVIDIA GPU that a callback of JAX's gets: they have an address and a shape, and no operations.

    Parameters
    ----------
    gpu : int
        The number of the GPU.
    stream : int
        The handle of the stream that orders the callback with all other work.
    """

    def __init__(self, gpu: int, stream: int = 0):
        super().__init__(np)
        self._gpu, self._stream = gpu, stream

    @classmethod
    def of(cls, buffer, context) -> BufferBackend:
        """Return the backend of a callback's buffers and its context."""
        return cls(buffer.__dlpack_device__()[1], context.stream)

    @property
    def gpu(self) -> int:
        return self._gpu

    def stream(self) -> int:
        return self._stream

    def located(self, array):
        own = array.shape[0] > 1
        return array.__cuda_array_interface__["data"][0], math.prod(array.shape[1:]) if own else 0, array

    def contiguous(self, array):
        return array
