"""The picture of a solve: its iterates are the solver's, its polygon is the feasible set, and it is not empty."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
import scipy.sparse as sp

pytest.importorskip("matplotlib")
pytest.importorskip("typer")
from matplotlib.figure import Figure
from matplotlib.image import imread
from problems import random_problem
from scipy.spatial import ConvexHull
from typer.testing import CliRunner

import qpdiff
from qpdiff import show
from qpdiff.cli import app
from qpdiff.problem import OPERANDS
from qpdiff.validation import make_problem

PARTS = ["", "G", "A", "lb ub", "A G lb", "G lb ub"]


def one(operands):
    return make_problem({name: operands.get(name) for name in OPERANDS})


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("n", [2, 6])
def test_the_iterates_are_those_of_the_solver_stopped_early(parts, n):
    operands = random_problem(np.random.default_rng(0), parts, batch=(), n=n, m=4, p=1)
    states = show.history(one(operands))
    sol = qpdiff.solve_qp(**operands, engine="array")
    assert len(states) == sol.iterations + 1
    for count, state in enumerate(states):
        early = qpdiff.solve_qp(**operands, engine="array", max_iterations=count)
        # To rounding: the solver may have computed x at the last iterate alone.
        np.testing.assert_allclose(state.x[0], early.x, atol=1e-10)
        for name, mine in (("primal_residual", "primal"), ("dual_residual", "dual"), ("duality_gap", "gap")):
            np.testing.assert_allclose(getattr(state.absolute, mine).item(), getattr(early, name), atol=1e-10)
    np.testing.assert_allclose(show.path(states)[-1], sol.x, atol=1e-10)


def test_sparse_operands_are_drawn():
    operands = {"Q": sp.csr_array(np.eye(2)), "q": -np.ones(2), "G": sp.csr_array([[1.0, 1.0]]), "h": np.ones(1)}
    assert show.draw(operands).axes[-1].get_title() == "problem 0: SOLVED"


def test_mu_is_the_mean_of_slack_times_multiplier():
    rng = np.random.default_rng(1)
    operands = random_problem(rng, "G", batch=(), n=2, m=5)
    for count, state in enumerate(show.history(one(operands))):
        early = qpdiff.solve_qp(**operands, engine="array", max_iterations=count)
        np.testing.assert_allclose(state.mu.item(), np.mean(early.s * early.z), rtol=1e-10)


@pytest.mark.parametrize("bend", [0.0, 1.0])
def test_a_cost_without_bottom_leaves_its_ray_out(bend):
    operands = {"Q": np.diag([0.0, bend]), "q": np.array([-1.0, 5.0]), "lb": np.zeros(2)}
    states = show.history(one(operands))
    assert states[-1].status.item() == qpdiff.Status.DUAL_INFEASIBLE
    np.testing.assert_array_equal(show.path(states), np.array([state.x[0] for state in states[:-1]]).reshape(-1, 2))
    assert show.draw(operands).axes[-1].get_title() == "problem 0: DUAL_INFEASIBLE"


@pytest.mark.parametrize("seed", range(50))
def test_the_polygon_is_the_feasible_set(seed):
    rng = np.random.default_rng(seed)
    G, h = rng.normal(size=(6, 2)), rng.normal(size=6) + 1.0
    lb = np.array([-1.5, -np.inf])
    problem = one({"Q": np.eye(2), "q": np.zeros(2), "G": G, "h": h, "lb": lb})
    corners = show.feasible_polygon(problem, np.array([[-3.0, -3.0], [3.0, 3.0]]))
    samples = rng.uniform(-3, 3, size=(2000, 2))
    feasible = np.all(samples @ G.T <= h, axis=-1) & (samples[:, 0] >= -1.5)
    if not len(corners):
        assert not feasible.any()
        return
    assert np.all(corners @ G.T <= h + 1e-9)
    assert np.all(corners[:, 0] >= -1.5 - 1e-9)
    hull = ConvexHull(corners)
    inside = np.all(samples @ hull.equations[:, :2].T + hull.equations[:, 2] <= 0, axis=-1)
    np.testing.assert_array_equal(inside, feasible)


def test_an_equality_leaves_a_segment():
    problem = one({"Q": np.eye(2), "q": np.zeros(2), "A": np.ones((1, 2)), "b": np.array([1.0]), "lb": np.zeros(2)})
    corners = show.feasible_polygon(problem, np.array([[-3.0, -3.0], [3.0, 3.0]]))
    np.testing.assert_allclose(corners.sum(axis=1), 1.0, atol=1e-12)
    np.testing.assert_allclose(np.ptp(corners, axis=0), 1.0, atol=1e-12)


@pytest.mark.parametrize(("n", "batch", "panels"), [(2, (), 5), (2, (2, 3), 8), (5, (20,), 4)])
def test_what_is_drawn(n, batch, panels):
    figure = show.draw(random_problem(np.random.default_rng(0), "G lb", batch=batch, n=n, m=3))
    assert len(figure.axes) == panels
    count = min(int(np.prod(batch)), show.CURVES)
    curves = [[line for line in axes.lines if line.get_label() != "tolerance"] for axes in figure.axes[:4]]
    assert [len(lines) for lines in curves] == [count] * 4
    for lines in curves[2:]:  # gap and μ start far from 0
        assert all(line.get_ydata()[-1] < 1e-5 * line.get_ydata()[0] for line in lines)
    whole = int(np.prod(batch))
    drawn = {1: "1 problem", 6: "6 problems", 20: "first 8 of 20 problems"}[whole]
    assert figure.subfigs[0].get_suptitle() == f"Convergence, {drawn}"
    if n == 2:
        assert figure.axes[-1].get_title() == f"problem {'1, 0' if batch else '0'}: SOLVED"


def test_curves_cross_the_tolerance_where_a_problem_ends():
    figure = show.draw(random_problem(np.random.default_rng(0), "G lb", batch=(5,), n=4, m=3))
    for axes in figure.axes[:3]:
        *curves, tolerance = axes.lines
        assert tolerance.get_label() == "tolerance"
        assert set(tolerance.get_ydata()) == {1e-8}
        assert all(curve.get_ydata()[-1] <= 1e-8 for curve in curves)
    assert len(figure.axes[3].lines) == 5


@pytest.mark.parametrize("operands", [{"q": np.zeros(3)}, {"q": np.ones(3), "lb": np.zeros(3)}])
def test_zeros_are_drawn_at_a_tick_of_their_own(operands):
    figure = show.draw({"Q": np.eye(3), **operands})
    figure.canvas.draw()
    zero = 0
    for axes in figure.axes:
        ticks = dict(zip([text.get_text() for text in axes.get_yticklabels()], axes.get_yticks(), strict=True))
        curve = axes.lines[0].get_ydata()
        assert np.all(curve > 0)
        assert axes.get_ylim()[0] < curve.min()
        if "zero" in ticks:
            zero += int(np.sum(curve == ticks["zero"]))
            assert all(ticks["zero"] < place for label, place in ticks.items() if label != "zero")
        counts = axes.get_xticks()
        np.testing.assert_array_equal(counts, np.round(counts))
    state = show.history(one({"Q": np.eye(3), **operands}))
    assert zero == sum(getattr(each, name).item() == 0 for each in state for name in show.QUANTITIES)
    assert zero > 0


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def invoke(operands, *arguments):
        np.savez(tmp_path / "problem.npz", **operands)
        return CliRunner().invoke(app, ["show", "problem.npz", *arguments], env={"COLUMNS": "200"})

    return invoke


def test_the_command_writes_a_png_that_is_not_empty(run, tmp_path):
    result = run(random_problem(np.random.default_rng(0), "G", batch=(3,), n=2, m=3))
    assert result.exit_code == 0, result.output
    assert "problem.png written" in result.output
    pixels = imread(tmp_path / "problem.png")
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 100


def test_the_command_writes_svg(run, tmp_path):
    result = run(random_problem(np.random.default_rng(0), "G", batch=(), n=4, m=3), "-o", "out.svg")
    assert result.exit_code == 0, result.output
    root = ET.parse(tmp_path / "out.svg").getroot()
    assert len([element for element in root.iter() if element.tag.endswith("path")]) > 20


@pytest.mark.parametrize(
    ("operands", "arguments", "message"),
    [
        ({"q": np.ones(2)}, [], "has no array Q"),
        ({"Q": -np.eye(2), "q": np.ones(2)}, [], "Q is not positive semidefinite"),
        ({"Q": np.eye(2), "q": np.ones(2)}, ["-o", "out.txt"], "out.txt does not end in .png or .svg"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, operands, arguments, message):
    result = run(operands, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_an_infeasible_problem_is_drawn_too(run):
    result = run(
        {"Q": np.eye(2), "q": np.zeros(2), "G": np.array([[1.0, 0.0], [-1.0, 0.0]]), "h": np.array([0.0, -1.0])}
    )
    assert result.exit_code == 0, result.output


def test_the_figure_needs_no_display(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    assert isinstance(show.draw({"Q": np.eye(2), "q": np.ones(2)}), Figure)
