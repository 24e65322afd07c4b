"""Moreau's torch interface, on the CPU."""

from __future__ import annotations

import moreau
import numpy as np
import torch
from moreau.torch import Solver
from operands import Matrices


class Moreau:
    """Dense matrices are given with all their entries, finite bounds as rows of one entry each.

    No set-up is reused by a pass. `solver` is Moreau's: "ipm", its interior-point method, or "auto", which may choose
    its active-set method. A shared operand is expanded over the batch: Moreau would skip the set-up of shared matrices
    that it had before, as it had in every pass but the first.
    """

    def __init__(self, operands, tolerance, solver="auto"):
        self.operands = {
            name: torch.from_numpy(value.values if isinstance(value, Matrices) else value).requires_grad_()
            for name, value in operands.items()
        }
        self.batch, n = operands["q"].shape
        self.dense = {name: not isinstance(operands.get(name), Matrices) for name in "QAG"}
        self.p, self.m = (operands[name].shape[-1] if name in operands else 0 for name in ("b", "h"))
        self.bounded = {name: np.flatnonzero(np.isfinite(operands[name].reshape(-1, n)[0]))
                        for name in ("lb", "ub") if name in operands}  # fmt: skip
        bounds = sum(map(len, self.bounded.values()))
        of_rows, columns = [np.zeros(1, np.int64)], []
        for name in "AG":
            if name in operands:
                indptr, indices = _pattern(operands[name])
                of_rows.append(of_rows[-1][-1] + indptr[1:])
                columns.append(indices)
        of_rows.append(of_rows[-1][-1] + 1 + np.arange(bounds))
        columns += self.bounded.values()
        settings = moreau.Settings(
            solver=solver,
            device="cpu",
            batch_size=self.batch,
            enable_grad=True,
            ipm_settings=moreau.IPMSettings(tol_gap_abs=tolerance, tol_gap_rel=tolerance, tol_feas=tolerance),
            active_set_settings=moreau.ActiveSetSettings(primal_tol=tolerance),
        )
        cones = moreau.Cones(num_zero_cones=self.p, num_nonneg_cones=self.m + bounds)
        patterns = *_pattern(operands["Q"]), np.concatenate(of_rows), np.concatenate(columns)
        indices = [torch.from_numpy(np.asarray(part, np.int64)) for part in patterns]
        self.solver = Solver(n, self.p + self.m + bounds, *indices, cones, settings)
        self.places = {name: torch.from_numpy(where) for name, where in self.bounded.items()}
        self.signs = [torch.full((len(where),), -1.0 if name == "lb" else 1.0).double()
                      for name, where in self.bounded.items()]  # fmt: skip

    def forward(self):
        with torch.no_grad():
            self._solve()
        self.gradients = {}

    def forward_backward(self):
        self._solve()
        gradients = torch.autograd.grad(self.solution.x.sum(), list(self.operands.values()))
        self.gradients = dict(zip(self.operands, gradients, strict=True))

    def _solve(self):
        matrices = [self._entries(name) for name in "AG" if name in self.operands] + self.signs
        sides = [self.operands[name] for name in "bh" if name in self.operands]
        for (name, places), signs in zip(self.places.items(), self.signs, strict=True):
            sides.append(signs * self.operands[name][..., places])
        parts = [self._entries("Q")], matrices, [self.operands["q"]], sides
        self.solution = self.solver.solve(*map(self._of_each, parts))

    def _entries(self, name):
        value = self.operands[name]
        return value.flatten(-2) if self.dense[name] else value

    def _of_each(self, parts):
        """Join values side by side, for each problem its own."""
        return torch.cat([part.expand(self.batch, -1) for part in parts], dim=-1)

    def answer(self):
        x, v = self.solution.x.detach().numpy(), self.solution.z.detach().numpy()
        y, z, *of_bounds = np.split(
            v, np.cumsum([self.p, self.m, *map(len, self.bounded.values())])[:-1], axis=-1
        )  # fmt: skip
        answer = {"x": x, "y": y, "z": z}
        for (name, where), values in zip(self.bounded.items(), of_bounds, strict=True):
            answer[f"z_{name}"] = np.zeros_like(x)
            answer[f"z_{name}"][:, where] = values
        return answer | {f"grad_{name}": gradient.numpy() for name, gradient in self.gradients.items()}


def _pattern(matrix):
    """Return the pattern of an operand in compressed rows."""
    if isinstance(matrix, Matrices):
        return matrix.indptr, matrix.indices
    rows, columns = matrix.shape[-2:]
    return np.arange(rows + 1) * columns, np.tile(np.arange(columns), rows)
