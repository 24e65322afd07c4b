"""Handwritten digits: a classifier with an OptNet layer before its softmax, and without (section 4.3, appendix A).

The paper's networks for MNIST, FC600-FC10-softmax and FC600-FC10-OptNet10-softmax, on the 1797 digits of 8 × 8 pixels
that scikit-learn brings along, and one more with a fully connected layer where the other has the OptNet layer. As in
the paper, the point is that the layer trains inside an ordinary network, not that it is needed there.

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
from sklearn.datasets import load_digits
from torch import nn

import qpdiff.torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HIDDEN, CLASSES = 600, 10
TEST = 360
"""Images of each seed's test set, a fifth of all."""


class Images(NamedTuple):
    """Images as rows of 64 pixels in [0, 1], and their digits."""

    pixels: torch.Tensor
    digits: torch.Tensor


def make_data(seed: int) -> tuple[Images, Images]:
    """Load training and test images."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    pixels, digits = torch.tensor(data.data[order] / 16, dtype=torch.float32), torch.tensor(data.target[order])
    return Images(pixels[TEST:], digits[TEST:]), Images(pixels[:TEST], digits[:TEST])


def last_layers(name: str) -> list[nn.Module]:
    """Make the layers between the features and the softmax."""
    if name == "OptNet":
        # The features are the linear term of the QP, whose other operands are learned. A problem that is not solved
        # is left out of the gradient.
        return [qpdiff.torch.OptNet(CLASSES, CLASSES)]
    if name == "fully connected":
        return [nn.ReLU(), nn.Linear(CLASSES, CLASSES)]
    return []


NETWORKS = ("OptNet", "fully connected", "neither")


def make_network(name: str, pixels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(pixels, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES), *last_layers(name))


def share_wrong(network: nn.Module, images: Images) -> float:
    with torch.no_grad():
        return float((network(images.pixels).argmax(-1) != images.digits).double().mean())


class History(NamedTuple):
    """Shares of wrongly classified images per epoch, epoch 0 before any training."""

    train: list[float]
    test: list[float]


def train(network: nn.Module, train_images: Images, test_images: Images, *, epochs: int, batch: int, step) -> History:
    """Train by Adam on the cross entropy, its learning rate falling to zero along half a cosine."""
    count = len(train_images.digits)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (count // batch))
    history = History([], [])
    for epoch in range(epochs + 1):
        if epoch:
            for part in torch.randperm(count)[: count // batch * batch].split(batch):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(network(train_images.pixels[part]), train_images.digits[part])
                loss.backward()
                optimizer.step()
                schedule.step()
                step()
        history.train.append(share_wrong(network, train_images))
        history.test.append(share_wrong(network, test_images))
    return history


def plot(histories: dict[str, list[History]], path: str) -> None:
    """Draw errors by epoch; a thin line a seed, a thick one for their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for model, (name, runs) in enumerate(histories.items()):
        for axis, kind in zip(axes, ("train", "test"), strict=True):
            errors = 100 * np.array([getattr(run, kind) for run in runs])
            axis.plot(errors.T, color=f"C{model}", linewidth=0.5, alpha=0.5)
            axis.plot(errors.mean(axis=0), color=f"C{model}", linewidth=1.8, label=name)
    axes[0].set(xlabel="epoch", ylabel="wrongly classified images [%]", title="Training set", yscale="symlog")
    axes[1].set(xlabel="epoch", title="Test set")
    axes[0].set_ylim(0, 100)
    axes[1].legend()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Train the networks for each seed, report, plot, and fail if the one with OptNet has not learned the digits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--output", default="classification.png", help="the plot")
    parser.add_argument("--quick", action="store_true", help="one seed and three epochs, to test that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.epochs = options.seeds[:1], 3

    histories: dict[str, list[History]] = {name: [] for name in NETWORKS}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for seed in options.seeds:
        train_images, test_images = make_data(seed)
        for name in NETWORKS:
            torch.manual_seed(seed)
            network = make_network(name, train_images.pixels.shape[1])
            total = options.epochs * (len(train_images.digits) // options.batch)
            with Progress(*columns) as progress:
                task = progress.add_task(f"{name}, seed {seed}", total=total)
                history = train(
                    network,
                    train_images,
                    test_images,
                    epochs=options.epochs,
                    batch=options.batch,
                    step=lambda progress=progress, task=task: progress.advance(task),
                )
            histories[name].append(history)
    print(f"wrongly classified images, mean and standard deviation over {len(options.seeds)} seeds")
    for name, runs in histories.items():
        ends = {kind: 100 * np.array([getattr(run, kind)[-1] for run in runs]) for kind in History._fields}
        print(f"{name:>16}: " + ", ".join(f"{e.mean():.2f}% ± {e.std():.2f} ({kind})" for kind, e in ends.items()))
    plot(histories, options.output)
    print(f"plot: {options.output}")
    worst = max(run.test[-1] for run in histories["OptNet"])
    if worst > 0.1 and not options.quick:
        print(f"the network with OptNet still calls {100 * worst:.0f}% of test images wrongly", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
