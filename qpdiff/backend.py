"""The array library: chosen by the arrays or by name, and the few operations the array API standard lacks.

A symmetric positive definite matrix M is factored as M = F Fᵀ. A *factor* is a tuple of arrays with the batch axis
first; only the class that made it looks inside. Every matrix and every right-hand side carries one batch axis, of
length B or, where it is shared by the batch, of length 1.
"""

from __future__ import annotations

import contextvars
import importlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import array_api_compat
import numpy as np
from scipy.linalg import get_lapack_funcs

try:
    from threadpoolctl import ThreadpoolController
except ImportError:
    ThreadpoolController = None

_NAMESPACES = {
    "numpy": "array_api_compat.numpy",
    "cupy": "array_api_compat.cupy",
    "torch": "array_api_compat.torch",
    "jax": "jax.numpy",
}
THREADS = ContextVar(
    "THREADS", default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
)
"""How many threads to work with on NumPy arrays, one a processor unless `single_threaded` says otherwise."""
_EXTRAS = {"cupy": "cuda12 (or cuda13)", "torch": "torch", "jax": "jax"}


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

    def __init__(self, xp, device=None):
        self.xp = xp
        self.device = device

    def __reduce__(self):
        """By the name of the namespace, because a module does not pickle."""
        return _restore, (type(self), self.xp.__name__, self.device)

    @property
    def workers(self) -> int:
        """Chunks that are worked on at the same time."""
        return 1

    def asarray(self, value, dtype=None):
        return self.xp.asarray(value, dtype=dtype, device=self.device)

    def full(self, shape, value, dtype):
        return self.xp.full(shape, value, dtype=dtype, device=self.device)

    def eye(self, n, dtype):
        return self.xp.eye(n, dtype=dtype, device=self.device)

    def arange(self, stop):
        return self.xp.arange(stop, device=self.device)

    def map(self, function, items: list, workers: int) -> list:
        """The function's value for each chunk of a batch, in order."""
        return [function(item) for item in items]

    def none(self, mask) -> bool:
        """Whether a mask is known to have no True entry; False where that would take a transfer to the host."""
        return False

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

    def pivots(self, factor):
        """What is left of diagonal entries once other variables are eliminated: all others, or those before in order.

        About 0 for one of them where M is singular.
        """
        return 1.0 / self.xp.sum(factor[0] ** 2, axis=-1)

    def solve(self, factor, r):
        """M⁻¹ r for vectors r (B, n)."""
        (inverse,) = factor
        if inverse.shape[0] == 1:
            return r @ inverse[0, :, :] @ inverse[0, :, :].mT
        return (inverse @ (inverse.mT @ r[:, :, None]))[:, :, 0]

    def inverse(self, factor):
        """F⁻¹."""
        return factor[0].mT

    def add_diagonal(self, M, diagonal):
        """M + diag(d) for matrices (B or 1, n, n) and vectors d (B, n)."""
        return M + self.eye(M.shape[-1], M.dtype) * diagonal[:, :, None]


INVERTED = 24
"""Up to this size the Cholesky factors of a batch are inverted."""
SMALL = 10
"""Up to this size triangular matrices are inverted row by row, all problems at once."""
FEW = 16
"""So few matrices take less time one after the other."""


class NumPyBackend(Backend):
    """NumPy arrays, with LAPACK's Cholesky factorisation through NumPy and SciPy."""

    chunk_bytes = 48 * 2**20

    @property
    def workers(self) -> int:
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
            return super().solve((L.mT,), r)
        (potrs,) = get_lapack_funcs(("potrs",), (L,))
        if L.shape[0] == 1:
            return potrs(L[0].T, r.T, lower=0)[0].T
        out = np.empty_like(r)
        for i in range(r.shape[0]):
            out[i] = potrs(L[i].T, r[i], lower=0)[0]  # Lᵀ is what LAPACK sees of a row-major L without a copy
        return out

    def inverse(self, factor):
        (L,) = factor
        return L if _is_inverted(L) else _inverse_lower(L)

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


class CuPyBackend(Backend):
    """CuPy arrays: batched Cholesky and triangular solves of cuSOLVER and cuBLAS, failures flagged on the device."""

    chunk_bytes = 2 * 2**30

    def __reduce__(self):
        """Without the device: an array goes to the current one where it is unpickled, as in another process."""
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


# ---- threads


@cache
def _controller():
    return ThreadpoolController()


_lock = threading.Lock()
_users = 0
_limit: Any = None


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """One thread for each call of BLAS, from when the first of any Python threads enters until the last has left."""
    global _users, _limit
    if ThreadpoolController is None:
        yield
        return
    with _lock:
        if _users == 0:
            _limit = _controller().limit(limits=1, user_api="blas")
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _limit.restore_original_limits()


@contextmanager
def single_threaded() -> Iterator[None]:
    """One thread for what is called in this context, as befits a task of a scheduler that runs one for each thread."""
    token = THREADS.set(1)
    try:
        with single_threaded_blas():
            yield
    finally:
        THREADS.reset(token)


# ---- the choice


def _restore(kind, namespace: str, device):
    return kind(importlib.import_module(namespace), device)


