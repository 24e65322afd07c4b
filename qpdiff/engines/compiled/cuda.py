"""Compile the CUDA kernels at first use, store them on disk, and launch them through the driver.

NVRTC compiles, which needs neither a GPU nor a toolkit, and the driver launches; `cuda-bindings` calls both. So the
kernels take the arrays of any library that tells where its data is, and no library is needed beside that one.

References
----------
NVIDIA, "NVRTC" and "CUDA Driver API" (docs.nvidia.com/cuda).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

SOURCES = Path(__file__).parent / "src"
MAIN = "kernels.cu"
OPTIONS = ("--std=c++20", "-default-device", f"--include-path={SOURCES}")
"""Those of NVRTC but for the architecture."""
STATIC_BYTES = 48 * 2**10
"""Bytes of shared memory that any kernel may have; for more it has to ask."""
INSTALL = (
    "pip install 'cuda-bindings>=12.9,<13' nvidia-cuda-nvrtc-cu12 for CUDA 12, "
    "pip install 'cuda-bindings>=13' nvidia-cuda-nvrtc for CUDA 13"
)


class Device(NamedTuple):
    """What a GPU is and has."""

    number: int
    architecture: str
    """As NVRTC names it: sm_90."""
    shared_bytes: int
    """Shared memory that a block may ask for."""
    multiprocessors: int


@cache
def missing() -> str | None:
    """Say what is missing to compile and launch kernels, and what to install; None: nothing."""
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        return f"it needs the package cuda-bindings ({INSTALL}): {error}"
    # A library that is not found is a RuntimeError at the first call.
    try:
        compiler = _result(nvrtc.nvrtcVersion())
    except RuntimeError as error:
        return f"it needs NVRTC ({INSTALL}): {error}"
    try:
        _result(driver.cuInit(0))
        newest = _result(driver.cuDriverGetVersion()) // 1000
    except RuntimeError as error:
        return f"it needs NVIDIA's driver and a GPU: {error}"
    if compiler[0] > newest:
        return f"NVRTC is of CUDA {compiler[0]}, but the driver takes CUDA {newest} at most ({INSTALL})"
    return None


@cache
def device(number: int) -> Device:
    """Describe a GPU by its number."""
    from cuda.bindings import driver

    handle = _result(driver.cuDeviceGet(number))
    names = driver.CUdevice_attribute

    def attribute(name: str) -> int:
        return _result(driver.cuDeviceGetAttribute(getattr(names, f"CU_DEVICE_ATTRIBUTE_{name}"), handle))

    return Device(
        number,
        f"sm_{attribute('COMPUTE_CAPABILITY_MAJOR')}{attribute('COMPUTE_CAPABILITY_MINOR')}",
        attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        attribute("MULTIPROCESSOR_COUNT"),
    )


def launch(
    kernel: str, blocks: int, threads: int, shared_bytes: int, arguments: ctypes.Structure, on: Device, stream: int
) -> None:
    """Start a kernel on a stream, with one struct as its arguments.

    Parameters
    ----------
    shared_bytes : int
        Dynamic shared memory of a block.
    stream : int
        The handle of a stream of that GPU.
    """
    from cuda.bindings import driver

    function = _load(kernel, on.architecture)
    values = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    with _current(on):
        if shared_bytes > STATIC_BYTES:
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _result(driver.cuKernelSetAttribute(most, shared_bytes, function, driver.CUdevice(on.number)))
        _result(
            driver.cuLaunchKernel(
                driver.CUfunction(int(function)),
                blocks,
                1,
                1,
                threads,
                1,
                1,
                shared_bytes,
                driver.CUstream(stream),
                ctypes.addressof(values),
                0,
            )
        )


@contextmanager
def _current(on: Device):
    """Make the context that the array libraries work in current in this thread, where a new thread has none yet."""
    from cuda.bindings import driver

    _result(driver.cuCtxPushCurrent(_context(on.number)))
    try:
        yield
    finally:
        _result(driver.cuCtxPopCurrent())


@cache
def _context(number: int):
    from cuda.bindings import driver

    return _result(driver.cuDevicePrimaryCtxRetain(_result(driver.cuDeviceGet(number))))


_loading = Lock()
_loaded: dict[tuple[str, str], Any] = {}


def _load(kernel: str, architecture: str):
    """Return the handle of a kernel, which is good for all GPUs of the architecture; compile it where need be."""
    from cuda.bindings import driver

    with _loading:
        handle = _loaded.get((kernel, architecture))
        if handle is None:
            code = cubin(kernel, architecture)
            library = _result(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
            handle = _loaded[kernel, architecture] = _result(driver.cuLibraryGetKernel(library, kernel.encode()))
        return handle


# ---- compiled code, on disk


def cubin(kernel: str, architecture: str) -> bytes:
    """Return the machine code of a kernel: that on disk, or else compile it and store it there.

    The name of the file is a digest of all that the code depends on, and the file begins with a digest of the code.
    It is written under another name first, so that no process reads a part of it. A file that is damaged is written
    again, and where nothing can be written the code is compiled in each process.
    """
    path = cache_directory() / f"{_digest(kernel, architecture)}.cubin"
    with suppress(OSError):
        stored = path.read_bytes()
        size = hashlib.sha256().digest_size
        if hashlib.sha256(stored[size:]).digest() == stored[:size]:
            return stored[size:]
    code = compile_kernel(kernel, architecture)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
    return code


def cache_directory() -> Path:
    """Return the folder for compiled kernels in the platform's folder for caches."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qpdiff"


