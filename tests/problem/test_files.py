"""Problems read from files, against HiGHS's own solution of the models that it has written."""

import gzip
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("highspy")
import highspy
from problems import random_problem

import qpdiff
from qpdiff.files import read_problem
from qpdiff.problem import OPERANDS

QPTEST = """NAME          QPTEST
ROWS
 N  obj
 G  r1
 L  r2
COLUMNS
    c1        obj       1.5            r1        2.0
    c1        r2        -1.0
    c2        obj       -2.0           r1        1.0
    c2        r2        2.0
RHS
    rhs       obj       -4.0           r1        2.0
    rhs       r2        6.0
BOUNDS
 UP bound     c1        20.0
QUADOBJ
    c1        c1        8.0
    c1        c2        2.0
    c2        c2        10.0
ENDATA
"""
"""The example of Maros and Mészáros, "A repository of convex quadratic programming problems" (1999)."""

GREATEST = """NAME
OBJSENSE
    MAX
ROWS
 N obj
 L r
COLUMNS
 x obj 1 r 1
RHS
 rhs obj -3 r 10
QUADOBJ
 x x -1
ENDATA
"""
"""3 + x − ½x², to be maximised."""


def random_model(rng, cost, sense):
    """A model with rows and variables of every kind, that has an optimum because multipliers of its signs exist."""
    n, rows = 8, 6
    lp, point = highspy.HighsLp(), rng.normal(size=n)
    matrix = rng.normal(size=(rows, n)) * (rng.uniform(size=(rows, n)) < 0.7)
    L = rng.normal(size=(n, {"lp": 0, "psd": n // 2, "pd": n}[cost]))
    Q, value = L @ L.T, matrix @ point

    def limits(center, kinds):
        """Limits around a point by kind, and a multiplier of a sign that these allow."""
        below, above = center - rng.uniform(0.1, 1.0, len(center)), center + rng.uniform(0.1, 1.0, len(center))
        lower = np.select([kinds == "equal", kinds == "upper", kinds == "free"], [center, -np.inf, -np.inf], below)
        upper = np.select([kinds == "equal", kinds == "lower", kinds == "free"], [center, np.inf, np.inf], above)
        size = rng.normal(size=len(center))
        signs = [kinds == "lower", kinds == "upper", kinds == "free"]
        return lower, upper, np.select(signs, [np.abs(size), -np.abs(size), 0 * size], size)

    lower, upper, y = limits(value, np.array(["equal", "lower", "upper", "range", "range", "free"]))
    column_kinds = np.array(["lower", "upper", "range", "range", "equal", "free", "lower", "free"])
    column_lower, column_upper, z = limits(point, column_kinds)
    c = -Q @ rng.normal(size=n) + matrix.T @ y + z
    sign = -1.0 if sense == "max" else 1.0
    lp.num_col_, lp.num_row_, lp.offset_ = n, rows, rng.normal()
    lp.sense_ = highspy.ObjSense.kMaximize if sense == "max" else highspy.ObjSense.kMinimize
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = sign * c, column_lower, column_upper
    lp.row_lower_, lp.row_upper_ = lower, upper
    entries = [np.flatnonzero(column) for column in matrix.T]
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.cumsum([0, *map(len, entries)])
    lp.a_matrix_.index_ = np.concat(entries)
    lp.a_matrix_.value_ = np.concat([column[rows] for column, rows in zip(matrix.T, entries, strict=True)])
    model = highspy.HighsModel()
    model.lp_ = lp
    if cost != "lp":
        hessian = model.hessian_
        hessian.dim_, hessian.format_ = n, highspy.HessianFormat.kTriangular
        hessian.start_ = np.cumsum([0, *range(n, 0, -1)])
        hessian.index_ = np.concat([np.arange(j, n) for j in range(n)])
        hessian.value_ = sign * np.concat([Q[j:, j] for j in range(n)])
        model.hessian_ = hessian

    def violation(x):
        inside = [lower - matrix @ x, matrix @ x - upper, column_lower - x, x - column_upper]
        return max(float(np.max(part)) for part in inside)

    return model, lambda x: sign * (x @ Q @ x / 2 + c @ x) + lp.offset_, violation


@pytest.mark.parametrize("suffix", [".mps", ".lp"])
@pytest.mark.parametrize("sense", ["min", "max"])
@pytest.mark.parametrize("cost", ["lp", "psd", "pd"])
@pytest.mark.parametrize("seed", range(10))
def test_models_written_by_highs(tmp_path, suffix, sense, cost, seed):
    model, objective, violation = random_model(np.random.default_rng(seed), cost, sense)
    highs = highspy.Highs()
    highs.silent()
    highs.passModel(model)
    highs.writeModel(str(tmp_path / f"model{suffix}"))
    highs.run()
    assert highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
    problem = read_problem(tmp_path / f"model{suffix}")
    solution = qpdiff.solve_qp(**problem.operands)
    assert solution.status == qpdiff.Status.SOLVED
    value = problem.objective(solution.objective)
    assert value == pytest.approx(highs.getInfo().objective_function_value, rel=1e-5, abs=1e-5)
    assert value == pytest.approx(objective(solution.x), rel=1e-9, abs=1e-9)
    assert violation(solution.x) < 1e-7


@pytest.mark.parametrize("name", ["a.qps", "a.mps", "a.QPS", "a.b.MPS", "a.qps.gz", "a.mps.gz"])
def test_the_example_of_maros_and_meszaros(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(gzip.compress(QPTEST.encode()) if name.endswith(".gz") else QPTEST.encode())
    problem = read_problem(str(file))
    solution = qpdiff.solve_qp(**problem.operands)
    np.testing.assert_allclose(problem.objective(solution.objective), 4.37187500 + 4, rtol=1e-8)  # published, and 4
    np.testing.assert_array_equal(problem.operands["Q"].toarray(), [[8, 2], [2, 10]])


@pytest.mark.parametrize(
    "quadratic",
    [
        "QUADOBJ\n c1 c1 8\n c2 c1 2\n c2 c2 10\n",
        "QUADOBJ\n c2 c2 10\n c1 c2 2\n c1 c1 8\n",
        "QMATRIX\n c1 c1 8\n c1 c2 2\n c2 c1 2\n c2 c2 10\n",
        "QSECTION obj\n c1 c1 8\n c1 c2 2\n c2 c2 10\n",
    ],
)
def test_ways_to_write_the_same_cost(tmp_path, quadratic):
    (tmp_path / "a.qps").write_text(QPTEST[: QPTEST.index("QUADOBJ")] + quadratic + "ENDATA\n")
    np.testing.assert_array_equal(read_problem(tmp_path / "a.qps").operands["Q"].toarray(), [[8, 2], [2, 10]])


def test_rows_ranges_and_bounds(tmp_path):
    """Every kind of row and bound that the MPS format has for continuous variables."""
    (tmp_path / "a.mps").write_text("""NAME kinds
OBJSENSE
    MAX
ROWS
 N cost
 E e
 E up
 E down
 G g
 L l
 N free
COLUMNS
 x cost 1 e 1
 x up 1 down 1
 x g 1 l 1
 x free 1
 y e 1
 z e 1
 w e 1
 v e 1
 u e 1
RHS
 r cost -5 e 1
 r up 2 down 3
 r g 4 l 5
RANGES
 s up 0.5 down -0.5
 s g 1 l 2
BOUNDS
 UP b y 7
 FR b z
 MI b w
 UP b w -1
 FX b v 3
 LO b u -4
 UP b u 4
ENDATA
""")
    problem = read_problem(tmp_path / "a.mps")
    assert (problem.sense, problem.offset) == (-1, 5)
    operands = {name: value.tolist() for name, value in problem.dense_operands().items() if name != "Q"}
    sides = {"up": (2, 2.5), "down": (2.5, 3), "g": (4, 5), "l": (3, 5)}
    assert operands == {
        "q": [-1, 0, 0, 0, 0, 0],
        "A": [[1] * 6], "b": [1],
        "G": [[1, *[0] * 5]] * 4 + [[-1, *[0] * 5]] * 4,
        "h": [upper for _, upper in sides.values()] + [-lower for lower, _ in sides.values()],
        "lb": [0, 0, -np.inf, -np.inf, 3, -4], "ub": [np.inf, 7, np.inf, -1, 3, 4],
    }  # fmt: skip
    assert not problem.operands["Q"].nnz


OBJSENSES = ["OBJSENSE {}\n", "OBJSENSE\n    {}\n", "OBJSENSE\n{}\n", " OBJSENSE\n\t{}\r\n", "OBJSENSE\n* why\n\n {}\n"]
"""Ways to place the sense: on the line of the section as Gurobi does, or on the next as CPLEX does."""
LINEAR = """ROWS
 N obj
 L r
COLUMNS
 x obj 1 r 1
RHS
 rhs obj -3 r 10
ENDATA
"""
"""3 + x over 0 ≤ x ≤ 10."""
SPACES = """ROWS
 N  obj
 L  one row
COLUMNS
    one col   obj                1.0   one row            1.0
RHS
    RHS       one row           10.0   obj               -3.0
ENDATA
"""
"""The same in fixed columns, with names that have spaces, for which HiGHS has a second parser."""


def file_of(folder, name, text):
    """A file with the text, compressed if its name says so."""
    (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return folder / name


def optimum(file):
    problem = read_problem(file)
    solution = qpdiff.solve_qp(**problem.operands)
    assert solution.status == qpdiff.Status.SOLVED
    return float(problem.objective(solution.objective))


@pytest.mark.filterwarnings("ignore:HiGHS reads .* switching to fixed format parser")
@pytest.mark.parametrize("body", [LINEAR, SPACES], ids=["free", "fixed"])
@pytest.mark.parametrize("name", ["a.mps", "a.qps", "a.mps.gz"])
@pytest.mark.parametrize("placed", OBJSENSES)
def test_every_spelling_of_the_sense_in_mps(tmp_path, placed, name, body):
    for start, value in (("MAX", 13.0), ("MIN", 3.0)):
        for sense in (start, f"{start}IMIZE", f"{start}IMISE", f"{start}imum", f"{start}imize".lower()):
            for header in (f"NAME a\n{placed.format(sense)}", f"* a comment\n{placed.format(sense)}NAME a\n"):
                file = file_of(tmp_path, name, header + body)
                assert optimum(file) == pytest.approx(value, abs=1e-6), header
                file = file_of(tmp_path, name, header.replace("OBJSENSE", "objsense") + body)
                assert optimum(file) == pytest.approx(value, abs=1e-6), header


@pytest.mark.parametrize(
    ("header", "value"),
    [("", 3), ("NAME\n", 3), ("\ufeffOBJSENSE MAXIMIZE\n", 13), ("NAME OBJSENSE MAX\n", 3), ("OBJSENSEMAX\n", 13)],
)
def test_headers_of_mps(tmp_path, header, value):
    assert optimum(file_of(tmp_path, "a.mps", header + LINEAR)) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("before", ["", "\\ max or min?\n\n", "/* min\n max */ ", "\ufeff"])
@pytest.mark.parametrize("name", ["a.lp", "a.lp.gz"])
@pytest.mark.parametrize(
    "sense", ["max", "MAX", "Maximize", "maximise", "maximum", "min", "MINIMIZE", "minimise", "Minimum"]
)
def test_every_spelling_of_the_sense_in_lp(tmp_path, sense, name, before):
    file = file_of(tmp_path, name, f"{before}{sense} obj: x + 3\nsubject to\n r: x <= 10\nend\n")
    assert optimum(file) == pytest.approx(13 if sense.lower().startswith("max") else 3, abs=1e-6)


@pytest.mark.filterwarnings("ignore:HiGHS reads .* switching to fixed format parser")
def test_blank_lines_in_fixed_columns(tmp_path):
    file = file_of(tmp_path, "a.mps", "NAME\n\n" + SPACES.replace("\n", "\n\n").replace("RHS\n", "RHS\n  \r\n"))
    assert optimum(file) == pytest.approx(3.0, abs=1e-6)


@pytest.mark.parametrize("placed", OBJSENSES)
@pytest.mark.parametrize("sense", ["MAX", "MAXIMIZE", "maximise"])
def test_a_concave_objective_is_maximised(tmp_path, placed, sense):
    text = GREATEST.replace("OBJSENSE\n    MAX\n", placed.format(sense))
    assert optimum(file_of(tmp_path, "a.mps", text)) == pytest.approx(3.5, abs=1e-6)


def test_a_problem_without_constraints(tmp_path):
    (tmp_path / "a.lp").write_text("min\n obj: - 3 x + [ x ^ 2 ] / 2 + 1\nst\nbounds\n x free\nend\n")
    problem = read_problem(tmp_path / "a.lp")
    assert set(problem.operands) == {"Q", "q"}
    np.testing.assert_allclose(problem.objective(qpdiff.solve_qp(**problem.operands).objective), -3.5)


def test_arrays(tmp_path):
    operands = random_problem(np.random.default_rng(0), "A G lb")
    np.savez(tmp_path / "a.npz", **operands, r=1.0)
    problem = read_problem(tmp_path / "a.npz")
    assert (problem.sense, problem.offset, set(problem.operands)) == (1, 0, set(operands))
    for name, value in operands.items():
        np.testing.assert_array_equal(problem.operands[name], value)


# ---- what is refused


@pytest.fixture
def refused(tmp_path):
    def read(name, text, kind=ValueError):
        file = tmp_path / name
        if text is not None:
            file.write_text(text)
        with pytest.raises(kind) as caught:
            read_problem(file)
        assert str(file) in str(caught.value)
        return str(caught.value)

    return read


def test_files_that_cannot_be_read(refused, tmp_path):
    assert "No such file" in refused("absent.mps", None, FileNotFoundError)
    assert "No such file" in refused("absent.npz", None, FileNotFoundError)
    for name in ("junk.mps", "junk.qps"):
        message = refused(name, "This is no model\n")
        assert message.startswith("HiGHS cannot read")
        assert "/model." not in message  # the copy that HiGHS was given
    refused("junk.lp", "This is no model\n")  # which some versions of HiGHS read as a model without variables
    assert "has no variables" in refused("empty.mps", "NAME\nROWS\n N obj\nCOLUMNS\nRHS\nENDATA\n")
    assert "cannot be decompressed: Not a gzipped file" in refused("junk.qps.gz", "This is no model\n")
    (tmp_path / "part.qps.gz").write_bytes(gzip.compress(QPTEST.encode())[:-20])
    assert "cannot be decompressed: Compressed file ended" in refused("part.qps.gz", None)
    assert "does not end in .npz, .mps, .qps, .lp" in refused("a.txt", "")
    assert "does not end in .npz" in refused("a.npz.gz", "")
    np.savez(tmp_path / "a.npz", q=np.ones(2))
    assert "has no array Q" in refused("a.npz", None)


@pytest.mark.parametrize("header", ["OBJSENSE {}\n", "OBJSENSE\n    {}\n", "objsense\n{}\n"])
@pytest.mark.parametrize("sense", ["MAXI", "-1", "MAX extra", "maximal", ": MAX", "MAX MIN", "MIN\n    MAX"])
def test_unknown_senses(refused, header, sense):
    message = refused("a.mps", f"NAME\n{header.format(sense)}{LINEAR}")
    assert f"has an OBJSENSE that is '{' '.join(sense.split())}'; expected one of MIN, MINIMIZE" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"NAME\nOBJSENSE\n{LINEAR}", "has an OBJSENSE that is ''; expected one of MIN"),
        (f"NAME\nOBJSENSE MAX\nOBJSENSE MIN\n{LINEAR}", "has 2 sections OBJSENSE; expected at most one"),
        (f"NAME\nOBJSENCE\n MAX\n{LINEAR}", "has 'OBJSENCE' before ROWS; expected NAME, OBJSENSE or a comment"),
        (f"NAME\nMAXIMIZE\n{LINEAR}", "has 'MAXIMIZE' before ROWS"),
        (f"NAME\nOBJSENSE\n MAX\nOBJNAME\n obj\n{LINEAR}", "has 'OBJNAME' before ROWS"),
        (f"NAME\n{LINEAR.replace('RHS', 'objsense maximize' + chr(10) + 'RHS')}", "has OBJSENSE after ROWS"),
    ],
)
def test_senses_that_highs_would_skip(refused, text, message):
    assert message in refused("a.mps", text)


@pytest.mark.parametrize("sense", ["maximal", "objective", "max:"])
def test_unknown_senses_in_lp(refused, sense):
    message = refused("a.lp", f"\\ max\n\n{sense} \n obj: x\nst\n r: x <= 10\nend\n")
    assert f"begins with {sense!r}; expected one of MIN, MINIMIZE" in message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.mps", GREATEST.replace("x x -1", "x x 1")),
        ("a.qps", QPTEST.replace("ROWS", "OBJSENSE MAXIMIZE\nROWS")),
        ("a.lp", "maximize\n obj: [ x ^ 2 - y ^ 2 ] / 2\nst\n r: x + y <= 10\nend\n"),
    ],
)
def test_a_convex_objective_that_is_maximised(refused, name, text):
    assert "maximises a quadratic objective that is not concave, so the problem is not convex" in refused(name, text)


