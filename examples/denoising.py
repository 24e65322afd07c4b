"""Signal denoising: total variation, and a layer that learns its difference operator (section 4.2 of the paper).

Total variation denoising of a signal y is the convex problem

    minimise  ½‖z − y‖² + λ‖D z‖₁,    D z the differences of neighbours.

The layer solves it for a D that is learned from pairs of noisy and clean signals: from random numbers, from the
differences, and from the differences together with a linear map y ↦ W y + c in front. The paper's signals are piecewise
constant, of length 100 in 1 to 9 pieces of height 10 to 99, with noise of standard deviation 10.

The paper writes the problem as a QP in z and t with |D z| ≤ t, of 199 variables and 198 inequalities. Here its dual is
solved, which has the same solution and is several times as fast: 99 variables and nothing but bounds,

    minimise  ½‖Dᵀu‖² − (D y)ᵀu   subject to  −λ ≤ u ≤ λ;    z = y − Dᵀu.

B. Amos, J. Z. Kolter, "OptNet: differentiable optimization as a layer in neural networks", ICML 2017.
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import qpdiff.torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LENGTH, NOISE = 100, 10.0
TV = "total variation"


class Signals(NamedTuple):
    """Noisy and clean signals, (signals, LENGTH)."""

    noisy: torch.Tensor
    clean: torch.Tensor

    def select(self, index) -> Signals:
        return Signals(self.noisy[index], self.clean[index])


def make_signals(rng: np.random.Generator, count: int) -> Signals:
    clean = np.empty((count, LENGTH))
    for signal in clean:
        pieces = rng.integers(1, 10)
        breaks = np.sort(rng.choice(LENGTH - 2, pieces - 1, replace=False) + 1)
        signal[:] = np.repeat(rng.integers(10, 100, pieces), np.diff(breaks, prepend=0, append=LENGTH))
    return Signals(*map(torch.from_numpy, (clean + rng.normal(0, NOISE, clean.shape), clean)))


# ---- the models: z for each noisy signal


class TotalVariation(nn.Module):
    """min ½‖z − y‖² + λ‖D z‖₁; what of it is learned depends on who trains it."""

    def __init__(self, D: torch.Tensor, penalty: float):
        super().__init__()
        self.D, self.penalty = nn.Parameter(D), penalty

    def forward(self, y):
        D, bound = self.D, torch.full((len(self.D),), self.penalty, dtype=y.dtype)
        u = qpdiff.torch.solve_qp(D @ D.mT, -y @ D.mT, lb=-bound, ub=bound).x
        return y - u @ D


class AffineTotalVariation(TotalVariation):
    """The same of W y + c, which start as y."""

    def __init__(self, D: torch.Tensor, penalty: float):
        super().__init__(D, penalty)
        self.W, self.c = (
            nn.Parameter(torch.eye(LENGTH, dtype=D.dtype)),
            nn.Parameter(torch.zeros(LENGTH, dtype=D.dtype)),
        )

    def forward(self, y):
        return super().forward(y @ self.W.mT + self.c)


class FullyConnected(nn.Sequential):
    """One hidden layer of ReLU units, on signals shifted and scaled to numbers of size one."""

    def __init__(self, width: int):
        layers = nn.Linear(LENGTH, width), nn.ReLU(), nn.Linear(width, LENGTH)
        super().__init__(*(layer.double() for layer in layers))

    def forward(self, y):
        return 55 + 30 * super().forward((y - 55) / 30)


def differences() -> torch.Tensor:
    """Return the operator of total variation, rows e_i − e_(i+1)."""
    eye = torch.eye(LENGTH, dtype=torch.float64)
    return eye[:-1] - eye[1:]


def make_models(penalty: float, width: int) -> dict[str, nn.Module]:
    """Make the models that are compared, untrained."""
    random = 0.3 * torch.randn(LENGTH - 1, LENGTH, dtype=torch.float64)
    return {
        "fully connected": FullyConnected(width),
        "D learned from scratch": TotalVariation(random, penalty),
        TV: TotalVariation(differences(), penalty),
        "D learned from TV": TotalVariation(differences(), penalty),
        "D, W, c learned from TV": AffineTotalVariation(differences(), penalty),
    }


def mean_squared_error(model: nn.Module, signals: Signals) -> float:
    with torch.no_grad():
        return float((model(signals.noisy) - signals.clean).square().mean())


def best_penalty(signals: Signals, penalties) -> float:
    """Find the λ with which plain total variation has the least error."""
    return min(penalties, key=lambda penalty: mean_squared_error(TotalVariation(differences(), penalty), signals))


# ---- training


class History(NamedTuple):
    """Mean squared errors per epoch, epoch 0 before any training."""

    train: list[float]
    test: list[float]


def train(model, signals: Signals, test: Signals, *, epochs: int, batch: int, rate: float, step) -> History:
    """Train by Adam on the mean squared error, its learning rate falling to zero along half a cosine.

    The training error is that of as many signals as there are test signals.
    """
    count, measured = len(signals.noisy), signals.select(slice(len(test.noisy)))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (count // batch))
    history = History([mean_squared_error(model, measured)], [mean_squared_error(model, test)])
    for _ in range(epochs):
        for part in torch.randperm(count)[: count // batch * batch].split(batch):
            noisy, clean = signals.select(part)
            optimizer.zero_grad()
            (model(noisy) - clean).square().mean().backward()
            optimizer.step()
            schedule.step()
            step()
        history.train.append(mean_squared_error(model, measured))
        history.test.append(mean_squared_error(model, test))
    return history


# ---- the report


def plot(histories: dict[str, History], models: dict[str, nn.Module], test: Signals, path: str) -> None:
    """Draw test errors while training, and three signals denoised by total variation and the best learned layer."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    colors = {name: f"C{k}" for k, name in enumerate(histories)}
    for name, history in histories.items():
        if len(history.test) == 1:
            axes[0, 0].axhline(history.test[0], color=colors[name], linewidth=1, label=name)
        else:
            axes[0, 0].semilogy(np.linspace(0, 1, len(history.test)), history.test, color=colors[name], label=name)
    axes[0, 0].set(xlabel="share of the training", ylabel="mean squared error (test)", title="Learning")
    axes[0, 0].legend()
    learned = min((name for name in histories if name != TV), key=lambda name: histories[name].test[-1])
    for number, (axis, noisy, clean) in enumerate(zip(axes.flat[1:], *test.select(slice(3)), strict=True), 1):
        axis.plot(noisy, ".", color="0.7", label="noisy")
        axis.plot(clean, color="black", linewidth=1, label="clean")
        with torch.no_grad():
            for name in (TV, learned):
                axis.plot(models[name](noisy), color=colors[name], linewidth=1.2, label=name)
        axis.set(xlabel="position", ylabel="signal", title=f"Test signal {number}")
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower right", ncols=4)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Train all models, report, plot, and fail unless learning from total variation has improved on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=9000, help="training signals")
    parser.add_argument("--test", type=int, default=1000, help="test signals")
    parser.add_argument("--epochs", type=int, default=10, help="of the layers; the network gets four times as many")
    parser.add_argument("--batch", type=int, default=150)
    parser.add_argument("--width", type=int, default=500, help="hidden units of the network")
    parser.add_argument("--output", default="denoising.png", help="the plot")
    parser.add_argument("--quick", action="store_true", help="two epochs on few signals, to test that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.train, options.test, options.epochs, options.batch = 300, 50, 2, 50

    rng = np.random.default_rng(options.seed)
    signals, test = make_signals(rng, options.train), make_signals(rng, options.test)
    penalty = best_penalty(signals.select(slice(500)), np.arange(1.0, 31.0))
    print(f"{TV} is best with λ = {penalty:g}")
    torch.manual_seed(options.seed)
    models = make_models(penalty, options.width)

    histories = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        for name, model in models.items():
            torch.manual_seed(options.seed)
            epochs = {TV: 0, "fully connected": 4 * options.epochs}.get(name, options.epochs)
            task = progress.add_task(name, total=epochs * (options.train // options.batch))
            histories[name] = train(
                model,
                signals,
                test,
                epochs=epochs,
                batch=options.batch,
                rate=1e-2 if name == "D learned from scratch" else 1e-3,
                step=lambda task=task: progress.advance(task),
            )
            ends = f"{histories[name].train[-1]:.2f} (train), {histories[name].test[-1]:.2f} (test)"
            progress.console.print(f"{name}: mean squared error {ends}")
    plot(histories, models, test, options.output)
    print(f"plot: {options.output}")
    tuned = min(histories[name].test[-1] for name in ("D learned from TV", "D, W, c learned from TV"))
    print(f"learning from total variation changes its test error by {100 * (tuned / histories[TV].test[0] - 1):.1f}%")
    if tuned >= histories[TV].test[0] and not options.quick:
        print("learning from total variation has not improved on it", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
