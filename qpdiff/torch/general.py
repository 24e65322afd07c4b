"""A call by the two functions: from the caller's operands to the fields of the solution."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..problem import Problem, split_rows
from ..solution import Violation, violation_at
from ..sparse import Sparse, stored
from ..validation import make_problem
from .functions import Layer
from .operators import Operators, not_in_programs
from .rules import LAST, Settings, may_transform
from .tensors import half, in_batch


def solve_by_functions(operands, warm, unsolved, *, in_operator=False, dtype=None, **options):
    """Return the fields of the solution; an operator has to call others where a transform of torch.func calls it."""
    result = half(operands) if dtype is None else None
    problem = make_problem(operands, backend="torch", dtype=dtype if result is None else torch.float64)
    if warm is not None:
        given = (value.detach() if isinstance(value, torch.Tensor) else value for value in warm)
        warm = [problem.backend.asarray(value) for value in given]
    batch_shape, tensors = problem.batch_shape, [stored(value) for value in problem.operands.values()]
    patterns = {name: value.pattern for name, value in problem.operands.items() if isinstance(value, Sparse)}
    settings = Settings(tuple(problem.operands), problem.rounding, unsolved, options, patterns)
    # In a dispatch mode tensors may have no numbers yet.
    traced = is_in_torch_dispatch_mode() or (in_operator and may_transform())
    if traced and patterns:
        raise not_in_programs(next(iter(patterns)))
    layer = (Operators if traced else Layer)(problem.backend, settings)
    x, v, s, *constants = layer.solution(batch_shape, tensors, warm or ())[:LAST]
    parts = [x, *split_rows(problem, v, v)]
    parts = [in_batch(part, batch_shape) for part in parts]
    parts.append(s)
    if (result := result or problem.result) != problem.dtype:
        parts = [part.to(result) for part in parts]
    return *parts, *constants, *([_violation(problem, x, result)] if problem.is_elastic else [])


def _violation(problem: Problem, x, result):
    """Return the violations at x (B, n), which differentiate as x does, in the type of the results."""
    found: Any = violation_at(problem, x)
    return Violation(*(part if part is None else part.to(result) for part in found))
