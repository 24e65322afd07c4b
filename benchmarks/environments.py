"""The environments of the solvers: which releases each is run with, and the folder that holds them.

Every environment is a virtual environment of its own, since the solvers ask for releases of the same libraries that
exclude each other. It is made once and used again for as long as its list below stays the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUMPY, SCIPY, CVXPY = "numpy==2.4.6", "scipy==1.17.1", "cvxpy==1.9.3"
# Exact, since another torch may bring gigabytes of libraries for GPUs.
TORCH = "torch==2.13.0"
JAX = ["jax==0.10.2", "jaxlib==0.10.2"]
# qpth asks for NumPy < 2 and runs with 2; it imports CVXPY whether or not that is used.
TORCH_AND_QPTH = [[TORCH, NUMPY, CVXPY], ["--no-deps", "qpth==0.0.18"]]

ENVIRONMENTS: dict[str, list[list[str]]] = {
    "qpdiff-torch": [[TORCH, NUMPY, SCIPY], ["--editable", f"{ROOT}[threads]"]],
    "qpdiff-jax": [[*JAX, NUMPY, SCIPY], ["--editable", f"{ROOT}[threads]"]],
    "qpth": TORCH_AND_QPTH,
    "proxsuite": [[TORCH, NUMPY, SCIPY, "proxsuite==0.8.0"]],
    "moreau": [[TORCH, NUMPY, SCIPY, "moreau==0.4.1"]],
    "qpax": [[*JAX, NUMPY, SCIPY, "qpax==0.1.4"]],
    "cvxpylayers": [[TORCH, NUMPY, SCIPY, CVXPY, "diffcp==1.1.9", "cvxpylayers==1.2.0"]],
    "piqp": [[NUMPY, SCIPY, "piqp==0.7.0"]],
    "daqp": [[NUMPY, SCIPY, "daqp==0.11.0"]],
    "quadprog": [[NUMPY, SCIPY, "quadprog==0.1.14"]],
    "clarabel": [[NUMPY, SCIPY, "clarabel==0.11.1"]],
    "osqp": [[NUMPY, SCIPY, "osqp==1.1.3"]],
    "elastiqp": [[NUMPY, SCIPY, "elastiqp==0.2.0"]],
    "cupy-12": [["--editable", f"{ROOT}[cuda12]"]],
    "cupy-13": [["--editable", f"{ROOT}[cuda13]"]],
    "torch-cuda": [*TORCH_AND_QPTH, ["--editable", str(ROOT)]],
}
"""What is installed in each: the arguments of each call of pip."""


def interpreter(name: str | None, folder: Path) -> Path:
    """Return the Python of an environment, made if it is not there; without a name, the one that runs this."""
    if name is None:
        return Path(sys.executable)
    home = folder / name
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    receipt = home / "installed.json"
    if receipt.exists() and json.loads(receipt.read_text()) == ENVIRONMENTS[name]:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
    for arguments in ENVIRONMENTS[name]:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)
    receipt.write_text(json.dumps(ENVIRONMENTS[name]))
    return python
