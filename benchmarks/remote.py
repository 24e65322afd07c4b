"""Ask workers from the benchmark: one that does not answer within a time is stopped and started again."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from pathlib import Path

from solvers import Solver


class Failed(Exception):
    """The reason why there is no answer."""


class Remote:
    """One solver's process, which is started by the first question."""

    def __init__(self, solver: Solver, python: Path, log: Path):
        self.solver = solver
        self.python = python
        self.log = log
        self.process = None

    def ask(self, command: str, *arguments, limit: float):
        """Return the answer of the worker, or raise `Failed` with what it says instead."""
        if self.process is None:
            self._start()
        try:
            self.process.stdin.write(json.dumps([command, arguments]) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=limit)
        except queue.Empty:
            self.stop()
            raise Failed(f"{command} took longer than {limit:g} s") from None
        except OSError:
            line = ""
        if not line:
            code = self.process.wait()
            self.stop()
            raise Failed(f"{command} ended its process with code {code}")
        reply = json.loads(line)
        if "error" in reply:
            raise Failed(reply["error"])
        return reply["value"]

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _start(self) -> None:
        worker = Path(__file__).with_name("worker.py")
        command = [self.python, worker, self.solver.code, json.dumps(self.solver.options)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.lines = queue.Queue()
        threading.Thread(target=_read, args=(self.process.stdout, self.lines), daemon=True).start()


def _read(stream, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")
