"""The first function without transforms, on the CPU.

Small problems take less time than torch takes for a few operations. So here the operands go to the solver as arrays
before anything is recorded, the function takes them in the caller's shapes and returns no more than what moves, and
the other fields are made when they are asked for. First derivatives are the engine's; where torch records them, the
rules are those of the two functions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.autograd import Function
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .. import solver
from ..differentiation import in_given_shapes, objective_gradients, solve_adjoint
from ..engines.base import Linearization, Outcome
from ..problem import OPERANDS, Problem, slack, split_blocks
from ..solution import FIELDS, Solution, raise_if_unsolved, whole_solution
from ..validation import make_problem
from .functions import Layer
from .rules import (
    OTHERS,
    WARM,
    Settings,
    fill_of,
    may_record,
    may_transform,
    names_wanted,
    solution_backward,
    sum_of,
)
from .tensors import HALF, as_array, in_batch, on_host

_TENSORS = frozenset({torch.Tensor, nn.Parameter})
_PLAIN = frozenset({type(None), int, float, list, tuple, np.ndarray})


def are_numpys(operands) -> bool:
    """Return whether the solver takes operands as NumPy arrays in any case, and nothing has to be traced."""
    if len(operands) > len(OPERANDS) or may_transform() or is_in_torch_dispatch_mode():
        return False
    tensors = []
    for value in operands.values():
        kind = type(value)
        if kind in _TENSORS:
            if not value.is_cpu or value.layout is not torch.strided or value.dtype in HALF:
                return False
            tensors.append(value)
        elif kind not in _PLAIN:
            return False
    return bool(tensors) and on_host(tensors[0].device)


def solve_arrays(operands, warm, unsolved, *, dtype=None, **options) -> Solution:
    """Solve as `solve_by_functions` does."""
    tensors = {name: value for name, value in operands.items() if type(value) in _TENSORS}
    problem = make_problem(operands | {name: as_array(value) for name, value in tensors.items()}, dtype=dtype)
    if warm is not None:
        arrays = [as_array(value) if isinstance(value, torch.Tensor) else value for value in warm]
        options["warm_start"] = Solution(**dict.fromkeys(FIELDS) | dict(zip(WARM, arrays, strict=True)))
    problem, outcome, factors = solver.solve_problem(problem, finish=_as_found, **options)
    if unsolved == "raise":
        raise_if_unsolved(outcome.status.reshape(problem.batch_shape))
    if torch.is_grad_enabled() and any(value.requires_grad for value in tensors.values()):
        lin = Linearization(problem, factors, outcome.x, outcome.v, outcome.s, outcome.status)
        solved = _Solved(operands, tuple(tensors), dtype, unsolved, lin, outcome)
        x, v, objective = _SolvedArrays.apply(solved, *tensors.values())
        return _RecordedSolution.of(problem, outcome, x, v, objective)
    sol = solver.make_solution(problem, outcome, None)
    return whole_solution({name: _tensor(getattr(sol, name)) for name in FIELDS})


def _as_found(*solved):
    """Return the problem, the outcome and the factors of a solve."""
    return solved


def _tensor(array) -> torch.Tensor:
    """Return the tensor in the memory of a NumPy array, which torch may write to."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


class _Solved(NamedTuple):
    """A batch that was solved as NumPy arrays, with what its derivative needs."""

    operands: dict[str, Any]
    """The caller's."""
    names: tuple[str, ...]
    """Of those that are tensors."""
    dtype: Any
    unsolved: str
    linearization: Linearization
    outcome: Outcome

    def gradients(self, wanted, g_x, g_v, g) -> dict[str, Any]:
        """Return the gradients of the tensors that are wanted; a cotangent may be None for zero."""
        lin, fill, gradients = self.linearization, fill_of(self.unsolved), dict[str, Any]()
        problem = lin.problem
        with problem.backend.no_grad():
            if g_x is not None or g_v is not None:
                r_x, r_v = _cotangent(problem, g_x, lin.x), _cotangent(problem, g_v, lin.v)
                _, _, gradients = solve_adjoint(lin, r_x, r_v, wanted, unsolved=fill)
            if g is not None:
                g = as_array(g).reshape(-1, 1).astype(problem.dtype, copy=False)
                of_value = objective_gradients(lin, g, wanted, unsolved=fill)
                gradients = {name: sum_of(value, gradients.get(name)) for name, value in of_value.items()}
            return {
                name: torch.from_numpy(np.asarray(value))  # NumPy's sums may be numbers
                for name, value in in_given_shapes(problem, gradients).items()
            }

    def recorded_gradients(self, wanted, g_x, g_v, g, x, v, tensors) -> dict[str, Any]:
        """Return the same by functions and operations that torch differentiates further."""
        lin, given = self.linearization, self.operands | dict(zip(self.names, tensors, strict=True))
        problem = make_problem(given, backend="torch", dtype=self.dtype)
        operands, status = problem.operands, torch.from_numpy(lin.status)
        layer = Layer(problem.backend, Settings(tuple(operands), problem.rounding, self.unsolved, {}, {}))
        layer.linearization = lin
        g_x, x = (value if value is None else value.reshape(lin.x.shape) for value in (g_x, x))
        cotangents = [g_x, g_v, *[g if name == "objective" else None for name in OTHERS]]
        needed = [name in wanted for name in operands]
        gradients = solution_backward(layer, needed, cotangents, x, v, status, operands.values())
        found = {name: value for name, value in zip(operands, gradients, strict=True) if value is not None}
        return in_given_shapes(problem, found)