def _digest(kernel: str, architecture: str) -> str:
    """Name what the code of a kernel depends on: the sources, NVRTC, the architecture and the options."""
    given = (kernel, architecture, compiler_version(), [o for o in OPTIONS if str(SOURCES) not in o], _source_digest())
    return hashlib.sha256(repr(given).encode()).hexdigest()


@cache
def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".cu", ".hpp"):
            digest.update(f"{path.relative_to(SOURCES).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


# ---- NVRTC


@cache
def compiler_version() -> tuple[int, int]:
    """Return the version of NVRTC."""
    from cuda.bindings import nvrtc

    major, minor = _result(nvrtc.nvrtcVersion())
    return major, minor


def compile_kernel(kernel: str, architecture: str) -> bytes:
    """Compile one kernel for an architecture; it takes seconds.

    Raises
    ------
    RuntimeError
        With the compiler's messages.
    """
    from cuda.bindings import nvrtc

    known = _result(nvrtc.nvrtcGetSupportedArchs())
    if int(architecture.removeprefix("sm_")) not in known:
        version = ".".join(map(str, compiler_version()))
        raise RuntimeError(f"NVRTC {version} does not compile for {architecture}; install a newer one ({INSTALL})")
    program = _result(nvrtc.nvrtcCreateProgram((SOURCES / MAIN).read_bytes(), MAIN.encode(), 0, [], []))
    try:
        name, priced, _ = kernel.partition("_priced")
        stage, *form, kind = name.split("_")
        given = {"STAGE": stage, "FORM": "_".join(form), "TYPE": kind, "PRICED": int(bool(priced))}
        options = [f"--gpu-architecture={architecture}", *OPTIONS]
        options += [f"--define-macro=QP_{name}={value}" for name, value in given.items()]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if int(status):
            messages = bytearray(_result(nvrtc.nvrtcGetProgramLogSize(program)))
            _result(nvrtc.nvrtcGetProgramLog(program, messages))
            raise RuntimeError(f"NVRTC did not compile {kernel} for {architecture}: {messages.decode().rstrip(chr(0))}")
        code = bytearray(_result(nvrtc.nvrtcGetCUBINSize(program)))
        _result(nvrtc.nvrtcGetCUBIN(program, code))
        return bytes(code)
    finally:
        _result(nvrtc.nvrtcDestroyProgram(program))


def _result(returned):
    """Return what a function of `cuda-bindings` gives beside its status.

    Raises
    ------
    RuntimeError
        With the name of the status, where it is not success.
    """
    status, *values = returned
    if int(status):
        raise RuntimeError(f"{type(status).__name__}: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)
