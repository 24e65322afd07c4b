"""OptNet's mini-Sudoku: a layer that learns the rules of 4 × 4 Sudoku from solved examples (section 4.4 of the paper).

The layer is one quadratic program, minimise 0.05 xᵀx − puzzleᵀx over A x = b, x ≥ 0, and learns A and b. A fully
connected network is trained beside it: it learns the training boards by heart and fails on boards of other grids.

B. Amos, J. Z. Kolter, "OptNet: differentiable optimization as a layer in neural networks", ICML 2017.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from typing import NamedTuple

import autograd.numpy as anp
import matplotlib
import numpy as np
from autograd import value_and_grad
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import qpdiff
import qpdiff.autograd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CELLS, DIGITS = 16, 4
VARIABLES, EQUALITIES = CELLS * DIGITS, 40
Q = 0.1 * np.eye(VARIABLES)
LOWER = np.zeros(VARIABLES)


# ---- the boards


class Boards(NamedTuple):
    """Puzzles and their solutions, one-hot, (boards, 64); a blank cell of a puzzle is all zeros."""

    puzzles: np.ndarray
    solutions: np.ndarray


def all_grids() -> np.ndarray:
    """The 288 solved 4 × 4 grids, (288, 16), digits 0 to 3."""
    grids = []
    for rows in itertools.product(itertools.permutations(range(4)), repeat=4):
        grid = np.array(rows)
        boxes = grid.reshape(2, 2, 2, 2).swapaxes(1, 2).reshape(4, 4)
        if all(len(set(unit)) == 4 for unit in (*grid.T, *boxes)):
            grids.append(grid.ravel())
    return np.array(grids)


def make_boards(rng: np.random.Generator, grids: np.ndarray, every_grid: np.ndarray, count: int) -> Boards:
    """Distinct puzzles with exactly one solution: cells of a grid are blanked in random order while it stays one."""
    puzzles = {}
    while len(puzzles) < count:
        grid = grids[rng.integers(len(grids))]
        given = np.ones(CELLS, dtype=bool)
        for cell in rng.permutation(CELLS)[: rng.integers(6, CELLS)]:
            given[cell] = False
            if np.sum((every_grid[:, given] == grid[given]).all(axis=1)) != 1:
                given[cell] = True
        puzzles[(*grid, *given)] = grid, given
    solved, given = (np.array(part) for part in zip(*puzzles.values(), strict=True))
    solutions = np.eye(DIGITS)[solved]
    return Boards((solutions * given[:, :, None]).reshape(-1, VARIABLES), solutions.reshape(-1, VARIABLES))


def make_data(seed: int, train: int, test: int) -> tuple[Boards, Boards]:
    """Training and test boards from disjoint sets of solved grids."""
    rng = np.random.default_rng(seed)
    grids = rng.permutation(all_grids())
    return make_boards(rng, grids[:200], grids, train), make_boards(rng, grids[200:], grids, test)


def share_wrong(answers: np.ndarray, solutions: np.ndarray) -> float:
    """Share of boards with at least one wrong cell."""
    picked = answers.reshape(-1, CELLS, DIGITS).argmax(-1)
    return float(np.mean((picked != solutions.reshape(-1, CELLS, DIGITS).argmax(-1)).any(-1)))


# ---- the two models: parameters, answers, and the loss with its gradient


class OptNet:
    """The quadratic program with learned equalities A x = A exp(w), always feasible at x = exp(w) > 0."""

    learning_rate = 0.1

    def __init__(self, rng: np.random.Generator, backend: str):
        self.backend = backend
        self.parameters = [rng.uniform(size=(EQUALITIES, VARIABLES)), np.zeros(VARIABLES)]

    def answers(self, puzzles):
        A, w = self.parameters
        return to_numpy(qpdiff.solve_qp(Q, -puzzles, A=A, b=A @ np.exp(w), lb=LOWER, backend=self.backend).x)

    def loss_and_gradient(self, boards: Boards):
        if self.backend == "numpy":
            return value_and_grad(self._loss)(self.parameters, boards)
        return self._by_hand(boards)

    @staticmethod
    def _loss(parameters, boards: Boards):
        A, w = parameters
        b = anp.dot(A, anp.exp(w))
        x = qpdiff.autograd.solve_qp(Q, -boards.puzzles, A=A, b=b, lb=LOWER, unsolved="zero").x
        return anp.mean((x - boards.solutions) ** 2)

    def _by_hand(self, boards: Boards):
        """The same where autograd cannot go: solve_qp and vjp on the other library's arrays, then the chain rule."""
        A, w = self.parameters
        sol = qpdiff.solve_qp(Q, -boards.puzzles, A=A, b=A @ np.exp(w), lb=LOWER, backend=self.backend)
        error = to_numpy(sol.x) - boards.solutions
        grads = qpdiff.vjp(sol, x=2 * error / error.size, unsolved="zero")
        gA, gb = to_numpy(grads.A), to_numpy(grads.b)
        return np.mean(error**2), [gA + np.outer(gb, np.exp(w)), (A.T @ gb) * np.exp(w)]


