"""The GPU kernels, with emulated blocks of threads on the CPU, against the engines that run there."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from engines.test_engines import CASES, ROUNDING, UNDECIDED, assert_same, of_case, rng

import qpdiff
from qpdiff.engines import parameters
from qpdiff.engines.base import Outcome
from qpdiff.engines.choice import choose_engine
from qpdiff.engines.reduction import Form, preferred_form
from qpdiff.problem import MATRICES, OPERANDS

SOURCES = Path(qpdiff.__file__).parent / "engines" / "compiled" / "src"
COMPILER = next(filter(None, map(shutil.which, [os.environ.get("CXX", ""), "g++", "clang++"])), None)
pytestmark = pytest.mark.skipif(
    COMPILER is None or not SOURCES.exists() or platform.system() == "Windows", reason="no C++ compiler, or no sources"
)
FORWARD, BACKWARD, WARP_AHEAD, SHUFFLED = 0, 1, 2, 777
SHARED = 227 * 1024
"""Bytes of shared memory of a block on an H100."""


# ---- the structs of launch.hpp


def struct(name, **fields):
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


POINTER, INT, DOUBLE = ctypes.c_void_p, ctypes.c_int, ctypes.c_double
NAMES = re.findall(r"X\((\w+)\)", (SOURCES / "method" / "problem.hpp").read_text().split("#define QP_PARAMETERS(X)")[1])
Parameters = struct("Parameters", **{name: DOUBLE for name in NAMES if name != "name"})
Settings = struct(
    "Settings", tol=DOUBLE, rtol=DOUBLE, absolute=ctypes.c_bool, max_iterations=INT, rho=DOUBLE, delta=DOUBLE,
    smallest=DOUBLE, certificate=DOUBLE, tiny=DOUBLE,
)  # fmt: skip
OperandArray = struct("OperandArray", data=POINTER, stride=ctypes.c_longlong)
OperandArrays = struct("OperandArrays", **dict.fromkeys(OPERANDS, OperandArray))
BlockShape = struct("BlockShape", **dict.fromkeys(["form", "n", "p", "m", "lower", "upper"], INT))
StoredArrays = struct(
    "StoredArrays", constant=POINTER, last=POINTER, scaling=POINTER, form=POINTER, factor_ok=POINTER,
    constant_stride=ctypes.c_longlong,
)  # fmt: skip
BlockMemory = struct(
    "BlockMemory", workspace=POINTER, workspace_bytes=ctypes.c_longlong, shared_bytes=INT, reserved=INT
)
SolveLaunch = struct(
    "SolveLaunch", parameters=Parameters, settings=Settings, operands=OperandArrays, shape=BlockShape, count=INT,
    check=INT, rounding=DOUBLE, start_x=POINTER, start_v=POINTER, start_usable=POINTER,
    **dict.fromkeys(Outcome._fields, POINTER), refused=POINTER, stored=StoredArrays, memory=BlockMemory,
)  # fmt: skip
DerivativeLaunch = struct(
    "DerivativeLaunch", parameters=Parameters, operands=OperandArrays, shape=BlockShape, count=INT, reserved=INT,
    fill=DOUBLE, x=POINTER, v=POINTER, s=POINTER, status=POINTER, r_x=OperandArray, r_v=OperandArray, u_x=POINTER,
    u_v=POINTER, of_Q=POINTER, of_A=POINTER, of_G=POINTER, stored=StoredArrays, memory=BlockMemory,
)  # fmt: skip


def address(array):
    return None if array is None else array.ctypes.data


def operand(array):
    if array is None:
        return OperandArray()
    assert array[0].flags.c_contiguous
    shared = array.shape[0] == 1 or array.strides[0] == 0
    return OperandArray(array.ctypes.data, 0 if shared else array.strides[0] // array.itemsize)


class Stored(NamedTuple):
    constant: np.ndarray | None
    last: np.ndarray | None
    scaling: np.ndarray
    form: np.ndarray
    factor_ok: np.ndarray

    def struct(self):
        shared = self.constant is None or self.constant.shape[0] == 1
        return StoredArrays(*map(address, self), 0 if shared else self.constant.shape[1])


class EmulatedBlocks:
    """An engine that launches the kernels with emulated blocks."""

    def __init__(self, library, threads=64, order=FORWARD, shared=SHARED, blocks=None, store=True):
        self.library, self.threads, self.order, self.shared = library, threads, order, shared
        self.blocks, self.store = blocks, store

    def refusal(self, problem, verbose):
        return None

    def sizes(self, derivative, problem, form, itemsize):
        sizes = (ctypes.c_longlong * 5)()
        layout = problem.layout
        self.library.qp_block_sizes(
            derivative, form, layout.n, layout.p, layout.m, layout.lower, layout.upper, itemsize, self.shared, sizes
        )
        return list(sizes)

    def launch(self, kernel, problem, form, arguments, derivative=False):
        dtype = np.dtype(problem.dtype)
        least, shared, workspace, *_ = self.sizes(derivative, problem, form, dtype.itemsize)
        assert least <= shared
        blocks = self.blocks or problem.batch
        memory = np.full(blocks * workspace // 8 + 1, np.nan)
        arguments.memory = BlockMemory(memory.ctypes.data, workspace, shared, 0)
        kind = {8: "double", 4: "float"}[dtype.itemsize]
        failed = self.library.qp_emulated_launch(
            f"{kernel}_{kind}".encode(), blocks, self.threads, ctypes.c_size_t(shared), ctypes.byref(arguments),
            ctypes.c_size_t(ctypes.sizeof(arguments)), self.order,
        )  # fmt: skip
        assert not failed

    def common(self, launch, problem, form, stored):
        layout, P = problem.layout, parameters.parameters(problem)
        launch.parameters = Parameters(*[getattr(P, name) for name, _ in Parameters._fields_])
        for name in OPERANDS:
            setattr(launch.operands, name, operand(problem.operands.get(name)))
        launch.shape = BlockShape(form, layout.n, layout.p, layout.m, layout.lower, layout.upper)
        launch.count, launch.stored = problem.batch, stored.struct()

    def solve(self, problem, settings, start, *, check, verbose, progress):
        form, B, n, rows = preferred_form(problem), problem.batch, problem.n, problem.rows
        dtype = np.dtype(problem.dtype)
        *_, constant, last = self.sizes(False, problem, form, dtype.itemsize)
        shared = all(
            value.shape[0] == 1 for name in ("Q", "G", "A", "lb", "ub") if (value := problem.operands.get(name)) is not None
        )
        numbers = lambda *shape: np.full(shape, np.nan, dtype)  # noqa: E731
        stored = Stored(
            numbers(1 if shared else B, constant) if self.store else None, numbers(B, last) if self.store else None,
            numbers(B, n + rows), np.full(B, -1, np.int32), np.full(B, 2, np.uint8),
        )  # fmt: skip
        kinds = [dtype] * 3 + [np.int32] * 2 + [np.float64] * 4
        shapes = [(B, n), (B, rows), (B, rows)] + [(B, 1)] * 6
        outcome = Outcome(*[np.zeros(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)])
        self.refused = np.full(B, -1, np.int32)
        launch = SolveLaunch()
        self.common(launch, problem, form, stored)
        launch.settings, launch.check, launch.rounding = Settings(*settings), check, problem.rounding
        given = None
        if start is not None:
            given = [
                np.ascontiguousarray(np.broadcast_to(value, (B, *value.shape[1:])), kind)
                for value, kind in zip(start, (dtype, dtype, np.uint8), strict=True)
            ]
            launch.start_x, launch.start_v, launch.start_usable = map(address, given)
        for name, array in outcome._asdict().items():
            setattr(launch, name, address(array))
        launch.refused = address(self.refused)
        self.launch(f"solve_{form.name.lower()}", problem, form, launch)
        self.left = int(np.sum(stored.form != form))
        if form != Form.PRIMAL:
            self.launch("solve_primal", problem, Form.PRIMAL, launch)
        return outcome, Factors(self, form, stored)


class Factors(NamedTuple):
    engine: EmulatedBlocks
    form: Form
    stored: Stored

    def solve(self, lin, r_x, r_v, fill, matrices):
        problem, launch = lin.problem, DerivativeLaunch()
        self.engine.common(launch, problem, self.form, self.stored)
        status = np.ascontiguousarray(lin.status, np.int32)
        u_x, u_v = np.full_like(lin.x, np.nan), np.full_like(lin.v, np.nan)
        gradients = {
            name: np.full((problem.batch, *problem.operands[name].shape[1:]), np.nan, lin.x.dtype)
            for name in matrices
            if name in problem.operands and problem.operands[name].shape[0] == problem.batch
        }
        launch.fill, launch.status = fill, address(status)
        for name in ("x", "v", "s"):
            setattr(launch, name, address(np.ascontiguousarray(getattr(lin, name))))
        r_x, r_v = np.ascontiguousarray(r_x), np.ascontiguousarray(r_v)
        launch.r_x, launch.r_v, launch.u_x, launch.u_v = operand(r_x), operand(r_v), address(u_x), address(u_v)
        for name in MATRICES:
            setattr(launch, f"of_{name}", address(gradients.get(name)))
        self.engine.launch(f"derivative_{self.form.name.lower()}", problem, self.form, launch, derivative=True)
        return u_x, u_v, gradients


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("blocks") / "blocks.so"
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", f"-I{SOURCES}"]
    subprocess.run([COMPILER, *options, SOURCES / "emulation.cpp", "-o", path], check=True, timeout=300)
    return ctypes.CDLL(os.fspath(path))


@pytest.fixture
def blocks(library, monkeypatch):
    """Return a function that makes engine="compiled" use emulated blocks from then on, and returns that engine."""

    def use(**options):
        engine = EmulatedBlocks(library, **options)
        monkeypatch.setattr(
            "qpdiff.solver.choose_engine", lambda name, *a: choose_engine(name, *a) if name == "array" else engine
        )
        return engine

    return use


def some_of(operands, count):
    """The first problems of a batch."""
    return {name: value[:count] if value.ndim > len(OPERANDS[name]) else value for name, value in operands.items()}


@pytest.mark.parametrize("threads", [1, 32, 64])
@pytest.mark.parametrize("case", CASES)
def test_iteration_by_iteration(case, threads, blocks):
    """As in test_engines.py: the first iterates to rounding, then where each problem ends."""
    blocks(threads=threads)
    operands = some_of(CASES[case](), {1: 20, 32: 4, 64: 2}[threads])
    steps = range(3 if of_case(ROUNDING, case, 0) else 8) if threads == 1 else (0, 2)
    for k in steps:
        array, compiled = (
            qpdiff.solve_qp(**operands, engine=engine, max_iterations=k) for engine in ("array", "compiled")
        )
        np.testing.assert_array_equal(array.status, compiled.status)
        np.testing.assert_array_equal(array.iterations, compiled.iterations)
        assert_same(array, compiled, of_case(ROUNDING, case, 1e-7))
    array, compiled = (qpdiff.solve_qp(**operands, engine=engine, tol=1e-8) for engine in ("array", "compiled"))
    assert np.mean(array.status != compiled.status) <= of_case(UNDECIDED, case, 0.0)
    solved = (array.status == qpdiff.Status.SOLVED) & (compiled.status == qpdiff.Status.SOLVED)
    assert np.max(np.abs(array.iterations - compiled.iterations)[solved], initial=0) <= 2
