"""The examples run, and what they are made of is what it is said to be."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from scipy.linalg import solve_discrete_are

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def sudoku():
    for package in ("autograd", "matplotlib", "rich"):
        pytest.importorskip(package)
    return import_module("sudoku")


@pytest.fixture(scope="module")
def example():
    """A function that imports an example that needs torch."""
    for package in ("autograd", "torch", "matplotlib", "rich"):
        pytest.importorskip(package)
    return import_module


@pytest.mark.parametrize("name", ["quickstart", "custom_autodiff"])
def test_runs(name):
    done = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_compiled_network_learns():
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, EXAMPLES / "compile.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, exported = (float(line.split()[-1]) for line in done.stdout.splitlines())
    assert second < first
    assert exported < 1e-6


def test_a_filter_learns_from_infeasible_problems(tmp_path):
    for package in ("torch", "matplotlib"):
        pytest.importorskip(package)
    command = [sys.executable, EXAMPLES / "elastic_filter.py", "--quick", "--output", tmp_path / "plot.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    without, priced = done.stdout.splitlines()[:2]
    assert "100% of the problems at first, 100% at last" in without
    assert "100% of the problems at first, 100% at last" not in priced
    assert (tmp_path / "plot.png").stat().st_size > 10000


def test_a_cluster_loses_a_worker_and_nothing_else():
    for package in ("distributed", "rich"):
        pytest.importorskip(package)
    done = subprocess.run([sys.executable, EXAMPLES / "cluster.py", "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "killed, and with it" in done.stdout
    assert "40000 of 40000 SOLVED" in done.stdout


def test_there_are_288_grids(sudoku):
    grids = np.array(list(sudoku.Sudoku(2).completions([-1] * 16)))
    assert len(np.unique(grids, axis=0)) == 288
    for unit in (grids.reshape(-1, 4, 4), grids.reshape(-1, 4, 4).swapaxes(1, 2)):
        assert np.all(np.sort(unit, axis=-1) == np.arange(4))


def test_every_puzzle_has_one_solution_and_no_grid_is_in_both_sets(sudoku):
    game = sudoku.Sudoku(2)
    train, test = sudoku.make_data(0, game, 300, 100)
    grids = np.array(list(game.completions([-1] * 16)))
    for boards in (train, test):
        puzzles = boards.puzzles.reshape(-1, 16, 4)
        solutions = boards.solutions.reshape(-1, 16, 4).argmax(-1)
        given = puzzles.any(-1)
        fits = ((grids[None] == puzzles.argmax(-1)[:, None]) | ~given[:, None]).all(-1)
        assert np.all(fits.sum(-1) == 1)
        assert np.array_equal(grids[fits.argmax(-1)], solutions)
        assert len(np.unique(boards.puzzles, axis=0)) == len(puzzles)
    assert not {tuple(s) for s in train.solutions} & {tuple(s) for s in test.solutions}


@pytest.mark.parametrize("box", [2, 3])
def test_boards_obey_the_rules_and_the_rules_give_their_blanks(sudoku, box):
    game = sudoku.Sudoku(box)
    train, _ = sudoku.make_data(2, game, 20, 1)
    R = game.rules()
    side = box**2
    assert R.shape == (4 * side**2, side**3)
    assert np.linalg.matrix_rank(R) == {2: 40, 3: 249}[box]
    np.testing.assert_array_equal(train.solutions @ R.T, 1)
    grids = game.digits_of(train.solutions).reshape(-1, side, side)
    boxes = grids.reshape(-1, box, box, box, box).swapaxes(2, 3).reshape(-1, side, side)
    for units in (grids, grids.swapaxes(1, 2), boxes):
        assert np.all(np.sort(units, axis=-1) == np.arange(side))
    given = train.puzzles.reshape(20, side**2, side).any(-1)
    np.testing.assert_array_equal(train.puzzles, train.solutions * np.repeat(given, side, axis=1))
    assert sudoku.solve_by_rules(game, train) <= 0.5
    for puzzle, solution, known in zip(train.puzzles, train.solutions, given, strict=True):
        board = np.where(known, game.digits_of(puzzle)[0], -1)
        (only,) = game.completions(board)
        np.testing.assert_array_equal(only, game.digits_of(solution)[0])


def test_rules_are_recognised_in_combinations_of_them_and_in_nothing_else(sudoku):
    game, rng = sudoku.Sudoku(2), np.random.default_rng(4)
    mix = rng.normal(size=(40, 64))
    same = sudoku.compare(game, mix @ game.rules(), mix @ np.ones(64))
    np.testing.assert_allclose(same.distance, 0, atol=1e-9)
    np.testing.assert_allclose(same.right, 1, atol=1e-9)
    other = sudoku.compare(game, rng.normal(size=(40, 64)), np.ones(40))
    assert other.distance.min() > 0.3
    assert abs(np.mean(other.distance**2) - 24 / 64) < 0.05


def test_the_layer_knows_its_gradient_two_ways(sudoku):
    game = sudoku.Sudoku(2)
    boards, _ = sudoku.make_data(1, game, 10, 1)
    model = sudoku.OptNet(np.random.default_rng(0), game, "numpy")
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


def test_sudoku_through_torch_has_the_same_program(sudoku, example):
    """Torch's layer and this one, given the same A and point that satisfies them, agree."""
    import torch

    game = sudoku.Sudoku(2)
    boards, _ = sudoku.make_data(3, game, 10, 1)
    model = sudoku.OptNet(np.random.default_rng(0), game, "numpy")
    layer = example("sudoku_torch").make_layer(game, 0)
    A, w = model.parameters
    with torch.no_grad():
        layer.A.copy_(torch.from_numpy(A))
        layer.z0.copy_(torch.from_numpy(np.log(np.expm1(np.exp(w)))))
        answers = layer(-torch.from_numpy(boards.puzzles)).numpy()
    np.testing.assert_allclose(answers, model.answers(boards.puzzles), atol=1e-6)


