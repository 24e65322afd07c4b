"""The solvers that are measured, and where the code of each one is."""

from __future__ import annotations

from typing import Any, NamedTuple


class Solver(NamedTuple):
    """One line of every table."""

    name: str
    code: str
    """Module and class of the peer."""
    packages: tuple[str, ...]
    """Whose releases are reported."""
    environment: str | None = None
    """Of `environments.ENVIRONMENTS`; None is the one the benchmark runs in."""
    differentiable: bool = False
    framework: str = "NumPy"
    """Whose arrays it is called with: NumPy, torch or JAX."""
    options: dict[str, Any] = {}  # noqa: RUF012 - not changed

    @property
    def own(self) -> bool:
        return self.name.startswith("qpdiff")


QPDIFF = Solver("qpdiff", "peers.qpdiff:Qpdiff", ("qpdiff", "numpy", "scipy"), differentiable=True)
QPTH = Solver("qpth", "peers.qpth:Qpth", ("qpth", "torch"), "qpth", True, "torch")
MOREAU = Solver("Moreau", "peers.moreau:Moreau", ("moreau", "torch"), "moreau", True, "torch")


def one_by_one(name: str, peer: str = "one_by_one") -> Solver:
    module = name.lower()
    return Solver(name, f"peers.{peer}:OneByOne", (module,), module, options={"solver": module})


ON_CPU = [
    QPDIFF,
    QPDIFF._replace(name="qpdiff array", options={"engine": "array"}),
    Solver("qpdiff torch", "peers.qpdiff_torch:QpdiffTorch", ("qpdiff", "torch"), "qpdiff-torch", True, "torch"),
    Solver("qpdiff JAX", "peers.qpdiff_jax:QpdiffJax", ("qpdiff", "jax"), "qpdiff-jax", True, "JAX"),
    QPTH,
    Solver("QPLayer", "peers.proxsuite:QPLayer", ("proxsuite", "torch"), "proxsuite", True, "torch"),
    MOREAU,
    MOREAU._replace(name="Moreau ipm", options={"solver": "ipm"}),
    Solver(
        "cvxpylayers",
        "peers.cvxpylayers:Cvxpylayers",
        ("cvxpylayers", "diffcp", "scs", "torch"),
        "cvxpylayers",
        True,
        "torch",
    ),
    Solver("qpax", "peers.qpax:Qpax", ("qpax", "jax"), "qpax", True, "JAX"),
    Solver("ProxSuite", "peers.proxsuite:Dense", ("proxsuite",), "proxsuite"),
    *map(one_by_one, ("PIQP", "DAQP", "quadprog", "Clarabel", "OSQP", "ElastiQP")),
]

QPDIFF_SPARSE = QPDIFF._replace(name="qpdiff sparse")
SPARSE = [
    QPDIFF_SPARSE,
    MOREAU,
    MOREAU._replace(name="Moreau ipm", options={"solver": "ipm"}),
    *[one_by_one(name, "sparse") for name in ("PIQP", "OSQP", "Clarabel", "ProxSuite")],
]
"""Those of the sparse rows."""


def counterpart(solver: Solver, solvers: list[Solver]) -> str:
    """Return the name of the qpdiff, among the solvers, that is called the same way; without one, of the first."""
    alike = (other.name for other in solvers if other.own and other.framework == solver.framework)
    return next(alike, QPDIFF.name)


def on_gpu(library: str, cuda: int) -> list[Solver]:
    """Return qpdiff on arrays of CuPy or torch, and qpth on the same GPU, for a version of CUDA."""
    environment = f"cupy-{cuda}" if library == "cupy" else library
    packages = ("qpdiff", f"cupy-cuda{cuda}x") if library == "cupy" else ("qpdiff", "torch")
    return [
        QPDIFF._replace(packages=packages, environment=environment, options={"library": library}),
        QPTH._replace(environment="torch-cuda", options={"library": "torch-cuda"}),
    ]
