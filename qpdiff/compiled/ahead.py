"""Memory that is wanted next, asked for while there is arithmetic to do.

What a batch keeps for its derivative seldom fits the cache, and the arithmetic on one problem waits more for itself
than it works: fetched meanwhile, the next problem's matrices cost little. The processor has room for a few lines under
way, so they are asked for by parts, in loops that do something else.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiler import jit
from .registers import span, word

LINE = 64
"""Bytes of a line of the cache."""
_READ, _SECOND_LEVEL, _DATA = (ir.Constant(ir.IntType(32), number) for number in (0, 2, 1))


@intrinsic
def _fetch(typing_context, row, start):
    """Ask for the lines of a row from the one with entry `start` on, where the row begins with a line."""

    def generate(context, builder, signature, arguments):
        kind, size = signature.args[0], word(signature.args[0].dtype.bitwidth // 8)
        array = context.make_array(kind)(context, builder, arguments[0])
        data = builder.bitcast(array.data, ir.IntType(8).as_pointer())
        (length,) = cgutils.unpack_tuple(builder, array.shape)
        start = builder.mul(context.cast(builder, arguments[1], signature.args[1], types.int64), size)
        hints = (_READ, _SECOND_LEVEL, _DATA)
        prefetch = ir.FunctionType(ir.VoidType(), [data.type, *(hint.type for hint in hints)])
        function = cgutils.get_or_insert_function(builder.module, prefetch, "llvm.prefetch.p0")
        with span(builder, builder.and_(start, word(-LINE)), builder.mul(length, size), LINE) as (place, _):
            builder.call(function, [builder.gep(data, [place]), *hints])
        return context.get_dummy_value()

    return types.void(row, start), generate


@jit
def fetch_vectors(vectors, i):
    """Ask for problem i's in stacks of vectors, if there is such a problem."""
    for stack in vectors:
        if 0 <= i < stack.shape[0]:
            _fetch(stack[i], 0)


@jit
def fetch_rows(stack, i, part, parts):
    """Ask for one of so many parts of problem i's in a stack of matrices, if there is such a problem with its own."""
    if i >= 0 and stack.shape[0] > 1:
        M, rows = stack[i], stack.shape[1]
        for r in range(rows * part // parts, rows * (part + 1) // parts):
            _fetch(M[r], 0)


@jit
def fetch_upper(stack, i, part, parts):
    """The same for upper triangles."""
    if i >= 0 and stack.shape[0] > 1:
        M, rows = stack[i], stack.shape[1]
        for r in range(rows * part // parts, rows * (part + 1) // parts):
            _fetch(M[r], r)
