"""The GPU kernels, with emulated blocks of threads on the CPU, against the engines that run there."""

import ctypes
import platform
from typing import NamedTuple

import numpy as np
import pytest
from emulated_gpu import COMPILER, SOURCES, build
from engines.test_engines import CASES, DIFFERENTIATED, ELASTIC, ROUNDING, UNDECIDED, assert_same, of_case, rng

import qpdiff
from qpdiff.engines import parameters
from qpdiff.engines.base import Outcome
from qpdiff.engines.choice import choose_engine
from qpdiff.engines.reduction import Form, preferred_form
from qpdiff.problem import MATRICES, OPERANDS, PRICE_NAMES, PRICED

pytest.importorskip("qpdiff.engines.compiled.engine")
from qpdiff.engines.compiled.launch import (
    BlockMemory,
    BlockShape,
    DerivativeLaunch,
    OperandArray,
    ParameterStruct,
    SettingsStruct,
    SolveLaunch,
    StoredArrays,
)

pytestmark = pytest.mark.skipif(
    COMPILER is None or not SOURCES.exists() or platform.system() == "Windows", reason="no C++ compiler, or no sources"
)
FORWARD, BACKWARD, WARP_AHEAD, SHUFFLED = 0, 1, 2, 777
SHARED = 227 * 1024
"""Bytes of shared memory of a block on an H100."""


def address(array):
    return None if array is None else array.ctypes.data


