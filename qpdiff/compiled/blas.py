"""BLAS for compiled code, on matrices that lie row by row in memory.

The functions are the ones SciPy is linked with, which its Cython module exports. They are bound by a name of ours that
is registered with the linker whenever this module is imported: that way compiled code that comes from Numba's cache on
disk finds them in a later process, where they have another address.

BLAS takes matrices that lie column by column, so to it every matrix here is its transpose.
"""

from __future__ import annotations

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import get_cython_function_address, intrinsic

from .compiler import jit

INTEGER, SCALAR, ARRAY = "isa"
_PREFIX = {types.float64: "d", types.float32: "s"}


def _fortran(name: str, kinds: str):
    """A function of BLAS, for the floating point type of the first array that it is called with.

    Each letter of `kinds` says what an argument of the Fortran function is: i and s an integer and a scalar, passed by
    value here, a an array whose first entry is meant, and a capital letter itself.
    """
    for prefix in _PREFIX.values():
        address = get_cython_function_address("scipy.linalg.cython_blas", prefix + name)
        binding.add_symbol(f"qpdiff_{prefix}{name}", address)
    taken = [kind for kind in kinds if kind in (INTEGER, SCALAR, ARRAY)]

    @intrinsic
    def call(typing_context, args):
        real = next(arg.dtype for arg, kind in zip(args, taken, strict=True) if kind == ARRAY)

        def generate(context, builder, signature, arguments):
            values = iter(zip(cgutils.unpack_tuple(builder, arguments[0]), args, strict=True))
            pointers = []
            for kind in kinds:
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
            function_type = ir.FunctionType(ir.VoidType(), [byte] * len(pointers))
            symbol = f"qpdiff_{_PREFIX[real]}{name}"
            builder.call(cgutils.get_or_insert_function(builder.module, function_type, symbol), pointers)
            return context.get_dummy_value()

        return types.void(args), generate

    return call


_gemm_tn = _fortran("gemm", "NTiiisaiaisai")
_syrk_t = _fortran("syrk", "LNiisaisai")


# ---- on row-major matrices, or parts of them whose rows are contiguous


@jit
def _ld(M):
    """Distance between rows, at least 1 as BLAS wants it for an empty matrix."""
    return max(1, M.strides[0] // M.itemsize)


@jit
def add_product_tn(alpha, A, B, C):
    """C ← C + α AᵀB."""
    _gemm_tn((B.shape[1], A.shape[1], A.shape[0], alpha, B, _ld(B), A, _ld(A), 1.0, C, _ld(C)))


@jit
def add_gram_tn(A, C):
    """C ← C + AᵀA, in the upper triangle."""
    _syrk_t((A.shape[1], A.shape[0], 1.0, A, _ld(A), 1.0, C, _ld(C)))
