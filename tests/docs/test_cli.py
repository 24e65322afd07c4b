"""The command line, run in process."""

import errno
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
from problems import random_problem
from rich.console import Console
from typer.testing import CliRunner

import qpdiff
from qpdiff.cli import app, tables
from qpdiff.engines.choice import compiled_engine


@pytest.fixture
def run():
    def invoke(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})

    return invoke


@pytest.fixture
def save(tmp_path):
    def write(operands, name="problem.npz"):
        np.savez(tmp_path / name, **operands)
        return tmp_path / name

    return write


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_another_library_solves_as_accurately(run, save, tmp_path, backend):
    module = pytest.importorskip(backend)
    operands = random_problem(np.random.default_rng(0), "A G lb ub")
    before = module.config.jax_enable_x64 if backend == "jax" else None
    try:
        result = run("solve", save(operands), "-o", tmp_path / "out.npz", "--backend", backend)
    finally:
        if backend == "jax":
            module.config.update("jax_enable_x64", before)
    assert result.exit_code == 0
    with np.load(tmp_path / "out.npz") as out:
        assert out["x"].dtype == np.float64
        np.testing.assert_allclose(out["x"], qpdiff.solve_qp(**operands).x, atol=1e-7)


def test_solve_prints_a_row_a_problem_and_writes_the_solution(run, save, tmp_path):
    operands = random_problem(np.random.default_rng(0), "A G lb ub")
    result = run("solve", save(operands | {"r": np.zeros(1)}), "-o", tmp_path / "out.npz")
    assert result.exit_code == 0
    assert result.output.count("SOLVED") == 4
    sol = qpdiff.solve_qp(**operands)
    with np.load(tmp_path / "out.npz") as out:
        for name in ("x", "y", "z", "z_lb", "z_ub", "s", "status", "objective"):
            np.testing.assert_array_equal(out[name], getattr(sol, name))


def test_a_file_in_float32_is_solved_and_checked_in_float64(run, save, tmp_path):
    operands = {k: v.astype(np.float32) for k, v in random_problem(np.random.default_rng(0), "A G lb ub").items()}
    file = save(operands)
    assert run("solve", file, "-o", tmp_path / "out.npz").exit_code == 0
    with np.load(tmp_path / "out.npz") as out:
        assert out["x"].dtype == np.float32
        np.testing.assert_array_equal(out["x"], qpdiff.solve_qp(**operands, dtype="float64").x.astype(np.float32))
    result = run("check", file, "--directions", 2)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("count", [2, 40])
