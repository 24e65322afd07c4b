"""Compiling, storing and launching kernels, with stand-ins for NVRTC and the driver."""

import ctypes
import enum
import os
import sys
from threading import Thread
from types import ModuleType, SimpleNamespace

import pytest

from qpdiff.engines.compiled import cuda


class Status(enum.IntEnum):
    SUCCESS = 0
    INVALID = 1


class Arguments(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int), ("x", ctypes.c_void_p))


ON = cuda.Device(1, "sm_90", 232448, 132)


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """The kernels that were compiled, by a stand-in; stored in an empty folder."""
    done = []

    def compile_kernel(kernel, architecture):
        done.append((kernel, architecture))
        return f"code of {kernel} for {architecture}".encode()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setattr(cuda, "compile_kernel", compile_kernel)
    monkeypatch.setattr(cuda, "compiler_version", lambda: (13, 0))
    monkeypatch.setattr(cuda, "_loaded", {})
    return done


# ---- compiled code on disk


def test_a_kernel_is_compiled_once_for_each_architecture(compiled):
    for _ in range(2):
        assert cuda.cubin("solve", "sm_90") == b"code of solve for sm_90"
        assert cuda.cubin("solve", "sm_80") == b"code of solve for sm_80"
        assert cuda.cubin("differentiate", "sm_90") == b"code of differentiate for sm_90"
    assert compiled == [("solve", "sm_90"), ("solve", "sm_80"), ("differentiate", "sm_90")]


@pytest.mark.parametrize("changed", ["compiler_version", "_source_digest"])
def test_another_compiler_or_source_compiles_again(compiled, monkeypatch, changed):
    cuda.cubin("solve", "sm_90")
    monkeypatch.setattr(cuda, changed, lambda: (13, 1))
    cuda.cubin("solve", "sm_90")
    assert len(compiled) == 2


@pytest.mark.parametrize("damage", [lambda code: code[:-1], lambda code: b"", lambda code: code[:-1] + b"?"])
def test_a_damaged_file_is_written_again(compiled, damage):
    cuda.cubin("solve", "sm_90")
    (file,) = cuda.cache_directory().iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert cuda.cubin("solve", "sm_90") == b"code of solve for sm_90"
    assert file.read_bytes() == whole
    assert len(compiled) == 2


def test_without_a_folder_to_write_to(compiled, monkeypatch, tmp_path):
    (tmp_path / "qpdiff").write_text("a file in the way")
    assert cuda.cubin("solve", "sm_90") == b"code of solve for sm_90"
    assert cuda.cubin("solve", "sm_90") == b"code of solve for sm_90"
    assert len(compiled) == 2


def test_a_write_that_fails_leaves_nothing_behind(compiled, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert cuda.cubin("solve", "sm_90") == b"code of solve for sm_90"
    assert list(cuda.cache_directory().iterdir()) == []


# ---- the driver


class Driver(ModuleType):
    """A stand-in for `cuda.bindings.driver` that records what is called with."""

    CUdevice = CUfunction = CUstream = staticmethod(int)
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="most")

    def __init__(self):
        super().__init__("cuda.bindings.driver")
        self.calls, self.launched, self.status = [], [], Status.SUCCESS

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)
        handles = {"cuLibraryGetKernel": 7, "cuDevicePrimaryCtxRetain": 70, "cuDeviceGet": 1}

        def call(*arguments):
            self.calls.append((name, *arguments))
            return Status.SUCCESS, handles.get(name, 0)

        return call

    def cuLaunchKernel(self, function, *numbers):
        *sizes, stream, values, _ = numbers
        self.calls.append(("cuLaunchKernel", function))
        at = ctypes.cast(values, ctypes.POINTER(ctypes.c_void_p))[0]
        self.launched.append((sizes, stream, Arguments.from_address(at).count))
        return (self.status,)


@pytest.fixture
def driver(monkeypatch, compiled):
    driver = Driver()
    bindings = ModuleType("cuda.bindings")
    bindings.driver = driver
    for name, module in (("cuda", ModuleType("cuda")), ("cuda.bindings", bindings), ("cuda.bindings.driver", driver)):
        monkeypatch.setitem(sys.modules, name, module)
    cuda._context.cache_clear()
    yield driver
    cuda._context.cache_clear()


def test_a_launch(driver, compiled):
    cuda.launch("solve", 1000, 64, 5000, Arguments(3), ON, 99)
    cuda.launch("solve", 1, 32, 50_000, Arguments(4), ON, 98)
    assert driver.launched == [([1000, 1, 1, 64, 1, 1, 5000], 99, 3), ([1, 1, 1, 32, 1, 1, 50_000], 98, 4)]
    names = [name for name, *_ in driver.calls]
    assert names.count("cuLibraryLoadData") == 1
    assert compiled == [("solve", "sm_90")]
    assert [call[1:] for call in driver.calls if call[0] == "cuKernelSetAttribute"] == [("most", 50_000, 7, 1)]
    assert names[-4:] == ["cuCtxPushCurrent", "cuKernelSetAttribute", "cuLaunchKernel", "cuCtxPopCurrent"]
    assert ("cuCtxPushCurrent", 70) in driver.calls


def test_a_launch_that_fails_leaves_the_context_as_it_was(driver):
    driver.status = Status.INVALID
    with pytest.raises(RuntimeError, match="INVALID"):
        cuda.launch("solve", 1, 32, 0, Arguments(), ON, 0)
    assert driver.calls[-1][0] == "cuCtxPopCurrent"


def test_threads_compile_a_kernel_once(driver, compiled):
    threads = [Thread(target=cuda.launch, args=("solve", 1, 32, 0, Arguments(i), ON, i)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1
    assert sorted(count for *_, count in driver.launched) == list(range(8))


# ---- what is missing


@pytest.mark.parametrize(
    ("compiler", "newest", "message"),
    [
        (None, 13000, "needs NVRTC"),
        ((13, 0), None, "needs NVIDIA's driver"),
        ((13, 0), 12090, "takes CUDA 12 at most"),
        ((12, 9), 13000, None),
    ],
)
def test_what_is_missing(driver, monkeypatch, compiler, newest, message):
    def found(*values):
        if values == (None,):
            raise RuntimeError("not found")
        return Status.SUCCESS, *values

    nvrtc = ModuleType("cuda.bindings.nvrtc")
    nvrtc.nvrtcVersion = lambda: found(*(compiler or (None,)))
    driver.cuDriverGetVersion = lambda: found(newest)
    sys.modules["cuda.bindings"].nvrtc = nvrtc
    cuda.missing.cache_clear()
    try:
        reason = cuda.missing()
    finally:
        cuda.missing.cache_clear()
    assert reason is None if message is None else message in reason


def test_without_the_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    cuda.missing.cache_clear()
    try:
        assert "cuda-bindings" in cuda.missing()
    finally:
        cuda.missing.cache_clear()
