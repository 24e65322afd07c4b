"""What importing brings along, what works without the optional packages, and which module may import which."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import pytest

import qpdiff

OPTIONAL = [
    "autograd", "cupy", "cupyx", "cvxpy", "cvxpylayers", "dask", "distributed", "highspy", "jax", "matplotlib",
    "qpsolvers", "rich", "threadpoolctl", "torch", "typer",
]  # fmt: skip
ADAPTERS = ["autograd", "torch", "jax", "dask", "cvxpy", "cvxpylayers", "qpsolvers"]
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(code, **given):
    """What code prints last, as JSON, in a process of its own that has `given` (-P: the package that this one has)."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], input=json.dumps(given), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---- without the optional packages

BARE = """
import contextlib, importlib, io, json, runpy, sys

given = json.load(sys.stdin)

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in given["optional"]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())

import numpy as np
import qpdiff
from qpdiff.backend import single_threaded_blas

def import_error(call):
    try:
        call()
    except ImportError as error:
        return str(error)

def solve(**options):
    return qpdiff.solve_qp(**{name: np.asarray(value) for name, value in given["operands"].items()}, **options)

with single_threaded_blas():
    sol = solve()
    grads = qpdiff.vjp(sol, x=np.asarray(given["cotangent"]))
errors = {name: import_error(lambda: importlib.import_module(f"qpdiff.{name}")) for name in given["adapters"]}
errors |= {f"backend={name}": import_error(lambda: solve(backend=name)) for name in ("cupy", "torch", "jax")}
sys.argv = ["qpdiff", "info"]
with contextlib.redirect_stderr(io.StringIO()) as printed:
    try:
        runpy.run_module("qpdiff", run_name="__main__")
    except SystemExit as end:
        code = end.code
print(json.dumps({
    "x": sol.x.tolist(), "gradients": {name: getattr(grads, name).tolist() for name in given["operands"]},
    "errors": errors, "command": [code, printed.getvalue()],
}))
"""


@pytest.fixture(scope="module")
def projection():
    """Projections of points onto planes aᵀx = b, and their derivative along a cotangent."""
    rng = np.random.default_rng(0)
    points, a, b, cotangent = (rng.normal(size=shape) for shape in ((5, 4), (5, 1, 4), (5, 1), (5, 4)))

    def along(direction):
        normal = a[:, 0] / np.sum(a[:, 0] ** 2, axis=-1, keepdims=True)
        return normal * np.sum(a[:, 0] * direction, axis=-1, keepdims=True)

    operands = {"Q": np.eye(4), "q": -points, "A": a, "b": b, "lb": np.full(4, -100.0)}
    x = points - along(points) + a[:, 0] * b / np.sum(a[:, 0] ** 2, axis=-1, keepdims=True)
    gradients = {
        "q": along(cotangent) - cotangent,
        "b": np.sum(a[:, 0] * cotangent, axis=-1, keepdims=True) / np.sum(a[:, 0] ** 2, axis=-1, keepdims=True),
        "lb": np.zeros(4),
    }
    return operands, cotangent, x, gradients


@pytest.fixture(scope="module")
def bare(projection):
    """What happens in a process that has none of the optional packages."""
    operands, cotangent, *_ = projection
    lists = {name: value.tolist() for name, value in operands.items()}
    return run(BARE, optional=OPTIONAL, adapters=[*ADAPTERS, "show"], operands=lists, cotangent=cotangent.tolist())


def test_numpy_and_scipy_are_enough(bare, projection):
    *_, x, gradients = projection
    np.testing.assert_allclose(bare["x"], x, atol=1e-6)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(bare["gradients"][name], gradient, atol=1e-6)


@pytest.mark.parametrize(
    ("what", "extra"),
    [(name, name) for name in ADAPTERS]
    + [
        ("show", "plot"),
        ("backend=cupy", "cuda12"),
        ("backend=torch", "torch"),
        ("backend=jax", "jax"),
    ],
)
def test_what_is_missing_names_the_extra_to_install(bare, what, extra):
    named = re.findall(r"pip install 'qpdiff\[(\w+)\]'", bare["errors"][what] or "")
    assert extra in named, bare["errors"][what]
    assert set(named) <= set(PROJECT["optional-dependencies"])


def test_the_command_without_its_packages(bare):
    assert bare["command"] == [2, "the qpdiff command needs typer: pip install 'qpdiff[cli]'\n"]


# ---- with whatever is installed

TRACED = """
import json, sys
import array_api_compat.numpy, numpy as np, scipy.linalg  # which ask for more

wanted = set()

class Recorded:
    def find_spec(self, name, path=None, target=None):
        wanted.add(name.partition(".")[0])

sys.meta_path.insert(0, Recorded())

import qpdiff

imported = sorted(wanted)
qpdiff.vjp(qpdiff.solve_qp(np.eye(2), np.ones(2), lb=np.zeros(2), engine="array"), x=np.ones(2))
solved = sorted(wanted)
qpdiff.engines.choice.compiled_engine()
print(json.dumps([imported, solved, sorted(wanted)]))
"""


@pytest.fixture(scope="module")
def wanted():
    """The packages asked for, found or not: by the import, by then by the array engine, and by the compiled one."""
    return [set(names) for names in run(TRACED)]