class FullyConnected:
    """Two hidden layers of ReLU units."""

    learning_rate = 3e-3

    def __init__(self, rng: np.random.Generator, width: int = 512):
        sizes = [VARIABLES, width, width, VARIABLES]
        self.parameters = []
        for a, b in itertools.pairwise(sizes):
            self.parameters += [rng.normal(size=(a, b)) * np.sqrt(2 / a), np.zeros(b)]

    def answers(self, puzzles):
        return self._forward(self.parameters, puzzles)

    def loss_and_gradient(self, boards: Boards):
        return value_and_grad(lambda p: anp.mean((self._forward(p, boards.puzzles) - boards.solutions) ** 2))(
            self.parameters
        )

    @staticmethod
    def _forward(parameters, x):
        for i in range(0, len(parameters) - 2, 2):
            x = anp.maximum(anp.dot(x, parameters[i]) + parameters[i + 1], 0)
        return anp.dot(x, parameters[-2]) + parameters[-1]


def to_numpy(value) -> np.ndarray:
    """An array of any library on the host."""
    return value.get() if hasattr(value, "get") else np.asarray(value)


# ---- training


class Adam:
    """Kingma & Ba, "Adam", ICLR 2015, with the learning rate of each step given by the caller."""

    def __init__(self, parameters):
        self.mean = [np.zeros_like(p) for p in parameters]
        self.square = [np.zeros_like(p) for p in parameters]
        self.steps = 0

    def update(self, parameters, gradients, rate: float):
        self.steps += 1
        out = []
        for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
            self.mean[i] = 0.9 * self.mean[i] + 0.1 * g
            self.square[i] = 0.999 * self.square[i] + 0.001 * g * g
            mean = self.mean[i] / (1 - 0.9**self.steps)
            square = self.square[i] / (1 - 0.999**self.steps)
            out.append(p - rate * mean / (np.sqrt(square) + 1e-8))
        return out


class History(NamedTuple):
    """Per epoch, epoch 0 before any training."""

    train_loss: list[float]
    test_loss: list[float]
    train_wrong: list[float]
    test_wrong: list[float]