# ---- denoising


@pytest.fixture(scope="module")
def denoising():
    for package in ("torch", "matplotlib", "rich"):
        pytest.importorskip(package)
    return import_module("denoising")


def test_signals_have_one_to_nine_pieces_and_noise_of_deviation_ten(denoising):
    noisy, clean = denoising.make_signals(np.random.default_rng(0), 2000)
    jumps = (clean[:, 1:] != clean[:, :-1]).sum(-1)
    assert set(jumps.tolist()) == set(range(9))
    assert clean.min() == 10
    assert clean.max() == 99
    assert abs((noisy - clean).std() - 10) < 0.1


@pytest.mark.parametrize("penalty", [0.5, 13.0, 100.0])
def test_the_dual_denoises_by_total_variation(denoising, penalty):
    """A z is optimal if y − z = Dᵀu for a u with |u| ≤ λ and uᵀDz = λ‖Dz‖₁; D being differences, u is a running sum."""
    y, _ = denoising.make_signals(np.random.default_rng(1), 50)
    z = denoising.TotalVariation(denoising.differences(), penalty)(y).detach()
    u = (y - z).cumsum(-1)
    Dz = z[:, :-1] - z[:, 1:]
    assert u[:, -1].abs().max() < 1e-8
    assert u.abs().max() < penalty + 1e-6
    assert ((u[:, :-1] * Dz).sum(-1) - penalty * Dz.abs().sum(-1)).abs().max() < 1e-5


def test_the_dual_and_the_slack_form_agree_for_any_operator(denoising):
    import torch

    import qpdiff

    rng = np.random.default_rng(2)
    y, D, penalty = denoising.make_signals(rng, 20)[0].numpy(), 0.3 * rng.normal(size=(99, 100)), 13.0
    eye = np.eye(99)
    Q = np.diag(np.r_[np.ones(100), np.zeros(99)])
    q = np.hstack([-y, np.full((20, 99), penalty)])
    slack = qpdiff.solve_qp(Q, q, np.block([[D, -eye], [-D, -eye]]), np.zeros(198))
    z = denoising.TotalVariation(torch.from_numpy(D), penalty)(torch.from_numpy(y)).detach()
    np.testing.assert_allclose(z, slack.x[:, :100], atol=1e-4)


def test_the_gradient_of_the_learned_operator_is_a_difference_quotient(denoising):
    import torch

    torch.manual_seed(3)
    noisy, clean = denoising.make_signals(np.random.default_rng(3), 10)
    model = denoising.AffineTotalVariation(denoising.differences() + 0.1 * torch.randn(99, 100).double(), 5.0)
    parameters = dict(model.named_parameters())
    directions = {name: torch.randn_like(value) for name, value in parameters.items()}

    def loss(step=0.0):
        moved = {name: value + step * directions[name] for name, value in parameters.items()}
        return (torch.func.functional_call(model, moved, (noisy,)) - clean).square().mean()

    loss().backward()
    slope = sum((value.grad * directions[name]).sum() for name, value in parameters.items())
    with torch.no_grad():
        quotient = (loss(1e-6) - loss(-1e-6)) / 2e-6
    np.testing.assert_allclose(slope, quotient, rtol=1e-4)


