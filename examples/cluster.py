"""Solve a million quadratic programs on the worker processes of a Dask cluster, and kill one of them on the way.

Each problem has matrices of its own. The workers make them block by block from a seed, solve them, and return
no more than a line of figures for each block, so that the memory in use does not grow with the number of problems.
What the killed worker held, Dask computes again on another. At the end every problem must be SOLVED, and a sample of
blocks must satisfy the KKT conditions and be equal to what this process computes on its own.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import time

import dask
import dask.array as da
import numpy as np
from dask.distributed import Client, LocalCluster, futures_of
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import qpdiff
import qpdiff.dask

FIGURES = ("solved", "worst residual", "sum of objectives", "iterations")


def make_problems(batch: int, block: int, n: int, m: int, seed: int) -> dict[str, da.Array]:
    """Make feasible problems like those of OptNet's timing experiment, lazily."""
    rng = da.random.default_rng(seed)
    L = da.tril(rng.uniform(size=(batch, n, n), chunks=(block, n, n))) + np.eye(n)
    G = rng.normal(size=(batch, m, n), chunks=(block, m, n))
    point = rng.normal(size=(batch, n, 1), chunks=(block, n, 1))
    return {
        "Q": L @ L.transpose(0, 2, 1) + 1e-3 * np.eye(n),
        "q": rng.normal(size=(batch, n), chunks=(block, n)),
        "G": G,
        "h": (G @ point)[:, :, 0] + 1,
    }


def figures(status, objective, primal, dual, gap, iterations):
    """Return a line of `FIGURES` on a block."""
    solved = np.sum(status == qpdiff.Status.SOLVED)
    worst = max(np.max(residual) for residual in (primal, dual, gap))
    return np.array([[solved, worst, np.sum(objective), np.sum(iterations)]])


def summary(sol: qpdiff.Solution) -> da.Array:
    parts = sol.status, sol.objective, sol.primal_residual, sol.dual_residual, sol.duality_gap, sol.iterations
    chunks = ((1,) * sol.status.numblocks[0], (len(FIGURES),))
    return da.map_blocks(figures, *parts, new_axis=1, chunks=chunks, dtype=float, meta=np.empty((0, 0)))


def kkt_residual(Q, q, G, h, x, z) -> float:
    """Return the largest violation of a condition of optimality, from their definition."""
    Qx, Gx = np.einsum("bij,bj->bi", Q, x), np.einsum("bij,bj->bi", G, x)
    gap = np.sum(x * Qx + q * x, axis=1) + np.sum(h * z, axis=1)
    parts = np.maximum(Gx - h, 0), np.maximum(-z, 0), Qx + q + np.einsum("bij,bi->bj", G, z), gap
    return max(np.max(np.abs(part)) for part in parts)


def kill_a_worker(client: Client) -> tuple[int, set]:
    """End the process of the worker that holds most results, without a warning; return its id and the results."""
    victim, results = max(client.has_what().items(), key=lambda item: len(item[1]))
    pid = client.run(os.getpid, workers=[victim])[victim]
    os.kill(pid, signal.SIGKILL)
    return pid, set(results)


def peak_memory() -> int:
    """Return the most bytes that this process has had in memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(client: Client, lines: da.Array) -> tuple[np.ndarray, list[int]]:
    """Compute all blocks' lines, killing a worker when a third of them is done; also return what it had done."""
    lines = lines.persist()
    futures = sorted(futures_of(lines), key=lambda future: future.key)
    lost: list[int] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task("blocks", total=len(futures))
        while (done := sum(future.done() for future in futures)) < len(futures):
            progress.update(bar, completed=done)
            if not lost and 3 * done >= len(futures):
                pid, results = kill_a_worker(client)
                lost = [i for i, future in enumerate(futures) if future.key in results]
                progress.console.print(f"process {pid} killed, and with it {len(lost)} of {done} blocks that were done")
            time.sleep(0.05)
        progress.update(bar, completed=done)
    if not lost:
        raise RuntimeError("all blocks were done before a worker could be killed; take more problems")
    return lines.compute(), lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=1_000_000)
    parser.add_argument("--block", type=int, default=5000, help="problems solved by one task")
    parser.add_argument("--workers", type=int, default=max(2, os.cpu_count() or 1))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small run, to test that it works")
    options = parser.parse_args()
    if options.quick:
        options.problems, options.block, options.workers = 40_000, 500, 2
    n, m = 10, 20

    problems = make_problems(options.problems, options.block, n, m, options.seed)
    sol = qpdiff.dask.solve_qp(**problems, unsolved="nan")
    lines = summary(sol)
    count = lines.numblocks[0]
    qpdiff.solve_qp(np.eye(1), np.ones(1))  # compiles the solver, if need be, which the workers then find on disk

    start = time.perf_counter()
    with (
        LocalCluster(options.workers, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as cluster,
        Client(cluster) as client,
    ):
        print(f"{options.problems} problems in {count} blocks on {options.workers} worker processes")
        table, lost = run(client, lines)
        seconds = time.perf_counter() - start
        memory = max(client.run(peak_memory).values())
        sample = sorted({0, lost[0], lost[-1], count - 1})
        there = dask.compute([(sol.x.blocks[i], sol.z.blocks[i], sol.objective.blocks[i]) for i in sample])[0]

    solved, worst = int(np.sum(table[:, 0])), np.max(table[:, 1])
    data = 8 * sum(value.size for value in problems.values())
    print(f"{solved} of {options.problems} SOLVED in {seconds:.1f} s, largest residual {worst:.1e}")
    print(f"{data / 1e9:.2f} GB of operands, at most {memory / 1e9:.2f} GB at a time in a worker process")
    few = [{name: value.blocks[i] for name, value in problems.items()} for i in sample]
    (operands,) = dask.compute(few, scheduler="sync")
    here = [qpdiff.solve_qp(**made) for made in operands]
    residual = max(kkt_residual(**made, x=x, z=z) for made, (x, z, _) in zip(operands, there, strict=True))
    distance = max(
        max(np.max(np.abs(x - own.x)), np.max(np.abs(objective - own.objective)), abs(np.sum(objective) - table[i, 2]))
        for i, own, (x, _, objective) in zip(sample, here, there, strict=True)
    )
    print(f"blocks {sample}: KKT residual {residual:.1e}, distance to what this process computes {distance:.1e}")
    return 0 if solved == options.problems and residual < 1e-5 and distance < 1e-9 else 1


if __name__ == "__main__":
    sys.exit(main())
