"""The examples run, and the Sudoku boards are what they are said to be."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sudoku():
    for package in ("autograd", "matplotlib", "rich"):
        pytest.importorskip(package)
    return load("sudoku")


@pytest.mark.parametrize("name", ["quickstart", "custom_autodiff"])
def test_runs(name):
    done = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_cluster_loses_a_worker_and_nothing_else():
    for package in ("distributed", "rich"):
        pytest.importorskip(package)
    done = subprocess.run([sys.executable, EXAMPLES / "cluster.py", "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "killed, and with it" in done.stdout
    assert "40000 of 40000 SOLVED" in done.stdout


def test_there_are_288_grids(sudoku):
    grids = sudoku.all_grids()
    assert len(np.unique(grids, axis=0)) == 288
    for unit in (grids.reshape(-1, 4, 4), grids.reshape(-1, 4, 4).swapaxes(1, 2)):
        assert np.all(np.sort(unit, axis=-1) == np.arange(4))


def test_every_puzzle_has_one_solution_and_no_grid_is_in_both_sets(sudoku):
    train, test = sudoku.make_data(0, 300, 100)
    grids = sudoku.all_grids()
    for boards in (train, test):
        puzzles = boards.puzzles.reshape(-1, 16, 4)
        solutions = boards.solutions.reshape(-1, 16, 4).argmax(-1)
        given = puzzles.any(-1)
        fits = ((grids[None] == puzzles.argmax(-1)[:, None]) | ~given[:, None]).all(-1)
        assert np.all(fits.sum(-1) == 1)
        assert np.array_equal(grids[fits.argmax(-1)], solutions)
        assert len(np.unique(boards.puzzles, axis=0)) == len(puzzles)
    assert not {tuple(s) for s in train.solutions} & {tuple(s) for s in test.solutions}


def test_the_layer_knows_its_gradient_two_ways(sudoku):
    boards, _ = sudoku.make_data(1, 10, 1)
    model = sudoku.OptNet(np.random.default_rng(0), "numpy")
    loss, gradient = model.loss_and_gradient(boards)
    other_loss, other_gradient = model._by_hand(boards)
    assert np.isclose(loss, other_loss)
    for one, other in zip(gradient, other_gradient, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)


def test_quick_training_lowers_the_loss(sudoku, tmp_path, capsys, monkeypatch):
    histories = []
    train = sudoku.train
    monkeypatch.setattr(sudoku, "train", lambda *a, **k: histories.append(train(*a, **k)) or histories[-1])
    assert sudoku.main(["--quick", "--seeds", "0", "--output", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    for history in histories:
        assert history.train_loss[-1] < history.train_loss[0]
    assert "OptNet, seed 0" in capsys.readouterr().out