def operand(array):
    if array is None:
        return OperandArray()
    assert array[0].flags.c_contiguous
    shared = array.shape[0] == 1 or array.strides[0] == 0
    return OperandArray(array.ctypes.data, 0 if shared else array.strides[0] // array.itemsize)


def unset(shape, dtype):
    return np.full(shape, np.nan, dtype)


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
            derivative, form, layout.n, layout.p, layout.m, layout.lower, layout.upper, problem.is_elastic, itemsize,
            self.shared, sizes,
        )  # fmt: skip
        return list(sizes)

    def launch(self, kernel, problem, form, arguments, derivative=False):
        dtype = np.dtype(problem.dtype)
        least, shared, workspace, *_ = self.sizes(derivative, problem, form, dtype.itemsize)
        assert least <= shared
        self.global_bytes = workspace
        blocks = self.blocks or problem.batch
        memory = np.full(blocks * workspace // 8 + 1, np.nan)
        arguments.memory = BlockMemory(memory.ctypes.data, workspace, shared, 0)
        kind, priced = {8: "double", 4: "float"}[dtype.itemsize], "_priced" if problem.is_elastic else ""
        failed = self.library.qp_emulated_launch(
            f"{kernel}_{kind}{priced}".encode(), blocks, self.threads, ctypes.c_size_t(shared), ctypes.byref(arguments),
            ctypes.c_size_t(ctypes.sizeof(arguments)), self.order,
        )  # fmt: skip
        assert not failed

    def common(self, launch, problem, form, stored):
        layout, P = problem.layout, parameters.parameters(problem)
        launch.parameters = ParameterStruct(*[getattr(P, name) for name, _ in ParameterStruct._fields_])
        for name in OPERANDS:
            setattr(launch.operands, name, operand(problem.operands.get(name)))
        for option, names in PRICE_NAMES.items():
            for of, name in names.items():
                setattr(getattr(launch.operands, f"price_of_{of}"), option, operand(problem.operands.get(name)))
        launch.shape = BlockShape(form, layout.n, layout.p, layout.m, layout.lower, layout.upper, problem.is_elastic)
        launch.count, launch.stored = problem.batch, stored.struct()

    def solve(self, problem, settings, start, *, check, verbose, progress):
        form, B, n, rows = preferred_form(problem), problem.batch, problem.n, problem.rows
        dtype = np.dtype(problem.dtype)
        *_, constant, last = self.sizes(False, problem, form, dtype.itemsize)
        deciding = [problem.operands.get(name) for name in ("Q", "G", "A", "lb", "ub")]
        shared = all(value is None or value.shape[0] == 1 for value in deciding)
        stored = Stored(
            unset((1 if shared else B, constant), dtype) if self.store else None,
            unset((B, last), dtype) if self.store else None,
            unset((B, n + rows), dtype), np.full(B, -1, np.int32), np.full(B, 2, np.uint8),
        )  # fmt: skip
        kinds = [dtype] * 3 + [np.int32] * 2 + [np.float64] * 4
        shapes = [(B, n), (B, rows), (B, rows)] + [(B, 1)] * 6
        outcome = Outcome(*[np.zeros(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)])
        self.refused = np.full(B, -1, np.int32)
        launch = SolveLaunch()
        self.common(launch, problem, form, stored)
        launch.settings, launch.check, launch.rounding = SettingsStruct(*settings), check, problem.rounding
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

    def solve(self, lin, r_x, r_v, fill, names):
        lin = lin.at_solved() if names else lin
        problem, launch = lin.problem, DerivativeLaunch()
        self.engine.common(launch, problem, self.form, self.stored)
        status = np.ascontiguousarray(lin.status, np.int32)
        u_x, u_v = np.full_like(lin.x, np.nan), np.full_like(lin.v, np.nan)
        gradients = {
            name: np.full((problem.batch, *problem.operands[name].shape[1:]), np.nan, lin.x.dtype)
            for name in MATRICES
            if name in names and problem.operands[name].shape[0] == problem.batch
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
def library():
    return build()


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

    def some(name, value):
        if name in PRICED:
            return value and {of: price[:count] for of, price in value.items()}
        return value[:count] if value.ndim > len(OPERANDS[name]) else value

    return {name: some(name, value) for name, value in operands.items()}


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
    undecided = np.ceil(of_case(UNDECIDED, case, 0.0) * len(array.status))  # of few problems one
    assert np.sum(array.status != compiled.status) <= undecided
    solved = (array.status == qpdiff.Status.SOLVED) & (compiled.status == qpdiff.Status.SOLVED)
    assert np.max(np.abs(array.iterations - compiled.iterations)[solved], initial=0) <= 2


@pytest.mark.parametrize("threads", [1, 64])
@pytest.mark.parametrize("case", ELASTIC)
def test_iteration_by_iteration_with_prices(case, threads, blocks):
    blocks(threads=threads)
    operands = some_of(ELASTIC[case](), {1: 20, 64: 2}[threads])
    for k in (*range(5), 200) if threads == 1 else (0, 2, 200):
        array, compiled = (
            qpdiff.solve_qp(**operands, engine=engine, max_iterations=k) for engine in ("array", "compiled")
        )
        np.testing.assert_array_equal(array.status, compiled.status)
        if k < 200:
            np.testing.assert_array_equal(array.iterations, compiled.iterations)
        assert_same(array, compiled, 1e-7 if 0 < k < 200 and case != "linear programs" else 1e-5)


@pytest.mark.parametrize("threads", [32, 64])
@pytest.mark.parametrize(
    "case",
    ["optnet", "everything", "diagonal", "infeasible", "unbounded", "shared matrices", "some rows", "dense dual"],
)
def test_order_of_threads(case, threads, blocks):
    """Bits do not depend on the order in which the threads run."""
    operands = some_of((CASES | ELASTIC)[case](), 2)
    found = []
    for order in (FORWARD, BACKWARD, WARP_AHEAD, SHUFFLED):
        blocks(threads=threads, order=order)
        sol = qpdiff.solve_qp(**operands, engine="compiled")
        gradients = qpdiff.vjp(sol, x=np.ones_like(sol.x), z=np.ones_like(sol.z))
        found.append([getattr(sol, name) for name in ("x", "y", "z", "s", "iterations", "objective")])
        found[-1] += [value for value in gradients if isinstance(value, np.ndarray)]
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("store", [True, False], ids=["stored factors", "new factors"])
@pytest.mark.parametrize("threads", [1, 64])
@pytest.mark.parametrize("case", [*DIFFERENTIATED, "dense dual", "some rows"])
def test_the_same_derivatives(case, threads, store, blocks):
    operands = some_of((CASES | ELASTIC)[case](), {1: 20, 64: 3}[threads])
    prices = {name: operands.pop(name) for name in PRICED if name in operands}
    expected = qpdiff.solve_qp(**operands, **prices, engine="compiled", tol=1e-10)
    blocks(threads=threads, store=store)
    sol = qpdiff.solve_qp(**operands, **prices, engine="compiled", tol=1e-10)
    cotangents = {name: rng().normal(size=getattr(sol, name).shape) for name in ("x", "y", "z", "z_lb", "z_ub")}
    one, other = qpdiff.vjp(expected, **cotangents), qpdiff.vjp(sol, **cotangents)
    # An iteration more on one side changes gradients that are zero but for the last iterate's distance to the bounds.
    scale = max(np.max(np.abs(getattr(one, name)), initial=0.0) for name in operands)
    for name in operands:
        np.testing.assert_allclose(getattr(other, name), getattr(one, name), atol=1e-5 * scale, err_msg=name)
    tangents = {name: rng().normal(size=value.shape) for name, value in operands.items()}
    for a, b in zip(qpdiff.jvp(expected, **tangents), qpdiff.jvp(sol, **tangents), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * np.max(np.abs(a), initial=1.0))


@pytest.mark.parametrize("case", ["optnet", "everything", "diagonal", "shared, primal"])
def test_single_precision(case, blocks):
    operands = {name: value.astype(np.float32) for name, value in some_of(CASES[case](), 4).items()}
    expected = qpdiff.solve_qp(**operands, dtype="float32", engine="compiled")
    blocks(threads=32)
    for k in range(4):
        array, compiled = (
            qpdiff.solve_qp(**operands, dtype="float32", engine=engine, max_iterations=k)
            for engine in ("array", "compiled")
        )
        np.testing.assert_array_equal(array.iterations, compiled.iterations)
        assert_same(array, compiled, 1e-2)
    sol = qpdiff.solve_qp(**operands, dtype="float32", engine="compiled")
    assert sol.x.dtype == np.float32
    np.testing.assert_array_equal(sol.status, expected.status)
    one, other = (qpdiff.vjp(s, x=np.ones_like(s.x)).q for s in (expected, sol))
    np.testing.assert_allclose(other, one, atol=2e-2 * np.max(np.abs(one)))


@pytest.mark.parametrize("case", ["everything", "larger", "rows without a limit"])
def test_warm_start(case, blocks):
    operands = some_of(CASES[case](), 3)
    moved = operands | {"q": operands["q"] + 1e-3}
    start = qpdiff.solve_qp(**operands, engine="array")
    blocks(threads=32)
    for k in (0, 1, 3, 200):
        array, compiled = (
            qpdiff.solve_qp(**moved, engine=engine, warm_start=start, max_iterations=k)
            for engine in ("array", "compiled")
        )
        np.testing.assert_array_equal(array.status, compiled.status)
        assert_same(array, compiled, 1e-5)


# ---- what a launch is told, and what it says


@pytest.mark.parametrize("case", ["optnet", "everything", "diagonal", "shared matrices"])
def test_blocks_and_memory_do_not_matter(case, blocks):
    """Fewer blocks than problems, and matrices in global memory, give the same bits."""
    operands = some_of(CASES[case](), 5)
    found = []
    for options in ({}, {"blocks": 2}, {"shared": 0}):
        engine = blocks(threads=32, **options)
        sol = qpdiff.solve_qp(**operands, engine="compiled")
        gradients = qpdiff.vjp(sol, x=np.ones_like(sol.x))
        found.append([sol.x, sol.z, sol.objective, *[value for value in gradients if value is not None]])
    assert engine.global_bytes > 0
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_values_that_are_refused(blocks):
    """A flag for each problem, by both launches; the other problems are solved as without it."""
    operands = some_of(CASES["everything"](), 6)
    engine = blocks(threads=32)
    qpdiff.solve_qp(**operands, engine="compiled")
    np.testing.assert_array_equal(engine.refused, 0)
    wrong = {name: value.copy() for name, value in operands.items()}
    wrong["Q"][0, 0, 1] += 1.0
    wrong["q"][1, 0] = np.nan
    wrong["h"][2, 0] = -np.inf
    wrong["Q"][3] = np.diag([1.0, *[-1.0] * (wrong["Q"].shape[-1] - 1)])
    wrong["G"][4, 0, 0] = np.inf
    qpdiff.solve_qp(**wrong, engine="compiled")
    np.testing.assert_array_equal(engine.refused, [1, 1, 1, 1, 1, 0])


def test_prices_that_are_refused(blocks):
    operands = some_of(ELASTIC["primal"](), 5)
    engine = blocks(threads=32)
    qpdiff.solve_qp(**operands, engine="compiled")
    np.testing.assert_array_equal(engine.refused, 0)
    linear, quadratic = operands["elastic"], operands["elastic_quadratic"]
    linear["A"][0, 0], linear["G"][1, 0], quadratic["bounds"][2, 0] = -1.0, np.nan, np.inf
    operands["lb"][3, 0] = operands["ub"][3, 0] + 1.0  # at its price
    operands["lb"][4, 0] = operands["ub"][4, 0] + 1.0
    linear["bounds"][4, 0], quadratic["bounds"][4, 0] = np.inf, 0.0
    qpdiff.solve_qp(**operands, engine="compiled")
    np.testing.assert_array_equal(engine.refused, [1, 1, 1, 0, 1])


def test_problems_that_a_dual_form_cannot_solve(blocks):
    """Those are left to a second launch; the others are not touched by it."""
    operands = CASES["optnet"]()
    singular = operands["Q"].copy()
    singular[[2, 5]] = np.diag([1.0] * 9 + [0.0])
    engine = blocks(threads=32)
    mixed = qpdiff.solve_qp(**operands | {"Q": singular}, engine="compiled", tol=1e-8)
    assert engine.left == 2
    array = qpdiff.solve_qp(**operands | {"Q": singular}, engine="array", tol=1e-8)
    np.testing.assert_array_equal(mixed.status, array.status)
    np.testing.assert_allclose(mixed.x, array.x, atol=1e-5)
    alone = qpdiff.solve_qp(**operands, engine="compiled", tol=1e-8)
    np.testing.assert_array_equal(np.delete(mixed.x, [2, 5], 0), np.delete(alone.x, [2, 5], 0))
    gradients = [qpdiff.vjp(sol, x=np.ones_like(sol.x)) for sol in (mixed, array)]
    for a, b in zip(*gradients, strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, atol=1e-4 * np.max(np.abs(b)))
