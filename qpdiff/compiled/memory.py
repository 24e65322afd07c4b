"""Memory for large arrays, used again when it is free.

The system hands out memory page by page, cleared, at the first touch of each. Where a solve of a training loop takes a
few milliseconds, that is a good part of it.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from contextlib import suppress
from functools import lru_cache, wraps

import numpy as np

SMALLEST, LARGEST = 2**16, 2**25
"""Bytes of the arrays for which this is worth while, and which are not too large to be kept."""
KEPT = 2**27
"""Bytes that are kept at most."""
ALIGNMENT = 64
"""Bytes of a line of the cache: vectors that lie across two take twice as long to load."""

_free: deque[np.ndarray] = deque()
"""Appended to and popped from in one step each: an array may end at any time, in any thread."""


class _Block:
    """What an array and its views hold on to; when the last of them ends, the memory is free."""

    def __init__(self, memory: np.ndarray):
        self.memory = memory

    @property
    def __array_interface__(self):
        return self.memory.__array_interface__

    def __del__(self):
        _free.append(self.memory)
        with suppress(IndexError):
            while sum(memory.size for memory in list(_free)) > KEPT:
                _free.popleft()


def empty(shape, dtype) -> np.ndarray:
    """`numpy.empty`."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if not SMALLEST <= size <= LARGEST:
        return np.empty(shape, dtype)
    return np.asarray(_Block(_take(size))).view(dtype).reshape(shape)


def _take(size: int) -> np.ndarray:
    with suppress(IndexError):
        for _ in range(len(_free)):
            memory = _free.popleft()
            if memory.size == size:
                return memory
            _free.append(memory)
    return _aligned(size)


def _aligned(size: int) -> np.ndarray:
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]


def aligned(shape) -> np.ndarray:
    """Zeros in float64, the first at the beginning of a line of the cache."""
    return _aligned(8 * math.prod(shape)).view(np.float64).reshape(shape)


def kept_by_thread(make):
    """A function that makes memory to work in, so that each thread keeps what it was given last."""
    local = threading.local()

    @wraps(make)
    def get(*sizes):
        if not hasattr(local, "make"):
            local.make = lru_cache(maxsize=1)(make)
        return local.make(*sizes)

    return get
