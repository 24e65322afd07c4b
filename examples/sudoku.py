"""OptNet's mini-Sudoku: a layer that learns the rules of 4 × 4 Sudoku from solved examples (section 4.4 of the paper).

The layer is one quadratic program, minimise 0.05 xᵀx − puzzleᵀx over A x = b, x ≥ 0, and learns A and b. A fully
connected network is trained beside it: it learns the training boards by heart and fails on boards of other grids.
At the end the learned A is laid beside the true rules, which are equalities too. `--box 3` is 9 × 9 Sudoku.

B. Amos, J. Z. Kolter, "OptNet: differentiable optimization as a layer in neural networks", ICML 2017.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import autograd.numpy as anp
import matplotlib
import numpy as np
import scipy.sparse as sp
from autograd import value_and_grad
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import qpdiff
import qpdiff.autograd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# ---- the game


class Sudoku:
    """The rules for boxes of box × box cells, which leave box² digits; a board is digits by cell, −1 where blank."""

    def __init__(self, box: int):
        self.box, self.digits, self.cells = box, box**2, box**4
        self.variables = self.cells * self.digits
        cells = np.arange(self.cells).reshape(box, box, box, box)
        units = [np.moveaxis(cells, axes, (0, 1)).reshape(-1, self.digits) for axes in ((0, 1), (2, 3), (0, 2))]
        self.units = np.concatenate(units)
        """The cells of each row, column and box, (3 box², box²)."""
        alike = (self.units[:, :, None] == np.arange(self.cells)).any(1)
        self.peers = [np.flatnonzero(alike[alike[:, cell]].any(0)) for cell in range(self.cells)]

    def digits_of(self, boards: np.ndarray) -> np.ndarray:
        """Return the digits of one-hot boards, or of answers that are only nearly so: (boards, cells)."""
        return boards.reshape(-1, self.cells, self.digits).argmax(-1)

    def rules(self) -> np.ndarray:
        """Return R of the rules R x = 1 of one-hot boards: every digit once in a unit, then one digit in every cell."""
        eye = np.eye(self.variables).reshape(self.cells, self.digits, self.variables)
        return np.concatenate([eye[self.units].sum(1).reshape(-1, self.variables), eye.sum(1)])

    def completions(self, board, rng: np.random.Generator | None = None) -> Iterator[np.ndarray]:
        """Yield all solutions, by trying the digits that are left, in order or shuffled, where the fewest are left."""
        board = np.array(board)
        left = np.ones((self.cells, self.digits), dtype=bool)
        for cell in np.flatnonzero(board >= 0):
            left[self.peers[cell], board[cell]] = False
        yield from self._completions(board, left, rng)

    def _completions(self, board, left, rng):
        blank = np.flatnonzero(board < 0)
        if not len(blank):
            yield board
            return
        cell = blank[left[blank].sum(-1).argmin()]
        digits = np.flatnonzero(left[cell])
        for digit in digits if rng is None else rng.permutation(digits):
            after, fewer = board.copy(), left.copy()
            after[cell] = digit
            fewer[self.peers[cell], digit] = False
            yield from self._completions(after, fewer, rng)


class Boards(NamedTuple):
    """Puzzles and their solutions, one-hot, (boards, variables); a blank cell of a puzzle is all zeros."""

    puzzles: np.ndarray
    solutions: np.ndarray


def make_boards(rng: np.random.Generator, game: Sudoku, grids: np.ndarray, blanks: range, count: int) -> Boards:
    """Make distinct puzzles with one solution: cells of a grid are blanked in random order while it stays one."""
    puzzles = {}
    while len(puzzles) < count:
        grid = grids[rng.integers(len(grids))]
        puzzle = grid.copy()
        for cell in rng.permutation(game.cells)[: rng.integers(blanks.start, blanks.stop)]:
            puzzle[cell] = -1
            if len(list(itertools.islice(game.completions(puzzle), 2))) > 1:
                puzzle[cell] = grid[cell]
        puzzles[(*grid, *puzzle)] = grid, puzzle
    grids, boards = (np.array(part)[:, :, None] for part in zip(*puzzles.values(), strict=True))
    return Boards(*(np.reshape(part == np.arange(game.digits), (count, -1)).astype(float) for part in (boards, grids)))


def make_data(seed: int, game: Sudoku, train: int, test: int) -> tuple[Boards, Boards]:
    """Make training and test boards from disjoint sets of solved grids: of all there are, or one for each board.

    The 9 × 9 boards to learn from have few blanks: each teaches more of the rules, of which there are many.
    """
    rng = np.random.default_rng(seed)
    blank = -np.ones(game.cells, dtype=int)
    if game.box == 2:
        few = many = range(6, 16)
        grids, held_out = np.split(rng.permutation(sorted(map(tuple, game.completions(blank)))), [200])
    else:
        few, many = range(1, 10), range(30, 50)
        grids, held_out = (
            np.array([next(game.completions(blank, rng)) for _ in range(count)]) for count in (train, test)
        )
    return make_boards(rng, game, grids, few, train), make_boards(rng, game, held_out, many, test)


# ---- the two models: parameters, answers, and the loss with its gradient


def fixed_operands(game: Sudoku) -> dict[str, np.ndarray]:
    """Return the operands of the program beside a puzzle and equalities."""
    return {"Q": 0.1 * np.eye(game.variables), "lb": np.zeros(game.variables)}


class OptNet:
    """The quadratic program with learned equalities A x = A exp(w), always feasible at x = exp(w) > 0.

    At first that is any digit in any cell, a little.
    """

    def __init__(self, rng: np.random.Generator, game: Sudoku, backend: str):
        self.backend, self.learning_rate = backend, {2: 0.1, 3: 0.01}[game.box]
        equalities = np.linalg.matrix_rank(game.rules())
        w = np.full(game.variables, -np.log(game.digits))
        self.parameters = [rng.uniform(size=(equalities, game.variables)), w]
        self.fixed = fixed_operands(game)

    def constraints(self) -> tuple[np.ndarray, np.ndarray]:
        """Return A and b."""
        A, w = self.parameters
        return A, A @ np.exp(w)

    def answers(self, puzzles):
        A, b = self.constraints()
        return to_numpy(qpdiff.solve_qp(**self.fixed, q=-puzzles, A=A, b=b, backend=self.backend).x)

    def loss_and_gradient(self, boards: Boards):
        if self.backend == "numpy":
            return value_and_grad(self._loss)(self.parameters, boards)
        return self._by_hand(boards)

    def _loss(self, parameters, boards: Boards):
        A, w = parameters
        b = anp.dot(A, anp.exp(w))
        x = qpdiff.autograd.solve_qp(**self.fixed, q=-boards.puzzles, A=A, b=b, unsolved="zero").x
        return anp.mean((x - boards.solutions) ** 2)

    def _by_hand(self, boards: Boards):
        """Do the same without autograd: solve_qp and vjp on the other library's arrays, then the chain rule."""
        A, w = self.parameters
        _, b = self.constraints()
        sol = qpdiff.solve_qp(**self.fixed, q=-boards.puzzles, A=A, b=b, backend=self.backend)
        error = to_numpy(sol.x) - boards.solutions
        grads = qpdiff.vjp(sol, x=2 * error / error.size, unsolved="zero")
        gA, gb = to_numpy(grads.A), to_numpy(grads.b)
        return np.mean(error**2), [gA + np.outer(gb, np.exp(w)), (A.T @ gb) * np.exp(w)]


