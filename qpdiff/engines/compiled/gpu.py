"""The arrays that a call passes to the kernels on a GPU: operands, results, and factors stored for the derivative.

A block of threads solves one problem from its start to its end, and another kernel differentiates it. Both read the
caller's arrays where they are; results and workspace come from the arrays' own library, so that its allocator and its
stream order them with all other work. Nothing goes to the host but, where operands are checked, whether one is bad.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any, NamedTuple

from ...problem import MATRICES, OPERANDS, PRICE_NAMES, Problem
from ...validation import check_values
from ..base import Linearization, Outcome, Settings, StartingPoint
from ..parameters import Parameters, parameters
from ..reduction import Form, preferred_form
from . import cuda
from .cuda import missing
from .engine import DECIDING, Stored, _core, stores
from .launch import (
    BlockMemory,
    BlockShape,
    DerivativeLaunch,
    OperandArray,
    ParameterStruct,
    SettingsStruct,
    SolveLaunch,
)

__all__ = [
    "Factors", "arrays_of_solve", "derivative_bytes", "form_of", "launch_solve", "missing", "refusal", "solve", "suits",
]  # fmt: skip

THREADS = ((16, 32), (32, 64), (80, 128))
"""The largest number of variables or of linear constraints, and the threads of a block up to there.

By a model of the time, 60 cycles for a barrier and 8 for an access to memory: with more threads the barriers take
longer than the work between them. Not measured yet.
"""
MOST_THREADS = 256
"""Beyond; the kernels take no more, so that each thread may have all the registers that it can address."""
WORKSPACE_BYTES = 2**31
"""Bytes of workspace that all blocks have together, at most; where it is too little for as many blocks as problems,
each block takes several."""
WAVES = 8
"""Problems for each multiprocessor up to which "auto" takes sizes whose reduced matrix does not fit in shared memory.

