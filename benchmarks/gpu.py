"""Find the GPU by its driver alone, so that nothing is installed for one that is not there."""

from __future__ import annotations

import ctypes
from typing import NamedTuple


class Gpu(NamedTuple):
    """The first GPU."""

    name: str
    cuda: int
    """The newest major version of CUDA that its driver takes."""


def find_gpu() -> Gpu | None:
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(library)
        except OSError:
            continue
        count, version, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(128)
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
            return None
        driver.cuDriverGetVersion(ctypes.byref(version))
        driver.cuDeviceGetName(name, len(name), 0)
        return Gpu(name.value.decode(), version.value // 1000)
    return None
