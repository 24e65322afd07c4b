"""Compute how accurate an answer is from the definitions, whatever the solver says of it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from operands import Matrices, problem

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from problems import kkt_residuals

ASKED = 1e-8
"""The largest primal residual, dual residual and duality gap of answers whose times are compared."""


def residual(operands, answer) -> float:
    """Return the largest primal residual, dual residual or duality gap of the batch."""
    x = answer["x"]
    none, no_bounds = np.zeros((len(x), 0)), np.zeros_like(x)
    absent = {"y": none, "z": none, "z_lb": no_bounds, "z_ub": no_bounds}
    point = [x, *[answer.get(name, value) for name, value in absent.items()]]
    if any(isinstance(value, Matrices) for value in operands.values()):
        each = [_of_problem(problem(operands, b), *[value[b] for value in point]) for b in range(len(x))]
        parts = np.max(each, axis=0)
    else:
        parts = kkt_residuals(operands, *point)
    return float(max(parts)) if np.all(np.isfinite(parts)) else np.inf


def _of_problem(d, x, y, z, z_lb, z_ub):
    """Return the primal residual, dual residual and duality gap of one problem with sparse matrices."""
    below, above = np.isfinite(d["lb"]), np.isfinite(d["ub"])
    primal = d["G"] @ x - d["h"], np.abs(d["A"] @ x - d["b"]), (d["lb"] - x)[below], (x - d["ub"])[above]
    dual = d["Q"] @ x + d["q"] + d["G"].T @ z + d["A"].T @ y - z_lb + z_ub
    largest = [max(np.max(part, initial=0.0) for part in parts) for parts in (primal, (np.abs(dual), -z, -z_lb, -z_ub))]
    of_bounds = d["ub"][above] @ z_ub[above] - d["lb"][below] @ z_lb[below]
    return *largest, abs(x @ (d["Q"] @ x) + d["q"] @ x + d["h"] @ z + d["b"] @ y + of_bounds)


def gradient_difference(operands, reference, answer) -> float:
    """Return the largest difference of a gradient, relative to the largest entry of the reference's gradients."""
    differences = [_difference(name, value, reference, answer) for name, value in operands.items()]
    return max(differences) / max(float(np.max(np.abs(reference[f"grad_{name}"]))) for name in operands)


def _difference(name, operand, reference, answer) -> float:
    expected, gradient = reference[f"grad_{name}"], answer[f"grad_{name}"]
    if name == "Q":  # only its symmetric part is defined
        gradient = (gradient + _transposed(operand, gradient)) / 2
    return float(np.max(np.abs(gradient - expected)))


def _transposed(operand, gradient):
    """Return the transposes of matrices, or the values of the transposes of matrices of a symmetric pattern."""
    if not isinstance(operand, Matrices):
        return np.swapaxes(gradient, -1, -2)
    places = sp.csr_array((np.arange(len(operand.indices)), operand.indices, operand.indptr), shape=operand.shape)
    return gradient[..., sp.csr_array(places.T).data]