A block is bound by latency there, while the matrix products of the array engine use the whole GPU in large batches. By
the model: sixteen problems with n = 500 take 10 ms, a thousand 100, about as long as with the array engine.
"""


class Sizes(NamedTuple):
    """The memory that a kernel needs for the sizes of a problem: `BlockSizes` of src/launch.hpp."""

    least_shared: int
    """Bytes of shared memory without any matrix."""
    shared: int
    """Bytes of shared memory with all matrices that fit."""
    workspace: int
    """Bytes of workspace of a block, for the others."""
    constant: int
    """Numbers stored for each problem: constants of the reduced system; `last`, of its last factor."""
    last: int


@lru_cache(maxsize=256)
def _sizes(derivative: bool, form: int, shape: tuple, itemsize: int, limit: int) -> Sizes:
    return Sizes(*_core.block_sizes(derivative, form, *shape, itemsize, limit))


def _shape(problem: Problem) -> tuple[int, int, int, bool, bool, bool]:
    layout = problem.layout
    return layout.n, layout.p, layout.m, layout.lower, layout.upper, problem.is_elastic


def _itemsize(problem: Problem) -> int:
    return 4 if problem.dtype == problem.backend.xp.float32 else 8


def _sizes_on(on: cuda.Device, problem: Problem, derivative: bool, form: Form) -> Sizes:
    return _sizes(derivative, int(form), _shape(problem), _itemsize(problem), on.shared_bytes)


def _workspace_bytes(problem: Problem, sizes: Sizes) -> int:
    """Return the bytes of workspace that all blocks of a launch have together."""
    return sizes.workspace * min(problem.batch, max(1, WORKSPACE_BYTES // max(1, sizes.workspace)))


def threads_for(n: int, linear: int) -> int:
    """Return the threads of a block for problems with so many variables and linear constraints."""
    longest = max(n, linear)
    return next((threads for limit, threads in THREADS if longest <= limit), MOST_THREADS)


# ---- the engine


def refusal(problem: Problem, verbose: bool) -> str | None:
    """Say why it cannot take these problems; None: it can."""
    if verbose:
        return "takes one problem after the other; verbose needs engine='array'"
    on, form = cuda.device(problem.backend.gpu), form_of(problem)
    for one in {form, Form.PRIMAL}:
        for derivative in (False, True):
            needed = _sizes(derivative, one, _shape(problem), 8, on.shared_bytes).least_shared
            if needed > on.shared_bytes:
                return (
                    f"needs {needed} bytes of shared memory for the vectors of such a problem, of which the GPU has "
                    f"{on.shared_bytes}; pass engine='array'"
                )
    return None


def suits(problem: Problem) -> bool:
    """Return whether it is likely to take less time than the array engine."""
    on, form = cuda.device(problem.backend.gpu), form_of(problem)
    least = _sizes(False, form, _shape(problem), 8, on.shared_bytes).least_shared
    size = problem.n if form == Form.PRIMAL else problem.p + problem.m
    return least + 8 * size**2 <= on.shared_bytes or problem.batch <= WAVES * on.multiprocessors


def form_of(problem: Problem) -> Form:
    """Choose the reduced form by the shapes alone; problems for which it is not safe get the primal one on the GPU."""
    return preferred_form(problem, diagonal=True)


def solve(
    problem: Problem, settings: Settings, start: StartingPoint | None, *, check: bool, verbose: bool, progress
) -> tuple[Outcome, Factors]:
    """Solve every problem of a batch, as `engines.base.Engine` says."""
    solved, refused = _solve(problem, settings, start, check)
    if refused is not None and bool(problem.backend.xp.any(refused != 0)):
        check_values(problem)  # raises the error, if there is one: the checks in the kernels are stricter
        solved, _ = _solve(problem, settings, start, False)
    if progress is not None:
        progress(problem.batch, problem.batch)
    return solved


class Arrays(NamedTuple):
    """The arrays that a solve writes."""

    outcome: Outcome
    stored: Stored
    refused: Any
    """Flags of the problems that break a rule; None without a check."""
    workspace: Any


def _solve(problem: Problem, settings: Settings, start: StartingPoint | None, check: bool):
    """Solve as `solve` does; return also a mask of the problems that break a rule, None without a check."""
    backend = problem.backend
    arrays = arrays_of_solve(problem, cuda.device(backend.gpu), backend.empty, check=check)
    if start is not None:
        start = StartingPoint(*(backend.xp.broadcast_to(part, (problem.batch, part.shape[-1])) for part in start))
    launch_solve(problem, settings, start, arrays)
    return (arrays.outcome, Factors(int(form_of(problem)), arrays.stored)), arrays.refused


def arrays_of_solve(problem: Problem, on: cuda.Device, make, *, check: bool = False, store: bool = True) -> Arrays:
    """Make the arrays that a solve on a GPU writes by ``make(shape, dtype)``; False for `store`: without factors."""
    backend, dtype, form = problem.backend, problem.dtype, form_of(problem)
    xp, count, n, rows = backend.xp, problem.batch, problem.n, problem.rows
    sizes = _sizes_on(on, problem, False, form)
    shared, factors = _storage(problem, sizes, _itemsize(problem)) if store else (False, False)

    def empty(columns: int, kind=dtype, problems: int = count):
        return make((problems, columns), kind)

    outcome = Outcome(
        empty(n), empty(rows), empty(rows), empty(1, xp.int32), empty(1, xp.int32),
        *(empty(1, backend.widest_float) for _ in range(4)),
    )  # fmt: skip
    stored = Stored(
        empty(sizes.constant, problems=1 if shared else count) if sizes.constant and (shared or factors) else None,
        empty(sizes.last) if sizes.last and factors else None,
        empty(n + rows), empty(1, xp.int32), empty(1, xp.uint8),
    )  # fmt: skip
    needed = max(_workspace_bytes(problem, _sizes_on(on, problem, False, one)) for one in (form, Form.PRIMAL))
    return Arrays(outcome, stored, empty(1, xp.int32) if check and count else None, make((needed,), xp.uint8))


def launch_solve(problem: Problem, settings: Settings, start: StartingPoint | None, arrays: Arrays) -> None:
    """Start the kernels that solve every problem of a batch; `start` has an entry for each."""
    if problem.batch == 0:
        return
    form = form_of(problem)
    launch = _Launch(problem, form, SolveLaunch)
    launch.arguments.settings = SettingsStruct(*settings)
    launch.arguments.check, launch.arguments.rounding = arrays.refused is not None, problem.rounding
    launch.set_stored(arrays.stored)
    launch.set_pointers(**arrays.outcome._asdict(), refused=arrays.refused)
    if start is not None:
        launch.set_pointers(**dict(zip(("start_x", "start_v", "start_usable"), start, strict=True)))
    launch.start("solve", form, arrays.workspace)
    if form != Form.PRIMAL:  # which solves the problems that are left, and leaves the others as they are
        launch.start("solve", Form.PRIMAL, arrays.workspace)


def _storage(problem: Problem, sizes: Sizes, itemsize: int) -> tuple[bool, bool]:
    """Return whether one entry of the constants is for all problems, and whether factors of each are stored."""
    values = {name: value for name, value in problem.operands.items() if name in DECIDING}
    shared = problem.batch == 1 or all(value.shape[0] == 1 for value in values.values())
    stored = itemsize * problem.batch * ((0 if shared else sizes.constant) + sizes.last)
    return shared, stores(stored, itemsize * problem.entries)


class Factors(NamedTuple):
    """Factors that solve the KKT system at the solutions of a batch."""

    form: int
    """The reduced form chosen by the shapes."""
    stored: Stored

    def solve(self, lin: Linearization, r_x, r_v, fill: float, names: Collection[str]):
        """Solve the KKT system, as `engines.base.Factors` says.

        The gradients of matrices that each problem has its own of come along.
        """
        lin = lin.at_solved() if names else lin
        problem, form = lin.problem, Form(self.form)
        backend, dtype = problem.backend, problem.dtype
        u = backend.empty(lin.x.shape, dtype), backend.empty(lin.v.shape, dtype)
        own = [name for name in MATRICES if name in names and getattr(problem, name).shape[0] == problem.batch]
        gradients = {name: backend.empty(getattr(problem, name).shape, dtype) for name in own}
        needed = derivative_bytes(problem, cuda.device(backend.gpu), form)
        self.launch(lin, (r_x, r_v), fill, u, gradients, backend.empty((needed,), backend.xp.uint8))
        return *u, gradients

    def launch(self, lin: Linearization, right, fill: float, u, gradients: dict[str, Any], workspace) -> None:
        """Start the kernel that solves the KKT system and writes u and the gradients."""
        launch = _Launch(lin.problem, Form(self.form), DerivativeLaunch)
        launch.arguments.fill = fill
        launch.set_stored(self.stored)
        launch.set_pointers(
            x=lin.x, v=lin.v, s=lin.s, status=lin.status, **dict(zip(("u_x", "u_v"), u, strict=True)),
            **{f"of_{name}": value for name, value in gradients.items()},
        )  # fmt: skip
        launch.arguments.r_x, launch.arguments.r_v = map(launch.operand, right)
        launch.start("derivative", Form(self.form), workspace)


def derivative_bytes(problem: Problem, on: cuda.Device, form: Form) -> int:
    """Return the bytes of workspace of a derivative for problems that were solved in a form."""
    return _workspace_bytes(problem, _sizes_on(on, problem, True, form))


# ---- a launch


@lru_cache(maxsize=8)
def _numbers(P: Parameters):
    return ParameterStruct(*[getattr(P, name) for name in _core.PARAMETERS])


class _Launch:
    """The arguments of a kernel, and the arrays that have to stay until it is started."""

    def __init__(self, problem: Problem, form: Form, kind):
        self.problem, self.backend, self.arguments = problem, problem.backend, kind()
        self.on = cuda.device(self.backend.gpu)
        self.kind = "float" if _itemsize(problem) == 4 else "double"
        self.held: list[Any] = []
        self.arguments.parameters = _numbers(parameters(problem))
        self.arguments.shape = BlockShape(form, *_shape(problem))
        self.arguments.count = problem.batch
        if problem.batch:
            self.set_operands(problem.operands)

    def operand(self, value) -> Any:
        """Return an array (B or 1, ·) as an operand."""
        pointer, stride, owner = self.backend.located(value)
        self.held.append(owner)
        return OperandArray(pointer, stride)

    def set_operands(self, operands: dict[str, Any]) -> None:
        """Set the operands, and the prices of violations."""
        to = self.arguments.operands
        for name in OPERANDS.keys() & operands.keys():
            setattr(to, name, self.operand(operands[name]))
        for option, names in PRICE_NAMES.items():
            for of, name in names.items():
                if name in operands:
                    setattr(getattr(to, f"price_of_{of}"), option, self.operand(operands[name]))

    def set_pointers(self, **arrays) -> None:
        """Set pointers to arrays (B, ·), which have to be contiguous."""
        for name, value in arrays.items():
            if value is not None:
                pointer, stride, owner = self.backend.located(value)
                if stride not in (0, value.shape[-1]) or (stride == 0 and value.shape[0] > 1):
                    pointer, _, owner = self.backend.located(self.backend.contiguous(value))
                self.held.append(owner)
                setattr(self.arguments, name, pointer)

    def set_stored(self, stored: Stored) -> None:
        for name, value in stored._asdict().items():
            if value is not None:
                setattr(self.arguments.stored, name, self.backend.located(value)[0])
        constant = stored.constant
        own = constant is not None and constant.shape[0] > 1
        self.arguments.stored.constant_stride = constant.shape[1] if own else 0

    def start(self, stage: str, form: Form, workspace) -> None:
        """Start the kernel of a stage in a form, with as many blocks as have workspace."""
        problem, sizes = self.problem, _sizes_on(self.on, self.problem, stage == "derivative", form)
        blocks, pointer = problem.batch, None
        if sizes.workspace:
            blocks, pointer = min(blocks, workspace.shape[0] // sizes.workspace), self.backend.located(workspace)[0]
        self.arguments.memory = BlockMemory(pointer, sizes.workspace, sizes.shared, 0)
        priced = "_priced" if problem.is_elastic else ""
        cuda.launch(
            f"{stage}_{form.name.lower()}_{self.kind}{priced}", blocks, threads_for(problem.n, problem.p + problem.m),
            sizes.shared, self.arguments, self.on, self.backend.stream(),
        )  # fmt: skip
