"""A pool of buffers for large arrays, which are recycled.

The system maps and clears new memory page by page at the first access to each, which takes a large share of a solve of
a few milliseconds, as in a training loop.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from contextlib import suppress

import numpy as np

SMALLEST, LARGEST = 2**16, 2**25
"""Bytes of the arrays that are recycled: for smaller ones it saves nothing, larger ones would hold too much memory."""
HELD = 2**27
"""Largest number of bytes of the buffers in the pool, free or not."""
ALIGNMENT = 64
"""Bytes of a cache line: vectors that cross two take twice as long to load."""

_pool: deque[np.ndarray] = deque()
"""The buffers that were used last, free or not. Each change is one atomic operation, as any thread may make it.

A buffer is free when nothing but the pool refers to it. That is asked of its count of references and not told by a
finaliser: Python would handle a signal that is pending in there, and ignore the KeyboardInterrupt.
"""


def empty(shape, dtype) -> np.ndarray:
    """Make an array as `numpy.empty` does, in a recycled buffer where its size is right for that."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if not SMALLEST <= size <= LARGEST:
        return np.empty(shape, dtype)
    buffer = _take(size + ALIGNMENT)
    _pool.append(buffer)
    return np.ndarray(shape, dtype, buffer, -buffer.ctypes.data % ALIGNMENT)


def _take(size: int) -> np.ndarray:
    """Take a free buffer of this size out of the pool, or make one, for which the oldest ones leave the pool."""
    with suppress(IndexError):
        for _ in range(len(_pool)):
            buffer, references = _next(_pool)
            if references == ALONE and buffer.size == size:
                return buffer
            _pool.append(buffer)
        while sum(buffer.size for buffer in list(_pool)) + size > HELD:
            _pool.popleft()
    return np.zeros(size, np.uint8)


def _next(pool: deque[np.ndarray]) -> tuple[np.ndarray, int]:
    """Take the oldest buffer out of a pool, and count the references to it."""
    buffer = pool.popleft()
    return buffer, sys.getrefcount(buffer)


ALONE = _next(deque([np.zeros(1, np.uint8)]))[1]
"""The count of a buffer that nothing refers to; how many are `_next`'s own depends on the release of Python."""
