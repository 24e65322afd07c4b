"""`solve_qp`: the ways in which a call is solved, and which one it takes."""

from __future__ import annotations

from typing import Any

import torch

from .. import solver
from ..differentiation import check_smoothing
from ..prices import with_prices
from ..solution import Solution, check_unsolved
from .general import solve_by_functions
from .program import refuse_arrays, solve_in_graph
from .rules import WARM
from .tensors import stacked
from .untransformed import are_numpys, solve_arrays


def solve_qp(
    Q,
    q,
    G=None,
    h=None,
    A=None,
    b=None,
    lb=None,
    ub=None,
    *,
    elastic=None,
    elastic_quadratic=None,
    unsolved: str = "raise",
    smoothing: float | None = None,
    warm_start=None,
    **options,
) -> Solution:
    """Solve a batch of convex quadratic programs; `qpdiff.solve_qp` for torch.

    Parameters
    ----------
    Q, q, G, h, A, b, lb, ub : tensor
        As for `qpdiff.solve_qp`; any of them may require a gradient. Arrays, lists and numbers become tensors on the
        device of the others. Of Q, G and A any may be a tensor in the layout CSR, whose gradient is one too, or a
        `qpdiff.Sparse` with a tensor of values, through which derivatives of any order go.
    elastic, elastic_quadratic : number or tensor without axes, or dict, optional
        As for `qpdiff.solve_qp`; tensors may require a gradient.
    unsolved : {"raise", "nan", "zero"}
        What to do about problems that are not SOLVED: raise, or give them NaN or zero gradients.
    smoothing : float, optional
        κ > 0: differentiate the solution of the relaxed conditions s ∘ z = κ, to any order, see `qpdiff.vjp`. The
        values stay those of the solution.
    warm_start : Solution, optional
        As for `qpdiff.solve_qp`; of this function or that one. No gradient goes through it.
    **options
        Further options of `qpdiff.solve_qp`, but for `backend`.

    Returns
    -------
    Solution
        Whose x, y, z, z_lb, z_ub, objective and violation differentiate. The other fields are constants. Under
        `torch.func.vmap` all are those of one sample; the function that is mapped returns the ones that it wants.

    Raises
    ------
    RuntimeError
        With ``unsolved="raise"``, when a problem is not SOLVED, or its relaxed point was not found; the error counts
        them and names the first. The axes that `torch.func.vmap` maps over come first in its position.

    Examples
    --------
    >>> import torch
    >>> import qpdiff.torch
    >>> point = torch.tensor([2.0, -3.0], requires_grad=True)
    >>> projection = qpdiff.torch.solve_qp(torch.eye(2), -point, lb=0.0).x
    >>> torch.sum((projection - point) ** 2).backward()
    >>> point.grad.round(decimals=3).abs().tolist()
    [0.0, 6.0]
    """
    check_unsolved(unsolved)
    compiling = torch.compiler.is_compiling()
    if compiling:
        refuse_arrays(options | {"smoothing": smoothing})
    check_smoothing(smoothing)
    if options:
        solver.check_names("solve_qp", [name for name in options if name != "dtype"])
    operands = {"Q": Q, "q": q, "G": G, "h": h, "A": A, "b": b, "lb": lb, "ub": ub}
    operands, _ = with_prices(operands, elastic, elastic_quadratic)
    operands = {k: stacked(value) if isinstance(value, (list, tuple)) else value for k, value in operands.items()}
    warm: Any = None
    if isinstance(warm_start, Solution):
        warm = [getattr(warm_start, name) for name in WARM]
    elif warm_start is not None:
        options["warm_start"] = warm_start  # for the solver to refuse
    if not compiling and smoothing is None and are_numpys(operands):
        return solve_arrays(operands, warm, unsolved, **options)
    options["smoothing"] = None if smoothing is None else float(smoothing)
    solve = solve_in_graph if compiling else solve_by_functions
    return Solution(*solve(operands, warm, unsolved, **options))
