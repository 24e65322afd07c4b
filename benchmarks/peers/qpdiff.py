"""qpdiff, on any of its array libraries."""

from __future__ import annotations

import time

import numpy as np
from operands import Matrices

import qpdiff

from .arrays import arrays_of


class Qpdiff:
    """qpdiff's public functions; `options` go to `solve_qp`."""

    def __init__(self, operands, tolerance, library="numpy", **options):
        self.arrays = arrays_of(library)
        self.operands = {name: self._put(value) for name, value in operands.items()}
        self.options = options | {"tol": tolerance, "rtol": 0.0}
        self.cotangent = self.arrays.put(np.ones_like(operands["q"]))

    def _put(self, value):
        if isinstance(value, Matrices):
            return qpdiff.Sparse(*value)
        return self.arrays.put(value)

    def _get(self, value):
        return value.values if isinstance(value, qpdiff.Sparse) else self.arrays.get(value)

    def forward(self):
        self.gradients = None
        self.solution = qpdiff.solve_qp(**self.operands, **self.options)
        self.arrays.synchronize()

    def backward(self):
        """Return the gradients of the last solution."""
        self.gradients = qpdiff.vjp(self.solution, x=self.cotangent)
        self.arrays.synchronize()

    def forward_backward(self):
        self.forward()
        self.backward()

    def answer(self):
        names = ("x", "y", "z", "z_lb", "z_ub", "iterations")
        answer = {name: self.arrays.get(getattr(self.solution, name)) for name in names}
        if self.gradients is not None:
            answer |= {f"grad_{name}": self._get(getattr(self.gradients, name)) for name in self.operands}
        return answer

    @staticmethod
    def peak(library="numpy", size=2000, repeats=5, **options) -> float:
        """Measure the floating point operations a second of a large matrix product, with all threads."""
        arrays = arrays_of(library)
        M = arrays.put(np.random.default_rng(0).normal(size=(size, size)))
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            M @ M
            arrays.synchronize()
            times.append(time.perf_counter() - start)
        return 2 * size**3 / min(times)
