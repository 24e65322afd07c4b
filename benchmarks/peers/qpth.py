"""qpth's QPFunction, on the CPU or a GPU."""

from __future__ import annotations

import torch
from qpth.qp import QPFunction

from .arrays import arrays_of
from .bounds import EMPTY, bounds_as_rows, bounds_from_rows


class Qpth:
    """Bounds are rows of G, since qpth has none."""

    def __init__(self, operands, tolerance, library="torch"):
        self.arrays = arrays_of(library)
        self.operands = operands
        self.batch = len(operands["q"])
        self.shared = [name for name, value in bounds_as_rows(operands).items() if value.ndim == 1 + (name in "QGA")]
        self.tensors = {
            name: self.arrays.put(value).requires_grad_() for name, value in bounds_as_rows(operands).items()
        }
        self.arguments = [self.tensors.get(name, self.arrays.put(EMPTY)) for name in "QqGhAb"]
        # verbose=-1 silences the warning about inexact answers; the benchmark checks them.
        self.solve = QPFunction(eps=tolerance, verbose=-1)

    def forward(self):
        self.gradients = {}
        self.x = self.solve(*self.arguments)
        self.arrays.synchronize()

    def forward_backward(self):
        self.x = self.solve(*self.arguments)
        gradients = torch.autograd.grad(self.x.sum(), list(self.tensors.values()))
        self.gradients = dict(zip(self.tensors, gradients, strict=True))
        self.arrays.synchronize()

    def answer(self):
        node, get = self.x.grad_fn, self.arrays.get
        answer = {"x": get(self.x), "z": get(node.lams)}
        if "A" in self.operands:
            answer["y"] = get(node.nus)
        for name, gradient in self.gradients.items():
            # qpth gives the mean over the batch where an operand is shared; the gradient is the sum.
            answer[f"grad_{name}"] = get(gradient) * (self.batch if name in self.shared else 1)
        return bounds_from_rows(self.operands, answer)