def test_prices_of_violations(run, save, tmp_path, count):
    """½x² + ½x + 2 max(0, 1 − x) + 2 max(0, x), or with ½ in place of 1, is least at x = 0."""
    operands = {"Q": np.eye(1), "q": np.full(1, 0.5), "G": np.array([[-1.0], [1.0]])}
    file = save(operands | {"h": np.array([[-1.0, 0.0], [-0.5, 0.0]] * (count // 2))})
    assert run("solve", file).exit_code == 1
    result = run("solve", file, "--elastic", 2, "-o", tmp_path / "out.npz")
    assert result.exit_code == 0, result.output
    for text in ("violation", "1.0e+00", *(["5.0e-01"] if count == 2 else [])):
        assert text in result.output
    with np.load(tmp_path / "out.npz") as out:
        assert {name for name in out if "violation" in name} == {"violation", "violation_G"}
        np.testing.assert_allclose(out["violation"], [1.0, 0.5] * (count // 2), atol=1e-6)
        np.testing.assert_allclose(out["violation_G"][:, 0], out["violation"])
        np.testing.assert_allclose(out["objective"], 2 * out["violation"], atol=1e-6)


def test_a_quadratic_price(run, save):
    """½x² + ½(1 − x)²/σ is least at x = 1 / (1 + σ), where the violation is σx."""
    file = save({"Q": np.eye(1), "q": np.zeros(1), "A": np.eye(1), "b": np.ones(1), "lb": np.zeros(1)})
    result = run("solve", file, "--elastic-quadratic", 0.25, "--json")
    solution = json.loads(result.stdout)
    np.testing.assert_allclose([solution["x"][0], solution["violation"]], [0.8, 0.2], atol=1e-6)
    np.testing.assert_allclose([solution["violation_A"], solution["violation_lb"]], [[0.2], [0.0]], atol=1e-6)


def test_prices_of_a_model_with_sparse_matrices(run, tmp_path):
    pytest.importorskip("highspy")
    lines = ["NAME", "ROWS", " N  obj", " L  r", " G  s", "COLUMNS", "    x  obj  1.0  r  1.0", "    x  s  1.0"]
    lines += ["RHS", "    rhs  r  1.0  s  3.0", "ENDATA"]
    (tmp_path / "a.mps").write_text("\n".join(lines) + "\n")
    assert run("solve", tmp_path / "a.mps").exit_code == 1
    solution = json.loads(run("solve", tmp_path / "a.mps", "--elastic", 5, "--json").stdout)
    # x + 5 (3 − x) + 5 (x − 1) between 1 and 3
    np.testing.assert_allclose([solution["x"][0], solution["objective"]], [1.0, 11.0], atol=1e-6)
    np.testing.assert_allclose(solution["violation"], 2.0, atol=1e-6)


def test_prices_that_cannot_be(run, save):
    file = save({"Q": np.eye(2), "q": np.ones(2), "lb": np.zeros(2)})
    for price, message in (("-1", "Invalid value for '--elastic'"), ("1", "--elastic is a number, the price of")):
        result = run("solve", file, "--elastic", price)
        assert result.exit_code == 2
        assert message in result.stderr
        assert "bounds" not in result.stderr
        assert result.stderr.count("\n") == 1


def test_an_unsolved_problem_is_exit_code_1(run, save):
    result = run(
        "solve", save({"Q": np.eye(1), "q": np.zeros(1), "G": np.array([[1.0], [-1.0]]), "h": np.array([0.0, -1.0])})
    )
    assert result.exit_code == 1
    assert "PRIMAL_INFEASIBLE" in result.output


@pytest.mark.parametrize("batch", [(600,), (3, 200)])
def test_a_large_batch_has_a_row_a_status(run, save, tmp_path, batch):
    operands = random_problem(np.random.default_rng(1), "A G", batch=batch, shared=("Q", "A"), n=4, m=3, p=1)
    operands["G"] = operands["G"][:1]
    operands["h"] = np.ones(3) + np.abs(operands["h"])
    result = run("solve", save(operands), "-o", tmp_path / "out.npz", "--tol", "1e-9")
    assert result.exit_code == 0, result.output
    assert "Statuses of problem.npz" in result.output
    assert re.search(r"SOLVED +│ 600 ", result.output)
    with np.load(tmp_path / "out.npz") as out:
        np.testing.assert_allclose(out["x"], qpdiff.solve_qp(**operands, tol=1e-9).x, atol=1e-7)


@pytest.mark.parametrize(
    ("operands", "message"),
    [({"q": np.ones(2)}, "has no array Q"), ({"Q": np.eye(2), "q": np.ones(3)}, "q has shape (3,)")],
)
def test_bad_input_is_one_line_and_exit_code_2(run, save, operands, message):
    result = run("solve", save(operands))
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["solve"], "solve: Missing argument"),
        (["solve", "--bad", "problem.npz"], "solve: No such option: --bad"),
        (["solve", "problem.npz", "--tol", "small"], "solve: Invalid value for '--tol'"),
        (["check", "problem.npz", "--directions", "0"], "check: Invalid value for '--directions'"),
        (["show", "problem.npz", "a\nb"], "show: Got unexpected extra argument"),
        (["solv", "problem.npz"], ": No such command 'solv'"),
        (["--bad"], ": No such option: --bad"),
    ],
)
def test_what_typer_refuses_is_one_line_and_exit_code_2(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "--help" in result.stderr


def test_x_fits_a_narrow_terminal(save):
    operands = {"Q": np.eye(4), "q": np.array([[0.123456, -1.0, 2.0, 1e6], [1.0, 2.0, 3.0, 4.0]])}
    result = CliRunner().invoke(app, ["solve", str(save(operands))], env={"COLUMNS": "80"})
    assert "x of problem 0: -0.12346 1 -2 -1e+06\nx of problem 1: -1 -2 -3 -4\n" in result.output
    assert "…" not in result.output


def test_no_arguments_print_the_help(run):
    assert "Commands" in run().output


def test_a_warning_is_one_line(run, tmp_path):
    pytest.importorskip("highspy")
    lines = ["NAME", "ROWS", " N  obj", " L  r", "COLUMNS", "    x  obj  1.0  r  1.0", "    x  r  2.0"]
    lines += ["RHS", "    rhs  r  1.0", "ENDATA"]
    (tmp_path / "a.mps").write_text("\n".join(lines) + "\n")
    result = run("solve", tmp_path / "a.mps")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"HiGHS reads {tmp_path / 'a.mps'} with a warning: Column")


@pytest.mark.parametrize("batch", [2, 300])
def test_no_check_solves_what_a_check_refuses(run, save, tmp_path, batch):
    operands = {"Q": np.array([[1.0, 0.1], [0.0, 1.0]]), "q": np.array([[-1.0, 1.0]] * batch), "lb": np.zeros(2)}
    for arguments in ([], ["--check"]):
        result = run("solve", save(operands), *arguments)
        assert result.exit_code == 2
        assert "Q is not symmetric" in result.output
    result = run("solve", save(operands), "--no-check", "-o", tmp_path / "out.npz")
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "out.npz") as out:
        np.testing.assert_allclose(out["x"], [[1.0, 0.0]] * batch, atol=1e-6)


def test_files_that_cannot_be_read(run, tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("absent.npz", "text.npz"):
        result = run("solve", tmp_path / name)
        assert result.exit_code == 2
        assert name in result.output


def damaged(kind, good):
    """Return the bytes of a file that is no problem."""
    array = io.BytesIO()
    np.save(array, np.eye(2))
    if kind == "huge":
        array, archive = io.BytesIO(), io.BytesIO()
        np.lib.format.write_array_header_1_0(
            array, {"descr": "<f8", "fortran_order": False, "shape": (2_000_000, 2_000_000)}
        )
        with zipfile.ZipFile(archive, "w") as members:
            members.writestr("Q.npy", array.getvalue())
        return archive.getvalue()
    flipped = bytearray(good)
    flipped[130] ^= 255
    return {
        "truncated": good[: len(good) // 2], "empty": b"", "flipped": bytes(flipped), "npy": array.getvalue(),
        "pickle": b"\x80\x04N.",
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["truncated", "empty", "flipped", "npy", "pickle", "huge"])
def test_a_damaged_file_is_one_line_and_exit_code_2(run, save, kind):
    file = save({"Q": np.eye(2), "q": np.ones(2)})
    file.write_bytes(damaged(kind, file.read_bytes()))
    for command in ("solve", "check", "show"):
        result = run(command, file)
        assert result.exit_code == 2
        assert len(result.output.splitlines()) == 1
        assert "pickle" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "--step", "0"), "--step is 0.0"), (("check", "--step", "nan"), "--step is nan"),
        (("check", "--threshold", "nan"), "--threshold is nan"), (("check", "--seed", "-1"), "--seed is -1"),
        (("solve", "--max-iterations", "-1"), "--max-iterations is -1"), (("solve", "--tol", "nan"), "--tol is nan"),
        (("solve", "--max-size", "1e-9"), "the limit on its size"),
        (("solve", "--max-size", "nan"), "--max-size is nan"),
    ],
)  # fmt: skip
def test_a_bad_option_is_one_line_and_exit_code_2(run, save, arguments, message):
    result = run(*arguments, save({"Q": np.eye(2), "q": np.ones(2)}))
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1


