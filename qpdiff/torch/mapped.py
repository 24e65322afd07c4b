"""An axis that `torch.func.vmap` maps over: joined with the batch axis, so that all problems are one batch."""

from __future__ import annotations

import math

import torch

from ..adjoint import solution_vjp
from .rules import LAST, WARM, gradients_by


def solution_vmap(layer, size: int, batch_shape, operands, warm):
    """Solve all problems as one batch, for tensors with their mapped axes; return what torch's vmap expects."""
    batch = math.prod(batch_shape)
    output = layer.solution((size, *batch_shape), *_mapped_inputs(size, batch_shape, operands, warm))
    parted = [value if 2 <= i < LAST else _parted(value, size, batch) for i, value in enumerate(output)]
    return tuple(parted), (0,) * len(parted)


def kkt_vmap(layer, size: int, wanted, pairs):
    """Solve with all KKT matrices as one batch, likewise."""
    tensors = [tensor for tensor, _ in pairs]
    if pairs[2][1] is None:  # several right-hand sides for each problem
        columns = [t.unbind(dim) if dim is not None else (t,) * size for t, dim in pairs[:2]]
        x, v, *operands = tensors[2:]
        solved = [layer.kkt_solve(wanted, *r, x, v, operands) for r in zip(*columns, strict=True)]
        output = tuple(map(torch.stack, zip(*solved, strict=True)))
        return output, (0,) * len(output)
    batch = batch_of(*pairs[2])
    vectors = [joined(value, dim, size, batch).expand(size * batch, -1) for value, dim in pairs[:4]]
    operands = _joined_operands(pairs[4:], size, batch)
    # Where all problems share an operand, the engine would sum over the mapped axis, too.
    own = [name for name, value in zip(layer.names, operands, strict=True) if value.shape[0] == size * batch]
    of_each = tuple([name for name in own if name in wanted])
    output = layer.kkt_solve(of_each, *vectors, operands)
    u_x, u_v, *gradients = [_parted(part, size, batch) for part in output]
    by_name = dict(zip(of_each, gradients, strict=True))
    for name, (tensor, dim) in zip(layer.names, pairs[4:], strict=True):
        if name in by_name and batch_of(tensor, dim) < batch:
            by_name[name] = by_name[name].sum(1, keepdim=True)
    if rest := [name for name in wanted if name not in by_name]:
        by_name |= _vjp_of_each(layer, rest, (u_x, u_v), pairs[2:])
    return (u_x, u_v, *map(by_name.get, wanted)), (0,) * (2 + len(wanted))


def _vjp_of_each(layer, names, u, pairs):
    """Compute the gradients of operands for each entry of a mapped axis, from x, v, the operands and their axes."""
    tensors, in_dims = zip(*pairs, strict=True)

    def gradients(u_x, u_v, x, v, *operands):
        return gradients_by(solution_vjp, layer.problem(x, operands), x, v, u_x, u_v, names, layer.kappa)

    with layer.backend.in_full_precision():
        return torch.func.vmap(gradients, (0, 0, *in_dims))(*u, *tensors)


def batch_of(tensor, dim: int | None) -> int:
    """Return the length of the batch axis of a tensor with a mapped axis, if any."""
    return tensor.shape[1 if dim == 0 else 0]


def joined(tensor, dim: int | None, size: int, batch: int):
    """Return a tensor (batch or 1, core) with `size` times the batch; of length 1 still where all problems share it."""
    if dim is None and tensor.shape[0] == 1:
        return tensor
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    core = tensor.shape[2:]
    return tensor.expand(size, batch, *core).reshape(size * batch, *core)


def _joined_operands(pairs, size: int, batch: int):
    """Return operands likewise, q for every problem, so that one has the mapped axis in any case."""
    Q, q, *others = [joined(tensor, dim, size, batch) for tensor, dim in pairs]
    return Q, q.expand(size * batch, -1), *others


def _mapped_inputs(size: int, batch_shape, operands, warm):
    """Return the operands and the warm start of the first function, from tensors and their mapped axes."""
    cores = [name != "status" for name in WARM]
    axes = [len(batch_shape) + core for core in cores]
    warm = [_padded(value, dim, size, count) for (value, dim), count in zip(warm, axes, strict=False)]
    return _joined_operands(operands, size, math.prod(batch_shape)), warm


def _parted(tensor, size: int, batch: int):
    """Split the joined axis into the two again."""
    return tensor.reshape(size, batch, *tensor.shape[1:])


def _padded(tensor, dim: int | None, size: int, axes: int):
    """Return a tensor of up to `axes` axes with the mapped axis in front of so many."""
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.reshape(size, *[1] * (axes + 1 - tensor.ndim), *tensor.shape[1:])
