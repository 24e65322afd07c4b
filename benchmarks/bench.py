"""qpdiff side by side with other solvers: times, accuracy, targets, growth.

Each solver runs in a process and an environment of its own, which is made once. The report goes to the terminal and,
with pictures beside it, to the file that --output names; that of the sparse families to a file beside it, whose name
ends with -sparse. A run of both tables with all solvers also makes the table and the picture at the top of the README.
With --backend cupy or torch-cuda qpdiff runs on a GPU, next to qpth; without a GPU the exit code is 2.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import overview
from environments import ROOT, interpreter
from gpu import Gpu, find_gpu
from measure import Limits, Result, measure
from page import Run, write, write_sparse
from plots import plot
from remote import Failed, Remote
from report import machine
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rows import QUICK_ROWS, QUICK_SPARSE_ROWS, ROWS, SPARSE_ROWS, Growth, Row, growths, parse
from solvers import ON_CPU, SPARSE, Solver, counterpart, on_gpu
from verdicts import Table

GROWTH_REPEATS = 3
BUSY = 0.5
"""A load from which on a thread may wait for another that does not run."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(row.name for row in ROWS)
    parser.add_argument("--backend", choices=["cpu", "cupy", "torch-cuda"], default="cpu", help="where qpdiff runs")
    parser.add_argument("--rows", type=parse, nargs="+", help=f"B,N,M,P or a name; by default {names}")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=list(dict.fromkeys(s.name for s in (*ON_CPU, *SPARSE))),
        help="solvers beside qpdiff, else all",
    )
    parser.add_argument("--tables", choices=["dense", "sparse"], nargs="+", help="by default both; on a GPU dense")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of the rows (default: 7)")
    parser.add_argument("--growth", action=argparse.BooleanOptionalAction, default=True, help="the curves")
    parser.add_argument("--quick", action="store_true", help="small rows and two rounds, to test that it runs")
    parser.add_argument("--time-limit", type=float, default=20, help="seconds for a pass, and for all passes in a row")
    parser.add_argument("--first-limit", type=float, default=120, help="seconds for a first pass, which may compile")
    parser.add_argument("--environments", type=Path, default=ROOT / ".tox" / "bench-environments")
    parser.add_argument("--output", type=Path, help="default: docs/benchmarks[-BACKEND].md, build/... with --quick")
    options = parser.parse_args()
    if options.quick:
        options.repeats = min(options.repeats, 2)
    on_cpu = options.backend == "cpu"
    options.tables = options.tables or (["dense", "sparse"] if on_cpu and not options.rows else ["dense"])
    if "sparse" in options.tables and not on_cpu:
        parser.error("--tables sparse: the sparse families are measured on the CPU only")
    options.rows = options.rows or (QUICK_ROWS if options.quick else ROWS)
    suffix = "" if options.backend == "cpu" else f"-{options.backend}"
    folder = ROOT / ("build" if options.quick else "docs")
    options.output = options.output or folder / f"benchmarks{suffix}.md"
    return options


def main() -> int:
    options = parse_arguments()
    gpu = None if options.backend == "cpu" else find_gpu()
    if options.backend != "cpu" and gpu is None:
        print(f"--backend {options.backend}: this machine has no GPU that CUDA can use", file=sys.stderr)
        return 2
    if os.getloadavg()[0] > BUSY:
        print("Something else is running here: the times of solvers with threads will be wrong.", file=sys.stderr)
    options.environments.mkdir(parents=True, exist_ok=True)
    pages = []
    if "dense" in options.tables:
        solvers = on_gpu(options.backend, gpu.cuda) if gpu else ON_CPU
        pages.append((chosen(solvers, options.peers), run_dense, write, options.output))
    if "sparse" in options.tables:
        output = options.output.with_name(f"{options.output.stem}-sparse.md")
        pages.append((chosen(SPARSE, options.peers), run_sparse, write_sparse, output))
    runs = []
    for solvers, run, page, output in pages:
        try:
            runs.append(with_team(options, solvers, run, gpu, output))
        except Failed as failure:
            print(f"qpdiff: {failure}", file=sys.stderr)
            return 2 if gpu else 1
        report = page(runs[-1])
        print(report, end="")
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(report)
    if len(runs) == 2 and not options.peers and {overview.DENSE, overview.SPARSE} <= {*runs[0].rows, *runs[1].rows}:
        panels = overview.panels(runs[0].rows, runs[0].solvers, runs[1].rows, runs[1].solvers)
        overview.draw(panels, options.output.with_name("benchmarks-overview.png"))
        if options.output == ROOT / "docs" / "benchmarks.md":
            for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
                overview.insert(page, overview.write(panels))
    return 0