def train(model, train_boards: Boards, test_boards: Boards, *, epochs: int, batch: int, seed: int, step) -> History:
    """Adam on the mean squared error, its learning rate falling to zero along half a cosine.

    Training boards are judged by the first hundred of them.
    """
    rng = np.random.default_rng(seed)
    adam = Adam(model.parameters)
    history = History([], [], [], [])
    norms = []
    judged = Boards(*(array[:100] for array in train_boards))
    count = len(train_boards.puzzles)
    total = epochs * (count // batch)
    for epoch in range(epochs + 1):
        if epoch:
            for part in np.array_split(rng.permutation(count), count // batch):
                _, gradients = model.loss_and_gradient(Boards(*(array[part] for array in train_boards)))
                # Where a board's active constraints are nearly dependent its gradient is huge: unclipped, one such
                # step throws the learned rules away.
                norms.append(np.sqrt(sum(np.sum(g * g) for g in gradients)))
                shrink = min(1.0, 3 * np.median(norms[-50:]) / norms[-1])
                gradients = [shrink * g for g in gradients]
                rate = model.learning_rate * 0.5 * (1 + np.cos(np.pi * adam.steps / total))
                model.parameters = adam.update(model.parameters, gradients, rate)
                step()
        for boards, losses, wrong in (
            (judged, history.train_loss, history.train_wrong),
            (test_boards, history.test_loss, history.test_wrong),
        ):
            answers = model.answers(boards.puzzles)
            losses.append(float(np.mean((answers - boards.solutions) ** 2)))
            wrong.append(share_wrong(answers, boards.solutions))
    return history


# ---- the report


def plot(histories: dict[str, list[History]], path: str) -> None:
    """Loss and share of wrongly solved boards by epoch; a thin line a seed."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for model, (name, runs) in enumerate(histories.items()):
        for run, history in enumerate(runs):
            for kind, style in (("train", "--"), ("test", "-")):
                label = f"{name}, {kind}" if run == 0 else None
                options = {"color": f"C{model}", "linestyle": style, "linewidth": 1.2, "label": label}
                axes[0].semilogy(getattr(history, f"{kind}_loss"), **options)
                axes[1].plot([100 * share for share in getattr(history, f"{kind}_wrong")], **options)
    axes[0].set(xlabel="epoch", ylabel="mean squared error", title="Loss")
    axes[1].set(xlabel="epoch", ylabel="wrongly solved boards [%]", ylim=(-3, 103), title="Error")
    axes[1].legend()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Train both networks for each seed, report, plot, and fail if OptNet has not learned the rules."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--train", type=int, default=1500, help="training boards")
    parser.add_argument("--test", type=int, default=300, help="test boards")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--backend", default="numpy", choices=["numpy", "cupy"], help="where the layer is solved")
    parser.add_argument("--output", default="sudoku.png", help="the plot")
    parser.add_argument("--quick", action="store_true", help="two epochs on few boards, to see that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.epochs, options.train, options.test, options.batch = options.seeds[:1], 2, 200, 50, 50

    histories: dict[str, list[History]] = {"OptNet": [], "fully connected": []}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for seed in options.seeds:
        train_boards, test_boards = make_data(seed, options.train, options.test)
        rng = np.random.default_rng(seed)
        for name, model in (("OptNet", OptNet(rng, options.backend)), ("fully connected", FullyConnected(rng))):
            with Progress(*columns) as progress:
                task = progress.add_task(
                    f"{name}, seed {seed}", total=options.epochs * (options.train // options.batch)
                )
                start = time.perf_counter()
                history = train(
                    model,
                    train_boards,
                    test_boards,
                    epochs=options.epochs,
                    batch=options.batch,
                    seed=seed,
                    step=lambda progress=progress, task=task: progress.advance(task),
                )
            histories[name].append(history)
            print(
                f"{name}, seed {seed}: {time.perf_counter() - start:.1f} s, loss {history.train_loss[-1]:.2e} (train) "
                f"{history.test_loss[-1]:.2e} (test), wrong {100 * history.train_wrong[-1]:.1f}% of training "
                f"boards, {100 * history.test_wrong[-1]:.1f}% of {options.test} test boards"
            )
    plot(histories, options.output)
    print(f"plot: {options.output}")
    missed = [seed for seed, run in zip(options.seeds, histories["OptNet"], strict=True) if run.test_wrong[-1] > 0]
    if missed and not options.quick:
        print(f"OptNet still solves test boards wrongly for seeds {missed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
