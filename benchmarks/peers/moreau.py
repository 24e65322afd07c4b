"""Moreau's torch interface, on the CPU."""

from __future__ import annotations

import moreau
import numpy as np
import torch
from moreau.torch import Solver


class Moreau:
    """Q, G and A are given with all their entries, bounds as rows of one entry each; no set-up is reused by a pass.

    `solver` is Moreau's: "ipm", its interior-point method, or "auto", the active-set method for problems of these
    sizes. A shared operand is expanded over the batch: Moreau would skip the set-up of shared matrices that it had
    before, as it had in every pass but the first.
    """

    def __init__(self, operands, tolerance, solver="auto"):
        self.tensors = {name: torch.from_numpy(value).requires_grad_() for name, value in operands.items()}
        self.batch, n = operands["q"].shape
        self.p, self.m, bounds = (operands[name].shape[-1] if name in operands else 0 for name in ("b", "h", "lb"))
        self.negative = -torch.ones(bounds).double()
        rows = self.p + self.m
        of_rows = np.append(np.arange(rows) * n, rows * n + np.arange(bounds + 1))
        columns = np.append(np.tile(np.arange(n), rows), np.arange(bounds))
        of_Q = np.arange(n + 1) * n, np.tile(np.arange(n), n)
        settings = moreau.Settings(
            solver=solver,
            device="cpu",
            batch_size=self.batch,
            enable_grad=True,
            ipm_settings=moreau.IPMSettings(tol_gap_abs=tolerance, tol_gap_rel=tolerance, tol_feas=tolerance),
            active_set_settings=moreau.ActiveSetSettings(primal_tol=tolerance),
        )
        cones = moreau.Cones(num_zero_cones=self.p, num_nonneg_cones=self.m + bounds)
        indices = map(torch.from_numpy, (*of_Q, of_rows, columns))
        self.solver = Solver(n, rows + bounds, *indices, cones, settings)

    def forward(self):
        with torch.no_grad():
            self._solve()
        self.gradients = {}

    def forward_backward(self):
        self._solve()
        gradients = torch.autograd.grad(self.solution.x.sum(), list(self.tensors.values()))
        self.gradients = dict(zip(self.tensors, gradients, strict=True))

    def _solve(self):
        matrices = [self.tensors[name].flatten(-2) for name in "AG" if name in self.tensors]
        sides = [self.tensors[name] for name in "bh" if name in self.tensors]
        if "lb" in self.tensors:
            matrices.append(self.negative)
            sides.append(-self.tensors["lb"])
        parts = [self.tensors["Q"].flatten(-2)], matrices, [self.tensors["q"]], sides
        self.solution = self.solver.solve(*map(self._of_each, parts))

    def _of_each(self, parts):
        """Join values side by side, for each problem its own."""
        return torch.cat([part.expand(self.batch, -1) for part in parts], dim=-1)

    def answer(self):
        x, v = self.solution.x.detach().numpy(), self.solution.z.detach().numpy()
        y, z, z_lb = np.split(v, [self.p, self.p + self.m], axis=-1)
        answer = {"x": x, "y": y, "z": z} | ({"z_lb": z_lb} if "lb" in self.tensors else {})
        return answer | {f"grad_{name}": gradient.numpy() for name, gradient in self.gradients.items()}
