"""A disk that is full: the command ends with one line and exit code 2, and leaves files as they were."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from .common import Clock, Plan, Row, counted, verdict
from .jobs import draw

CAPACITY = 2**18
"""Bytes of the file system; the output takes up to half of that."""
Limit = Callable[[Path, int], Callable[[], None] | None]
"""Prepare a folder in which so many bytes can be written; return what the process does first."""


def run(plan: Plan) -> Iterator[Row]:
    """Write solutions and pictures where there is not enough space for them."""
    if find_spec("typer") is None or find_spec("rich") is None:  # the extra `cli`
        return
    with _file_system() as (folder, how, limit), tempfile.TemporaryDirectory() as elsewhere:
        problem = Path(elsewhere) / "problem.npz"
        np.savez(problem, **{name: value[:3] for name, value in draw("bounds").items()})
        outputs = {"solve": "solution.npz"} | ({} if plan.quick else {"show": "picture.png"})
        parts = zip(outputs.items(), plan.parts(len(outputs)), strict=True)
        for (command, name), clock in parts:
            yield _fill(f"qpdiff {command} -o, {how}", command, problem, folder / name, limit, clock, plan)


@contextmanager
def _file_system() -> Iterator[tuple[Path, str, Limit]]:
    """Make a small file system where this may be mounted, else limit the size of a file."""
    with tempfile.TemporaryDirectory(prefix="qpdiff-soak-") as name:
        folder = Path(name)
        command = ["mount", "-t", "tmpfs", "-o", f"size={CAPACITY}", "tmpfs", os.fspath(folder)]
        try:
            mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            mounted = False
        try:
            yield folder, "on a full tmpfs" if mounted else "with RLIMIT_FSIZE", _fill_up if mounted else _limit_size
        finally:
            if mounted:
                subprocess.run(["umount", os.fspath(folder)], check=True)


def _fill_up(folder: Path, left: int) -> None:
    filler = folder / "filler"
    filler.unlink(missing_ok=True)
    free = os.statvfs(folder)
    filler.write_bytes(b"x" * max(0, free.f_bavail * free.f_frsize - left))


def _limit_size(folder: Path, left: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (left, resource.RLIM_INFINITY))


def _fill(what: str, command: str, problem: Path, output: Path, limit: Limit, clock: Clock, plan: Plan) -> Row:
    """Run a command with more and more space, until the time is over."""
    rng, outcomes, old = plan.random(), Counter(), b"what was there before"
    limit(output.parent, CAPACITY)
    _run(command, problem, output, None)
    whole = output.stat().st_size
    while not clock.over() or outcomes.total() < 3:
        output.unlink(missing_ok=True)
        beside = {path.name for path in output.parent.iterdir()}
        limit(output.parent, CAPACITY)
        if existed := rng.random() < 0.5:
            output.write_bytes(old)
        before_process = limit(output.parent, rng.randrange(2 * whole))
        beside |= {path.name for path in output.parent.iterdir()}
        done = _run(command, problem, output, before_process)
        there = {path.name for path in output.parent.iterdir()}
        untouched = output.read_bytes() == old if existed else not output.exists()
        if there - beside - {output.name}:
            outcome = "left a temporary file"
        elif done.returncode == 0:
            outcome = "written" if output.stat().st_size == whole else "said to be written, and is not"
        elif done.returncode == 2 and len(done.stderr.splitlines()) == 1:
            outcome = "one line, exit code 2" if untouched else "one line, but the file is another"
        else:
            outcome = f"exit code {done.returncode}, {len(done.stderr.splitlines())} lines"
        outcomes[outcome] += 1
    kept = set(outcomes) <= {"written", "one line, exit code 2"}
    return Row(what, f"{outcomes.total()} runs", counted(outcomes), verdict(kept))


def _run(command: str, problem: Path, output: Path, before: Callable[[], None] | None):
    arguments = [sys.executable, "-P", "-m", "qpdiff", command, os.fspath(problem), "-o", os.fspath(output)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False, preexec_fn=before)
