"""The linear algebra of the compiled engine, of each team: linalg_test.cpp, compiled here."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from qpdiff.engines.choice import compiled_engine

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "qpdiff" / "engines" / "compiled" / "src"
COMPILER = next(filter(None, map(shutil.which, [os.environ.get("CXX", ""), "g++", "clang++"])), None)
OPTIONS = ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno", "-freciprocal-math"]
"""Those of CMakeLists.txt."""
engine, _ = compiled_engine()
LEVELS = [2, 3, 4] if platform.machine() in ("x86_64", "AMD64") else [0]


@pytest.mark.skipif(COMPILER is None or not SOURCES.exists(), reason="no C++ compiler, or no sources")
@pytest.mark.parametrize("level", LEVELS)
def test_linear_algebra(level, tmp_path):
    if engine is None:
        pytest.skip("the compiled engine was not built")
    from qpdiff.engines.compiled import _level

    if level > _level.highest():
        pytest.skip("not for this processor")
    program = tmp_path / "linalg_test"
    machine = [f"-march=x86-64-v{level}"] if level else []
    source = HERE / "linalg_test.cpp"
    command = [COMPILER, "-std=c++20", "-O2", *OPTIONS, "-Wno-psabi", *machine, f"-I{SOURCES}", source, "-o", program]
    subprocess.run(command, check=True, timeout=300)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
