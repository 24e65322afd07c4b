"""Let torch's tensors on the CPU pose as a GPU's: emulated blocks of threads run in place of the launch."""

from __future__ import annotations

import atexit
import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from qpdiff.engines.choice import compiled_engine

SOURCES = Path(__file__).parents[1] / "qpdiff" / "engines" / "compiled" / "src"
COMPILER = next(filter(None, map(shutil.which, [os.environ.get("CXX", ""), "g++", "clang++"])), None)


@cache
def build():
    """Compile the kernels for the CPU."""
    folder = tempfile.mkdtemp(prefix="qpdiff-tests-blocks-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "blocks.so"
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", f"-I{SOURCES}"]
    subprocess.run([COMPILER, *options, SOURCES / "emulation.cpp", "-o", path], check=True, timeout=300)
    return ctypes.CDLL(os.fspath(path))


class Launch(NamedTuple):
    """One that was asked for."""

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    stream: int


class EmulatedGPU:
    """A GPU that has memory in common with the CPU.

    Attributes
    ----------
    launches : list of Launch
    threads : int or None
        Threads of a block, in place of those asked for; one is the quickest to emulate.
    stream : int
        The handle of the stream that libraries work on.
    """

    def __init__(self, threads=1):
        self.launches, self.threads, self.stream = [], threads, 0

    def launch(self, kernel, blocks, threads, shared_bytes, arguments, on, stream):
        self.launches.append(Launch(kernel, blocks, threads, shared_bytes, stream))
        failed = build().qp_emulated_launch(
            kernel.encode(), blocks, self.threads or threads, ctypes.c_size_t(shared_bytes), ctypes.byref(arguments),
            ctypes.c_size_t(ctypes.sizeof(arguments)), 0,
        )  # fmt: skip
        assert not failed, kernel


def pose(monkeypatch, backend, shared_bytes=227 * 1024, **options) -> EmulatedGPU:
    """Let the arrays of a backend pass for a GPU's, on which "auto" takes the kernels."""
    if COMPILER is None or not SOURCES.exists() or platform.system() == "Windows":
        pytest.skip("no C++ compiler, or no sources")
    if compiled_engine()[0] is None:
        pytest.skip("the compiled engine was not built")
    from qpdiff.engines.compiled import cuda, gpu

    posing = EmulatedGPU(**options)
    monkeypatch.setenv("QPDIFF_GPU_ENGINE", "1")
    monkeypatch.setattr(backend, "gpu", 0)
    monkeypatch.setattr(backend, "stream", lambda self: posing.stream)
    monkeypatch.setattr(cuda, "device", lambda number: cuda.Device(number, "sm_90", shared_bytes, 132))
    monkeypatch.setattr(cuda, "launch", posing.launch)
    monkeypatch.setattr("qpdiff.engines.choice.gpu_engine", lambda: (gpu, "this is a test"))
    return posing