def test_integer_variables(refused):
    message = refused("a.lp", "min\n obj: x + y + z\nst\n c: x + y + z >= 1\ngeneral\n y\nbinary\n z\nend\n")
    assert "has integer or semicontinuous variables, 2 in all, y the first" in message


def test_a_problem_too_large_for_dense_arrays(tmp_path):
    columns = " + ".join(f"x{j}" for j in range(40_000))
    (tmp_path / "a.lp").write_text(f"min\n obj: {columns}\nst\n c: x0 + x39999 >= 1\nend\n")
    problem = read_problem(tmp_path / "a.lp")
    with pytest.raises(ValueError, match=r"^the dense matrices of the problem take 11.9 GiB; expected at most 8 GiB"):
        problem.dense_operands()
    solution = qpdiff.solve_qp(**problem.operands)
    np.testing.assert_allclose(problem.objective(solution.objective), 1.0, atol=1e-6)


def test_warnings_of_highs_are_warnings(tmp_path):
    (tmp_path / "a.qps").write_text(QPTEST.replace("RHS\n", "    c2        r2        5.0\nRHS\n"))
    with pytest.warns(UserWarning, match=r"HiGHS reads .*a.qps with a warning: Column \"c2\" has duplicate") as caught:
        read_problem(tmp_path / "a.qps")
    assert caught[0].filename == __file__


