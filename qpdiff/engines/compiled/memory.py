"""A pool of buffers for large arrays, which are recycled.

The system maps and clears new memory page by page at the first access to each, which takes a large share of a solve of
a few milliseconds, as in a training loop.
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import suppress

import numpy as np

SMALLEST, LARGEST = 2**16, 2**25
"""Bytes of the arrays that are recycled: for smaller ones it saves nothing, larger ones would hold too much memory."""
HELD = 2**27
"""Largest number of bytes of free buffers in the pool."""
ALIGNMENT = 64
"""Bytes of a cache line: vectors that cross two take twice as long to load."""


class _Buffer(np.ndarray):
    """A buffer that can be recycled.

    It has a class of its own because NumPy shortens chains of views: an array refers to the base of its base instead,
    where that is of the array's own class. With a plain array as buffer, an array in a `_Block` would refer to the
    buffer alone, and the block, which returns it to the pool, would be finalised at once.
    """


class _Block(np.ndarray):
    """The owner of the buffer of an array and its views; its finaliser returns the buffer to the pool."""

    buffer: _Buffer | None = None
    """None in views of a block, which are of this class too."""

    def __del__(self):
        if self.buffer is not None:
            _free.append(self.buffer)
            with suppress(IndexError):
                while sum(buffer.size for buffer in list(_free)) > HELD:
                    _free.popleft()


_free: deque[_Buffer] = deque()
"""The free buffers. Each change is one atomic operation: an array may be finalised at any time, in any thread."""


def empty(shape, dtype) -> np.ndarray:
    """Make an array as `numpy.empty` does, in a recycled buffer where its size is right for that."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if not SMALLEST <= size <= LARGEST:
        return np.empty(shape, dtype)
    buffer = _take(size)
    block = _Block(size, np.uint8, buffer)
    block.buffer = buffer
    return np.ndarray(shape, dtype, block)


def _take(size: int) -> _Buffer:
    """Take a free buffer of this size from the pool, or make one."""
    with suppress(IndexError):
        for _ in range(len(_free)):
            buffer = _free.popleft()
            if buffer.size == size:
                return buffer
            _free.append(buffer)
    return _aligned(size).view(_Buffer)


def _aligned(size: int) -> np.ndarray:
    """Make an array of bytes that begins at a cache line."""
    array = np.zeros(size + ALIGNMENT, np.uint8)
    start = -array.ctypes.data % ALIGNMENT
    return array[start : start + size]
