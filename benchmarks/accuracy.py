"""Compute how accurate an answer is from the definitions, whatever the solver says of it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from problems import kkt_residuals

ASKED = 1e-8
"""The largest primal residual, dual residual and duality gap of answers whose times are compared."""


def residual(operands, answer) -> float:
    """Return the largest primal residual, dual residual or duality gap of the batch."""
    x = answer["x"]
    none, no_bounds = np.zeros((len(x), 0)), np.zeros_like(x)
    multipliers = answer.get("y", none), answer.get("z", none), answer.get("z_lb", no_bounds), no_bounds
    parts = kkt_residuals(operands, x, *multipliers)
    return max(parts) if np.all(np.isfinite(parts)) else np.inf


def gradient_difference(operands, reference, answer) -> float:
    """Return the largest difference of a gradient, relative to the largest entry of the reference."""
    return max(_difference(name, reference[f"grad_{name}"], answer[f"grad_{name}"]) for name in operands)


def _difference(name, reference, gradient) -> float:
    if name == "Q":  # only its symmetric part is defined
        gradient = (gradient + np.swapaxes(gradient, -1, -2)) / 2
    return float(np.max(np.abs(gradient - reference)) / np.max(np.abs(reference)))
