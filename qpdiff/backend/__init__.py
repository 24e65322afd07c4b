"""The array library: chosen by the arrays or by name, and the few operations the array API standard lacks.

A symmetric positive definite matrix M is factored as M = F Fᵀ. A *factor* is a tuple of arrays with the batch axis
first; only the class that made it reads it. Every matrix and every right-hand side carries one batch axis, of
length B or, where it is shared by the batch, of length 1.
"""

from .base import Backend
from .choice import Kind, Types, choose_backend, floating_types, from_host, kinds_of, read_dtype
from .numpy import NumPyBackend
from .threads import pool, single_threaded, single_threaded_blas

__all__ = [
    "Backend", "Kind", "NumPyBackend", "Types", "choose_backend", "floating_types", "from_host", "kinds_of", "pool",
    "read_dtype", "single_threaded", "single_threaded_blas",
]  # fmt: skip
