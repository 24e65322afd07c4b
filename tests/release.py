"""Build what a release uploads, and try it: source distribution, wheels, metadata, and a solve in fresh environments.

The wheels are built from the source distribution, one for Python 3.11 and one of the stable ABI for later ones, and
each is installed with the dependencies that it declares in a new environment of every Python at hand. The exit code is
1 where something is missing or wrong. The wheels are for this machine: those that are uploaded, for all machines, are
built by .github/workflows/wheels.yml.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[1]
STABLE = (3, 12)
"""From this release of Python on, one wheel serves all."""
SUPPORTED = [(3, 11), (3, 12), (3, 13), (3, 14)]
TRIED = """
import numpy as np
import qpdiff
from qpdiff.engines.choice import compiled_engine

points = np.array([[0.4, 0.4, 0.2], [2.0, 0.0, 0.0]])
for engine in ("compiled", "array"):  # projections onto the simplex
    sol = qpdiff.solve_qp(np.eye(3), -points, A=np.ones((1, 3)), b=[1.0], lb=np.zeros(3), engine=engine)
    assert sol.status.tolist() == [0, 0], sol.status
    assert np.allclose(sol.x, [[0.4, 0.4, 0.2], [1.0, 0.0, 0.0]], atol=1e-6), sol.x
    gradient = qpdiff.vjp(sol, x=np.array([1.0, 0.0, 0.0])).q[0]
    assert np.allclose(gradient, [-2 / 3, 1 / 3, 1 / 3], atol=1e-6), gradient
print(qpdiff.__version__, compiled_engine()[1])
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder of what is built (default: dist)")
    options = parser.parse_args()
    pythons = find_pythons()
    if not any(release >= STABLE for release in pythons):
        print("no Python from 3.12 on: the wheel of the stable ABI is not built", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = build_source(folder)
        version = check_source(source)
        wheels = build_wheels(source, pythons, folder)
        for wheel in wheels:
            check_wheel(wheel, version)
        run(sys.executable, "-m", "twine", "check", "--strict", source, *wheels)
        for release, python in pythons.items():
            said = try_wheel(python, release, wheels, folder)
            print(f"Python {'.'.join(map(str, release))}: qpdiff {said}", flush=True)
        for release in sorted(set(SUPPORTED) - set(pythons)):
            print(f"Python {'.'.join(map(str, release))}: not at hand, not tried", flush=True)
        options.output.mkdir(parents=True, exist_ok=True)
        for file in (source, *wheels):
            shutil.copy(file, options.output)
            print(f"{options.output / file.name}, {file.stat().st_size / 2**20:.1f} MiB")
    return 0


def run(*command, **options) -> str:
    """Run a command and return what it prints; where it fails, end with what it printed."""
    arguments = [os.fspath(each) for each in command]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment, **options)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout


def find_pythons() -> dict[tuple[int, int], Path]:
    """Find an interpreter for each supported release: on the path, and among those of pyenv."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for release in SUPPORTED:
        name = f"python{release[0]}.{release[1]}"
        candidates = [shutil.which(name), *sorted(root.glob(f"{release[0]}.{release[1]}.*/bin/{name}"))]
        for python in filter(None, [*candidates, sys.executable]):
            asked = [python, "-c", "import sys, venv; print(*sys.version_info[:2])"]
            done = subprocess.run(asked, capture_output=True, text=True, check=False)
            if done.returncode == 0 and tuple(map(int, done.stdout.split())) == release:
                found[release] = Path(python)
                break
    return found


def build_source(folder: Path) -> Path:
    """Build the source distribution."""
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT)
    return next(folder.glob("*.tar.gz"))


def check_source(source: Path) -> str:
    """Check that the source distribution is complete, and that its version stands in the change log; return it."""
    with tarfile.open(source) as archive:
        top = archive.getnames()[0].partition("/")[0]
        names = {name.removeprefix(f"{top}/") for name in archive.getnames()}
        metadata = Parser().parsestr(archive.extractfile(f"{top}/PKG-INFO").read().decode())
    tracked = set(run("git", "-C", ROOT, "ls-files", "qpdiff", "tests", "docs", "examples", "LICENSE").split())
    if missing := sorted(tracked - names):
        sys.exit(f"{source.name} lacks {', '.join(missing)}")
    version = metadata["Version"]
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M):
        sys.exit(f"CHANGELOG.md has no section of version {version} with a date")
    if relative := re.findall(r"\]\((?!https?://)([^)]*)\)", metadata.get_payload()):
        sys.exit(f"the description links to {', '.join(relative)}, which leads nowhere on PyPI")
    return version


def build_wheels(source: Path, pythons: dict[tuple[int, int], Path], folder: Path) -> list[Path]:
    """Build a wheel for each ABI from the source distribution."""
    older = [release for release in pythons if release < STABLE]
    stable = [release for release in pythons if release >= STABLE][:1]
    wheels = []
    for release in older + stable:
        place = folder / f"wheel-{release[1]}"
        environment = new_environment(pythons[release], folder / f"build-{release[1]}")
        run(environment, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", place, source)
        wheels += place.glob("*.whl")
    return wheels


def check_wheel(wheel: Path, version: str) -> None:
    """Check that a wheel holds the engine, the types and the license, and neither tests nor C++ of the processor."""
    names = zipfile.ZipFile(wheel).namelist()
    wanted = [
        r"qpdiff/py\.typed",
        r"qpdiff/engines/compiled/_core.*\.(so|pyd)",
        r"qpdiff/engines/compiled/src/kernels\.cu",
    ]
    wanted += [rf"qpdiff-{re.escape(version)}\.dist-info/licenses/LICENSE"]
    lacking = [pattern for pattern in wanted if not any(re.fullmatch(pattern, name) for name in names)]
    beside = [name for name in names if not name.startswith(("qpdiff/", "qpdiff-")) or name.endswith("cpu.cpp")]
    if lacking or beside:
        sys.exit(f"{wheel.name}: lacks {lacking}, should not have {beside}")


def new_environment(python: Path, folder: Path) -> Path:
    """Make a new environment; return its interpreter."""
    run(python, "-m", "venv", folder)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def try_wheel(python: Path, release: tuple[int, int], wheels: list[Path], folder: Path) -> str:
    """Install a wheel in a new environment of a Python, solve and differentiate there; return what it prints."""
    tag = "abi3" if release >= STABLE else f"cp{release[0]}{release[1]}"
    (wheel,) = [each for each in wheels if each.name.split("-")[3] == tag]
    environment = new_environment(python, folder / f"try-{release[1]}")
    run(environment, "-m", "pip", "install", wheel)
    run(environment, "-m", "pip", "check")
    return run(environment, "-P", "-c", TRIED, cwd=folder).strip()


if __name__ == "__main__":
    sys.exit(main())
