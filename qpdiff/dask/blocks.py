"""The blocks of a lazy solution, and what is read from them."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import dask.array as da

from ..backend import from_host
from ..differentiation import Tangents
from ..solution import FIELDS, Solution
from ..sparse import Pattern, Sparse, stored
from ..validation import broadcasts
from .chunks import batch_axes, block_arguments, core_axes, core_shape
from .tasks import read_gradient


@dataclass(init=False, repr=False, eq=False)
class LazyTangents(Tangents):  # type: ignore[misc]
    """`Tangents` with the objective among the fields of a data class, by which Dask takes them apart and makes them."""

    x: Any
    y: Any
    z: Any
    z_lb: Any
    z_ub: Any
    objective: Any

    def __new__(cls, x, y, z, z_lb, z_ub, objective=None):
        """Make the tuple of five; pickle makes it of these and sets the objective by itself."""
        out = super().__new__(cls, x, y, z, z_lb, z_ub)
        out.objective = objective
        return out


class Blocks:
    """The lazy solution's stand-in for a linearization.

    No data class and no tuple, which Dask would traverse, to gather what the derivative needs with the solution.

    Parameters
    ----------
    solutions : dask array
        With the batch axes; each of its blocks is no array but the `Solution` of a block.
    shapes : dict
        In which the arrays of the operands were given; of a sparse one the values.
    patterns : dict
        Of the sparse operands.
    numbers : tuple
        The options of prices that were given as one number.
    chunks : tuple
        Of the batch axes.
    empty : Solution
        Of no problem, but with the types of any.
    unsolved : str
    """

    def __init__(
        self,
        solutions,
        shapes: dict[str, tuple[int, ...]],
        patterns: dict[str, Pattern],
        numbers: tuple[str, ...],
        chunks,
        empty: Solution,
        unsolved: str,
    ):
        self.solutions = solutions
        self.shapes = shapes
        self.patterns = patterns
        self.numbers = numbers
        self.chunks = chunks
        self.empty = empty
        self.unsolved = unsolved

    @property
    def problem(self):
        """Read first by `qpdiff.vjp` and `qpdiff.jvp`."""
        raise TypeError("sol is a Solution of qpdiff.dask.solve_qp; qpdiff.dask.vjp and qpdiff.dask.jvp take it")

    @property
    def fill(self) -> str:
        """The contribution to derivatives of problems that are not SOLVED; those of "raise" do not get there."""
        return "zero" if self.unsolved == "zero" else "nan"

    def core(self, name: str) -> tuple[int, ...]:
        """Return the shape of an operand's array without its batch axes."""
        return core_shape(name, self.shapes[name], name in self.patterns)

    @property
    def axes(self) -> tuple[str, ...]:
        return batch_axes(len(self.chunks))

    def map(self, function, arrays: dict[str, Any], core: dict[str, int], options: dict[str, Any], token: str):
        """Apply a function to each block and its part of the arrays; the result is no array, like `solutions`."""
        parts = [(name, value, core[name]) for name, value in arrays.items()]
        return da.blockwise(
            function, self.axes, self.solutions, self.axes, *block_arguments(parts, self.chunks),
            names=tuple(arrays), options=options, adjust_chunks=dict.fromkeys(self.axes, 1),
            align_arrays=False, dtype=object, meta=self.solutions._meta, token=token,
        )  # fmt: skip

    def read(self, values, name: str, empty):
        """Read an attribute of every block's value, as a dask array of what it is in a batch of no problems."""
        core = empty.shape[1:]
        return da.blockwise(
            attrgetter(name), self.axes + core_axes(name, core), values, self.axes,
            new_axes=dict(zip(core_axes(name, core), core, strict=True)),
            adjust_chunks=dict(zip(self.axes, self.chunks, strict=True)), align_arrays=False,
            dtype=empty.dtype, meta=empty, token=f"qpdiff-{name}",
        )  # fmt: skip


def lazy_solution(blocks: Blocks) -> Solution:
    lazy = {name: blocks.read(blocks.solutions, name, getattr(blocks.empty, name)) for name in FIELDS}
    violation = blocks.empty.violation
    if violation is not None:
        parts = {name: part for name, part in violation._asdict().items() if part is not None}
        read = {name: blocks.read(blocks.solutions, f"violation.{name}", part) for name, part in parts.items()}
        violation = violation._replace(**read)
    return Solution(**lazy, violation=violation, linearization=blocks)


def blocks_of(sol) -> Blocks:
    blocks = getattr(sol, "linearization", None)
    if not isinstance(blocks, Blocks):
        kind = "one that is not lazy" if isinstance(sol, Solution) else f"a {type(sol).__name__}"
        raise TypeError(f"sol is {kind}; expected the Solution of qpdiff.dask.solve_qp")
    return blocks


def gradient_of(blocks: Blocks, pulled, name: str, empty):
    """Return the gradient of an operand: read from each block, summed over the batch axes that the operand lacks."""
    shape, axes, empty = blocks.shapes[name], blocks.axes, stored(empty)
    core = empty.shape[1:]
    leading = (1,) * (len(axes) + len(core) - len(shape)) + shape[: len(shape) - len(core)]
    lacking = tuple(i for i, sizes in enumerate(blocks.chunks) if leading[i] != sum(sizes))
    chunks = {axis: 1 if i in lacking else blocks.chunks[i] for i, axis in enumerate(axes)}
    gradient = da.blockwise(
        read_gradient, axes + core_axes(name, core), pulled, axes, operand=name, dims=len(leading) + len(core),
        new_axes=dict(zip(core_axes(name, core), core, strict=True)), adjust_chunks=chunks, align_arrays=False,
        dtype=empty.dtype, meta=empty, token=f"qpdiff-gradient-{name}",
    )  # fmt: skip
    if lacking:
        gradient = gradient.sum(axis=lacking, keepdims=True)
    gradient = gradient[(0,) * (gradient.ndim - len(shape))]
    return Sparse.of_pattern(gradient, blocks.patterns[name]) if name in blocks.patterns else gradient


def fitting(label: str, value, shape, blocks: Blocks):
    """Return a tangent or cotangent, which must broadcast to the shape."""
    if not isinstance(value, da.Array) and not hasattr(value, "dtype"):
        value = from_host(label, value, blocks.empty.linearization.problem.backend)
    if not broadcasts(value.shape, shape):
        raise ValueError(f"{label} has shape {tuple(value.shape)}; expected {tuple(shape)}")
    return value
