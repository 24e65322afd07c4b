"""OptNet's timing experiment: a batch of 128 quadratic programs, solved and differentiated, against their size.

The programs are the paper's (section 4.1), with matrices of their own: n variables, n inequalities. Each batch is
taken at once and one program after the other, by both engines that there are for NumPy arrays: the compiled one, which
takes one program after the other itself, a thread a processor, and the one made of operations on the whole batch.

B. Amos, J. Z. Kolter, "OptNet: differentiable optimization as a layer in neural networks", ICML 2017.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import NamedTuple

import matplotlib
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import qpdiff

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH = 128


class Mode(NamedTuple):
    engine: str
    batched: bool

    def __str__(self):
        return f"{self.engine} engine, {'batched' if self.batched else 'one by one'}"


MODES = [Mode(engine, batched) for engine in ("compiled", "array") for batched in (True, False)]


class Seconds(NamedTuple):
    forward: float
    backward: float


def make_problems(n: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    L = np.tril(rng.uniform(size=(BATCH, n, n))) + np.eye(n)
    G = rng.normal(size=(BATCH, n, n))
    point = rng.normal(size=(BATCH, n, 1))
    h = (G @ point)[:, :, 0] + 1
    return {"Q": L @ L.mT + 1e-3 * np.eye(n), "q": rng.normal(size=(BATCH, n)), "G": G, "h": h}


def measure(mode: Mode, problems: dict[str, np.ndarray]) -> tuple[Seconds, np.ndarray, np.ndarray]:
    """Return the time, and for comparison the solutions and the gradients of their sum with respect to q."""
    ones = np.ones_like(problems["q"])
    parts = [slice(None)] if mode.batched else range(BATCH)
    given = [{name: value[part] for name, value in problems.items()} for part in parts]
    start = time.perf_counter()
    sols = [qpdiff.solve_qp(**operands, engine=mode.engine) for operands in given]
    middle = time.perf_counter()
    grads = [qpdiff.vjp(sol, x=ones[part]) for sol, part in zip(sols, parts, strict=True)]
    end = time.perf_counter()
    x, gradient = (np.reshape(arrays, ones.shape) for arrays in ([s.x for s in sols], [g.q for g in grads]))
    return Seconds(middle - start, end - middle), x, gradient


def experiment(sizes, rounds: int, step) -> dict[Mode, list[Seconds]]:
    """Return the fastest of the rounds by size; modes alternate, so that what disturbs the machine disturbs all."""
    for mode in MODES:
        measure(mode, make_problems(sizes[0], 0))  # compiles
    out: dict[Mode, list[Seconds]] = {mode: [] for mode in MODES}
    for n in sizes:
        problems = make_problems(n, n)
        times: dict[Mode, list[Seconds]] = {mode: [] for mode in MODES}
        for _ in range(rounds):
            answers = []
            for mode in MODES:
                seconds, *answer = measure(mode, problems)
                times[mode].append(seconds)
                answers.append(answer)
                step()
        for x, gradient in answers:
            np.testing.assert_allclose(x, answers[0][0], atol=1e-5)
            np.testing.assert_allclose(gradient, answers[0][1], atol=1e-3)
        for mode, all_rounds in times.items():
            out[mode].append(Seconds(*np.min(all_rounds, axis=0)))
    return out


def plot(times: dict[Mode, list[Seconds]], sizes, path: str) -> None:
    """Draw the time of a batch by size, forward and backward beside each other."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for axis, part in zip(axes, Seconds._fields, strict=True):
        for mode, seconds in times.items():
            color, line = ("C0" if mode.engine == "compiled" else "C1"), ("-o" if mode.batched else "--s")
            axis.loglog(
                sizes, [1000 * getattr(s, part) for s in seconds], line, color=color, markersize=4, label=str(mode)
            )
        axis.set(xlabel="variables and inequalities of a program", title=part.capitalize())
        axis.set_xticks(sizes, [str(n) for n in sizes], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set(ylabel=f"time of {BATCH} programs [ms]")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(times))
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None) -> int:
    """Measure, report ratios, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 20, 30, 50, 70, 100])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", default="timing.png", help="the plot")
    parser.add_argument("--quick", action="store_true", help="two small sizes, to test that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.sizes, options.rounds = [5, 10], 1

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("measurements", total=len(options.sizes) * options.rounds * len(MODES))
        times = experiment(options.sizes, options.rounds, lambda: progress.advance(task))
    print(f"{BATCH} programs, {os.cpu_count()} processors; milliseconds forward + backward; backward / forward")
    for mode, seconds in times.items():
        print(mode)
        for n, (forward, backward) in zip(options.sizes, seconds, strict=True):
            print(f"    n = {n:3}: {1000 * forward:8.1f} + {1000 * backward:.1f}    {backward / forward:.2f}")
    print("one by one / batched, forward and backward together")
    for engine in ("compiled", "array"):
        single, batched = (np.sum(times[Mode(engine, which)], axis=1) for which in (False, True))
        print(f"    {engine:8}", *(f"n = {n}: {r:.1f}" for n, r in zip(options.sizes, single / batched, strict=True)))
    plot(times, options.sizes, options.output)
    print(f"plot: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
