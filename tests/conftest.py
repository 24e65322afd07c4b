"""The `xp` fixture: one test, every array library that is installed. Hypothesis profiles."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import settings

# How many examples test_fuzz.py draws in all; HYPOTHESIS_PROFILE=more looks for rarer failures.
settings.register_profile("ci", max_examples=5000, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("more", max_examples=200_000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# XLA takes a third of the time to compile this way, and nearly all of the time of JAX's tests is that.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

METHOD = {
    "test_solver.py", "test_differentiation.py", "test_degenerate.py", "test_fuzz.py", "test_certificates.py",
    "test_warm_start.py", "test_smoothing.py", "test_memory.py", "test_backends.py",
}  # fmt: skip
"""What both engines must pass on NumPy."""


def pytest_addoption(parser):
    parser.addoption("--engine", choices=["auto", "array"], default="auto", help="array: as if there were no Numba")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--engine") == "array":
        others = {"array-api-strict", "cupy"}  # which always use it
        chosen = [item for item in items if item.path.name in METHOD]
        items[:] = [i for i in chosen if not (hasattr(i, "callspec") and i.callspec.params.get("xp") in others)]


@pytest.fixture(scope="session", autouse=True)
def engine(request):
    """The engine that engine="auto" takes for NumPy arrays."""
    if request.config.getoption("--engine") == "array":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qpdiff.engine.compiled_engine", lambda: (None, "this is a test"))
            yield
    else:
        yield


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
    """JAX, its loops taken step by step: compiling the solver for every shape in the tests would take hours."""

    name = "jax"

    def __init__(self, jax):
        self.jax = jax

    def asarray(self, value):
        return self.jax.numpy.asarray(value)

    def to_numpy(self, value):
        return np.asarray(value)


@pytest.fixture(params=["numpy", "array-api-strict", "jax", "cupy"])
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
    else:
        strict = pytest.importorskip("array_api_strict")
        strict.set_array_api_strict_flags(boolean_indexing=False, data_dependent_shapes=False)
        try:
            yield StrictLibrary(strict)
        finally:
            strict.reset_array_api_strict_flags()
