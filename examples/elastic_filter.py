"""A safety filter that learns its margins, from problems whose constraints contradict each other at first.

A robot at p wants the velocity v. The filter gives it the nearest one, u, that keeps it out of discs with centres c_i,
by a control barrier function (Ames et al.) for each, and within its speed:

    minimise  ½‖u − v‖²  subject to  −2(p − c_i)ᵀu ≤ α(‖p − c_i‖² − r_i²),  −1 ≤ u ≤ 1.

The radii r_i and α are learned from the velocities that a filter with the true ones gives. They begin too large: beside
two discs at once, no u satisfies the constraints. Such a problem has no solution to learn from, and its gradient is
zero; with a price of violating the barriers it has one, and the violation tells which radii to reduce.

A. D. Ames et al., "Control barrier functions: theory and applications", ECC 2019.
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

import matplotlib
import torch
from torch import nn

import qpdiff.torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CENTRES = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.4], [0.0, -1.4]], dtype=torch.float64)
RADII = torch.tensor([0.55, 0.6, 0.5, 0.45], dtype=torch.float64)
RATE = 1.0
PRICE, WEIGHT = 10.0, 0.3
"""The price of violating a barrier, and what the mean violation counts in the loss."""


class Samples(NamedTuple):
    """Positions, wanted velocities, and those of the true filter, (samples, 2)."""

    positions: torch.Tensor
    wanted: torch.Tensor
    target: torch.Tensor


class Filter(nn.Module):
    """The filter with learned radii and rate."""

    def __init__(self, radii: torch.Tensor, rate: float):
        super().__init__()
        self.radii = nn.Parameter(radii.clone())
        self.log_rate = nn.Parameter(torch.tensor(rate, dtype=torch.float64).log())

    def forward(self, positions, wanted, **options):
        """Return the solution for each position and wanted velocity."""
        away = positions[:, None, :] - CENTRES
        h = self.log_rate.exp() * (away.square().sum(-1) - self.radii.square())
        one = torch.ones(2, dtype=torch.float64)
        return qpdiff.torch.solve_qp(
            torch.eye(2, dtype=torch.float64), -wanted, -2 * away, h, lb=-one, ub=one, **options
        )


def make_samples(count: int) -> Samples:
    """Draw positions outside of the discs, between them, and velocities."""
    positions = 2.4 * torch.rand(20 * count, 2, dtype=torch.float64) - 1.2
    outside = ((positions[:, None, :] - CENTRES).norm(dim=-1) > RADII + 0.02).all(-1)
    positions = positions[outside][:count]
    wanted = torch.randn(len(positions), 2, dtype=torch.float64)
    with torch.no_grad():
        return Samples(positions, wanted, Filter(RADII, RATE)(positions, wanted).x)


class History(NamedTuple):
    """For every step: the share of problems without a solution, and the largest error of a radius."""

    infeasible: list[float]
    error: list[float]


def train(model: Filter, samples: Samples, *, steps: int, batch: int, elastic: bool) -> History:
    """Train by Adam on the mean squared error, with prices on the mean violation too."""
    optimizer, history = torch.optim.Adam(model.parameters(), lr=0.02), History([], [])
    for step in range(steps):
        part = [each.roll(-step * batch, 0)[:batch] for each in samples]
        positions, wanted, target = part
        with torch.no_grad():
            status = model(positions, wanted, unsolved="zero").status
        history.infeasible.append(float((status != 0).double().mean()))
        history.error.append(float((model.radii.detach() - RADII).abs().max()))
        if elastic:
            sol = model(positions, wanted, elastic=PRICE)
            loss = (sol.x - target).square().mean() + WEIGHT * sol.violation.G.mean()
        else:
            sol = model(positions, wanted, unsolved="zero")
            solved = (sol.status == 0)[:, None]
            loss = torch.where(solved, (sol.x - target).square(), 0.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return history


def plot(histories: dict[str, History], models: dict[str, Filter], start: torch.Tensor, path: str) -> None:
    """Draw the share of infeasible problems while training, and the discs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, history in histories.items():
        left.plot([100 * share for share in history.infeasible], label=name)
    left.set(xlabel="step", ylabel="problems without a solution (%)", ylim=(-3, 103), title="Learning")
    left.legend()
    learned = next(reversed(models.values())).radii.detach()
    for radii, color, line in ((start, "0.7", "-"), (learned, "tab:orange", "-"), (RADII, "black", ":")):
        for centre, radius in zip(CENTRES, radii, strict=True):
            right.add_patch(plt.Circle(centre.tolist(), float(radius), fill=False, color=color, linestyle=line))
    right.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), aspect="equal", title="Discs: at first, learned, true (dotted)")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Train with and without prices, report, and fail unless the prices have made the problems feasible."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--output", default="elastic_filter.png", help="the plot")
    parser.add_argument("--quick", action="store_true", help="few steps, to test that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.samples, options.steps, options.batch = 200, 40, 50

    torch.manual_seed(options.seed)
    samples, start = make_samples(options.samples), RADII + 1.3
    models, histories = {}, {}
    for name, elastic in (("without prices", False), ("with prices", True)):
        models[name] = model = Filter(start, 2 * RATE)
        histories[name] = history = train(
            model, samples, steps=options.steps, batch=options.batch, elastic=elastic
        )  # fmt: skip
        first, last = history.infeasible[0], history.infeasible[-1]
        print(
            f"{name}: without a solution {100 * first:.0f}% of the problems at first, {100 * last:.0f}% at last; "
            f"largest error of a radius {history.error[0]:.2f} at first, {history.error[-1]:.3f} at last"
        )
    plot(histories, models, start, options.output)
    print(f"plot: {options.output}")
    if histories["with prices"].infeasible[-1] >= histories["with prices"].infeasible[0]:
        print("prices have not made the problems feasible", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
