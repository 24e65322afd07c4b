"""The axes of `jax.vmap` in the arrays that callbacks get, which become one batch axis with that of the problems."""

from __future__ import annotations

import math
from itertools import product

import numpy as np

from ..problem import CORES


def mapped_axes(operands, vectors):
    """Return the leading axes that the arguments of a callback broadcast to: operands, and vectors (..., B or 1, ·)."""
    if operands["q"].ndim == 2:
        return ()
    of_operands = (value.shape[: -1 - len(CORES[name])] for name, value in operands.items())
    return np.broadcast_shapes(*of_operands, *(vector.shape[:-2] for vector in vectors))


def in_one_batch(value, batch_shape, core: int, dtype):
    """Return an array with one batch axis for its leading ones, of length 1 where all problems share it."""
    leading, last = value.shape[:-core], value.shape[-core:]
    if math.prod(leading) == 1:
        value = value.reshape(1, *last)
    else:
        value = _broadcast(value, (*batch_shape, *last)).reshape(-1, *last)
    return value.astype(dtype, copy=False)


def repeated(right, axes):
    """Return right-hand sides that are broadcast along mapped axes, and the index of each that a solve takes.

    Along the axes that only right-hand sides are mapped over, one is solved for after the other with the same matrices.
    """
    mapped = np.broadcast_shapes(*(r.shape[:-2] for r in right))
    sizes = [a if b == 1 else 1 for a, b in zip(mapped, axes, strict=True)]
    places = (
        tuple([slice(None) if size == 1 else slice(i, i + 1) for i, size in zip(index, sizes, strict=True)])
        for index in product(*map(range, sizes))
    )
    return [_broadcast(r, (*mapped, *r.shape[-2:])) for r in right], places


def of_each(value, batch: int, axes):
    """Return vectors with one batch axis, for each problem its own."""
    if not axes:
        return value
    value = _broadcast(value, (*axes, *value.shape[-2:]))
    return np.ascontiguousarray(value.reshape(batch, value.shape[-1]))


def _broadcast(value, shape):
    return value if value.shape == shape else np.broadcast_to(value, shape)  # which takes long for what it does
