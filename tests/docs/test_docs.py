"""The documentation's code runs as it stands, and its links lead somewhere."""

import ast
import functools
import inspect
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

import qpdiff

name = attrgetter("name")
ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
RUN_ELSEWHERE = {"custom-autodiff.md", "scaling.md"}
"""Pages whose code has a test of its own, or needs a cluster."""
CODE = {
    page: re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for page in PAGES
}
NEEDED = {
    "README.md": ["torch"],
    "autograd.md": ["autograd"],
    "coming-from.md": ["cvxpy", "jax", "qpsolvers", "torch"],
    "cvxpy.md": ["cvxpy", "torch"],
    "index.md": ["torch"],
    "jax.md": ["jax"],
    "projection.md": ["jax", "torch"],
    "torch.md": ["torch"],
    "troubleshooting.md": ["torch"],
    "tutorial.md": ["torch"],
}


@pytest.mark.parametrize("page", [page for page in PAGES if CODE[page] and page.name not in RUN_ELSEWHERE], ids=name)
def test_code_runs_and_prints_what_it_says(page):
    for module in NEEDED.get(page.name, []):
        pytest.importorskip(module)
    done = subprocess.run(
        [sys.executable, "-P", "-c", "\n".join(CODE[page])], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    printed = iter(done.stdout.splitlines())
    for expected in re.findall("# → (.*)$", "\n".join(CODE[page]), re.MULTILINE):
        assert expected in printed  # after what was found before


def test_examples_of_docstrings_fit_the_page():
    for file in (ROOT / "qpdiff").rglob("*.py"):
        lines = map(str.strip, file.read_text(encoding="utf-8").splitlines())
        assert not [line for line in lines if line.startswith((">>>", "...")) and len(line) > 80], file


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


def test_every_page_is_in_the_navigation():
    nav = re.findall(r"^ +- [^#\n]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = {page.relative_to(ROOT / "docs" if "docs" in page.parts else ROOT).as_posix() for page in PAGES}
    assert pages - set(nav) == {"README.md"}


def sections(path):
    """Return the text below each heading of the second level of a page."""
    return dict(part.split("\n", 1) for part in path.read_text(encoding="utf-8").split("\n## ")[1:])


def command_options():
    """Return the options of each command."""
    typer = pytest.importorskip("typer")
    from qpdiff.cli import app

    return {
        name: [option for option in command.params if option.param_type_name == "option"]
        for name, command in typer.main.get_command(app).commands.items()
    }


def test_the_page_of_the_command_line_has_every_command_and_option():
    commands = {
        command: {name for option in options for name in option.opts + option.secondary_opts}
        for command, options in command_options().items()
    }
    page = sections(ROOT / "docs" / "reference" / "cli.md")
    assert {name: set(re.findall(r"`(--?[\w-]+)`", section)) for name, section in page.items()} == commands


OPTIONS = sections(ROOT / "docs" / "options.md")
ADAPTERS = ("torch", "jax", "autograd", "dask")
DATA = {"Q", "q", "G", "h", "A", "b", "lb", "ub", "sol", "x", "y", "z", "z_lb", "z_ub"}


def options_of(function):
    """Return the options of a function, all arguments that are no data, and their defaults."""
    return {
        each.name: each.default for each in inspect.signature(function).parameters.values() if each.name not in DATA
    }


@pytest.mark.parametrize("name", [title.strip("`") for title in OPTIONS if title.startswith("`")])
def test_the_page_of_options_has_every_option_and_default(name):
    module, _, function = name.rpartition(".")
    function = getattr(pytest.importorskip(module, exc_type=ImportError), function)
    options = options_of(function)
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", OPTIONS[f"`{name}`"], re.MULTILINE))
    assert set(rows) == set(options)
    for option, default in options.items():
        written = rows[option].strip("`").split("`")[0]
        given = default not in (None, inspect.Parameter.empty)
        assert not given or written == str(default) or ast.literal_eval(written) == default, option


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_page_of_options_says_which_an_adapter_takes(adapter):
    solve_qp = pytest.importorskip(f"qpdiff.{adapter}", exc_type=ImportError).solve_qp
    takes = set(options_of(solve_qp))
    if "options" in takes:
        takes = takes - {"options"} | set(options_of(qpdiff.solve_qp)) - {"backend"}
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", OPTIONS["The adapters"], re.MULTILINE)
    column = {name: cells.split(" | ")[ADAPTERS.index(adapter)] for name, cells in rows}
    assert {name for name, cell in column.items() if cell == "yes"} == takes
    assert set(column) >= set(options_of(qpdiff.solve_qp))


def test_the_page_of_options_has_the_options_of_the_command_line():
    rows = re.findall(r"^\| `(\w+)` \| `(--[\w-]+)` \|", OPTIONS["The command line"], re.MULTILINE)
    options = [(name, option.opts[-1]) for name, options in command_options().items() for option in options]
    assert sorted(rows) == sorted(options)


REFERENCE = [
    path
    for page in sorted((ROOT / "docs" / "reference").glob("*.md"))
    for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]


@pytest.mark.parametrize("path", REFERENCE)
def test_every_parameter_of_the_reference_is_described(path):
    module, _, object_name = path.rpartition(".")
    described = getattr(pytest.importorskip(module, exc_type=ImportError), object_name)
    methods = vars(described).values() if inspect.isclass(described) else ()
    texts = [inspect.getdoc(each) or "" for each in (described, *filter(inspect.isfunction, methods))]
    for text in texts:
        parts = re.split(r"^(\w[\w ]*)\n-+\n", text, flags=re.MULTILINE)[1:]
        for title, part in zip(parts[::2], parts[1::2], strict=True):
            if title in ("Parameters", "Returns", "Raises", "Attributes"):
                assert not re.findall(r"^(\S.*)(?:\Z|\n(?! ))", part.strip(), re.MULTILINE), title


SOURCES = [*(ROOT / "qpdiff").rglob("*.py"), *(ROOT / "qpdiff").rglob("src/**/*.[ch]*")]
FILES = [
    *SOURCES,
    *(path for folder in ("benchmarks", "docs", "examples", "tests") for path in (ROOT / folder).rglob("*")),
]
WHOLLY_OURS = {"method.md", "internals.md"}
"""Pages on which every name in backticks is one of ours, also without parentheses."""
CPP_FUNCTION = r"^\s*(?:template <.*>\s*)?(?:(?!return\b|else\b|throw\b|new\b)[\w:<>,*&]+\s+)+[*&]?(\w+)\("
CPP_TYPE = r"\b(?:class|struct|enum|enum class|namespace|using) (\w+)"


def defined_names(tree):
    """Yield what a module or a class defines: a name and the names in it, which only classes have."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            members = {name for name, _ in defined_names(node)}
            made = (n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
            yield node.name, members | set(made)
        elif isinstance(node, ast.FunctionDef):
            yield node.name, set()
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name, set()) for alias in node.names)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((n.id, set()) for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
        elif isinstance(node, (ast.If, ast.Try)):
            yield from defined_names(node)


@functools.cache
def names_of_ours():
    """Return what the package defines: the modules, the members of every class, and all names, of C++ too."""
    modules, classes, names = {}, {}, set()
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".py":
            names |= {found for rule in (CPP_FUNCTION, CPP_TYPE) for found in re.findall(rule, text, re.MULTILINE)}
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        defined = dict(defined_names(ast.parse(text)))
        modules[module] = set(defined)
        for name, members in defined.items():
            classes.setdefault(name, set()).update(members)
            names |= {name, *members}
    modules["qpdiff"] |= set(dir(qpdiff))  # with what is imported when it is asked for
    return modules, classes, names


def is_ours(token, wholly):
    """Return whether what a page puts in backticks exists; None where it is no name of ours."""
    modules, classes, names = names_of_ours()
    if re.fullmatch(r"[\w./-]+\.(py|[ch]pp|[ch]|cu)", token):
        return any(path.as_posix().endswith("/" + token) for path in FILES)
    called = re.fullmatch(r"([A-Za-z_][\w.]*)\(.*\)", token)
    dotted = called[1] if called else token
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", dotted):
        return None
    first, *rest = dotted.split(".")
    if first == "qpdiff":
        module = max((m for m in modules if f"{dotted}.".startswith(f"{m}.")), key=len)
        rest = dotted[len(module) :].strip(".").split(".") if dotted != module else []
        return not rest or (rest[0] in modules[module] and set(rest[1:]) <= classes.get(rest[0], set()))
    if rest and classes.get(first):
        return set(rest) <= classes[first]
    if rest or (called is None and not wholly):
        return None
    return first in names


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_of_ours_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    tokens = set(re.findall(r"`([^`\n]+)`", text))
    assert not {token for token in tokens if is_ours(token, page.name in WHOLLY_OURS) is False}


@pytest.mark.parametrize(
    "token", ["solve_q()", "qpdiff.vjp_(sol)", "qpdiff.torch.Optnet", "qpdiff/solvers.py", "Problem.k_"]
)
def test_wrong_names_are_found(token):
    assert is_ours(token, wholly=False) is False
