"""The documentation's code runs as it stands, and its links lead somewhere."""

import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

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
    "coming-from.md": ["cvxpy", "jax", "torch"],
    "cvxpy.md": ["cvxpy", "torch"],
    "jax.md": ["jax"],
    "torch.md": ["torch"],
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


def test_the_page_of_the_command_line_has_every_command_and_option():
    typer = pytest.importorskip("typer")
    from qpdiff.cli import app

    commands = {
        name: {name for option in command.params if option.param_type_name == "option" for name in option.opts}
        for name, command in typer.main.get_command(app).commands.items()
    }
    text = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    assert {name: set(re.findall(r"`(--?[\w-]+)`", section)) for name, section in sections.items()} == commands
