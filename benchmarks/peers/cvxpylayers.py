"""cvxpylayers' torch layer with its default solver."""

from __future__ import annotations

import cvxpy as cp
import torch
from cvxpylayers.torch import CvxpyLayer


class Cvxpylayers:
    """½‖Sx‖² + qᵀx with Q = SᵀS, since the default solver takes no quadratic form with a parameter in it.

    The factorisation of Q is part of each pass, and torch differentiates through it.
    """

    def __init__(self, operands, tolerance):
        self.tensors = {name: torch.from_numpy(value).requires_grad_() for name, value in operands.items()}
        n = operands["q"].shape[-1]
        parameters = {
            name: cp.Parameter(value.shape[-1:] if name in ("q", "h", "b", "lb") else value.shape[-2:])
            for name, value in operands.items()
        }
        x = cp.Variable(n)
        rows = {}
        if "A" in operands:
            rows["y"] = parameters["A"] @ x == parameters["b"]
        if "G" in operands:
            rows["z"] = parameters["G"] @ x <= parameters["h"]
        if "lb" in operands:
            rows["z_lb"] = x >= parameters["lb"]
        objective = cp.Minimize(0.5 * cp.sum_squares(parameters["Q"] @ x) + parameters["q"] @ x)
        wanted = [x, *(row.dual_variables[0] for row in rows.values())]
        self.names = ["x", *rows]
        self.layer = CvxpyLayer(
            cp.Problem(objective, list(rows.values())),
            list(parameters.values()),
            wanted,
            solver_args={"eps": tolerance, "max_iters": 100_000},
        )

    def forward(self):
        with torch.no_grad():
            self._solve()
        self.gradients = {}

    def forward_backward(self):
        self._solve()
        gradients = torch.autograd.grad(self.solution[0].sum(), list(self.tensors.values()))
        self.gradients = dict(zip(self.tensors, gradients, strict=True))

    def _solve(self):
        self.solution = self.layer(
            *(torch.linalg.cholesky(v, upper=True) if name == "Q" else v for name, v in self.tensors.items())
        )

    def answer(self):
        answer = {name: value.detach().numpy() for name, value in zip(self.names, self.solution, strict=True)}
        return answer | {f"grad_{name}": gradient.numpy() for name, gradient in self.gradients.items()}
