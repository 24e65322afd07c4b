"""Solve a batch that is large next to the machine's memory, with a progress bar, and measure what it takes beside it.

The problems are of the family of OptNet's timing experiment, each with its own matrices. What counts is the largest
resident set during the solve, less that with all operands in memory and less the arrays of the solution. The exit code
is 1 where it is more than --limit, or a problem is not solved.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path

import numpy as np
from report import machine
from rich.progress import Progress

import qpdiff


def operands(batch: int, n: int, m: int, seed: int) -> dict[str, np.ndarray]:
    """Make the problems piece by piece, so that this takes no more memory than to solve them."""
    rng = np.random.default_rng(seed)
    core = {"Q": (n, n), "q": (n,), "G": (m, n), "h": (m,)}
    out = {name: np.empty((batch, *shape)) for name, shape in core.items()}
    for start in range(0, batch, 10_000):
        part = slice(start, min(start + 10_000, batch))
        size = part.stop - part.start
        L = np.tril(rng.uniform(size=(size, n, n))) + np.eye(n)
        out["Q"][part] = L @ L.mT + 1e-3 * np.eye(n)
        out["q"][part], out["G"][part] = rng.normal(size=(size, n)), rng.normal(size=(size, m, n))
        out["h"][part] = (out["G"][part] @ rng.normal(size=(size, n, 1)))[..., 0] + 1
    return out


def resident() -> int:
    """Return the bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1_000_000)
    parser.add_argument("--variables", type=int, default=10)
    parser.add_argument("--inequalities", type=int, default=20)
    parser.add_argument("--limit", type=float, default=1e9, help="bytes beyond the operands and the solution")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    print(machine("scipy"))
    problems = operands(options.batch, options.variables, options.inequalities, options.seed)
    few = {name: value[:10] for name, value in problems.items()}
    qpdiff.solve_qp(**few, engine=options.engine)  # what is compiled and imported on first use
    before, peak, solving = resident(), 0, True

    def watch():
        nonlocal peak
        while solving:
            peak = max(peak, resident())
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    with Progress() as bar:
        task = bar.add_task("problems", total=options.batch)

        def progress(done, _):
            bar.update(task, completed=done)

        sol = qpdiff.solve_qp(**problems, engine=options.engine, progress=progress)
    seconds = time.perf_counter() - start
    solving = False
    watcher.join()
    names = ("x", "z", "s", "status", "iterations", "objective", "primal_residual", "dual_residual", "duality_gap")
    result = sum(getattr(sol, name).nbytes for name in names)
    beyond = peak - before - result
    solved = int(np.sum(sol.status == qpdiff.Status.SOLVED))
    data = sum(value.nbytes for value in problems.values())
    print(
        f"{solved} of {options.batch} problems solved in {seconds:.1f} s, {1e6 * seconds / options.batch:.1f} µs each"
    )
    print(f"operands {data / 1e9:.2f} GB, solution {result / 1e9:.2f} GB, beyond at most {beyond / 1e9:.2f} GB")
    return 0 if solved == options.batch and beyond <= options.limit else 1


if __name__ == "__main__":
    sys.exit(main())
