"""A network whose output stays in a polytope: projected in the loop, projected afterwards, or held by a penalty.

The network learns to dispatch generators as an operator does, from the loads and from signals that move the operator's
costs in an unknown way. The grid is known: generation equals load, generators have capacities, and lines carry
no more than their rating, all linear in the generation. What the network answers should obey all of that. Compared are

* unconstrained: squared error only;
* balanced: what is missing to the load, or beyond it, is shared evenly by the generators, in the loop;
* penalty: squared error plus a weight times the squared violations;
* in the loop: the projection onto the polytope, a quadratic program, is the last layer and is trained through.

The answers of the first three are used as they are, and projected afterwards.

P. L. Donti, D. Rolnick, J. Z. Kolter, "DC3: a learning method for optimization with hard constraints", ICLR 2021,
compares such ways on power flow.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import qpdiff.torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BUSES, GENERATORS, LINES, SIGNALS = 12, 6, 20, 4
BATCH = 50
MEAN_LOAD = 50.0
"""Of a bus, in MW."""
PENALTIES = (1.0, 10.0, 100.0)


# ---- the grid and its operator


class Grid(NamedTuple):
    """Where generators are (BUSES, GENERATORS), what a bus puts on each line (LINES, BUSES), and limits in MW."""

    places: torch.Tensor
    factors: torch.Tensor
    capacity: torch.Tensor
    rating: torch.Tensor

    def constraints(self, load) -> dict[str, torch.Tensor]:
        """Return the constraints on the generation, as operands of `solve_qp`."""
        flow, through = self.factors @ self.places, load @ self.factors.mT
        return {
            "A": torch.ones(1, GENERATORS, dtype=torch.float64),
            "b": load.sum(-1, keepdim=True),
            "G": torch.cat([flow, -flow]),
            "h": torch.cat([self.rating + through, self.rating - through], dim=-1),
            "lb": torch.zeros(GENERATORS, dtype=torch.float64),
            "ub": self.capacity,
        }

    def violations(self, generation, load):
        """Compute by how much each constraint is violated, in MW: (batch, constraints)."""
        of = self.constraints(load)
        parts = (
            torch.abs(generation @ of["A"].mT - of["b"]),
            generation @ of["G"].mT - of["h"],
            of["lb"] - generation,
            generation - of["ub"],
        )
        return torch.relu(torch.cat(parts, dim=-1))

    def balance(self, generation, load):
        """Return the nearest generation that equals the load."""
        return generation + (load.sum(-1, keepdim=True) - generation.sum(-1, keepdim=True)) / GENERATORS

    def project(self, generation, load):
        """Return the nearest generation that the grid allows."""
        eye = torch.eye(GENERATORS, dtype=torch.float64)
        return qpdiff.torch.solve_qp(eye, -generation, **self.constraints(load)).x


class Cases(NamedTuple):
    """Loads (cases, BUSES), signals (cases, SIGNALS) and the operator's dispatch (cases, GENERATORS), in MW."""

    load: torch.Tensor
    signals: torch.Tensor
    dispatch: torch.Tensor


def make_grid(rng: np.random.Generator) -> Grid:
    """Make a ring of buses with random chords; power divides among lines by their reactances (DC power flow)."""
    ring = [(bus, (bus + 1) % BUSES) for bus in range(BUSES)]
    apart = [(a, b) for a in range(BUSES) for b in range(a + 2, BUSES) if (a, b) != (0, BUSES - 1)]
    chords = [apart[i] for i in rng.permutation(len(apart))[: LINES - BUSES]]
    incidence = np.zeros((LINES, BUSES))
    for line, (a, b) in enumerate(ring + chords):
        incidence[line, [a, b]] = 1, -1
    weighted = incidence / rng.uniform(0.5, 1.5, size=(LINES, 1))
    factors = weighted @ np.linalg.pinv(incidence.T @ weighted)
    places = np.eye(BUSES)[:, rng.permutation(BUSES)[:GENERATORS]]
    total = BUSES * MEAN_LOAD
    capacity = rng.uniform(0.25, 0.45, size=GENERATORS) * total
    loads = np.full(BUSES, MEAN_LOAD)
    rating = np.abs(factors @ (places @ (total * capacity / capacity.sum()) - loads)) + 0.5 * MEAN_LOAD
    return Grid(*map(torch.from_numpy, (places, factors, capacity, rating)))


class Operator:
    """Dispatch at least cost ½ gᵀ diag(a) g + cᵀg, where c depends on the signals through a hidden network."""

    def __init__(self, rng: np.random.Generator, grid: Grid):
        self.grid = grid
        self.inner, self.outer = rng.normal(size=(SIGNALS, 16)), rng.normal(size=(16, GENERATORS))
        self.slopes = torch.from_numpy(rng.uniform(0.2, 0.6, size=GENERATORS))

    def cases(self, rng: np.random.Generator, count: int) -> Cases:
        load = torch.from_numpy(MEAN_LOAD * rng.uniform(0.6, 1.4, size=(count, BUSES)))
        signals = rng.normal(size=(count, SIGNALS))
        prices = torch.from_numpy(10 * np.tanh(signals @ self.inner) @ self.outer)
        dispatch = qpdiff.torch.solve_qp(torch.diag(self.slopes), prices, **self.grid.constraints(load)).x
        return Cases(load, torch.from_numpy(signals), dispatch)


# ---- the network and the ways to train it


