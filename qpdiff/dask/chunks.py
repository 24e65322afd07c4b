"""Shapes of operands, and the chunks of arrays that blocks of the batch need."""

from __future__ import annotations

import dask.array as da
import numpy as np
from dask.array.core import unify_chunks

from .. import solver
from ..problem import CORES, OPERANDS, Problem
from ..validation import make_problem
from .operands import with_patterns

CORE_AXES = {"x": 1, "y": 1, "z": 1, "z_lb": 1, "z_ub": 1, "status": 0}
"""Core axes of the parts of a solution that a warm start or a cotangent may have."""


def with_shapes_of(arrays, patterns) -> Problem:
    """Make the problem of these shapes, which it checks, with one number in place of the data."""
    for name, value in arrays.items():
        if any(size != size for size in value.shape):
            raise ValueError(
                f"{name} has shape {value.shape}, with sizes that Dask does not know; call compute_chunk_sizes() on it"
            )
    zeros = {name: np.broadcast_to(0.0, value.shape) for name, value in arrays.items()}
    return make_problem(dict.fromkeys(OPERANDS) | with_patterns(zeros, patterns))


def batch_chunks(arrays, cores: dict[str, int], batch_shape) -> tuple[tuple[int, ...], ...]:
    """Return the blocks of the batch axes: those of the dask arrays that have them, unified."""
    pairs = []
    for name, value in arrays.items():
        if isinstance(value, da.Array) and value.ndim:
            core = cores[name]
            whole = value.rechunk(dict.fromkeys(range(value.ndim - core, value.ndim), -1))
            pairs += [whole, _index(name, value, core, len(batch_shape))]
    known, _ = unify_chunks(*pairs)
    blocks = (tuple(known.get(axis, ())) for axis in batch_axes(len(batch_shape)))
    return tuple(sizes if sum(sizes) == size else (size,) for sizes, size in zip(blocks, batch_shape, strict=True))


def block_arguments(parts, chunks):
    """Arrays (name, array, number of core axes) as arguments of `blockwise`, chunked as the batch is."""
    arguments = []
    for name, value, core in parts:
        leading = value.ndim - core
        batch = chunks[len(chunks) - leading :]
        blocks = tuple((1,) if size == 1 else sizes for size, sizes in zip(value.shape, batch, strict=False))
        blocks += tuple((size,) for size in value.shape[leading:])
        lazy = value.rechunk(blocks) if isinstance(value, da.Array) else da.from_array(value, chunks=blocks)
        arguments += [lazy, _index(name, value, core, len(chunks))]
    return arguments


def _index(name: str, value, core: int, batch: int):
    """Labels of an array's axes, those of the batch as NumPy broadcasts them."""
    leading = value.ndim - core
    return batch_axes(batch)[batch - leading :] + core_axes(name, value.shape[leading:])


def core_shape(name: str, shape: tuple[int, ...], sparse: bool) -> tuple[int, ...]:
    """Return the shape of an operand's array without its batch axes; a number that stands for all entries has none."""
    return shape[max(0, len(shape) - (1 if sparse else len(CORES[name]))) :]


def batch_axes(count: int) -> tuple[str, ...]:
    return tuple(f"batch-{axis}" for axis in range(count))


def core_axes(name: str, core) -> tuple[str, ...]:
    return tuple(f"{name}-{axis}" for axis in range(len(core)))


def warm_parts(sol, problem: Problem):
    """Return the fields that `solver.warm_point` reads."""
    if sol is None:
        return {}
    solver.check_warm_start(problem, sol)
    return {name: getattr(sol, name) for name in CORE_AXES}
