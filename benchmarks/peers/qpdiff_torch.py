"""qpdiff in torch, by torch's own differentiation."""

from __future__ import annotations

import torch

import qpdiff.torch

from .arrays import arrays_of


class QpdiffTorch:
    """`qpdiff.torch.solve_qp` and `torch.autograd.grad`, on the CPU."""

    def __init__(self, operands, tolerance):
        self.arrays = arrays_of("torch")
        self.operands = {name: self.arrays.put(value).requires_grad_() for name, value in operands.items()}
        self.options = {"tol": tolerance, "rtol": 0.0, "unsolved": "nan"}

    def forward(self):
        self.gradients = {}
        with torch.no_grad():
            self.solution = qpdiff.torch.solve_qp(**self.operands, **self.options)

    def forward_backward(self):
        self.solution = qpdiff.torch.solve_qp(**self.operands, **self.options)
        gradients = torch.autograd.grad(self.solution.x.sum(), list(self.operands.values()))
        self.gradients = dict(zip(self.operands, gradients, strict=True))

    def answer(self):
        names = ("x", "y", "z", "z_lb", "iterations")
        answer = {name: self.arrays.get(getattr(self.solution, name)) for name in names}
        return answer | {f"grad_{name}": self.arrays.get(value) for name, value in self.gradients.items()}
