"""Add pages for files of the root and for linked source files to the site, so that links work as on GitHub.

The link to the repository, and from each page to its source there, is that of pyproject.toml, where it has one.
"""

import os
import re
import tomllib
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config):
    """Link to the repository that the project's metadata name."""
    project = tomllib.loads(
        (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    )["project"]
    config.repo_url = project.get("urls", {}).get("Repository")
    if config.repo_url:
        config.repo_name, config.edit_uri = project["name"], "edit/main/docs/"
    return config


def on_files(files, config):
    """Add the pages that are not in docs/."""
    for name in ROOT_PAGES:
        page = File.generated(config, name, abs_src_path=str(ROOT / name))
        page.edit_uri = f"../{name}"
        files.append(page)
    pages = [Path(file.abs_src_path) for file in files.documentation_pages()]
    links = [
        (page, link)
        for page in pages
        for link, _ in LINK.findall(page.read_text(encoding="utf-8"))
    ]
    linked = {path for page, link in links if (path := target(page, link))}
    for path in sorted(linked):
        if uri(path).startswith("source/"):
            files.append(
                File.generated(config, uri(path), content=source_page(path))
            )
    return files


def on_page_markdown(markdown, page, config, files):
    """Replace links to files of the repository by links to their pages."""
    if page.file.generated_by and page.file.abs_src_path is None:
        return markdown
    here = Path(page.file.abs_src_path)

    def moved(match):
        path = target(here, match[1])
        if path is None:
            return match[0]
        return f"]({os.path.relpath(uri(path), os.path.dirname(page.file.src_uri))}{match[2] or ''})"

    return LINK.sub(moved, markdown)


def target(page: Path, link: str) -> Path | None:
    """Return the file of the repository that a link on a page leads to; None where it leads elsewhere."""
    path = (page.parent / link).resolve()
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def uri(path: Path) -> str:
    """Return the place of a file of the repository on the site."""
    if path.is_relative_to(DOCS) and path.suffix != ".py":
        return path.relative_to(DOCS).as_posix()
    name = path.relative_to(ROOT).as_posix()
    return name if name in ROOT_PAGES else f"source/{name}.md"


def source_page(path: Path) -> str:
    """Return a page that shows a file."""
    language = {".py": "python"}.get(path.suffix, "text")
    return f"# {path.relative_to(ROOT)}\n\n````{language}\n{path.read_text(encoding='utf-8')}\n````\n"