def test_any_large_limit_on_the_iterations_will_do(run, save):
    assert run("solve", save({"Q": np.eye(2), "q": np.ones(2)}), "--max-iterations", 10**20).exit_code == 0


def test_output_that_cannot_be_written_is_refused_and_leaves_nothing(run, save, tmp_path):
    file = save({"Q": np.eye(2), "q": np.ones(2)})
    before = file.read_bytes()
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "same.npz").hardlink_to(file)
    files = sorted(tmp_path.iterdir())
    for name in ("problem.npz", "same.npz", "x.txt", "absent/x.npz", "folder.npz"):
        result = run("solve", file, "-o", tmp_path / name)
        assert result.exit_code == 2
        assert len(result.output.splitlines()) == 1
    assert file.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize(("command", "name"), [("solve", "x.npz"), ("show", "x.png"), ("show", "x.svg")])
def test_a_full_disk_is_one_line_and_leaves_nothing(run, save, tmp_path, monkeypatch, command, name):
    file = save({"Q": np.eye(2), "q": np.ones((1000, 2))})
    before = sorted(tmp_path.iterdir())
    opened = Path.open

    def on_a_full_disk(path, mode="r", *rest, **more):
        handle = opened(path, mode, *rest, **more)
        if mode == "xb":
            handle.close()
            return io.BufferedWriter(FullDisk(path, "wb"))
        return handle

    monkeypatch.setattr(Path, "open", on_a_full_disk)
    result = run(command, file, "-o", tmp_path / name)
    assert result.exit_code == 2
    assert result.output.endswith(f"{tmp_path / name} cannot be written: No space left on device\n")
    assert len(result.output.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


class FullDisk(io.FileIO):
    """A file on a disk that has 1000 bytes left."""

    def write(self, data):
        if self.tell() + len(data) > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_progress_bar_for_a_few_problems_where_there_is_a_terminal(run, save, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(tables, "errors", Console(file=screen, force_terminal=True, width=100))
    assert run("solve", save({"Q": np.eye(2), "q": np.ones((3, 2))})).exit_code == 0
    assert "problems" in screen.getvalue()
    assert "3/3" in screen.getvalue()


def test_a_bad_problem_has_its_number_in_the_file(run, save):
    lb = np.where(np.arange(500) == 400, 2.0, 0.0)[:, None]
    result = run("solve", save({"Q": np.eye(1), "q": np.zeros((500, 1)), "lb": lb, "ub": np.ones(1)}))
    assert result.exit_code == 2
    assert "problem 400 of the batch" in result.output


def test_names_are_printed_as_text(run, save):
    result = run("solve", save({"q": np.ones(2)}, "a[red]b\x1b[31m.npz"))
    assert result.exit_code == 2
    assert r"a[red]b\x1b[31m.npz" in result.output


def test_json(run, save):
    result = run("solve", save({"Q": np.eye(2), "q": np.array([[-1.0, 2.0]] * 2)}), "--json")
    fields = json.loads(result.output)
    assert fields["status"] == ["SOLVED", "SOLVED"]
    np.testing.assert_allclose(fields["x"], [[1.0, -2.0]] * 2, atol=1e-6)


def test_version(run):
    assert run("--version").output == f"{qpdiff.__version__}\n"


def test_check_agrees(run, save):
    operands = random_problem(np.random.default_rng(2), "A G lb ub")
    result = run("check", save(operands), "--directions", 2)
    assert result.exit_code == 0, result.output
    assert "differs" not in result.output


def verdicts(result):
    """The verdict of every operand in the table of `check`, without the number of directions left out."""
    return dict(re.findall(r"^│ (\w+) +│ [\de.+-]+ +│ (.*?) +(?:\(.*)?│$", result.output, re.MULTILINE))


@pytest.mark.parametrize("shared", [(), ("Q",), ("Q", "q", "A", "b", "G", "h", "lb", "ub")], ids=["own", "Q", "all"])
@pytest.mark.parametrize("cost", ["lp", "psd", "pd", "diagonal"])
def test_check_agrees_for_every_convex_cost(run, save, cost, shared):
    rng = np.random.default_rng(5)
    operands = random_problem(rng, "A G lb ub", cost=cost, batch=(2,), shared=shared)
    result = run("check", save(operands), "--directions", 3)
    assert result.exit_code == 0, result.output
    assert verdicts(result) == dict.fromkeys(operands, "agrees")


@pytest.mark.parametrize("batch", [(), (3,)])
def test_check_takes_a_cost_of_zero_and_one_variable(run, save, batch):
    result = run("check", save({"Q": np.zeros((*batch, 1, 1)), "q": np.ones(1), "lb": np.zeros((*batch, 1))}))
    assert result.exit_code == 0, result.output
    assert verdicts(result) == {"Q": "agrees", "q": "agrees", "lb": "agrees"}


def test_numbers_in_a_file(run, save, tmp_path):
    operands = {"Q": np.eye(2), "q": np.array([[3.0, -2.0]] * 300), "lb": np.array(-1.0), "ub": np.array(0.5)}
    result = run("solve", save(operands), "-o", tmp_path / "out.npz")
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "out.npz") as out:
        np.testing.assert_allclose(out["x"], [[-1.0, 0.5]] * 300, atol=1e-6)
    result = run("check", save(operands | {"q": operands["q"][:2]}))
    assert result.exit_code == 0, result.output
    assert verdicts(result) == dict.fromkeys(operands, "agrees")


def test_check_tells_wrong_gradients_of_a_singular_cost(run, save, monkeypatch):
    right = qpdiff.vjp
    monkeypatch.setattr(qpdiff, "vjp", lambda *a, **k: right(*a, **k)._replace(Q=right(*a, **k).Q + np.eye(6) / 10))
    for cost in ("lp", "psd"):
        operands = random_problem(np.random.default_rng(2), "A G lb ub", cost=cost)
        result = run("check", save(operands), "--directions", 2)
        assert result.exit_code == 1
        assert verdicts(result) == dict.fromkeys(operands, "agrees") | {"Q": "differs"}


def test_check_tells_a_kink_of_a_singular_cost(run, save):
    # The minimiser 1 of ½x² − x lies on the bound x ≥ 1. With Q one way it stays, and the other way there is no Q.
    operands = {"Q": np.diag([1.0, 0.0]), "q": np.array([-1.0, 1.0]), "lb": np.array([1.0, 2.0])}
    result = run("check", save(operands))
    assert result.exit_code == 0, result.output
    assert verdicts(result)["Q"] == "not differentiable here"


@pytest.mark.parametrize("ub", [1.0, np.inf])
def test_check_tells_a_solution_that_is_not_unique(run, save, ub):
    # x₁ + x₂ = 1 is all that counts; with a change of q x is at one end of that, or the problem is unbounded.
    operands = {"Q": np.zeros((2, 2)), "q": np.ones(2), "G": -np.ones((1, 2)), "h": -np.ones(1), "ub": np.full(2, ub)}
    result = run("check", save(operands))
    assert result.exit_code == 0, result.output
    assert "not unique, so it has no derivative" in result.output


def test_check_leaves_out_what_has_no_solution(run, save):
    # x₁ + x₂ = 1 twice: where one of them moves, no point satisfies both.
    operands = {"Q": np.eye(2), "q": np.array([0.0, 1.0]), "A": np.ones((2, 2)), "b": np.ones(2)}
    result = run("check", save(operands))
    assert result.exit_code == 0, result.output
    assert verdicts(result) == {
        "Q": "agrees", "q": "agrees", "A": "not differentiable here", "b": "not differentiable here"
    }  # fmt: skip


@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-6, 1e-4])
def test_check_keeps_bounds_apart(run, save, gap):
    lb, ub = np.array([1.0, 0.0, -np.inf]), np.array([[1.0 + gap, 5.0, 3.0], [2.0, 0.0 + gap, np.inf]])
    operands = {"Q": np.eye(3), "q": np.array([-4.0, 1.0, 1.0]), "lb": lb, "ub": ub}
    result = run("check", save(operands))
    assert result.exit_code == 0, result.output
    assert "differs" not in result.output