def test_odd_names_are_escaped_in_warnings(tmp_path):
    text = QPTEST.replace("RHS\n", "    c2        r2        5.0\nRHS\n").replace("c2", "c\x1b[31m2")
    (tmp_path / "a\nb.mps").write_text(text)
    with pytest.warns(UserWarning, match="has duplicate") as caught:
        read_problem(tmp_path / "a\nb.mps")
    message = str(caught[0].message)
    assert message.isprintable()
    assert r"a\nb.mps" in message
    assert r"c\x1b[31m2" in message


def test_highs_is_missing_or_too_old(refused, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(highspy.Highs, "version", lambda self: "1.13.1")
        assert "needs HiGHS 1.14 or newer: pip install 'qpdiff[io]'" in refused("a.qps", QPTEST, ImportError)
    monkeypatch.setitem(sys.modules, "highspy", None)
    assert "needs HiGHS: pip install 'qpdiff[io]'" in refused("a.qps", QPTEST, ImportError)


# ---- the command line


@pytest.fixture
def run():
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from qpdiff.cli import app

    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("least.qps", QPTEST, "8.371875"),
        ("greatest.mps", GREATEST, "3.5"),
    ],
)
def test_solve_prints_and_saves_the_objective_of_the_file(run, tmp_path, name, text, value):
    (tmp_path / name).write_text(text)
    result = run("solve", tmp_path / name, "-o", tmp_path / "out.npz")
    assert value in result.output.split()
    assert result.exit_code == 0
    with np.load(tmp_path / "out.npz") as out:
        np.testing.assert_allclose(out["objective"], float(value), rtol=1e-7)


