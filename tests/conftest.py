"""Fixtures `xp` and `each_engine`, every array library and each engine for one test; Hypothesis profiles; XLA."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import settings

from qpdiff.engines.choice import compiled_engine

# How many examples test_fuzz.py draws in all; HYPOTHESIS_PROFILE=more looks for rarer failures.
settings.register_profile("ci", max_examples=5000, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("more", max_examples=200_000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def compile_quickly():
    """Let XLA compile with little effort, and each program once for all processes of a run.

    Nearly all of the time of JAX's tests is compiling. What a run has compiled is kept in a folder of its own, as
    workers of pytest-xdist have some programs in common, and `bounded_memory` forgets them.
    """
    flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    if version("jaxlib").startswith("0.10."):  # four times faster; a version that does not know a flag ends the process
        flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    os.environ["XLA_FLAGS"] = " ".join(flags)
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="qpdiff-tests-jax-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


if find_spec("jaxlib") and "XLA_FLAGS" not in os.environ:  # a worker has what the first process has set
    compile_quickly()

collect_ignore = ["mutants.py"]  # a command, with a dependency of its own

LIBRARIES = ["numpy", "array-api-strict", "jax", "torch", "cupy", "torch-cuda"]
ENGINES = ["compiled", "array"]


def pytest_addoption(parser):
    parser.addoption("--require-gpu", action="store_true", help="fail without a GPU, where its tests would be skipped")
    parser.addoption("--hard", metavar="DIR", help="a folder of hard problems, *.npz with an array for each operand")


def pytest_report_header(config):
    """The name of the GPU, where there has to be one."""
    if not config.getoption("--require-gpu"):
        return None
    try:
        import cupy

        return f"GPU: {cupy.cuda.runtime.getDeviceProperties(0)['name'].decode()}"
    except Exception as error:  # whatever a missing package, a missing driver or a broken one raises is the answer
        pytest.exit(f"--require-gpu: CuPy finds no GPU: {type(error).__name__}: {error}", returncode=1)


def pytest_generate_tests(metafunc):
    """Run what takes `xp` with each array library and what takes `each_engine` with each engine.

    Only NumPy's arrays have two engines: other libraries always use the array engine.
    """
    chosen = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    wanted = [name for name in ("xp", "each_engine") if name in metafunc.fixturenames and name not in chosen]
    if wanted == ["xp", "each_engine"]:
        pairs = [("numpy", engine) for engine in ENGINES] + [(library, "array") for library in LIBRARIES[1:]]
        ids = ["-".join(pair) if pair[0] == "numpy" else pair[0] for pair in pairs]
        metafunc.parametrize(wanted, pairs, indirect=True, ids=ids)
    elif wanted:
        metafunc.parametrize(wanted[0], LIBRARIES if wanted == ["xp"] else ENGINES, indirect=True)


@pytest.fixture
def each_engine(request):
    """The engine that engine="auto" takes for NumPy arrays: the compiled one where it can, or always the array one."""
    if request.param == "compiled":
        if compiled_engine()[0] is None:
            pytest.skip("the compiled engine was not built")
        yield
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qpdiff.engines.choice.compiled_engine", lambda: (None, "this is a test"))
            patch.setattr("qpdiff.backend.NumPyBackend.launch_bound_bytes", 0)  # as with large batches
            yield


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """What JAX has compiled for one file's shapes is of no use to the next, and takes gigabytes in the end."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


class NumPyLibrary:
    """NumPy itself."""

    name = "numpy"

    def asarray(self, value):
        return np.asarray(value)

    def to_numpy(self, value):
        return np.asarray(value)


class StrictLibrary:
    """array-api-strict on a device that is not the CPU, as a stand-in for a GPU: nothing moves to the host unasked."""

    name = "array-api-strict"

    def __init__(self, strict):
        self.strict = strict
        self.device = strict.Device("device1")

    def asarray(self, value):
        return self.strict.asarray(np.asarray(value), device=self.device)

    def to_numpy(self, value):
        return np.asarray(self.strict.asarray(value, device=self.strict.Device("CPU_DEVICE")))


class CuPyLibrary:
    """CuPy, where there is a GPU."""

    name = "cupy"

    def __init__(self, cupy):
        self.cupy = cupy

    def asarray(self, value):
        return self.cupy.asarray(value)

    def to_numpy(self, value):
        return value.get()


class JAXLibrary:
    """JAX in double precision."""

    name = "jax"

    def __init__(self, jax):
        self.jax = jax

    def asarray(self, value):
        return self.jax.numpy.asarray(value)

    def to_numpy(self, value):
        return np.asarray(value)


class TorchLibrary:
    """torch on the CPU or a GPU."""

    def __init__(self, torch, name, device):
        self.torch, self.name, self.device = torch, name, device

    def asarray(self, value):
        return self.torch.tensor(np.asarray(value), device=self.device)

    def to_numpy(self, value):
        return value.cpu().numpy()


@pytest.fixture
def strict():
    """array-api-strict without what depends on the numbers in arrays."""
    module = pytest.importorskip("array_api_strict")
    module.set_array_api_strict_flags(boolean_indexing=False, data_dependent_shapes=False)
    yield module
    module.reset_array_api_strict_flags()


@pytest.fixture
def transfers(strict, monkeypatch):
    """What has gone to the host from arrays of array-api-strict: a list to which each number adds the call."""
    seen = []

    def counted(name, method):
        def call(self):
            seen.append(name)
            return method(self)

        return call

    array = type(strict.asarray(0.0))
    for name in ("__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(array, name, counted(name, getattr(array, name)))
    return seen


@pytest.fixture
def xp(request):
    """An array library with `asarray` (from NumPy, onto its device) and `to_numpy`."""
    if request.param == "numpy":
        yield NumPyLibrary()
    elif request.param == "jax":
        jax = pytest.importorskip("jax")
        with jax.enable_x64(True):
            yield JAXLibrary(jax)
    elif request.param == "cupy":
        cupy = pytest.importorskip("cupy")
        if not cupy.cuda.is_available():
            pytest.skip("no GPU")
        yield CuPyLibrary(cupy)
    elif request.param.startswith("torch"):
        torch = pytest.importorskip("torch")
        if request.param == "torch-cuda" and not torch.cuda.is_available():
            pytest.skip("no GPU")
        yield TorchLibrary(torch, request.param, "cuda" if request.param == "torch-cuda" else "cpu")
    else:
        yield StrictLibrary(request.getfixturevalue("strict"))
