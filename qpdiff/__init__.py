"""Batches of convex quadratic programs, solved and differentiated on any array library."""

from .differentiation import Gradients, Tangents, jvp, vjp
from .solution import Solution, Status, Violation
from .solver import solve_qp
from .sparse import Sparse

__all__ = ["Gradients", "Solution", "Sparse", "Status", "Tangents", "Violation", "jvp", "solve_qp", "vjp"]
__version__ = "0.1.0"

_FROM_CVXPY = ("CVXPYSolver", "from_cvxpy")


def __getattr__(name: str):
    if name in _FROM_CVXPY:
        from . import cvxpy  # only here: CVXPY takes a second or two to import

        return getattr(cvxpy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_FROM_CVXPY])
