"""BLAS and LAPACK for compiled code, on matrices that lie row by row in memory.

The functions are the ones SciPy is linked with, which its Cython modules export. They are bound by a name of ours that
is registered with the linker whenever this module is imported: that way compiled code that comes from Numba's cache on
disk finds them in a later process, where they have another address.

BLAS takes matrices that lie column by column, so to it every matrix here is its transpose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import get_cython_function_address, intrinsic

INTEGER, SCALAR, ARRAY, OUTCOME, VALUE = "isaov"
OPTIONS: Any = {"nogil": True, "error_model": "numpy", "_nrt": False}
"""Nothing is allocated and no references are counted, which would cost more than the arithmetic on small arrays."""
_INNER: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
jit = njit(**OPTIONS, **_INNER, fastmath={"reassoc", "contract", "nsz"})
"""For functions that compiled code calls. Sums may be reordered, which vectorises them; NaN and infinity keep their
meaning."""
hot = njit(**OPTIONS, **_INNER, fastmath={"reassoc", "contract", "nsz"}, forceinline=True)
"""The same for functions of every iteration that take named tuples, which a call passes entry by entry."""
entry = njit(**OPTIONS, cache=True)
"""For functions that Python calls; they are kept on disk with all that they call."""
inline = njit(**OPTIONS, inline="always")
"""For functions that return an array, which without counting references must be part of their caller."""

_SMALL = 24
"""Up to this size loops are faster than the library."""
_SYRK = 96
"""Up to this size a product of matrices takes less time than the half of it that a symmetric one needs."""
_PREFIX = {types.float64: "d", types.float32: "s"}


def _fortran(library: str, name: str, kinds: str):
    """A function of BLAS or LAPACK, for the floating point type of the first array that it is called with.

    Each letter of `kinds` says what an argument of the Fortran function is: i and s an integer and a scalar, passed by
    value here, a an array whose first entry is meant, o the outcome, which is no argument but the value here, and a
    capital letter itself. A function of Fortran that has a value starts with v.
    """
    for prefix in _PREFIX.values():
        address = get_cython_function_address(f"scipy.linalg.cython_{library}", prefix + name)
        binding.add_symbol(f"qpdiff_{prefix}{name}", address)
    taken = [kind for kind in kinds if kind in (INTEGER, SCALAR, ARRAY)]

    @intrinsic
    def call(typing_context, args):
        real = next(arg.dtype for arg, kind in zip(args, taken, strict=True) if kind == ARRAY)
        result = types.intc if OUTCOME in kinds else real if VALUE in kinds else types.void

        def generate(context, builder, signature, arguments):
            values = iter(zip(cgutils.unpack_tuple(builder, arguments[0]), args, strict=True))
            pointers, outcome = [], None
            for kind in kinds[VALUE in kinds :]:
                if kind == OUTCOME:
                    outcome = cgutils.alloca_once(builder, ir.IntType(32))
                    pointers.append(outcome)
                elif kind not in taken:
                    letter = ir.Constant(ir.IntType(8), ord(kind))
                    pointers.append(cgutils.alloca_once_value(builder, letter))
                else:
                    value, kind_of = next(values)
                    if kind == ARRAY:
                        array = context.make_array(kind_of)(context, builder, value)
                        pointers.append(array.data)
                    else:
                        wanted = types.intc if kind == INTEGER else real
                        pointers.append(
                            cgutils.alloca_once_value(builder, context.cast(builder, value, kind_of, wanted))
                        )
            byte = ir.IntType(8).as_pointer()
            pointers = [builder.bitcast(pointer, byte) for pointer in pointers]
            returned = context.get_value_type(real) if VALUE in kinds else ir.VoidType()
            function_type = ir.FunctionType(returned, [byte] * len(pointers))
            symbol = f"qpdiff_{_PREFIX[real]}{name}"
            value = builder.call(cgutils.get_or_insert_function(builder.module, function_type, symbol), pointers)
            if VALUE in kinds:
                return value
            return builder.load(outcome) if outcome is not None else context.get_dummy_value()

        return result(args), generate

    return call


_dot = _fortran("blas", "dot", "viaiai")
_gemv_n = _fortran("blas", "gemv", "Tiisaiaisai")
_gemv_t = _fortran("blas", "gemv", "Niisaiaisai")
_gemm_nt = _fortran("blas", "gemm", "TNiiisaiaisai")
_gemm_nn = _fortran("blas", "gemm", "NNiiisaiaisai")
_gemm_tn = _fortran("blas", "gemm", "NTiiisaiaisai")
_syrk_n = _fortran("blas", "syrk", "UTiisaisai")
_syrk_t = _fortran("blas", "syrk", "UNiisaisai")
_potrf = _fortran("lapack", "potrf", "Uiaio")


# ---- on row-major matrices, or parts of them whose rows are contiguous


@jit
def finite(a):
    """Whether a number is finite. (`np.isfinite` takes a − a for 0, which sums that may be reordered are.)"""
    return abs(a) < np.inf


@jit
def _ld(M):
    """Distance between rows, at least 1 as BLAS wants it for an empty matrix."""
    return max(1, M.strides[0] // M.itemsize)


@jit
def dot(a, b):
    n = a.shape[0]
    if n > _SMALL:
        return _dot((n, a, 1, b, 1))
    total = 0.0
    for i in range(n):
        total += a[i] * b[i]
    return total


@jit
def product(M, x, out):
    """Put M x in `out`."""
    rows, columns = M.shape
    if columns > _SMALL and rows > 0:
        _gemv_n((columns, rows, 1.0, M, _ld(M), x, 1, 0.0, out, 1))
        return
    for i in range(rows):
        total = out.dtype.type(0.0)
        for j in range(columns):
            total += M[i, j] * x[j]
        out[i] = total


@jit
def add_product_transposed(sign, M, v, out):
    """Add ± Mᵀ v to `out`."""
    rows, columns = M.shape
    if columns > _SMALL and rows > 0:
        _gemv_t((columns, rows, sign, M, _ld(M), v, 1, 1.0, out, 1))
        return
    for i in range(rows):
        factor = sign * v[i]
        for j in range(columns):
            out[j] += M[i, j] * factor


@jit
def multiply(alpha, A, B, beta, C):
    """C ← α A B + β C."""
    _gemm_nn((B.shape[1], A.shape[0], A.shape[1], alpha, B, _ld(B), A, _ld(A), beta, C, _ld(C)))


@jit
def multiply_nt(alpha, A, B, beta, C):
    """C ← α A Bᵀ + β C."""
    _gemm_nt((B.shape[0], A.shape[0], A.shape[1], alpha, B, _ld(B), A, _ld(A), beta, C, _ld(C)))


@jit
def add_gram(A, C):
    """C ← C + AᵀA, in the lower triangle at least."""
    n = C.shape[0]
    if n <= _SYRK:
        _gemm_tn((n, n, A.shape[0], 1.0, A, _ld(A), A, _ld(A), 1.0, C, _ld(C)))
    else:
        _syrk_t((n, A.shape[0], 1.0, A, _ld(A), 1.0, C, _ld(C)))


@jit
def row_gram(A, C):
    """C ← A Aᵀ, in the lower triangle at least."""
    if C.shape[0] <= _SYRK:
        multiply_nt(1.0, A, A, 0.0, C)
    else:
        _syrk_n((C.shape[0], A.shape[1], 1.0, A, _ld(A), 0.0, C, _ld(C)))


@jit
def cholesky(M):
    """The lower factor of M = L Lᵀ in place of M's lower triangle, and whether M was positive definite."""
    n = M.shape[0]
    if n > _SMALL:
        return _potrf((n, M, _ld(M))) == 0 and finite(M[n - 1, n - 1])  # NaN anywhere ends up there
    for i in range(n):
        for j in range(i):
            left = M[i, j]
            for k in range(j):
                left -= M[i, k] * M[j, k]
            M[i, j] = left / M[j, j]
        left = M[i, i]
        for k in range(i):
            left -= M[i, k] * M[i, k]
        if not left > 0.0:
            return False
        M[i, i] = np.sqrt(left)
    return finite(M[n - 1, n - 1])