def _cotangent(problem: Problem, cotangent, value):
    """Return the cotangent of an array (B, ·) as one that the solver takes; None stands for zero."""
    if cotangent is None:
        return problem.backend.zeros_of_all(problem.batch, value.shape[1], problem.dtype)
    return as_array(cotangent).reshape(value.shape)


class _SolvedArrays(Function):
    """The variables (*batch, n), the multipliers of all rows (B, rows) and the optimal values (*batch).

    torch brings gradients to the types of the operands by itself.
    """

    @staticmethod
    def forward(ctx, solved, *tensors):
        x, v, *_, objective, _, _, _ = solved.outcome
        shape = solved.linearization.problem.batch_shape
        if len(shape) != 1:
            x = x.reshape(*shape, x.shape[1])
        x, v, objective = torch.from_numpy(x), torch.from_numpy(v), torch.from_numpy(objective.reshape(shape))
        ctx.solved = solved
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, x, v)
        return x, v, objective

    @staticmethod
    def backward(ctx, *cotangents):
        *tensors, x, v = ctx.saved_tensors  # also to refuse those that were changed in place
        solved, wanted = ctx.solved, names_wanted(ctx.solved.names, ctx.needs_input_grad[1:])
        if may_record():
            gradients = solved.recorded_gradients(wanted, *cotangents, x, v, tensors)
        else:
            gradients = solved.gradients(wanted, *cotangents)
        return None, *map(gradients.get, solved.names)


class _RecordedSolution(Solution):
    """A solution whose fields but x and the objective are made when one of them is asked for."""

    @classmethod
    def of(cls, problem: Problem, outcome: Outcome, x, v, objective) -> Solution:
        """Make the solution of what the function has returned."""
        if problem.result != problem.dtype:
            x = x.to(torch.float32)
        source = v, x.dtype, outcome, problem.batch_shape, problem.blocks, problem.fixed, problem.h
        sol = cls.__new__(cls)
        vars(sol).update(x=x, objective=objective, _source=source)  # the class is frozen
        return sol

    def __getattr__(self, name):
        if name not in FIELDS:
            raise AttributeError(f"a solution has no {name!r}")
        if torch.compiler.is_compiling():
            return _other_fields(*self._source)[name]
        # Whatever mode torch is in now, the solution is of another one.
        with torch.inference_mode(False), torch.enable_grad():
            fields = _other_fields(*self._source)
        if not may_transform():  # whose tensors are for them alone
            vars(self).update(fields)
        return fields[name]

    def __reduce__(self):
        return Solution, tuple([getattr(self, name) for name in FIELDS])

    def __repr__(self):
        return repr(Solution(*self.__reduce__()[1]))


def _other_fields(v, result, outcome: Outcome, batch_shape, blocks, fixed, h) -> dict[str, Any]:
    """Return the fields of a solution but x and the objective; the multipliers are views of those of all rows.

    All is in torch's operations, so that torch.compile can trace it.
    """
    s, *scalars = [torch.from_numpy(array) for array in outcome[2:]]
    status, iterations, _, primal, dual, gap = [value.reshape(batch_shape) for value in scalars]
    s = s[:, blocks["G"]]
    if h is not None:
        s = slack(torch, s, torch.from_numpy(h))
    zero = v.new_zeros((1, outcome.x.shape[1])).expand(v.shape[0], -1)
    parts = split_blocks(torch, blocks, v, v, zero, None if fixed is None else torch.from_numpy(fixed))
    parts = [in_batch(part, batch_shape).to(result) for part in (*parts, s)]
    names = ("y", "z", "z_lb", "z_ub", "s", "status", "iterations", "primal_residual", "dual_residual", "duality_gap")
    return dict(zip(names, (*parts, status, iterations, primal, dual, gap), strict=True))
