"""ProxSuite: its differentiable QPLayer, and its dense solver on a batch."""

from __future__ import annotations

import os

import numpy as np
import proxsuite

from .bounds import EMPTY, bounds_as_rows, bounds_from_rows

INFINITE = 1e20
"""What ProxSuite takes for no bound."""


class QPLayer:
    """Problems are solved in parallel, on half the processors: QPLayer's own rule."""

    def __init__(self, operands, tolerance):
        import torch
        from proxsuite.torch.qplayer import QPFunction

        # QPLayer makes its gradients of torch's default type.
        torch.set_default_dtype(torch.float64)
        self.gradients_of = torch.autograd.grad
        self.operands = operands
        rows = bounds_as_rows(operands)
        self.tensors = {name: torch.from_numpy(value).requires_grad_() for name, value in rows.items()}
        arguments = {name: self.tensors.get(name, torch.from_numpy(EMPTY)) for name in "QqAbGh"}
        lower = torch.full_like(self.tensors["h"], -INFINITE, requires_grad=False)
        self.arguments = [*(arguments[name] for name in "QqAbG"), lower, arguments["h"]]
        self.solve = QPFunction(eps=tolerance, omp_parallel=True)

    def forward(self):
        self.gradients = {}
        self.x, self.y, self.z = self.solve(*self.arguments)

    def forward_backward(self):
        self.forward()
        gradients = self.gradients_of(self.x.sum(), list(self.tensors.values()))
        self.gradients = dict(zip(self.tensors, gradients, strict=True))

    def answer(self):
        answer = {name: getattr(self, name).detach().numpy() for name in "xyz"}
        answer |= {f"grad_{name}": gradient.numpy() for name, gradient in self.gradients.items()}
        return bounds_from_rows(self.operands, answer)


class Dense:
    """Set-up and solve of the dense solver, problems in parallel on all processors."""

    def __init__(self, operands, tolerance):
        self.operands, self.tolerance = operands, tolerance
        rows = bounds_as_rows(operands)
        batch, self.n = operands["q"].shape
        self.m, self.p = rows["h"].shape[-1], rows["b"].shape[-1] if "b" in rows else 0
        each = {name: np.broadcast_to(v, (batch, *v.shape[-1 - (name in "QGA") :])) for name, v in rows.items()}
        lower = np.full(self.m, -INFINITE)
        none = [None] * batch
        columns = [each.get(name, none) for name in ("Q", "q", "A", "b", "G", "h")]
        self.problems = [(Q, q, A, b, G, lower, h) for Q, q, A, b, G, h in zip(*columns, strict=True)]

    def forward(self):
        self.solved = proxsuite.proxqp.dense.BatchQP()
        for arguments in self.problems:
            problem = self.solved.init_qp_in_place(self.n, self.p, self.m)
            problem.settings.eps_abs, problem.settings.eps_rel = self.tolerance, 0.0
            problem.settings.check_duality_gap = True
            problem.settings.eps_duality_gap_abs, problem.settings.eps_duality_gap_rel = self.tolerance, 0.0
            problem.init(*arguments)
        proxsuite.proxqp.dense.solve_in_parallel(self.solved, os.cpu_count())

    def answer(self):
        results = [self.solved.get(i).results for i in range(len(self.problems))]
        answer = {name: np.array([getattr(result, name) for result in results]) for name in "xyz"}
        return bounds_from_rows(self.operands, answer)