def test_importing_asks_for_what_the_project_requires(wanted):
    required = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in PROJECT["dependencies"]}
    assert "qpdiff" in wanted[0]
    assert wanted[0] - set(sys.stdlib_module_names) <= {"qpdiff", *required}


def test_optional_packages_come_on_first_use(wanted):
    _, array, compiled = wanted
    assert not (array | compiled) & set(OPTIONAL)


# ---- which module may import which

BASE = {"engines.base", "engines.parameters", "engines.reduction"}
ENGINES = {"engines.base", "engines.array"}
BELOW_ADAPTERS = {
    "adjoint", "backend", "differentiation", "once", "prices", "problem", "solution", "solver", "sparse", "validation",
    *ENGINES,
}  # fmt: skip
ALLOWED = {
    "backend": set(),
    "solution": {"once"},
    "once": set(),
    "sparse": {"backend", "once"},
    "problem": {"backend", "once", "sparse"},
    "validation": {"backend", "problem", "sparse"},
    "prices": {"problem"},
    "adjoint": {"problem", "sparse"},
    "engines": set(),
    "engines.parameters": {"problem"},
    "engines.base": {"problem", "solution", "engines.parameters"},
    "engines.reduction": {"problem"},
    "engines.array": {"once", "problem", "validation", "solution", *BASE},
    "engines.compiled": {"backend", "once", "problem", "sparse", "validation", "solution", *BASE},
    "engines.densified": {"problem", "engines.base"},
    "engines.hosted": {"backend", "problem", "sparse", "engines.base", "engines.array", "engines.densified"},
    "engines.choice": {"problem", "engines.base", "engines.array", "engines.densified", "engines.hosted"},
    "solver": {"prices", "problem", "validation", "engines.base", "engines.choice", "solution"},
    "differentiation": {
        "adjoint",
        "backend",
        "prices",
        "problem",
        "solution",
        "sparse",
        "engines.base",
        "engines.array",
    },
    **{name: BELOW_ADAPTERS | ({"engines.choice"} if name in ("jax", "torch") else set()) for name in ADAPTERS},
    "jax": BELOW_ADAPTERS | {"engines.choice", "engines.densified"},
    "__init__": {"solution", "solver", "differentiation", "sparse"},
    "files": {"problem", "validation"},
    "show": {"problem", "validation", "solution", *ENGINES},
    "cli": {"__init__", "problem", "engines.choice", "files", "show", "solution", "validation"},
    "__main__": {"cli"},
}
"""Data flows one way: arrays → problem → solver → engine → outcome → solution → differentiation → adapters."""
ON_FIRST_USE = {("engines.choice", "engines.compiled"), ("__init__", "cvxpy")}
"""Imports against the flow that wait until they are needed."""

ROOT = Path(qpdiff.__file__).parent
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}


def imports(name):
    """The files of the package that a file imports with itself, and those that it imports when called, or by name."""
    package = ["qpdiff", *name.split(".")[:-1]]
    at_once, later = set(), set()

    def visit(node, found):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found |= resolve(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                found |= resolve(f"{module}.{alias.name}") or resolve(module)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"(\.\w+)+", str(node.value)):
            later.update(resolve(".".join(package) + node.value))
        for child in ast.iter_child_nodes(node):
            visit(child, later if isinstance(node, (ast.FunctionDef, ast.Lambda)) else found)

    visit(ast.parse(FILES[name].read_text(encoding="utf-8")), at_once)
    return at_once, later


def resolve(dotted):
    """The file that a dotted name stands for, if it is one of the package's."""
    head, _, rest = dotted.partition(".")
    candidates = {rest, f"{rest}.__init__"} if rest else {"__init__"}
    return candidates & set(FILES) if head == "qpdiff" else set()


def unit(name):
    """The name in ALLOWED: all files of a package share one, but each engine has its own."""
    first, *rest = name.removesuffix(".__init__").split(".")
    return f"{first}.{rest[0]}" if first == "engines" and rest else first


def test_no_cycles():
    TopologicalSorter(ALLOWED).prepare()
    graph = {}
    for name in FILES:
        at_once, later = imports(name)
        graph[name] = at_once | {other for other in later if (unit(name), unit(other)) not in ON_FIRST_USE}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_module_imports_only_what_it_may(name):
    at_once, later = ({unit(other) for other in files} - {unit(name)} for files in imports(name))
    allowed = ALLOWED[unit(name)]
    assert at_once <= allowed
    assert later <= allowed | {there for here, there in ON_FIRST_USE if here == unit(name)}


def test_the_imports_are_seen():
    assert {"engines.base", "engines.choice", "problem", "solution"} <= imports("solver")[0]
    assert "backend.__init__" in imports("engines.compiled.engine")[0]
    assert "cli.__init__" in imports("__main__")[1]
    assert {"engines.compiled.engine", "engines.compiled.gpu"} <= imports("engines.choice")[1]


def test_the_problems_need_numpy_alone():
    """The benchmark draws them in environments of other solvers, where qpdiff is not installed."""
    tree = ast.parse((Path(__file__).parents[1] / "problems.py").read_text(encoding="utf-8"))
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert set(imported) == {"__future__", "collections.abc", "typing", "numpy"}