@pytest.mark.parametrize("name", ["a.mps", "a.lp"])
def test_reading_prints_nothing(tmp_path, name):
    """In a process of its own: HiGHS prints from C, past `sys.stdout`, and what it has not flushed at the end."""
    (tmp_path / "a.mps").write_text(QPTEST.replace("RHS\n", "    c2        r2        5.0\nRHS\n"))  # with a warning
    (tmp_path / "a.lp").write_text("max\n obj: x\nst\n c: x <= 1\nend\n")
    code = f"from qpdiff.files import read_problem; print(*read_problem({str(tmp_path / name)!r}).operands)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= set(OPERANDS)
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("text", [QPTEST, QPTEST[: QPTEST.index("QUADOBJ")] + "ENDATA\n", GREATEST, LINEAR])
def test_check_takes_models(run, tmp_path, text):
    (tmp_path / "a.qps").write_text(text)
    result = run("check", tmp_path / "a.qps", "--directions", 2)
    assert result.exit_code == 0, result.output
    assert "agrees" in result.output


@pytest.mark.parametrize(("name", "message"), [("a.mps", "HiGHS cannot read"), ("a.txt", "does not end in .npz")])
def test_bad_files_are_one_line_and_exit_code_2(run, tmp_path, name, message):
    (tmp_path / name).write_text("This is no model\n")
    result = run("solve", tmp_path / name)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert "Traceback" not in result.output


def test_without_highs_the_command_line_names_the_extra(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "highspy", None)
    (tmp_path / "a.qps").write_text(QPTEST)
    result = run("solve", tmp_path / "a.qps")
    assert result.exit_code == 2
    assert "pip install 'qpdiff[io]'" in result.output