class FullyConnected:
    """Two hidden layers of ReLU units."""

    learning_rate = 3e-3

    def __init__(self, rng: np.random.Generator, game: Sudoku, width: int = 512):
        sizes = [game.variables, width, width, game.variables]
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
    """Move an array of any library to the host."""
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


def train(
    model, game: Sudoku, train_boards: Boards, test_boards: Boards, *, epochs: int, batch: int, seed: int, step
) -> History:
    """Train by Adam on the mean squared error, its learning rate falling to zero along half a cosine.

    The training error is that of the first hundred training boards.
    """
    rng = np.random.default_rng(seed)
    adam = Adam(model.parameters)
    history = History([], [], [], [])
    norms = []
    measured = Boards(*(array[:100] for array in train_boards))
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
            (measured, history.train_loss, history.train_wrong),
            (test_boards, history.test_loss, history.test_wrong),
        ):
            answers = model.answers(boards.puzzles)
            losses.append(float(np.mean((answers - boards.solutions) ** 2)))
            wrong.append(share_wrong(game, answers, boards))
    return history


# ---- what was learned


def wrong_cells(game: Sudoku, answers: np.ndarray, boards: Boards) -> np.ndarray:
    """Return which cells are answered wrongly, (boards, cells)."""
    return game.digits_of(answers) != game.digits_of(boards.solutions)


def share_wrong(game: Sudoku, answers: np.ndarray, boards: Boards) -> float:
    """Return the share of boards with at least one wrong cell."""
    return float(np.mean(wrong_cells(game, answers, boards).any(-1)))


class Rules(NamedTuple):
    """The true rules R x = 1 as far as they follow from A x = b: a rule r is nearest to yᵀA for some y.

    `distance` is that of yᵀA from r, relative to the length of r, and `right` is yᵀb: (rules,) each.
    """

    distance: np.ndarray
    right: np.ndarray


def compare(game: Sudoku, A: np.ndarray, b: np.ndarray) -> Rules:
    R = game.rules()
    y = np.linalg.lstsq(A.T, R.T, rcond=None)[0]
    return Rules(np.linalg.norm(R - y.T @ A, axis=1) / np.linalg.norm(R, axis=1), y.T @ b)


