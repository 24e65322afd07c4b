"""How functions are compiled, and what the language of compiled functions lacks."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

OPTIONS: Any = {"nogil": True, "error_model": "numpy", "_nrt": False}
"""Nothing is allocated and no references are counted, which would cost more than the arithmetic on small arrays."""
_INNER: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
FAST = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be reordered, which vectorises them, and divisions by the same number become products; NaN and infinity keep
their meaning."""
jit = njit(**OPTIONS, **_INNER, fastmath=FAST)
"""For functions that compiled code calls."""
literal = njit(**OPTIONS, **_INNER)
"""Where no bit may depend on the order of the operands."""
hot = njit(**OPTIONS, **_INNER, fastmath=FAST, forceinline=True)
"""The same for functions of every iteration that take named tuples, which a call passes entry by entry."""
inline = njit(**OPTIONS, inline="always")
"""For functions that return an array, which without counting references must be part of their caller."""


def _sources() -> str:
    """A digest of what compiled functions are made from."""
    folder = Path(__file__).parent
    constants = (folder.parent / f"{name}.py" for name in ("kkt", "method", "problem", "solution"))
    files = [*sorted(folder.glob("*.py")), *(file for file in constants if file.exists())]
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


_SOURCES = _sources()


def entry(function):
    """For functions that Python calls; they are kept on disk with all that they call.

    Numba takes what is on disk for valid as long as the function's own file has not changed. So that a change in
    another one counts too, the name that it is kept under says which version of the package made it.
    """
    function.__qualname__ += f"_{_SOURCES}"
    return njit(**OPTIONS, cache=True)(function)


@jit
def finite(a):
    """Whether a number is finite. (`np.isfinite` takes a − a for 0, which sums that may be reordered are.)"""
    return abs(a) < np.inf


@intrinsic
def claim(typing_context, counts, which):
    """A number in an array, which is one more afterwards, though other threads do the same."""

    def generate(context, builder, signature, arguments):
        place, one = _place(context, builder, signature, arguments), ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", place, one, "acq_rel")

    return types.int64(counts, which), generate


@intrinsic
def peek(typing_context, counts, which):
    """A number in an array that other threads change; with it one sees what they did before."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_place(context, builder, signature, arguments), "acquire", 8)

    return types.int64(counts, which), generate


def _place(context, builder, signature, arguments):
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.gep(array.data, [context.cast(builder, arguments[1], signature.args[1], types.int64)])


_PAUSE = {"x86_64": ("llvm.x86.sse2.pause", []), "aarch64": ("llvm.aarch64.hint", [1])}


@intrinsic
def pause(typing_context):
    """Tell the processor that it is waiting for another one."""

    def generate(context, builder, signature, arguments):
        machine = binding.get_process_triple().split("-")[0].replace("arm64", "aarch64")
        if machine in _PAUSE:
            name, hints = _PAUSE[machine]
            word = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [word] * len(hints))
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [word(hint) for hint in hints])
        return context.get_dummy_value()

    return types.void(), generate
