"""qpth's function."""

from __future__ import annotations

import enum
import re
from typing import Any

import torch
from torch.autograd import Function

from ..backend import choose_backend
from .call import solve_qp
from .operators import OPERATORS
from .tensors import is_sparse_operand, stacked


class QPSolvers(enum.Enum):
    """qpth's names of its solvers."""

    PDIPM_BATCHED = 1
    CVXPY = 2


def QPFunction(eps=1e-12, verbose=0, notImprovedLim=3, maxIter=20, solver=QPSolvers.PDIPM_BATCHED, check_Q_spd=True):
    """Stand in for qpth's ``QPFunction``: its users change one import, ``from qpdiff.torch import QPFunction``.

    The function that it returns takes ``(Q, p, G, h, A, b)`` and returns the variables (batch, n) that minimise
    ½ zᵀQz + pᵀz subject to Gz ≤ h, Az = b, for Q (n, n) or (batch, n, n), p (n) or (batch, n), and so on; an empty
    tensor, or None, stands for constraints that are not there. Arrays and lists become tensors on the device of the
    others. As with qpth the gradient of an operand without batch axis is the **mean** over the batch; that of
    `solve_qp` is the sum, which is the derivative, and so is that of a batch axis of length 1, which broadcasts. All is
    computed in float64 and returned in the type of p.

    Parameters
    ----------
    eps : float
        Tolerance, where it is above 1e-8, that of `qpdiff.solve_qp`.
    verbose : int
        1: a line an iteration.
    notImprovedLim, maxIter, solver
        Without effect. qpth returns the best point so far when its iterations come to these limits.
    check_Q_spd : bool
        Check the numbers in the operands before solving. Q may also be semidefinite; only its symmetric part counts.

    Raises
    ------
    TypeError, ValueError
        For bad operands, as `solve_qp` does, naming them; for Q or p that is None or empty.
    RuntimeError
        When a problem cannot be solved; qpth prints a warning and returns what it has.

    Examples
    --------
    >>> import torch
    >>> from qpdiff.torch import QPFunction
    >>> e, p = torch.Tensor(), torch.tensor([1.0, -1.0])
    >>> x = QPFunction()(torch.eye(2), p, -torch.eye(2), torch.zeros(2), e, e)
    >>> x.round(decimals=2) + 0
    tensor([[0., 1.]])
    """

    def solve(Q, p, G, h, A, b):
        axes = {"Q": 3, "p": 2, "G": 3, "h": 2, "A": 3, "b": 2}
        given = _tensors(dict(zip(axes, (Q, p, G, h, A, b), strict=True)))
        batch = _batch(given, axes)
        given = {name: value for name, value in given.items() if 0 not in value.shape[1 - axes[name] :]}
        for name, value in (("Q", Q), ("p", p)):
            if name not in given:
                what = "None" if value is None else "empty"
                raise TypeError(f"{name} is {what}; every problem needs Q and p (pass zeros for what it lacks)")
        kind = given["p"].dtype
        mean = OPERATORS.mean_gradient if torch.compiler.is_compiling() else _MeanGradient.apply
        given = {k: v if v.ndim == axes[k] else mean(v, batch) for k, v in given.items()}
        Q, q = given.pop("Q"), given.pop("p")
        options = {"dtype": "float64", "tol": max(eps, 1e-8), "check": check_Q_spd, "verbose": verbose == 1}
        try:
            x = solve_qp((Q + Q.mT) / 2 if Q.shape[-1] == Q.shape[-2] else Q, q, **given, **options).x
        except (TypeError, ValueError) as error:
            raise type(error)(re.sub(r"\bq\b", "p", str(error))) from error  # as it is called here
        return x.expand(batch, x.shape[-1]).to(kind if kind.is_floating_point else x.dtype)

    return solve


def _tensors(operands: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the operands but for those that are None, as tensors on the device of those that are tensors."""
    for name, value in operands.items():
        if is_sparse_operand(value):
            raise TypeError(
                f"{name} is sparse; QPFunction takes dense tensors, and qpdiff.torch.solve_qp sparse ones too"
            )
    device = next((value.device for value in operands.values() if isinstance(value, torch.Tensor)), None)
    given = {k: stacked(v) if isinstance(v, (list, tuple)) else v for k, v in operands.items() if v is not None}
    return {
        name: value if isinstance(value, torch.Tensor) else choose_backend({name: value}, "torch")[1][name].to(device)
        for name, value in given.items()
    }


def _batch(tensors: dict[str, torch.Tensor], axes: dict[str, int]) -> int:
    """Return the length of the batch axis, with which an operand has so many axes."""
    batch, first = 1, ""
    for name, value in tensors.items():
        few = axes[name] - 1
        if value.ndim not in (few, few + 1) and value.numel():
            raise ValueError(f"{name} has {value.ndim} axes; expected {few}, or {few + 1} with that of the batch")
        if value.ndim == few + 1 and value.shape[0] not in (1, batch):  # len() is a constant in a program
            if batch != 1:
                size = value.shape[0]
                raise ValueError(f"{name} has a batch of {size}, but {first} one of {batch}; expected the same")
            batch, first = value.shape[0], name
    return batch


class _MeanGradient(Function):
    """The identity, whose gradient is divided by a number."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value, count):
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.count = inputs[1]

    @staticmethod
    def backward(ctx, g):
        return g / max(ctx.count, 1), None


# torch.export drops the rule of a Function, but not that of an operator.


torch.library.define("qpdiff::mean_gradient", "(Tensor value, SymInt count) -> Tensor")
torch.library.impl("qpdiff::mean_gradient", "CompositeExplicitAutograd", lambda value, count: value.clone())
torch.library.register_fake("qpdiff::mean_gradient", lambda value, count: torch.empty_like(value))
torch.library.register_autograd(
    "qpdiff::mean_gradient", _MeanGradient.backward, setup_context=_MeanGradient.setup_context
)
torch.library.register_vmap(
    "qpdiff::mean_gradient",
    lambda info, in_dims, value, count: (OPERATORS.mean_gradient(value, count), in_dims[0]),
)