def test_check_takes_single_precision(run, save):
    operands = random_problem(np.random.default_rng(2), "A G")
    result = run("check", save({name: value.astype(np.float32) for name, value in operands.items()}))
    assert result.exit_code == 0, result.output
    assert verdicts(result) == dict.fromkeys(operands, "agrees")


@pytest.mark.parametrize("factor", [-1.0, np.nan])
def test_check_tells_wrong_gradients(run, save, monkeypatch, factor):
    right = qpdiff.vjp
    monkeypatch.setattr(qpdiff, "vjp", lambda *a, **k: right(*a, **k)._replace(q=factor * right(*a, **k).q))
    result = run("check", save(random_problem(np.random.default_rng(2), "A G")), "--directions", 2)
    assert result.exit_code == 1
    assert "differs" in result.output


def test_check_tells_a_kink(run, save):
    # The minimiser −q lies on the bound x ≥ 0: one way it moves, the other way it stays.
    result = run("check", save({"Q": np.eye(1), "q": np.zeros(1), "lb": np.zeros(1)}))
    assert result.exit_code == 0
    assert "not differentiable here" in result.output


def test_info(run):
    result = run("info")
    assert result.exit_code == 0
    assert "backend numpy" in result.output
    expected = r"engine\W+compiled\W+built ahead of time" if compiled_engine()[0] else r"engine\W+array"
    assert re.search(expected, result.output)
    assert "engine on a GPU" in result.output
    assert qpdiff.__version__ in result.output
    assert re.search(r"runs, (compiled|array) engine on cpu: ", result.output)


def test_info_prints_the_names_of_extras(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    assert "qpdiff[threads]" in re.sub(r"[\s│]", "", run("info").output)


def test_python_m_qpdiff():
    done = subprocess.run([sys.executable, "-m", "qpdiff", "--help"], capture_output=True, text=True, check=True)
    assert "solve" in done.stdout
