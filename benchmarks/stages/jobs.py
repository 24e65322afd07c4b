"""The calls that the stages make: each solves and differentiates the same batch at every call, and returns arrays."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

import numpy as np
import scipy.sparse
from families import mpc, tv
from operands import Matrices

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from elastic_problems import contradictory
from problems import infeasible, optnet, random_problem, row_beyond_bounds

import qpdiff
from qpdiff.backend.threads import THREADS
from qpdiff.engines.choice import compiled_engine, explain_choice
from qpdiff.prices import with_prices
from qpdiff.problem import OPERANDS
from qpdiff.validation import make_problem

Job = Callable[[], list[np.ndarray]]
ENGINES = ["compiled", "array"] if compiled_engine()[0] is not None else ["array"]


def _shared(rng):
    operands = optnet(rng, (90,), 25, 12, 3)
    return operands | {name: operands[name][0] for name in ("Q", "G", "A")}


def _diagonal(rng):
    operands = optnet(rng, (60,), 40, 8, 0)
    return operands | {"Q": np.eye(40) * rng.uniform(0.5, 2.0, (60, 1, 40))}


def sparse(operands: dict) -> dict:
    """Return operands of a family, whose matrices are given as qpdiff takes them."""
    return {name: qpdiff.Sparse(*value) if isinstance(value, Matrices) else value for name, value in operands.items()}


def _made_dense(rng):
    operands = optnet(rng, (300,), 8, 5, 2)
    G = qpdiff.Sparse.like(scipy.sparse.csr_array(np.ones((5, 8))), operands["G"].reshape(-1, 40))
    return operands | {"Q": scipy.sparse.eye_array(8, format="csr"), "G": G}


def with_a_price(rng, batch: int, n: int) -> dict:
    """Draw problems without a feasible point, and one price of all violations."""
    return contradictory(rng, "A G lb ub", batch=(batch,), n=n, m=n, p=n // 4) | {"elastic": 10.0}


def _with_prices_of_rows(rng):
    operands = contradictory(rng, "A G lb ub", batch=(60,), n=8, m=8, p=4)
    price = np.array([np.inf, np.inf, np.inf, 0.0, 1.0, 3.0, 10.0, 1.0])  # the second half contradicts the first
    return operands | {"elastic": {"A": np.full(4, 5.0), "G": price}, "elastic_quadratic": {"A": 0.1}}


def _with_prices_of_problems(rng):
    operands = contradictory(rng, "A G lb ub", batch=(60,), n=8, m=8, p=4)
    prices = {name: rng.uniform(1.0, 10.0, size=operands[of].shape) for name, of in (("A", "b"), ("G", "h"))}
    return operands | {"elastic": prices | {"bounds": rng.uniform(1.0, 10.0, size=(60, 8))}}


CASES = {
    "small": lambda rng: optnet(rng, (300,), 8, 5, 2),
    "medium": lambda rng: optnet(rng, (40,), 40, 20, 4),
    "large": lambda rng: optnet(rng, (3,), 140, 20, 4),
    "diagonal": _diagonal,
    "shared": _shared,
    "bounds": lambda rng: random_problem(rng, "A G lb ub", batch=(100,), infinite=0.2, fixed=1),
    "linear": lambda rng: random_problem(rng, "G lb ub", batch=(100,), cost="lp"),
    "infeasible": lambda rng: infeasible(rng, row_beyond_bounds, "pd", (6, 5, 2)),
}
"""Batches for every way through the solver: lane groups, one by one, BLAS; each reduced form; certificates."""
SPARSE = {
    "sparse": lambda rng: sparse(mpc(rng, 40, 10, 8, 3)),
    "sparse, one by one": lambda rng: sparse(tv(rng, 3, 250)),
    "sparse, made dense": _made_dense,
}
"""Batches of sparse matrices: shared ones and others for each problem, in lane groups and not."""
PRICED = {
    "a price": lambda rng: with_a_price(rng, 60, 8),
    "a price, large": lambda rng: with_a_price(rng, 2, 140),
    "prices of rows": _with_prices_of_rows,
    "prices of problems": _with_prices_of_problems,
}
"""Batches of problems whose constraints contradict each other, with prices of violations."""
ANY_ENGINE = SPARSE | PRICED
"""Batches for the engine that `engine="auto"` takes."""


@cache
def draw(case: str) -> dict:
    """Draw the operands of a case once: products in it have other bits where BLAS has another number of threads."""
    return (CASES | ANY_ENGINE)[case](np.random.default_rng(0))


def engine_for(given: dict) -> str:
    """Return the engine that `engine="auto"` takes for these operands and prices."""
    prices = {name: given.get(name) for name in ("elastic", "elastic_quadratic")}
    operands, _ = with_prices({name: given.get(name) for name in OPERANDS}, **prices)
    return explain_choice("auto", make_problem(operands)).split()[0]


@contextmanager
def working_threads(count: int) -> Iterator[None]:
    """Solve with so many threads in this context."""
    token = THREADS.set(count)
    try:
        yield
    finally:
        THREADS.reset(token)


def solve(given: dict, engine: str, **options) -> list[np.ndarray]:
    """Solve and differentiate with operands and prices; return all that this gives."""
    sol = qpdiff.solve_qp(**given, engine=engine, **options)
    gradients = qpdiff.vjp(sol, x=np.ones_like(sol.x), unsolved="zero")
    parts = [sol.x, sol.y, sol.z, sol.z_lb, sol.z_ub, sol.s, sol.status, sol.iterations, sol.objective]
    return [*parts, *(array for name in given for array in arrays(getattr(gradients, name)))]


def arrays(value) -> list[np.ndarray]:
    """Return the arrays that an operand, a dict of prices, or its gradient consists of."""
    if isinstance(value, dict):
        return [array for each in value.values() for array in arrays(each)]
    return [value.values if isinstance(value, qpdiff.Sparse) else value]


def each_array(change: Callable[[np.ndarray], np.ndarray], value):
    """Return operands, or a dict of them, whose arrays are changed; the values of a `Sparse` are such an array."""
    if isinstance(value, dict):
        return {name: each_array(change, each) for name, each in value.items()}
    if isinstance(value, qpdiff.Sparse):
        return value.with_values(change(value.values))
    return change(value) if isinstance(value, np.ndarray) else value


def by_engines() -> dict[str, Job]:
    """Return a job for each engine and case."""
    return {f"{engine}: {case}": partial(solve, draw(case), engine) for engine in ENGINES for case in CASES}


def by_choice(cases: Collection[str] = ANY_ENGINE) -> dict[str, Job]:
    """Return a job for each of these cases, with the engine that `engine="auto"` takes for it in the name."""
    return {f"{engine_for(draw(case))}: {case}": partial(solve, draw(case), "auto") for case in cases}


def by_options() -> dict[str, Job]:
    """Return jobs for each engine that take other functions and options."""
    operands, jobs = draw("bounds"), {}
    tangents = {name: np.where(np.isfinite(value), value, 0.0) for name, value in operands.items()}
    for engine in ENGINES:
        start = qpdiff.solve_qp(**operands, engine=engine)

        def jvp(start=start):
            return list(qpdiff.jvp(start, **tangents)[:3])

        def smoothed(start=start):
            return [qpdiff.vjp(start, x=np.ones_like(start.x), smoothing=1e-3).h]

        def objective(start=start):
            return [qpdiff.vjp(start, objective=np.ones_like(start.objective)).h]

        jobs |= {f"{engine}: jvp": jvp, f"{engine}: smoothing": smoothed, f"{engine}: objective": objective}
        jobs[f"{engine}: warm start"] = partial(solve, operands, engine, warm_start=start)
        jobs[f"{engine}: float32"] = partial(solve, draw("small"), engine, dtype="float32")
        jobs[f"{engine}: progress"] = partial(solve, draw("small"), engine, progress=lambda done, batch: None)
        jobs[f"{engine}: refused"] = partial(_refused, engine)
    return jobs


def _refused(engine: str) -> list[np.ndarray]:
    """Pass a matrix that is indefinite, and an infinite number."""
    Q = np.diag([1.0, -1.0])
    for operands in ({"Q": Q, "q": np.zeros(2)}, {"Q": np.eye(2), "q": np.full((50, 2), np.inf)}):
        with suppress(ValueError):
            qpdiff.solve_qp(**operands, engine=engine)
    return []


# ---- adapters; each returns None where its framework is not installed


def by_adapters() -> dict[str, Job]:
    """Return a job for each adapter whose framework is installed."""
    makers = [_torch, _jax, _autograd, _dask, _cvxpy, _cvxpylayers, _qpsolvers, _files]
    jobs: dict[str, Job] = {}
    for make in makers:
        with suppress(ImportError):
            jobs |= make()
    return jobs


def _torch() -> dict[str, Job]:
    import torch

    import qpdiff.torch

    operands = {name: torch.from_numpy(value) for name, value in draw("small").items()}
    torch.manual_seed(0)
    layer = qpdiff.torch.OptNet(8, 5).double()

    def leaves():
        return {name: value.clone().requires_grad_() for name, value in operands.items()}

    def gradients():
        given = leaves()
        sol = qpdiff.torch.solve_qp(**given)
        sol.x.sum().backward()
        return [sol.x.detach().numpy(), *(value.grad.numpy() for value in given.values())]

    def second_order():
        given = leaves()
        x = qpdiff.torch.solve_qp(**given).x
        first = torch.autograd.grad((x**2).sum(), [given["q"], given["h"]], create_graph=True)
        return [part.numpy() for part in torch.autograd.grad(sum((g**2).sum() for g in first), list(given.values()))]

    def optnet_layer():
        layer.zero_grad()
        layer(operands["q"]).sum().backward()
        return [parameter.grad.numpy().copy() for parameter in layer.parameters()]

    def qp_function():
        given = leaves()
        x = qpdiff.torch.QPFunction()(*(given[name] for name in ("Q", "q", "G", "h", "A", "b")))
        x.sum().backward()
        return [given["G"].grad.numpy()]

    return {
        "torch": gradients, "torch: second order": second_order, "torch: OptNet": optnet_layer,
        "torch: QPFunction": qp_function,
    }  # fmt: skip


def _jax() -> dict[str, Job]:
    import jax

    import qpdiff.jax

    jax.config.update("jax_enable_x64", True)
    operands = draw("small")
    names = tuple(operands)

    def loss(*values):
        return qpdiff.jax.solve_qp(**dict(zip(names, values, strict=True))).x.sum()

    compiled = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(names)))))

    def under_jit():
        value, gradients = compiled(*operands.values())
        return [np.asarray(value), *map(np.asarray, gradients)]

    def eager():
        return [np.asarray(qpdiff.jax.solve_qp(**operands).x)]

    return {"JAX: jit": under_jit, "JAX: eager": eager}


def _autograd() -> dict[str, Job]:
    import autograd

    import qpdiff.autograd

    operands = draw("small")
    gradient = autograd.grad(lambda q: qpdiff.autograd.solve_qp(**operands | {"q": q}).x.sum())
    return {"autograd": lambda: [gradient(operands["q"])]}


def _dask() -> dict[str, Job]:
    import dask
    import dask.array as da

    import qpdiff.dask

    operands = draw("small")

    def call():
        sol = qpdiff.dask.solve_qp(**{k: da.from_array(v, chunks=(100, *v.shape[1:])) for k, v in operands.items()})
        grads = qpdiff.dask.vjp(sol, x=da.ones_like(sol.x))
        return list(dask.compute(sol.x, grads.G, scheduler="sync"))

    return {"Dask": call}


def _cvxpy() -> dict[str, Job]:
    import cvxpy

    x, point = cvxpy.Variable(6), cvxpy.Parameter(6)
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(x - point)), [cvxpy.sum(x) == 1, x >= 0])
    layer = qpdiff.from_cvxpy(problem, [point])
    points = np.random.default_rng(0).normal(size=(50, 6))

    def by_layer():
        solution = layer(points)
        return [solution[x], *layer.vjp(solution, np.ones((50, 6)))]

    def by_solver():
        point.value = points[0]
        problem.solve(solver=qpdiff.CVXPYSolver())
        return [x.value]

    return {"from_cvxpy": by_layer, "CVXPYSolver": by_solver}


def _cvxpylayers() -> dict[str, Job]:
    import cvxpy
    import torch
    from cvxpylayers.torch import CvxpyLayer

    from qpdiff.cvxpylayers import LayerSolver

    x, point = cvxpy.Variable(6), cvxpy.Parameter(6)
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(x - point)), [cvxpy.sum(x) == 1, x >= 0])
    layer = CvxpyLayer(problem, parameters=[point], variables=[x], solver=LayerSolver())
    points = np.random.default_rng(0).normal(size=(50, 6))

    def call():
        given = torch.from_numpy(points).requires_grad_()
        (found,) = layer(given)
        (found**2).sum().backward()
        return [found.detach().numpy(), given.grad.numpy()]

    return {"cvxpylayers": call}


def _qpsolvers() -> dict[str, Job]:
    import qpsolvers

    import qpdiff.qpsolvers

    qpdiff.qpsolvers.register()
    operands = {name: value[0] for name, value in draw("small").items()}
    order = [operands[name] for name in ("Q", "q", "G", "h", "A", "b")]
    return {"qpsolvers": lambda: [qpsolvers.solve_qp(*order, solver="qpdiff")]}


def _files() -> dict[str, Job]:
    from typer.testing import CliRunner

    from qpdiff.cli import app
    from qpdiff.files import read_problem

    folder = Path(tempfile.mkdtemp(prefix="qpdiff-soak-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file, output = folder / "problem.npz", folder / "solution.npz"
    np.savez(file, **draw("bounds"))

    def read():
        return list(read_problem(file).operands.values())

    def command():
        result = CliRunner().invoke(app, ["solve", os.fspath(file), "-o", os.fspath(output)])
        with np.load(output) as found:
            return [np.asarray(result.exit_code), found["x"]]

    return {"files": read, "command": command}


def all_jobs(quick: bool) -> dict[str, Job]:
    """Return every job."""
    return by_engines() | by_choice() | ({} if quick else by_options() | by_adapters())
