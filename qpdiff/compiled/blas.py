"""BLAS for compiled code, on matrices that lie row by row in memory.

The functions are the ones SciPy is linked with, which its Cython module exports. They are bound by a name of ours that
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

INTEGER, SCALAR, ARRAY, VALUE = "isav"
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
_PREFIX = {types.float64: "d", types.float32: "s"}


def _fortran(name: str, kinds: str):
    """A function of BLAS, for the floating point type of the first array that it is called with.

    Each letter of `kinds` says what an argument of the Fortran function is: i and s an integer and a scalar, passed by
    value here, a an array whose first entry is meant, and a capital letter itself. A function of Fortran that has a
    value starts with v.
    """
    for prefix in _PREFIX.values():
        address = get_cython_function_address("scipy.linalg.cython_blas", prefix + name)
        binding.add_symbol(f"qpdiff_{prefix}{name}", address)
    taken = [kind for kind in kinds if kind in (INTEGER, SCALAR, ARRAY)]

    @intrinsic
    def call(typing_context, args):
        real = next(arg.dtype for arg, kind in zip(args, taken, strict=True) if kind == ARRAY)
        result = real if VALUE in kinds else types.void

        def generate(context, builder, signature, arguments):
            values = iter(zip(cgutils.unpack_tuple(builder, arguments[0]), args, strict=True))
            pointers = []
            for kind in kinds[VALUE in kinds :]:
                if kind not in taken:
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
            return value if VALUE in kinds else context.get_dummy_value()

        return result(args), generate

    return call


_dot = _fortran("dot", "viaiai")
_gemv_n = _fortran("gemv", "Tiisaiaisai")
_gemv_t = _fortran("gemv", "Niisaiaisai")
_gemm_tn = _fortran("gemm", "NTiiisaiaisai")
_syrk_t = _fortran("syrk", "LNiisaisai")


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
    """Put M x in `out`, for as many rows and columns of M as the vectors have."""
    rows, columns = min(M.shape[0], out.shape[0]), min(M.shape[1], x.shape[0])
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
    """Add ± Mᵀ v to `out`, for as many rows and columns of M as the vectors have."""
    rows, columns = min(M.shape[0], v.shape[0]), min(M.shape[1], out.shape[0])
    if columns > _SMALL and rows > 0:
        _gemv_t((columns, rows, sign, M, _ld(M), v, 1, 1.0, out, 1))
        return
    for i in range(rows):
        factor = sign * v[i]
        for j in range(columns):
            out[j] += M[i, j] * factor


@jit
def add_product_tn(alpha, A, B, C):
    """C ← C + α AᵀB."""
    _gemm_tn((B.shape[1], A.shape[1], A.shape[0], alpha, B, _ld(B), A, _ld(A), 1.0, C, _ld(C)))


@jit
def add_gram_tn(A, C):
    """C ← C + AᵀA, in the upper triangle."""
    _syrk_t((A.shape[1], A.shape[0], 1.0, A, _ld(A), 1.0, C, _ld(C)))
