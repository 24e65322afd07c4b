"""The soak in some seconds: every stage runs, and what docs/reliability.md promises holds."""

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_every_promise_is_kept_in_a_short_run(tmp_path):
    page = tmp_path / "reliability.md"
    command = [sys.executable, SOAK, "--quick", "--minutes", "0.05", "--output", page]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    assert text.count("| kept |") > 30