def chosen(solvers: list[Solver], peers: list[str] | None) -> list[Solver]:
    """Return the solvers that are asked for, with those of qpdiff that they are compared with; the first always."""
    if not peers:
        return solvers
    names = {solvers[0].name, *peers}
    names |= {counterpart(solver, solvers) for solver in solvers if solver.name in names}
    return [solver for solver in solvers if solver.name in names]


def with_team(options, solvers: list[Solver], run: Callable[..., Run], gpu: Gpu | None, output: Path) -> Run:
    """Run a table with a process for each solver."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            team = []
            for solver in progress.track(solvers, description="environments"):
                python = interpreter(solver.environment, options.environments)
                team.append(Remote(solver, python, options.environments / f"{solver.name}.log".replace(" ", "-")))
            try:
                return run(options, team, folder, progress, gpu, output)
            finally:
                for remote in team:
                    remote.stop()


def run_dense(options, team: list[Remote], folder: Path, progress: Progress, gpu: Gpu | None, output: Path) -> Run:
    """Measure the rows of the dense table, and the curves."""
    limits = Limits(options.first_limit, options.time_limit)
    curves = growths(options.quick) if options.growth else []
    points = sum(len(growth.rows) for growth in curves)
    passes = len(team) * (len(options.rows) * (1 + options.repeats) + points * (1 + GROWTH_REPEATS))
    step = steps(progress, passes)
    solvers = [remote.solver for remote in team]
    where = describe(team, limits, gpu)
    peak = team[0].ask("peak", limit=limits.first)
    rows = {row: measure(row, team, folder, options.repeats, limits, {}, step) for row in options.rows}
    grown = []
    for growth in curves:
        table = grow(growth, team, folder, limits, step)
        picture = output.with_name(f"{output.stem}-{growth.axis}.png")
        plot(growth, table, solvers, picture)
        grown.append((growth, table, picture))
    peak = max(peak, team[0].ask("peak", limit=limits.first))
    return Run(solvers, where, rows, grown, peak, options.repeats, gpu is None)


def run_sparse(options, team: list[Remote], folder: Path, progress: Progress, gpu: Gpu | None, output: Path) -> Run:
    """Measure the rows of the sparse table."""
    limits = Limits(options.first_limit, options.time_limit)
    rows = QUICK_SPARSE_ROWS if options.quick else SPARSE_ROWS
    step = steps(progress, len(team) * len(rows) * (1 + options.repeats))
    where = describe(team, limits, gpu)
    table = {row: measure(row, team, folder, options.repeats, limits, {}, step) for row in rows}
    return Run([remote.solver for remote in team], where, table, [], 0.0, options.repeats, True)


def steps(progress: Progress, total: int) -> Callable[[str], None]:
    """Return a function to call with what is done after each pass of a solver."""
    task = progress.add_task("", total=total)
    return lambda what: progress.update(task, advance=1, description=what)


def describe(team: list[Remote], limits: Limits, gpu: Gpu | None) -> str:
    """Describe the machine, and the releases of the solvers."""
    where = f"{machine()}; {gpu.name}" if gpu else machine()
    versions = {}
    for remote in team:
        with contextlib.suppress(Failed):  # the reason is recorded where it is measured
            versions |= remote.ask("about", *remote.solver.packages, limit=limits.first)
    return where + "\n\n" + ", ".join(f"{package} {version}" for package, version in sorted(versions.items()))


def grow(growth: Growth, team: list[Remote], folder: Path, limits: Limits, step: Callable[[str], None]) -> Table:
    """Measure the rows of a curve; a solver that fails at one is not tried at the larger ones."""
    table: dict[Row, dict[str, Result]] = {}
    reasons: dict[str, dict[str, str]] = {}
    for row in growth.rows:
        table[row] = measure(row, team, folder, GROWTH_REPEATS, limits, reasons, step)
        for name, result in table[row].items():
            reasons[name] = result.reasons
    return table


if __name__ == "__main__":
    sys.exit(main())