class Network(nn.Module):
    """Two hidden layers from loads and signals to a dispatch, which nothing holds within the constraints."""

    def __init__(self, width: int = 128):
        super().__init__()
        layers = nn.Linear(BUSES + SIGNALS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        self.layers = nn.Sequential(*layers, nn.Linear(width, GENERATORS)).double()

    def forward(self, load, signals):
        per_generator = BUSES * MEAN_LOAD / GENERATORS
        return per_generator * (1 + self.layers(torch.cat([load / MEAN_LOAD - 1, signals], dim=-1)))


class Way(NamedTuple):
    """What follows the network in training and in use, and the weight of the squared violations."""

    layer: Callable[[Grid, torch.Tensor, torch.Tensor], torch.Tensor]
    penalty: float = 0.0


def unchanged(grid: Grid, generation, load):
    return generation


WAYS = {
    "unconstrained": Way(unchanged),
    "balanced": Way(Grid.balance),
    **{f"penalty {weight:g}": Way(unchanged, weight) for weight in PENALTIES},
    "in the loop": Way(Grid.project),
}


class Quality(NamedTuple):
    """On test cases, in MW: error (root mean square) as answered and projected; largest violation, mean over cases."""

    error: float
    projected_error: float
    violation: float


def assess(network, way: Way, grid: Grid, cases: Cases) -> Quality:
    with torch.no_grad():
        answer = way.layer(grid, network(cases.load, cases.signals), cases.load)
        projected = grid.project(answer, cases.load)
        errors = (float(torch.mean((x - cases.dispatch) ** 2) ** 0.5) for x in (answer, projected))
        return Quality(*errors, float(grid.violations(answer, cases.load).max(1).values.mean()))


def train(way: Way, grid: Grid, cases: Cases, test: Cases, epochs: int, seed: int, step) -> list[Quality]:
    """Train by Adam, its learning rate falling to 0 along half a cosine; return the quality after each epoch."""
    torch.manual_seed(seed)
    network, out = Network(), []
    adam = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, epochs)
    for _ in range(epochs):
        for part in torch.randperm(len(cases.load)).split(BATCH):
            load, signals, dispatch = (array[part] for array in cases)
            answer = way.layer(grid, network(load, signals), load)
            loss = torch.mean((answer - dispatch) ** 2)
            if way.penalty:
                loss = loss + way.penalty * torch.sum(grid.violations(answer, load) ** 2) / dispatch.numel()
            adam.zero_grad()
            loss.backward()
            adam.step()
        schedule.step()
        out.append(assess(network, way, grid, test))
        step()
    return out


# ---- the report


def plot(results: dict[str, list[list[Quality]]], path: str) -> None:
    """Draw error against violation, with arrows to the projected answers, and error by epoch. A mark a seed."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for k, (name, runs) in enumerate(results.items()):
        for i, run in enumerate(runs):
            last, label = run[-1], name if i == 0 else None
            axes[0].scatter(last.violation, last.error, color=f"C{k}", s=25, label=label)
            ends = {"xy": (0, last.projected_error), "xytext": (last.violation, last.error)}
            if name != "in the loop":
                axes[0].annotate("", **ends, arrowprops={"arrowstyle": "->", "color": f"C{k}", "alpha": 0.4})
            axes[1].semilogy([quality.projected_error for quality in run], color=f"C{k}", linewidth=1.2, label=label)
    axes[0].set(
        xlabel="largest violation of a case, mean over cases [MW]",
        ylabel="root mean squared error [MW]",
        title="Test cases; arrows: projected afterwards",
        xlim=(-0.3, None),
        ylim=(0, None),
    )
    axes[1].set(xlabel="epoch", ylabel="root mean squared error [MW]", title="Projected answers to test cases")
    axes[1].locator_params(axis="x", integer=True)
    for ticks in (axes[1].yaxis.set_major_formatter, axes[1].yaxis.set_minor_formatter):
        ticks("{x:g}")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(results))
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None) -> int:
    """Train a network in every way for each seed, report, plot, and fail if projecting in the loop is not the best."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--train", type=int, default=1000, help="training cases")
    parser.add_argument("--test", type=int, default=500, help="test cases")
    parser.add_argument("--output", default="projection.png", help="the plot")
    parser.add_argument("--quick", action="store_true", help="one seed and few epochs, to test that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.epochs, options.train, options.test = options.seeds[:1], 5, 300, 200

    results: dict[str, list[list[Quality]]] = {name: [] for name in WAYS}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        for seed in options.seeds:
            rng = np.random.default_rng(seed)
            grid = make_grid(rng)
            operator = Operator(rng, grid)
            cases, test = operator.cases(rng, options.train), operator.cases(rng, options.test)
            task = progress.add_task(f"seed {seed}", total=options.epochs * len(WAYS))
            for name, way in WAYS.items():
                step = partial(progress.advance, task)
                results[name].append(train(way, grid, cases, test, options.epochs, seed, step))
    print("test cases, mean over the seeds and the range: error [MW], violation [MW], error projected afterwards [MW]")
    for name, runs in results.items():
        final = np.array([run[-1] for run in runs])
        print(f"{name:15}", *(f"{v.mean():10.3g} ({v.min():.3g} to {v.max():.3g})" for v in final[:, [0, 2, 1]].T))
    plot(results, options.output)
    print(f"plot: {options.output}")
    best = {name: np.mean([run[-1].projected_error for run in runs]) for name, runs in results.items()}
    if min(best, key=best.get) != "in the loop" and not options.quick:
        print("projecting in the loop is not the best", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
