"""Describe the machine that a benchmark ran on, and make a table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import numpy as np

import qpdiff


def machine(*packages: str) -> str:
    """Describe the processor, its load, the limits on threads, and the versions of installed packages."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = names[0] if names else platform.processor() or platform.machine()
    limits = [f"{k}={os.environ[k]}" for k in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS") if k in os.environ]
    versions = [f"qpdiff {qpdiff.__version__}"]
    for package in ("numpy", *packages):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return (
        f"{model}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, "
        f"{' '.join(limits) or 'threads not limited'}; Python {platform.python_version()}, {', '.join(versions)}"
    )


def digits(value: float, count: int = 3) -> str:
    """Write a number with so many significant digits, and without an exponent."""
    return np.format_float_positional(value, precision=count, unique=False, fractional=False, trim="-")


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Make a Markdown table, its columns aligned to read well on a terminal too; all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (headings, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (aligned[0], rule, *aligned[1:]))
