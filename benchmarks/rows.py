"""The batches that are measured: rows of the tables, and the points of the curves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from families import FAMILIES
from problems import optnet


class Row(NamedTuple):
    """A batch of problems of one size."""

    batch: int
    n: int
    m: int
    p: int
    kind: str = "distinct"

    @property
    def name(self) -> str:
        """Return the name by which `--rows` takes it."""
        return self.kind if self.kind != "distinct" else f"{self.batch},{self.n},{self.m},{self.p}"

    @property
    def title(self) -> str:
        size = f"{self.batch}, {self.n}, {self.m}, {self.p}"
        return size if self.kind == "distinct" else f"{self.kind} {size}"

    def operands(self) -> dict[str, np.ndarray]:
        """Draw NumPy arrays by the names of `qpdiff.solve_qp`, the same in every run."""
        rng = np.random.default_rng(0)
        if self.kind == "shared":
            return _shared(rng, self.batch, self.n, self.m, self.p)
        if self.kind == "sudoku":
            return _sudoku(rng, self.batch)
        return optnet(rng, (self.batch,), self.n, self.m, self.p)


class SparseRow(NamedTuple):
    """A batch of sparse problems of one pattern."""

    batch: int
    family: str
    size: int
    """Small, medium or large: 0, 1 or 2."""

    @property
    def title(self) -> str:
        return f"{self.batch}, {self.family} {', '.join(map(str, FAMILIES[self.family][1][self.size]))}"

    def operands(self) -> dict:
        """Draw NumPy arrays, and `operands.Matrices`, by the names of `qpdiff.solve_qp`, the same in every run."""
        draw, sizes = FAMILIES[self.family]
        return draw(np.random.default_rng(0), self.batch, *sizes[self.size])


class Growth(NamedTuple):
    """Rows along one axis."""

    axis: str
    """The field of a row that grows."""
    title: str
    rows: list[Row]


def parse(text: str) -> Row:
    """Return a row by its name, or a batch of distinct problems B,N,M,P."""
    named = {row.name: row for row in ROWS}
    return named[text] if text in named else Row(*map(int, text.split(",")))


def _shared(rng, batch, n, m, p):
    """Draw problems with the same Q, G and A for the whole batch, but not the same q, h and b."""
    operands = optnet(rng, (), n, m, p)
    points = rng.normal(size=(batch, n))
    own = {"q": rng.normal(size=(batch, n)), "h": points @ operands["G"].T + 1, "b": points @ operands["A"].T}
    return operands | own


def _sudoku(rng, batch):
    """Make the mini-Sudoku layer before its first step; puzzles are one-hot, a blank cell is all zeros."""
    n, p = 64, 40
    A = rng.uniform(size=(p, n))
    cells = np.eye(4)[rng.integers(0, 4, size=(batch, 16))] * (rng.uniform(size=(batch, 16, 1)) < 0.5)
    return {"Q": 0.1 * np.eye(n), "q": -cells.reshape(batch, n), "A": A, "b": A @ np.ones(n), "lb": np.zeros(n)}


ROWS = [
    Row(1, 10, 10, 0),
    Row(128, 10, 10, 0),
    Row(1000, 10, 20, 0),
    Row(128, 50, 50, 0),
    Row(128, 100, 50, 10),
    Row(128, 100, 100, 0),
    Row(16, 500, 200, 50),
    Row(150, 64, 0, 40, "sudoku"),
    Row(128, 100, 50, 10, "shared"),
]
QUICK_ROWS = [Row(1, 10, 10, 0), Row(8, 50, 20, 5), Row(4, 64, 0, 40, "sudoku"), Row(8, 50, 20, 5, "shared")]
SPARSE_ROWS = [SparseRow(batch, family, size) for family in FAMILIES for size in (0, 1) for batch in (1, 64)]
SPARSE_ROWS += [SparseRow(1, family, 2) for family in FAMILIES]
QUICK_SPARSE_ROWS = [SparseRow(batch, family, 0) for family in ("portfolio", "opf") for batch in (1, 4)]

BATCHES, SIZES = [1, 3, 10, 30, 100, 300, 1000, 3000, 10_000], [5, 10, 20, 50, 100, 200, 500]


def growths(quick: bool) -> list[Growth]:
    """Return the rows of the curves: time against the batch, and against n = m."""
    batches, sizes = ([1, 4], [5, 10]) if quick else (BATCHES, SIZES)
    return [
        Growth("batch", "B, at n = m = 10", [Row(batch, 10, 10, 0) for batch in batches]),
        Growth("n", "n = m, at B = 64", [Row(64, n, n, 0) for n in sizes]),
    ]
