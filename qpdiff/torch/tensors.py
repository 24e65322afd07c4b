"""The caller's tensors: their types and layouts, and the solver's arrays in the same memory."""

from __future__ import annotations

import functools

import numpy as np
import torch

from ..sparse import Sparse, is_sparse, read_sparse, stored

HALF = frozenset({torch.float16, torch.bfloat16})


def half(operands):
    """Return the type of the results where operands are in half precision, else None."""
    if HALF.isdisjoint([getattr(value, "dtype", None) for value in operands.values()]):
        return None
    arrays = [stored(read_sparse(name, value)) if is_sparse(value) else value for name, value in operands.items()]
    kinds = [value.dtype for value in arrays if isinstance(value, torch.Tensor)]
    of_numpy = [value for value in arrays if isinstance(value, (np.ndarray, np.generic))]
    kinds += [getattr(torch, value.dtype.name) for value in of_numpy if value.dtype.name in ("float32", "float64")]
    return functools.reduce(torch.promote_types, [kind for kind in kinds if kind.is_floating_point])


def stacked(value):
    """Return a list with tensors in it as one tensor."""
    parts = [stacked(part) if isinstance(part, (list, tuple)) else part for part in value]
    tensors = any(isinstance(part, torch.Tensor) for part in parts)
    return torch.stack([torch.as_tensor(part) for part in parts]) if tensors else value


def is_sparse_operand(value) -> bool:
    """Return whether a value is a sparse operand, by what torch.compile can trace."""
    return isinstance(value, Sparse) or (isinstance(value, torch.Tensor) and value.layout != torch.strided)


def on_host(device) -> bool:
    return device.type == "cpu"


def as_array(tensor) -> np.ndarray:
    """Return the NumPy array in the memory of a tensor."""
    try:
        return tensor.numpy(force=True)
    except RuntimeError as error:
        raise RuntimeError(
            "qpdiff.torch does not run under torch's first vmap, which torch.autograd.grad(is_grads_batched=True) "
            "and torch.autograd.functional.jacobian(vectorize=True) use; take torch.func.jacrev, jacfwd or vmap "
            "instead"
        ) from error


def as_tensors(arrays) -> list:
    """Return the tensors in the memory of the solver's arrays."""
    if arrays and isinstance(arrays[0], np.ndarray):
        return [torch.from_numpy(array) for array in arrays]
    return [array.detach() for array in arrays]


def in_batch(value, batch_shape):
    """Return a tensor (B, ·) with the batch axes of the caller; each operation that torch records takes time."""
    if len(batch_shape) == 1:
        return value
    return value.reshape((*batch_shape, value.shape[1])) if batch_shape else value[0]