@jit
def solve_cholesky(L, r):
    """Solve L Lᵀ x = r in place."""
    n = L.shape[0]
    for i in range(n):
        left = r[i]
        for k in range(i):
            left -= L[i, k] * r[k]
        r[i] = left / L[i, i]
    for i in range(n - 1, -1, -1):
        value = r[i] / L[i, i]
        r[i] = value
        for k in range(i):
            r[k] -= L[i, k] * value


@jit
def invert_lower(L, out, work):
    """Put L⁻¹ in `out`, zeros above the diagonal: blocks on the diagonal by substitution, then joined in pairs."""
    n = L.shape[0]
    out[:, :] = 0.0
    for start in range(0, n, _SMALL):
        stop = min(start + _SMALL, n)
        for i in range(start, stop):
            inverse = 1.0 / L[i, i]
            for k in range(start, i):
                factor = -L[i, k] * inverse
                for j in range(start, k + 1):
                    out[i, j] += factor * out[k, j]
            out[i, i] = inverse
    size = _SMALL
    while size < n:
        for start in range(0, n - size, 2 * size):
            middle, stop = start + size, min(start + 2 * size, n)
            corner = work[: stop - middle, :size]
            multiply(1.0, L[middle:stop, start:middle], out[start:middle, start:middle], 0.0, corner)
            multiply(-1.0, out[middle:stop, middle:stop], corner, 0.0, out[middle:stop, start:middle])
        size *= 2
