"""Mini-Sudoku through torch: the boards of sudoku.py, `qpdiff.torch.OptNet` as the only layer, torch's optimiser.

The layer's quadratic program is that of sudoku.py. Its cost stays 0.05 xᵀx − puzzleᵀx here, A and b are learned.
"""

from __future__ import annotations

import sys
import time
from functools import partial

import matplotlib
import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sudoku import Boards, Sudoku, compare, make_data, make_parser, parse, share_wrong
from torch import nn

import qpdiff.torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def make_layer(game: Sudoku, seed: int) -> qpdiff.torch.OptNet:
    """Make the layer from a negated puzzle to the board: x ≥ 0, and as many learned equalities as true rules."""
    torch.manual_seed(seed)
    equalities = int(np.linalg.matrix_rank(game.rules()))
    layer = qpdiff.torch.OptNet(
        game.variables, p=equalities, nonnegative=True, eps=1e-4, dtype=torch.float64, unsolved="zero"
    )
    layer.L.requires_grad_(False).copy_((0.1 - layer.eps) ** 0.5 * torch.eye(game.variables))
    return layer


def train(layer, game: Sudoku, boards: Boards, test: Boards, epochs: int, batch: int, step) -> list[float]:
    """Train by Adam, its learning rate falling to 0 along half a cosine; return wrong test boards by epoch."""
    puzzles, solutions = map(torch.from_numpy, boards)
    learned = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    adam = torch.optim.Adam(learned, lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, epochs * -(-len(puzzles) // batch))
    out, norms, bound = [], [], float("inf")
    for _ in range(epochs):
        for part in torch.randperm(len(puzzles)).split(batch):
            loss = nn.functional.mse_loss(layer(-puzzles[part]), solutions[part])
            adam.zero_grad()
            loss.backward()
            # Where a board's active constraints are nearly dependent its gradient is huge.
            norms.append(float(nn.utils.clip_grad_norm_(learned, bound)))
            bound = 3 * float(np.median(norms[-50:]))
            adam.step()
            schedule.step()
            step()
        with torch.no_grad():
            out.append(share_wrong(game, layer(-torch.from_numpy(test.puzzles)).numpy(), test))
    return out


def main(arguments: list[str] | None = None) -> int:
    """Train the layer for each seed, report, plot, and fail if it has not learned the rules."""
    options = parse(make_parser(__doc__, "sudoku_torch.png"), arguments)
    game = Sudoku(2)
    figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    missed = []
    for seed in options.seeds:
        boards, test = make_data(seed, game, options.train, options.test)
        layer = make_layer(game, seed)
        with Progress(*columns) as progress:
            task = progress.add_task(f"seed {seed}", total=options.epochs * -(-options.train // options.batch))
            start = time.perf_counter()
            wrong = train(layer, game, boards, test, options.epochs, options.batch, partial(progress.advance, task))
        with torch.no_grad():
            A = layer.A
            rules = compare(game, A.numpy(), (A @ nn.functional.softplus(layer.z0)).numpy())
        print(
            f"seed {seed}: {time.perf_counter() - start:.1f} s, {100 * wrong[-1]:.1f}% of {options.test} test boards "
            f"wrong; true rules {rules.distance.mean():.3f} (at most {rules.distance.max():.3f}) of their length away"
        )
        axis.plot(range(1, len(wrong) + 1), [100 * share for share in wrong], label=f"seed {seed}")
        if wrong[-1] > 0:
            missed.append(seed)
    axis.set(xlabel="epoch", ylabel="wrongly solved test boards [%]", ylim=(-3, 103))
    axis.legend()
    figure.savefig(options.output, dpi=100)
    print(f"plot: {options.output}")
    if missed and not options.quick:
        print(f"test boards are still solved wrongly for seeds {missed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
