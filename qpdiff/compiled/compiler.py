"""How functions are compiled, and what the language of compiled functions lacks."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
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
def claim(typing_context, turn):
    """The number in an array of one, which is one more afterwards, though other threads do the same."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(turn), generate
