"""One solver in a process of its own: it does what lines of JSON on standard input say, and answers on standard output.

about PACKAGES               the releases of those that are installed
prepare FILE TOLERANCE       convert the operands in the file
forward, backward, forward_backward
                             one pass, or as many as fit into the least time, and how long the fastest took
answer FILE                  write what the last pass gave to the file
peak                         operations a second of a large matrix product

Between the lines the process sleeps, so that it takes nothing from the solver that is being timed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from operands import load

sys.path.append(str(Path(__file__).parents[1] / "tests"))
LEAST = 0.1
"""Seconds to fill: a pass shorter than this is repeated, so that neither the first after the pause counts nor one that
the machine disturbs."""


class Worker:
    """A peer and the commands on it."""

    def __init__(self, code: str, options: dict):
        module, name = code.split(":")
        self.kind = getattr(importlib.import_module(module), name)
        self.options = options
        self.peer = None

    def about(self, *packages):
        versions = {}
        for package in packages:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return versions

    def prepare(self, file, tolerance):
        self.peer = None  # its memory goes first
        self.peer = self.kind(load(file), tolerance, **self.options)

    def forward(self, once=False):
        return fastest(self.peer.forward, once)

    def forward_backward(self, once=False):
        return fastest(self.peer.forward_backward, once)

    def backward(self, once=False):
        return fastest(self.peer.backward, once, self.peer.forward)

    def answer(self, file):
        np.savez(file, **self.peer.answer())

    def peak(self):
        return self.kind.peak(**self.options)


def fastest(run, once: bool, before=lambda: None) -> float:
    """Return the seconds of the fastest pass; `before` each one comes what is not timed."""
    times = []
    while not times or (sum(times) < LEAST and not once):
        before()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    # What a solver prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    code, options = sys.argv[1:]
    worker = None
    for line in sys.stdin:
        command, arguments = json.loads(line)
        try:
            worker = worker or Worker(code, json.loads(options))
            reply = {"value": getattr(worker, command)(*arguments)}
        except Exception as error:  # whatever a solver raises is its answer
            reply = {"error": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
