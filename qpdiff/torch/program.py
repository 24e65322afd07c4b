"""A whole call as an operator, which torch.compile does not look into; torch makes the others of it."""

from __future__ import annotations

import functools

import numpy as np
import torch

from ..backend import read_dtype
from ..problem import OPERANDS
from ..solution import FIELDS, POINT, Violation
from .general import solve_by_functions
from .operators import DEFAULTS, OPERATORS, OPTIONS, in_order, not_in_programs
from .tensors import is_sparse_operand


def refuse_arrays(options) -> None:
    """Refuse numbers of NumPy's as options: torch.compile traces them as tensors, so that nothing is known of them."""
    for name in ("tol", "rtol", "max_iterations", "check", "verbose", "smoothing"):
        if isinstance(options.get(name), (torch.Tensor, np.ndarray)):
            raise TypeError(
                f"{name} is a number of NumPy's or torch's, which torch.compile traces; pass one of Python's"
            )


def solve_in_graph(operands, warm, unsolved, *, dtype=None, **options):
    """Return the fields of the solution in a program that torch.compile or torch.export is making."""
    operands = {name: value for name, value in operands.items() if value is not None}
    for name, value in operands.items():
        if is_sparse_operand(value):
            raise not_in_programs(name)
    device = next((value.device for value in operands.values() if isinstance(value, torch.Tensor)), None)
    # A number of NumPy's is an array here.
    typed = [isinstance(value, (torch.Tensor, np.ndarray)) for value in operands.values()]
    tensors = [
        value
        if isinstance(value, torch.Tensor)
        else torch.as_tensor(value, dtype=None if own else torch.float64, device=device)
        for value, own in zip(operands.values(), typed, strict=True)
    ]
    fields = OPERATORS.solve_qp(
        tensors, " ".join(operands), warm or [], unsolved, read_dtype(dtype), *in_order(options)
    )
    given = [tensor for tensor, own in zip(tensors, typed, strict=True) if own]
    kinds = [value.dtype for value in given if value.is_floating_point()]
    if dtype is None and kinds and len(given) < len(tensors):
        kind = functools.reduce(torch.promote_types, kinds)  # numbers and lists have no say in this
        fields = [value if len(POINT) <= i < len(FIELDS) else value.to(kind) for i, value in enumerate(fields)]
    if len(fields) == len(FIELDS):
        return fields
    constrained = [matrix in operands for matrix in Violation._fields]
    violation = iter(fields[len(FIELDS) :])
    return *fields[: len(FIELDS)], Violation(*(next(violation) if there else None for there in constrained))


def _whole(operands, names, warm, unsolved, dtype, *values):
    given = dict.fromkeys(OPERANDS) | dict(zip(names.split(), operands, strict=True))
    options = dict(zip(DEFAULTS, values, strict=True))
    fields = solve_by_functions(given, warm or None, unsolved, in_operator=True, dtype=dtype, **options)
    violation = [part for parts in fields[len(FIELDS) :] for part in parts if part is not None]
    return [*fields[: len(FIELDS)], *violation]


torch.library.define(
    "qpdiff::solve_qp",
    f"(Tensor[] operands, str names, Tensor[] warm, str unsolved, str? dtype, {OPTIONS}) -> Tensor[]",
)
for _key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
    torch.library.impl("qpdiff::solve_qp", _key, _whole)
