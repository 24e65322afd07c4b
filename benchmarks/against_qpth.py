"""Solve and differentiate batches of the family of OptNet's timing experiment with qpdiff and with qpth.

One pass is the solution of a batch and the gradients of sum(x) with respect to all operands: `solve_qp` and `vjp` on
NumPy arrays, `QPFunction` forward and backward on CPU tensors of torch, both float64 with their default settings and as
many threads as they take. Every problem of a batch has its own matrices.

First the answers are judged: the largest difference of x and of the gradient with respect to q, each relative to the
largest entry, and the largest primal residual, dual residual or duality gap of each, computed from the definition. qpth
iterates until nothing improves, qpdiff until it is within its tolerance (--tol sets another one), and a duality gap ε
leaves x free by about √(2ε/λ), λ the smallest eigenvalue of Q: x may differ by more than the residuals. Then passes are
timed alternately and the fastest of each counts. The exit code is 1 where the answers do not agree.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from qpth.qp import QPFunction
from report import machine, table

import qpdiff

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from problems import kkt_residuals, optnet

SIZES = [
    (128, 100, 50, 10),  # OptNet's
    (1, 10, 10, 0),
    (128, 10, 10, 0),
    (1000, 10, 20, 0),
    (128, 50, 50, 0),
    (128, 100, 100, 0),
    (16, 500, 200, 50),
]
RESIDUALS_AGREE, X_AGREES = 1e-6, 1e-4
"""The largest residual of either, and the largest relative difference of x, of answers that agree."""
PAUSE = 0.05
"""Seconds after which the idle threads of the library that ran last no longer spin."""


def qpdiff_pass(operands, tol):
    """x, y, z and the gradients."""
    sol = qpdiff.solve_qp(**operands, tol=tol, rtol=tol)
    gradients = qpdiff.vjp(sol, x=np.ones_like(sol.x))
    return sol.x, sol.y, sol.z, gradients


def qpth_pass(tensors):
    """x, the node that holds the multipliers, and the gradients."""
    # verbose=-1 silences the warning about inexact answers; they are judged here.
    x = QPFunction(verbose=-1)(*(tensors.get(name, torch.empty(0, dtype=torch.float64)) for name in "QqGhAb"))
    return x, x.grad_fn, dict(zip(tensors, torch.autograd.grad(x.sum(), list(tensors.values())), strict=True))


def judge(operands, tensors, tol) -> tuple[float, float, float, float]:
    """Differences of x and of the gradient of q, and the largest residual of qpdiff and of qpth."""
    x, y, z, gradients = qpdiff_pass(operands, tol)
    other, node, other_gradients = qpth_pass(tensors)
    other_y = node.nus.numpy() if "A" in operands else y
    no_bounds = np.zeros_like(x)
    return (
        difference(x, other.detach().numpy()),
        difference(gradients.q, other_gradients["q"].numpy()),
        max(kkt_residuals(operands, x, y, z, no_bounds, no_bounds)),
        max(kkt_residuals(operands, other.detach().numpy(), other_y, node.lams.numpy(), no_bounds, no_bounds)),
    )


def difference(a, b) -> float:
    return float(np.max(np.abs(a - b)) / np.max(np.abs(a)))


def fastest(passes, repeats: int) -> list[float]:
    """Milliseconds of each pass, run in turn."""
    times = [[] for _ in passes]
    for _ in range(repeats):
        for run, measured in zip(passes, times, strict=True):
            time.sleep(PAUSE)
            start = time.perf_counter()
            run()
            measured.append(1000 * (time.perf_counter() - start))
    return [min(measured) for measured in times]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = {"type": int, "nargs": 4, "metavar": ("B", "N", "M", "P")}
    parser.add_argument("--size", **size, action="append", help="batch, variables, inequalities, equalities")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes of each")
    parser.add_argument("--tol", type=float, help="tolerance of qpdiff, absolute and relative")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, help="write the report to this file too")
    options = parser.parse_args()

    rng = np.random.default_rng(options.seed)
    lines, agreed = [], True
    report = [f"{machine('torch', 'qpth')}; torch uses {torch.get_num_threads()} threads"]
    for batch, n, m, p in options.size or SIZES:
        operands = optnet(rng, (batch,), n, m, p)
        tensors = {name: torch.from_numpy(value).requires_grad_() for name, value in operands.items()}
        of_x, of_gradient, own, other = judge(operands, tensors, options.tol)
        agreed &= max(own, other) <= RESIDUALS_AGREE and of_x <= X_AGREES
        passes = partial(qpdiff_pass, operands, options.tol), partial(qpth_pass, tensors)
        ours, theirs = fastest(passes, options.repeats)
        accuracy = [f"{value:.0e}" for value in (of_x, of_gradient, own, other)]
        lines.append([f"{batch}, {n}, {m}, {p}", f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}", *accuracy])
    headings = ["B, n, m, p", "qpdiff [ms]", "qpth [ms]", "qpth / qpdiff"]
    headings += ["x differs by", "gradient by", "residual qpdiff", "residual qpth"]
    report.append(table(headings, lines))
    report.append("The answers agree." if agreed else "The answers do not agree.")
    text = "\n\n".join(report) + "\n"
    print(text, end="")
    if options.markdown:
        options.markdown.write_text(text)
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
