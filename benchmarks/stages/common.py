"""Report what a stage of the soak did and found, and measure the process that it runs in."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

KEPT, RECORDED, BROKEN = "kept", "recorded", "BROKEN"
"""A promise of docs/reliability.md that held; something that is not promised; a promise that did not hold."""
MIB = 2**20


@dataclass
class Row:
    """One line of a table."""

    what: str
    done: str
    """How much of it."""
    found: str
    verdict: str


@dataclass(frozen=True)
class Plan:
    """What a stage may take."""

    seconds: float
    quick: bool
    """Leave the frameworks out, and take small batches."""
    seed: int

    def parts(self, count: int) -> list[Clock]:
        """Divide the seconds into equal parts, one after the other."""
        return [Clock(self.seconds / count) for _ in range(count)]

    def random(self) -> random.Random:
        return random.Random(self.seed)


class Clock:
    """A number of seconds that begins with the first question whether it is over."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.start: float | None = None

    def over(self) -> bool:
        now = time.monotonic()
        if self.start is None:
            self.start = now
        return now - self.start >= self.seconds


def verdict(kept: bool) -> str:
    return KEPT if kept else BROKEN


def same_bits(found: Sequence, expected: Sequence) -> bool:
    """Return whether all arrays are equal bit for bit, NaN at the same places included."""
    return len(found) == len(expected) and all(
        a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
        for a, b in zip(map(np.asarray, found), map(np.asarray, expected), strict=True)
    )


def resident() -> int:
    """Return the bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def virtual() -> int:
    """Return the bytes of address space of this process, which RLIMIT_AS limits."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def threads() -> int:
    """Return the number of threads of this process."""
    return len(os.listdir("/proc/self/task"))


def counted(outcomes: dict[str, int]) -> str:
    """Write how often each outcome came, the most frequent first."""
    ordered = sorted(outcomes.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{count} {name}" for name, count in ordered) or "nothing"
