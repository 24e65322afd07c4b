"""Infeasible and unbounded problems get their status with a certificate, and leave their batch mates alone."""

from __future__ import annotations

from problems import INFEASIBLE, infeasible, unbounded

__all__ = ["COSTS", "INFEASIBLE", "SHAPES", "infeasible", "unbounded"]

COSTS = ["pd", "psd", "lp", "diagonal"]
SHAPES = [(1, 2, 1), (2, 4, 1), (3, 3, 1), (6, 5, 2), (10, 25, 3), (20, 10, 5)]  # n, m, p
