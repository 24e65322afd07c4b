"""Test for half an hour what takes longer than a test may, and write docs/reliability.md: what held, in figures.

Each stage runs in a process of its own, so that one that crashes or hangs is a line of the table: threads, processes,
interrupts, memory limits, a full disk, a million problems, leaks, which bits repeat. The exit code is 1 where a promise
of the page did not hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from report import machine
from stages.common import BROKEN, Plan, Row
from stages.page import Run, write

ROOT = Path(__file__).parents[1]
SHARES = {
    "threads": 5, "processes": 3, "interrupts": 6, "memory": 4, "disk": 1, "million": 2, "determinism": 2, "leaks": 7,
}  # fmt: skip
"""The stages, each a module, and their shares of the time."""
PATIENCE = 300
"""Seconds that a stage may take beyond its share: a million problems take as long as they take."""
ENVIRONMENTS = {"memory": {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}}
"""OpenBLAS ends the process where it finds no memory for threads of its own."""
MARK = "row: "


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="for all stages together (default: 30)")
    parser.add_argument("--stages", nargs="+", choices=list(SHARES), default=list(SHARES), metavar="STAGE")
    parser.add_argument("--seed", type=int, default=0, help="of what is random (default: 0)")
    parser.add_argument("--quick", action="store_true", help="NumPy alone and small batches, to test that it runs")
    parser.add_argument("--output", type=Path, help="default: docs/reliability.md; build/... for a part")
    parser.add_argument("--one", choices=list(SHARES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    whole = not options.quick and options.stages == list(SHARES)
    options.output = options.output or ROOT / ("docs" if whole else "build") / "reliability.md"
    return options


def main() -> int:
    options = parse_arguments()
    if options.one:
        plan = Plan(60 * options.minutes, options.quick, options.seed)
        for row in import_module(f"stages.{options.one}").run(plan):
            print(MARK + json.dumps(dataclasses.asdict(row)), flush=True)
        return 0
    if not Path("/proc/self/statm").exists():
        print("the soak reads /proc, and needs Linux", file=sys.stderr)
        return 2
    packages = ("scipy", "torch", "jax", "autograd", "dask", "cvxpy", "cvxpylayers", "qpsolvers", "threadpoolctl")
    where, began = machine(*packages), time.monotonic()
    whole, results = sum(SHARES[stage] for stage in options.stages), {}
    for stage in options.stages:
        minutes = options.minutes * SHARES[stage] / whole
        print(f"{stage}, about {minutes:.1f} minutes", file=sys.stderr, flush=True)
        results[stage] = run_stage(stage, minutes, options)
        for row in results[stage]:
            print(f"  {row.verdict:8} {row.what}: {row.done}: {row.found}", file=sys.stderr, flush=True)
    run = Run(where, (time.monotonic() - began) / 60, options.seed, results)
    report = write(run)
    print(report, end="")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(report, encoding="utf-8")
    return int(any(row.verdict == BROKEN for rows in results.values() for row in rows))


def run_stage(stage: str, minutes: float, options: argparse.Namespace) -> list[Row]:
    """Run a stage in a process of its own; where that ends early, a row says how."""
    command = [sys.executable, __file__, "--one", stage, "--minutes", str(minutes), "--seed", str(options.seed)]
    command += ["--quick"] if options.quick else []
    limit = 60 * minutes + PATIENCE
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed, tempfile.TemporaryFile("w+") as errors:
        environment = os.environ | ENVIRONMENTS.get(stage, {})
        process = subprocess.Popen(
            command, stdout=printed, stderr=errors, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            code = process.wait(limit)
            ended = None if code == 0 else f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
        except subprocess.TimeoutExpired:
            ended = f"ended after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        printed.seek(0)
        lines = [line.removeprefix(MARK) for line in printed if line.startswith(MARK)]
        rows = [Row(**json.loads(line)) for line in lines]
        if ended:
            errors.seek(0)
            last = [line.strip() for line in errors if line.strip()][-1:]
            rows.append(Row("the stage itself", "", ": ".join([ended, *last]), BROKEN))
        if any(row.verdict == BROKEN for row in rows):
            errors.seek(0)
            sys.stderr.write(errors.read())
    return rows


if __name__ == "__main__":
    sys.exit(main())
