"""qpdiff in JAX, under jit in float64, by JAX's own differentiation."""

from __future__ import annotations

import jax
import numpy as np

import qpdiff.jax

jax.config.update("jax_enable_x64", True)


class QpdiffJax:
    """`qpdiff.jax.solve_qp` and `jax.grad` of it, each compiled as one program."""

    def __init__(self, operands, tolerance):
        self.operands = jax.device_put(operands)

        def solve(operands):
            return qpdiff.jax.solve_qp(**operands, tol=tolerance, rtol=0.0)

        def total(operands):
            sol = solve(operands)
            return sol.x.sum(), sol

        self.solve = jax.jit(solve)
        self.differentiate = jax.jit(jax.grad(total, has_aux=True))

    def forward(self):
        self.gradients, self.solution = {}, jax.block_until_ready(self.solve(self.operands))

    def forward_backward(self):
        self.gradients, self.solution = jax.block_until_ready(self.differentiate(self.operands))

    def answer(self):
        names = ("x", "y", "z", "z_lb", "iterations")
        answer = {name: np.asarray(getattr(self.solution, name)) for name in names}
        return answer | {f"grad_{name}": np.asarray(value) for name, value in self.gradients.items()}