def choose_backend(operands, name=None):
    """The backend for the caller's operands, and the operands as its arrays.

    Parameters
    ----------
    operands : dict
        Arrays, lists or scalars by name; none is None.
    name : str, optional
        "numpy", "cupy", "torch" or "jax" to move the data there. By default the operands stay in their library; lists
        and scalars go where the arrays are, and to NumPy where there is no array.

    Raises
    ------
    TypeError, ValueError
        For an operand that is no array, for operands of several libraries or devices, for an unknown name.
    ImportError
        For a library that is not installed; the message names the extra to install.
    """
    if name is not None:
        xp = _namespace(name)
        backend = _CLASSES.get(name, Backend)(xp)
        return backend, {key: _move(key, value, xp, name) for key, value in operands.items()}
    arrays = {
        key: value for key, value in operands.items() if not isinstance(value, (int, float, list, tuple, np.generic))
    }
    if all(type(value) is np.ndarray for value in arrays.values()):  # what comes next would take most of a small solve
        backend = _numpy_backend()
        return backend, {key: from_host(key, value, backend) for key, value in operands.items()}
    namespaces, devices = {}, {}
    for key, value in arrays.items():
        try:
            namespaces[key] = array_api_compat.array_namespace(value)
        except TypeError as error:
            raise TypeError(
                f"{key} is a {type(value).__module__}.{type(value).__name__}; expected an array of a library that "
                "follows the array API standard, a list or a number"
            ) from error
        devices[key] = array_api_compat.device(value)
    first = next(iter(arrays))
    for key in arrays:
        if namespaces[key] is not namespaces[first]:
            library, other = (namespaces[k].__name__.removeprefix("array_api_compat.") for k in (key, first))
            raise TypeError(
                f"{key} is an array of {library} but {first} one of {other}; convert one of them, or pass backend= to "
                "move all"
            )
        if devices[key] != devices[first]:
            raise ValueError(
                f"{key} is on device {devices[key]} but {first} on {devices[first]}; move all to one device"
            )
    if array_api_compat.is_numpy_namespace(namespaces[first]):
        backend = _numpy_backend()
        return backend, {key: from_host(key, value, backend) for key, value in operands.items()}
    if array_api_compat.is_cupy_namespace(namespaces[first]):
        backend = CuPyBackend(namespaces[first], devices[first])
    else:
        backend = Backend(namespaces[first], devices[first])
    return backend, {key: value if key in arrays else from_host(key, value, backend) for key, value in operands.items()}


@cache
def _numpy_backend() -> NumPyBackend:
    return NumPyBackend(importlib.import_module(_NAMESPACES["numpy"]))


def working_dtype(backend, arrays, operands, dtype=None):
    """The floating point type to compute in: the caller's, else float32 if every floating array is, else float64."""
    xp = backend.xp
    floating = set()
    for key, value in arrays.items():
        if value.dtype in (xp.float32, xp.float64) and hasattr(operands[key], "dtype"):
            floating.add(value.dtype)
            continue
        if not xp.isdtype(value.dtype, ("real floating", "integral", "bool")):
            raise TypeError(f"{key} has dtype {_name(value.dtype)}; expected real numbers")
        if xp.isdtype(value.dtype, "real floating") and hasattr(operands[key], "dtype"):
            if dtype is None:
                raise TypeError(
                    f"{key} has dtype {_name(value.dtype)}; expected float32 or float64, or pass dtype= to convert"
                )
            floating.add(value.dtype)
    if dtype is None:
        return xp.float32 if floating and all(kind == xp.float32 for kind in floating) else xp.float64
    wanted = _name(dtype)
    if wanted not in ("float32", "float64"):
        raise ValueError(f"dtype is {dtype!r}; expected 'float32' or 'float64'")
    return getattr(xp, wanted)


def _name(dtype):
    """What a floating point type is called, without its library: torch.float32, <class 'numpy.float32'>, ..."""
    return str(dtype).rsplit(".", 1)[-1].strip("'>")


def _namespace(name):
    if not isinstance(name, str) or name not in _NAMESPACES:
        raise ValueError(f"backend is {name!r}; expected one of {', '.join(map(repr, _NAMESPACES))} or None")
    try:
        return importlib.import_module(_NAMESPACES[name])
    except ImportError as error:
        raise ImportError(
            f"backend={name!r} needs a package that is missing: pip install 'qpdiff[{_EXTRAS[name]}]'"
        ) from error


def from_host(key, value, backend):
    """A list, a number or a NumPy array of any kind as a plain array of the backend; a copy only where it must be."""
    if type(value) is np.ndarray and value.dtype.kind == "f" and value.dtype.isnative:
        return backend.asarray(value)
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{key} is a masked array; expected one without a mask, so fill the masked entries first")
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists, and lists of arrays of another device
        raise ValueError(f"{key} is not a regular array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{key} has dtype {array.dtype}; expected real numbers")
    return backend.asarray(array.astype(array.dtype.newbyteorder("="), copy=False))


def _move(key, value, xp, name):
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack__"):
        return from_host(key, value, Backend(xp))
    if array_api_compat.is_array_api_obj(value) and array_api_compat.array_namespace(value) is xp:
        return value
    try:
        return xp.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        kind = f"{type(value).__module__}.{type(value).__name__}"
        raise TypeError(f"{key} is a {kind}, which does not move to backend={name!r}: {error}") from error


_CLASSES = {"numpy": NumPyBackend, "cupy": CuPyBackend}
