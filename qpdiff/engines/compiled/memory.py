"""Memory for large arrays, used again when it is free.

The system hands out memory page by page, cleared, at the first touch of each. Where a solve of a training loop takes a
few milliseconds, that is a good part of it.
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import suppress

import numpy as np

SMALLEST, LARGEST = 2**16, 2**25
"""Bytes of the arrays for which this is worth while, and which are not too large to be held."""
HELD = 2**27
"""Bytes of free memory that are held at most."""
ALIGNMENT = 64
"""Bytes of a line of the cache: vectors that lie across two take twice as long to load."""


class _Memory(np.ndarray):
    """Memory that is used again.

    The base of a view is what it is a view of, but to NumPy what that is a view of if it is an array like the first:
    it would pass over a block between an array and memory of the same kind.
    """


class _Block(np.ndarray):
    """The owner of the memory of an array and its views; when the last of them ends, the memory is free."""

    memory: _Memory | None = None
    """Not there in views of a block, which are of this class too."""

    def __del__(self):
        if self.memory is not None:
            _free.append(self.memory)
            with suppress(IndexError):
                while sum(memory.size for memory in list(_free)) > HELD:
                    _free.popleft()


_free: deque[_Memory] = deque()
"""Appended to and popped from in one step each: an array may end at any time, in any thread."""


def empty(shape, dtype) -> np.ndarray:
    """`numpy.empty`."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if not SMALLEST <= size <= LARGEST:
        return np.empty(shape, dtype)
    memory = _take(size)
    block = _Block(size, np.uint8, memory)
    block.memory = memory
    return np.ndarray(shape, dtype, block)


def _take(size: int) -> _Memory:
    with suppress(IndexError):
        for _ in range(len(_free)):
            memory = _free.popleft()
            if memory.size == size:
                return memory
            _free.append(memory)
    return _aligned(size).view(_Memory)


def _aligned(size: int) -> np.ndarray:
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]