def test_quick_denoising_learns(denoising, tmp_path, monkeypatch):
    histories = []
    train = denoising.train
    monkeypatch.setattr(denoising, "train", lambda *a, **k: histories.append(train(*a, **k)) or histories[-1])
    assert denoising.main(["--quick", "--output", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    network, scratch, total_variation, *_ = histories
    assert network.train[-1] < 0.2 * network.train[0]
    assert scratch.train[-1] < scratch.train[0]
    assert total_variation.test[-1] < 0.3 * denoising.NOISE**2


# ---- classification


def test_quick_classification_learns(tmp_path, monkeypatch):
    for package in ("torch", "sklearn", "matplotlib", "rich"):
        pytest.importorskip(package)
    classification = import_module("classification")
    histories = []
    train = classification.train
    monkeypatch.setattr(classification, "train", lambda *a, **k: histories.append(train(*a, **k)) or histories[-1])
    assert classification.main(["--quick", "--output", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert len(histories) == 3
    for history in histories:
        assert history.train[-1] < history.train[0] - 0.2
    train_images, test_images = classification.make_data(0)
    rows = [{tuple(row) for row in images.pixels.tolist()} for images in (train_images, test_images)]
    assert not rows[0] & rows[1]


# ---- layers


@pytest.mark.parametrize("name", ["portfolio", "mpc", "projection", "sudoku_torch"])
def test_quick_run_of_a_layer(example, name, tmp_path):
    assert example(name).main(["--quick", "--output", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_quick_run_of_timing(tmp_path, capsys):
    for package in ("matplotlib", "rich"):
        pytest.importorskip(package)
    assert import_module("timing").main(["--quick", "--output", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert "one by one / batched" in capsys.readouterr().out


def test_no_portfolio_beats_knowing_the_expected_returns(example):
    portfolio = example("portfolio")
    market = portfolio.make_market(3, 8, 200, 100)
    investor = portfolio.Investor(market.covariance, 0.5)
    rng = np.random.default_rng(0)
    best = investor.utility(investor.portfolios(market.test.expected), market.test.expected)
    for shares in rng.dirichlet(np.ones(portfolio.ASSETS) / 5, size=(50, 100)):
        assert investor.utility(market.test.expected.new_tensor(shares), market.test.expected) < best
    W = portfolio.train_on_error(market)
    assert investor.regret(W, market.test) > investor.regret(W, market.test._replace(expected=market.test.features @ W))


def test_training_on_regret_follows_the_slope_of_utility(example):
    portfolio = example("portfolio")
    market = portfolio.make_market(4, 8, 200, 100)
    investor = portfolio.Investor(market.covariance, 0.5)
    start = portfolio.train_on_error(market)

    def utility(W):
        return investor.utility(investor.portfolios(market.train.features @ W), market.train.returns)

    W = start.clone().requires_grad_()
    utility(W).backward()
    direction = start.new_tensor(np.random.default_rng(0).normal(size=start.shape))
    difference = (utility(start + 1e-6 * direction) - utility(start - 1e-6 * direction)) / 2e-6
    assert abs(difference - (W.grad * direction).sum()) < 1e-3 * abs(difference)


def test_a_controller_without_limits_is_the_linear_quadratic_regulator(example, monkeypatch):
    mpc = example("mpc")
    monkeypatch.setattr(mpc, "HORIZON", 60)
    monkeypatch.setattr(mpc, "LIMIT", np.inf)
    *states, torque = mpc.EXPERT
    F, g = mpc.F.numpy(), mpc.g.numpy()[:, None]
    P = solve_discrete_are(F, g, np.diag(states), np.array([[torque]]))
    gain = np.linalg.solve(torque + g.T @ P @ g, g.T @ P @ F)
    near = np.random.default_rng(0).normal(size=(20, mpc.STATES))
    torques = mpc.Controller(mpc.EXPERT)(mpc.F.new_tensor(near)).detach().numpy()
    np.testing.assert_allclose(torques, -(near @ gain.T)[:, 0], atol=1e-5)


def test_the_expert_balances_every_start_and_nobody_could_one_farther_out(example):
    mpc = example("mpc")
    starts = mpc.starts(np.random.default_rng(0), 100, 0.98)
    expert = mpc.Controller(mpc.EXPERT)
    assert mpc.closed_loop(expert, starts, 80)[0][-1].abs().max() < 1e-2
    # The unstable mode, wᵀstate with wᵀF = λ wᵀ: a torque of LIMIT cannot hold it from LIMIT |wᵀg| / (λ − 1) on.
    values, left = np.linalg.eig(mpc.F.numpy().T)
    w, growth = left[:, np.argmax(values)], np.max(values)
    reach = mpc.LIMIT * abs(w @ mpc.g.numpy()) / (growth - 1)
    assert 0.9 * reach < np.abs(starts.numpy() @ w).max() < 0.98 * reach
    outside = starts.numpy() * 1.02 * reach / np.abs(starts.numpy() @ w)[:, None]
    assert mpc.closed_loop(expert, starts.new_tensor(outside), 80)[0][-1, :, 0].abs().min() > 1


def test_projected_dispatch_obeys_the_grid_and_is_nearer_to_the_operators(example):
    projection = example("projection")
    rng = np.random.default_rng(7)
    grid = projection.make_grid(rng)
    load, _, dispatch = projection.Operator(rng, grid).cases(rng, 200)
    assert grid.violations(dispatch, load).max() < 1e-6
    answer = dispatch + dispatch.new_tensor(20 * rng.normal(size=dispatch.shape))
    projected = grid.project(answer, load)
    assert grid.violations(answer, load).max() > 1
    assert grid.violations(projected, load).max() < 1e-6
    assert (((projected - dispatch) ** 2).sum(1) <= ((answer - dispatch) ** 2).sum(1)).all()
    balanced = grid.balance(answer, load)
    np.testing.assert_allclose(balanced.sum(1), load.sum(1))
