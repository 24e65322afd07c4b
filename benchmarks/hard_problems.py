"""Solve every QP of a folder with qpdiff, PIQP (dense), Clarabel, DAQP and quadprog, those that are installed.

Each problem goes to one solver after the other in one run, at each absolute tolerance (no relative one), and the primal
residual, dual residual and duality gap of every answer are computed again from their definitions, in long double: where
the objective is 1e8 the rounding error of the gap in float64 is 1e-8, so that the order of a sum decides what is solved
at 1e-9, of every solver.

solved        the solver says so and the largest of the three is within the tolerance
false claims  the solver says so and the largest of the three is beyond 1000 times the tolerance
time          of set-up and solve over all problems, failures included; the conversion of the operands to a solver's own
              form is not timed
both solve    the ratio to PIQP's time over the problems that both solve: a solver that gives up at once is not fast

Tolerances mean what each solver makes of them. PIQP tests the three residuals as here; Clarabel's residuals are
relative to the size of the data, its gap absolute; DAQP's are on constraints and signs of multipliers; quadprog has
none, and takes strictly convex problems only. In float32 the operands are rounded first, and qpdiff runs alone.

A problem is an .npz with Q, q and any of G, h, A, b, lb, ub. One that is not convex is skipped: it is called indefinite
in the column `cost` of manifest.csv beside it or, where that does not list it, refused by qpdiff.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from peers import one_by_one
from peers.one_by_one import Answer
from report import machine, table

import qpdiff

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from problems import complete, kkt_residuals

OPERANDS = ("Q", "q", "G", "h", "A", "b", "lb", "ub")


class Trial(NamedTuple):
    """One solve."""

    problem: str
    tol: float
    solver: str
    claimed: bool
    residuals: tuple[float, float, float]
    seconds: float
    error: str

    @property
    def solved(self) -> bool:
        return self.claimed and max(self.residuals) <= self.tol

    @property
    def false_claim(self) -> bool:
        return self.claimed and max(self.residuals) > 1000 * self.tol


def with_qpdiff(d, tol):
    def run():
        return qpdiff.solve_qp(**d, dtype=d["Q"].dtype.name, tol=tol, rtol=0.0)

    def read(sol):
        return Answer(int(sol.status) == qpdiff.Status.SOLVED, (sol.x, sol.y, sol.z, sol.z_lb, sol.z_ub))

    return run, read


PEERS = ("piqp", "clarabel", "daqp", "quadprog")
SOLVERS: dict[str, Callable] = {"qpdiff": with_qpdiff} | {name: one_by_one.SOLVERS[name] for name in PEERS}


# ---- running them


def convex_problems(folder: Path, skipped: list[str]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield name and operands of each problem; the names of those that are not convex are added to `skipped`."""
    manifest = folder / "manifest.csv"
    listed = list(csv.DictReader(manifest.read_text().splitlines())) if manifest.exists() else []
    cost = {row["name"]: row["cost"] for row in listed}
    for file in sorted(folder.glob("*.npz")):
        with np.load(file) as data:
            d = complete({name: data[name] for name in OPERANDS if name in data.files})
        if cost[file.stem] == "indefinite" if file.stem in cost else refused(d):
            skipped.append(file.stem)
        else:
            yield file.stem, d


def refused(d) -> bool:
    """Return whether qpdiff finds Q indefinite."""
    try:
        qpdiff.solve_qp(**d, max_iterations=0)
    except ValueError as error:
        return "is not positive semidefinite" in str(error)
    return False


def attempt(problem: str, d, tol: float, solver: str) -> Trial:
    """Solve once and check the answer."""
    run, read = SOLVERS[solver](d, tol)
    start = time.perf_counter()
    try:
        result = run()
    except Exception as error:  # a solver that raises has not solved the problem, whatever it raises
        return Trial(problem, tol, solver, False, (np.inf,) * 3, time.perf_counter() - start, str(error))
    seconds = time.perf_counter() - start
    claimed, point = read(result)
    if all(np.all(np.isfinite(part)) for part in point):
        d, point = {name: np.longdouble(value) for name, value in d.items()}, map(np.longdouble, point)
        residuals = kkt_residuals(d, *point)
    else:
        residuals = (np.inf,) * 3
    return Trial(problem, tol, solver, claimed, residuals, seconds, "")


def summary(trials: list[Trial], solvers: list[str], tolerances: list[float]) -> str:
    """Return a row for each tolerance and solver."""
    lines = []
    for tol in tolerances:
        by_solver = {s: {t.problem: t for t in trials if t.tol == tol and t.solver == s} for s in solvers}
        piqp = by_solver.get("piqp", {})
        for solver, own in by_solver.items():
            both = [name for name in piqp if own[name].solved and piqp[name].solved]
            lines.append(
                [
                    solver,
                    f"{tol:.0e}",
                    f"{sum(t.solved for t in own.values())} of {len(own)}",
                    str(sum(t.false_claim for t in own.values())),
                    f"{total(own, own):.2f}",
                    f"{total(own, own) / total(piqp, piqp):.2f}" if piqp else "-",
                    f"{total(own, both) / total(piqp, both):.2f} ({len(both)})" if both else "-",
                ]
            )
    return table(["solver", "tol", "solved", "false claims", "time [s]", "time / PIQP's", "where both solve"], lines)


def total(trials: dict[str, Trial], names) -> float:
    return sum(trials[name].seconds for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds the .npz files")
    parser.add_argument("--tol", type=float, nargs="+", default=[1e-6, 1e-9], help="absolute tolerances")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
    parser.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=list(SOLVERS))
    parser.add_argument("--list", action="store_true", help="print every solve")
    parser.add_argument("--markdown", type=Path, help="write the report to this file too")
    options = parser.parse_args()

    wanted = ["qpdiff"] if options.dtype == "float32" else options.solvers
    solvers = [name for name in wanted if importlib.util.find_spec(name)]
    report = [machine("scipy", *(name for name in solvers if name != "qpdiff"))]
    if missing := [name for name in wanted if name not in solvers]:
        report.append(f"Not installed: {', '.join(missing)}.")

    trials, skipped = [], []
    for problem, d in convex_problems(options.folder, skipped):
        d = {name: value.astype(options.dtype) for name, value in d.items()}
        if not trials:  # what a solver does once in a process is not timed
            for solver in solvers:
                attempt(problem, d, options.tol[0], solver)
        for tol in options.tol:
            for solver in solvers:
                trials.append(attempt(problem, d, tol, solver))
                if options.list:
                    print(line(trials[-1]), flush=True)
    if not trials:
        parser.error(f"no convex problem in {options.folder}")
    if skipped:
        report.append(f"Skipped, not convex: {', '.join(skipped)}.")
    report.append(summary(trials, solvers, options.tol))
    text = "\n\n".join(report) + "\n"
    print(text, end="")
    if options.markdown:
        options.markdown.write_text(text)


def line(trial: Trial) -> str:
    """Describe one solve and the accuracy that it reached."""
    verdict = "solved" if trial.solved else "FALSE CLAIM" if trial.false_claim else "missed" if trial.claimed else "-"
    residuals = " ".join(f"{r:.1e}" for r in trial.residuals)
    start = f"{trial.problem:16s} {trial.tol:.0e} {trial.solver:9s} {1000 * trial.seconds:9.1f} ms  {verdict:11s}"
    return f"{start} {trial.error.splitlines()[0][:70] if trial.error else residuals}"


if __name__ == "__main__":
    main()