def solve_by_rules(game: Sudoku, boards: Boards) -> float:
    """Return the share of boards that are solved wrongly by the same program with the true rules, which are sparse."""
    R, Q = sp.csr_array(game.rules()), 0.1 * sp.eye_array(game.variables, format="csr")
    sol = qpdiff.solve_qp(**fixed_operands(game) | {"Q": Q}, q=-boards.puzzles, A=R, b=np.ones(R.shape[0]))
    return share_wrong(game, sol.x, boards)


# ---- the report


def plot(histories: dict[str, list[History]], rules: list[tuple[Rules, Rules]], path: str) -> None:
    """Draw loss, wrongly solved boards, and the distance of the true rules from the learned ones; a line a seed."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for model, (name, runs) in enumerate(histories.items()):
        for run, history in enumerate(runs):
            for kind, style in (("train", "--"), ("test", "-")):
                label = f"{name}, {kind}" if run == 0 else None
                options = {"color": f"C{model}", "linestyle": style, "linewidth": 1.2, "label": label}
                axes[0].semilogy(getattr(history, f"{kind}_loss"), **options)
                axes[1].plot([100 * share for share in getattr(history, f"{kind}_wrong")], **options)
    for run, pair in enumerate(rules):
        for part, name, color in zip(pair, ("before training", "learned"), ("gray", "C0"), strict=True):
            axes[2].semilogy(np.sort(part.distance), color=color, linewidth=1.2, label=name if run == 0 else None)
    axes[0].set(xlabel="epoch", ylabel="mean squared error", title="Loss")
    axes[1].set(xlabel="epoch", ylabel="wrongly solved boards [%]", ylim=(-3, 103), title="Error")
    axes[2].set(xlabel="true rule, sorted", ylabel="distance / length", title="True rules from the span of A's rows")
    for axis in axes[:2]:
        axis.locator_params(axis="x", integer=True)
    axes[1].legend()
    axes[2].legend(loc="center")
    figure.savefig(path, dpi=100)


def make_parser(description: str, output: str) -> argparse.ArgumentParser:
    """Make the options of a training, and where its plot goes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--train", type=int, default=1500, help="training boards")
    parser.add_argument("--test", type=int, default=300, help="test boards")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--output", default=output, help="the plot")
    parser.add_argument("--quick", action="store_true", help="two epochs on few boards, to test that it runs")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.epochs, options.train, options.test, options.batch = options.seeds[:1], 2, 200, 50, 50
    return options


def main(arguments: list[str] | None = None) -> int:
    """Train both networks for each seed, report, plot, and fail if OptNet has not learned the rules."""
    parser = make_parser(__doc__, "sudoku.png")
    parser.add_argument("--box", type=int, default=2, choices=[2, 3], help="2: digits 1 to 4, 3: digits 1 to 9")
    parser.add_argument("--backend", default="numpy", choices=["numpy", "cupy"], help="where the layer is solved")
    options = parse(parser, arguments)
    game = Sudoku(options.box)
    histories: dict[str, list[History]] = {"OptNet": [], "fully connected": []}
    rules, missed = [], []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for seed in options.seeds:
        train_boards, test_boards = make_data(seed, game, options.train, options.test)
        least = solve_by_rules(game, test_boards)
        rng = np.random.default_rng(seed)
        layer, network = OptNet(rng, game, options.backend), FullyConnected(rng, game)
        before = compare(game, *layer.constraints())
        for name, model in (("OptNet", layer), ("fully connected", network)):
            with Progress(*columns) as progress:
                task = progress.add_task(
                    f"{name}, seed {seed}", total=options.epochs * (options.train // options.batch)
                )
                start = time.perf_counter()
                history = train(
                    model,
                    game,
                    train_boards,
                    test_boards,
                    epochs=options.epochs,
                    batch=options.batch,
                    seed=seed,
                    step=lambda progress=progress, task=task: progress.advance(task),
                )
            histories[name].append(history)
            cells = np.mean(wrong_cells(game, model.answers(test_boards.puzzles), test_boards))
            print(
                f"{name}, seed {seed}: {time.perf_counter() - start:.1f} s, loss {history.train_loss[-1]:.2e} (train) "
                f"{history.test_loss[-1]:.2e} (test), wrong {100 * history.train_wrong[-1]:.1f}% of training boards, "
                f"{100 * history.test_wrong[-1]:.1f}% of {options.test} test boards, {100 * cells:.1f}% of their cells"
            )
        learned = compare(game, *layer.constraints())
        rules.append((before, learned))
        print(
            f"true rules, seed {seed}: wrong {100 * least:.1f}% of test boards; {learned.distance.mean():.3f} (at most "
            f"{learned.distance.max():.3f}) of their length from the learned ones, before training "
            f"{before.distance.mean():.3f}; right-hand sides {learned.right.min():.3f} to {learned.right.max():.3f}"
        )
        if histories["OptNet"][-1].test_wrong[-1] > least:
            missed.append(seed)
    plot(histories, rules, options.output)
    print(f"plot: {options.output}")
    if missed and not options.quick:
        print(f"OptNet solves more test boards wrongly than the true rules do, for seeds {missed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
