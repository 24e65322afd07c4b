"""qpax, under jit and vmap in float64."""

from __future__ import annotations

import jax
import numpy as np
import qpax

from .bounds import bounds_as_rows, bounds_from_rows

jax.config.update("jax_enable_x64", True)
NAMES = "QqAbGh"


class Qpax:
    """The gradients are those of the relaxed problem, as by default; bounds are rows of G."""

    def __init__(self, operands, tolerance):
        self.operands = operands
        n = operands["q"].shape[-1]
        rows = {"A": np.zeros((0, n)), "b": np.zeros(0)} | bounds_as_rows(operands)
        self.arguments = [jax.device_put(rows[name]) for name in NAMES]
        self.tolerance = tolerance
        axes = tuple(None if rows[name].ndim == 1 + (name in "QGA") else 0 for name in NAMES)

        def primal(tolerance, *problem):
            return qpax.solve_qp_primal(*problem, solver_tol=tolerance)

        def everything(tolerance, *problem):
            return qpax.solve_qp(*problem, solver_tol=tolerance)

        def total(tolerance, *problems):
            x = jax.vmap(primal, in_axes=(None, *axes))(tolerance, *problems)
            return x.sum(), x

        # The tolerance is an argument, so that another one needs no compilation.
        self.solve = jax.jit(jax.vmap(everything, in_axes=(None, *axes)))
        self.differentiate = jax.jit(jax.grad(total, argnums=tuple(range(1, 7)), has_aux=True))

    def forward(self):
        x, _, z, y, *_ = jax.block_until_ready(self.solve(self.tolerance, *self.arguments))
        self.result = {"x": x, "y": y, "z": z}

    def forward_backward(self):
        gradients, x = jax.block_until_ready(self.differentiate(self.tolerance, *self.arguments))
        self.result = {f"grad_{name}": gradient for name, gradient in zip(NAMES, gradients, strict=True)} | {"x": x}

    def answer(self):
        answer = {name: np.asarray(value) for name, value in self.result.items()}
        return bounds_from_rows(self.operands, answer)
