"""CVXPY: its problems as functions of their parameters, and this package's solver among its own."""

try:
    import cvxpy  # noqa: F401
except ImportError as error:
    raise ImportError("qpdiff.from_cvxpy and qpdiff.CVXPYSolver need CVXPY: pip install 'qpdiff[cvxpy]'") from error

from .layer import Layer, LayerSolution, LayerTangents, from_cvxpy
from .solver import CVXPYSolver

__all__ = ["CVXPYSolver", "Layer", "LayerSolution", "LayerTangents", "from_cvxpy"]
