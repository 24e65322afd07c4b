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
from .memory import ALIGNMENT
from .registers import span, unpacked, word

_READ, _SECOND_LEVEL, _DATA = (ir.Constant(ir.IntType(32), number) for number in (0, 2, 1))


@intrinsic
def _fetch(typing_context, row, start, stop):
    """Ask for the lines with the entries of a row from `start` to `stop`, where the row begins with a line."""

    def generate(context, builder, signature, arguments):
        row, start, stop = unpacked(context, builder, signature, arguments, 1)
        hints, line = (_READ, _SECOND_LEVEL, _DATA), ALIGNMENT // row.size
        prefetch = ir.FunctionType(ir.VoidType(), [row.data.type, *(hint.type for hint in hints)])
        function = cgutils.get_or_insert_function(builder.module, prefetch, "llvm.prefetch.p0")
        with span(builder, builder.and_(start, word(-line)), stop, line) as (j, _):
            builder.call(function, [row.at(j), *hints])
        return context.get_dummy_value()

    return types.void(row, start, stop), generate


@jit
def fetch_vectors(vectors, i):
    """Ask for problem i's in stacks of vectors, if there is such a problem."""
    for stack in vectors:
        if 0 <= i < stack.shape[0]:
            _fetch(stack[i], 0, stack.shape[1])


@jit
def fetch_rows(stack, i, part, parts, upper):
    """Ask for one of so many parts of problem i's in a stack of matrices, if there is such a problem with its own.

    With `upper` that is the upper triangle.
    """
    if i >= 0 and stack.shape[0] > 1:
        M, rows, columns = stack[i], stack.shape[1], stack.shape[2]
        for r in range(rows * part // parts, rows * (part + 1) // parts):
            _fetch(M[r], r if upper else 0, columns)
