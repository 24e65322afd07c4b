"""Batches of convex quadratic programs, solved and differentiated on any array library."""

from .differentiation import Gradients, Tangents, jvp, vjp
from .solution import Solution, Status
from .solver import solve_qp

__all__ = ["Gradients", "Solution", "Status", "Tangents", "jvp", "solve_qp", "vjp"]
__version__ = "0.1.0"
