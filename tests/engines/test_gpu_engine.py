"""The compiled engine on a GPU, with emulated blocks of threads: what is passed to the kernels, stored and sent back.

torch's tensors on the CPU pose as a GPU's; array-api-strict counts what goes to the host.
"""

import pickle
import re
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from emulated_gpu import SOURCES, pose
from problems import mostly_active, random_problem
from torch_inside import replace_inside

pytest.importorskip("torch")
import torch
from torch.autograd import gradcheck, gradgradcheck

import qpdiff
import qpdiff.torch
from qpdiff.backend import Backend
from qpdiff.backend.torch import TorchBackend
from qpdiff.engines import choice
from qpdiff.engines.reduction import Form

FORMS = {
    "no constraints": ("", "pd", "primal"),
    "primal": ("A G lb", "pd", "primal"),
    "dense dual": ("A", "pd", "dense_dual"),
    "diagonal dual": ("A lb ub", "diagonal", "diagonal_dual"),
    "bounds, Q not diagonal": ("A lb ub", "pd", "diagonal_dual"),
}


@pytest.fixture
def gpu(monkeypatch):
    replace_inside(monkeypatch, "on_host", lambda device: False)
    return pose(monkeypatch, TorchBackend)


@pytest.fixture
def module():
    return pytest.importorskip("qpdiff.engines.compiled.gpu", exc_type=ImportError)


def draw(form, shared=(), batch=5, n=9, m=8):
    parts, cost, _ = FORMS[form]
    return random_problem(np.random.default_rng(0), parts, cost=cost, batch=(batch,), n=n, m=m, p=2, shared=shared)


def tensors(operands):
    return {name: torch.tensor(value) for name, value in operands.items()}


def gradients(sol):
    return qpdiff.vjp(sol, x=np.ones(sol.x.shape))


def assert_same(ours, expected, names, accuracy=1e-6):
    for name in names:
        one, other = np.asarray(getattr(ours, name)), np.asarray(getattr(expected, name))
        np.testing.assert_allclose(one, other, rtol=accuracy, atol=accuracy, err_msg=name)


# ---- what is launched


@pytest.mark.parametrize("shared", [(), ("Q", "A", "G", "lb", "ub")], ids=["own", "shared"])
@pytest.mark.parametrize("form", FORMS)
def test_a_solve_and_a_derivative(gpu, form, shared):
    gpu.stream = 99
    operands = draw(form, shared)
    sol, expected = qpdiff.solve_qp(**tensors(operands)), qpdiff.solve_qp(**operands)
    name = FORMS[form][2]
    kernels = [f"solve_{name}_double"] + ["solve_primal_double"] * (name != "primal")
    assert [each.kernel for each in gpu.launches] == kernels
    assert_same(sol, expected, ("status", "x", "y", "z", "z_lb", "z_ub", "s", "objective"))
    assert_same(gradients(sol), gradients(expected), operands, 1e-5)
    assert [each.kernel for each in gpu.launches[len(kernels) :]] == [f"derivative_{name}_double"]
    assert {each.stream for each in gpu.launches} == {99}
    assert {each.blocks for each in gpu.launches} == {5}
    assert_same(qpdiff.jvp(sol, q=sol.x), qpdiff.jvp(expected, q=expected.x), ("x", "y", "z"), 1e-5)
    smooth, other = (qpdiff.vjp(s, x=np.ones(s.x.shape), smoothing=1e-2) for s in (sol, expected))
    assert_same(smooth, other, operands, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_float32(gpu, form):
    operands = draw(form)
    sol = qpdiff.solve_qp(**tensors(operands), dtype="float32")
    assert all(each.kernel.endswith("_float") for each in gpu.launches)
    assert sol.x.dtype == torch.float32
    assert_same(sol, qpdiff.solve_qp(**operands), ("status", "x"), 1e-2)
    assert gradients(sol).q.dtype == torch.float32


@pytest.mark.parametrize("form", sorted(FORMS.keys() - {"no constraints"}))
def test_prices(gpu, form):
    operands = draw(form)
    sizes = {of: operands[name].shape for of, name in (("A", "b"), ("G", "h"), ("bounds", "lb")) if name in operands}
    rng, first = np.random.default_rng(1), next(iter(sizes))
    prices = {"elastic": {of: 10 ** rng.uniform(-2, 0, size) for of, size in sizes.items()}}
    prices["elastic_quadratic"] = {first: 10 ** rng.uniform(-2, 0, sizes[first][1:])}
    sol = qpdiff.solve_qp(**tensors(operands), **{option: tensors(values) for option, values in prices.items()})
    expected = qpdiff.solve_qp(**operands, **prices)
    assert all(each.kernel.endswith("_priced") for each in gpu.launches)
    assert_same(sol, expected, ("status", "x", "y", "z", "z_lb", "z_ub", "s", "objective"))
    ours, others = gradients(sol), gradients(expected)
    assert_same(ours, others, operands, 1e-5)
    for option, values in prices.items():
        for of in values:
            np.testing.assert_allclose(getattr(ours, option)[of], getattr(others, option)[of], rtol=1e-5, atol=1e-5)


def test_no_problems(gpu):
    sol = qpdiff.solve_qp(**tensors(draw("primal", batch=0)))
    assert sol.x.shape == (0, 9)
    assert gradients(sol).Q.shape == (0, 9, 9)
    assert gpu.launches == []


def test_a_warm_start(gpu):
    operands = draw("primal")
    cold = qpdiff.solve_qp(**tensors(operands))
    for near in (cold, qpdiff.solve_qp(**{name: value[0] for name, value in tensors(operands).items()})):
        warm = qpdiff.solve_qp(**tensors(operands), warm_start=near)
        assert_same(warm, cold, ("status", "x", "z"))
    assert torch.all(qpdiff.solve_qp(**tensors(operands), warm_start=cold).iterations < cold.iterations)


# ---- the caller's arrays


def test_operands_are_read_where_they_are(gpu, module, monkeypatch):
    seen = []

    def launch(kernel, blocks, threads, shared_bytes, arguments, *others):
        seen.append({name: getattr(arguments.operands, name) for name in operands})
        return type(gpu).launch(gpu, kernel, blocks, threads, shared_bytes, arguments, *others)

    monkeypatch.setattr(module.cuda, "launch", launch)
    operands = tensors(draw("primal", shared=("A",)))
    operands["h"] = operands["h"][0].expand(5, -1)
    operands["Q"] = torch.stack([operands["Q"], operands["Q"]], dim=1)[:, 0]  # every second matrix of a larger array
    qpdiff.solve_qp(**operands)
    for name, value in operands.items():
        assert seen[0][name].data == value.data_ptr()
    assert [seen[0][name].stride for name in ("A", "h", "Q", "q", "lb")] == [0, 0, 162, 9, 9]


def test_layouts(gpu):
    operands = tensors(draw("primal"))
    expected = qpdiff.solve_qp(**operands)
    transposed = {name: value.movedim(0, -1).contiguous().movedim(-1, 0) for name, value in operands.items()}
    transposed["q"] = torch.complex(operands["q"], -operands["q"]).conj().imag  # with torch's negative bit
    assert transposed["q"].is_neg()
    sol = qpdiff.solve_qp(**transposed)
    assert torch.equal(sol.x, expected.x)
    assert_same(gradients(sol), gradients(expected), operands, 1e-12)


# ---- checks, and what goes to the host


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("q", (3, 1), np.nan),
        ("Q", (2, 0, 0), -5.0),
        ("Q", (4, 0, 1), 3.0),
        ("G", (1, 0, 0), np.inf),
        ("h", (0, 0), np.nan),
    ],
)
@pytest.mark.parametrize("parts", ["G", "A G"])
def test_bad_operands_are_named_as_elsewhere(gpu, parts, name, index, value):
    operands = random_problem(np.random.default_rng(0), parts, batch=(5,), n=9, m=4, p=2)
    operands[name][index] = value
    with pytest.raises(ValueError, match=name) as expected:
        qpdiff.solve_qp(**operands)
    with pytest.raises(ValueError, match=re.escape(str(expected.value)[:30])):
        qpdiff.solve_qp(**tensors(operands))
    qpdiff.solve_qp(**tensors(operands), check=False)


@pytest.mark.parametrize("form", FORMS)
def test_at_most_one_number_goes_to_the_host(strict, transfers, monkeypatch, form):
    def located(self, array):
        inner = array._array
        if not inner[:1].flags.c_contiguous:
            inner = np.ascontiguousarray(inner)
        return inner.ctypes.data, inner.strides[0] // inner.itemsize if len(inner) > 1 else 0, inner

    pose(monkeypatch, Backend)
    monkeypatch.setattr(Backend, "located", located)
    monkeypatch.setattr(Backend, "contiguous", lambda self, array: array)
    device = strict.Device("device1")
    operands = {name: strict.asarray(value, device=device) for name, value in draw(form).items()}
    transfers.clear()
    near = qpdiff.solve_qp(**operands, check=False)
    sol = qpdiff.solve_qp(**operands, check=False, warm_start=near)
    qpdiff.vjp(sol, x=sol.x)
    qpdiff.jvp(sol, q=sol.x)
    assert transfers == []
    qpdiff.solve_qp(**operands)
    assert len(transfers) == 1


# ---- memory


def least_shared(module, n=9, m=8):
    """The least bytes of shared memory with which all kernels can run for problems of these sizes."""
    shape = (n, 2, m, True, True, False)
    return max(module._sizes(derivative, one, shape, 8, 0).least_shared for derivative in (False, True) for one in Form)


@pytest.mark.parametrize("form", FORMS)
def test_matrices_in_the_workspace_and_nothing_stored(monkeypatch, module, form):
    operands = draw(form)
    expected = qpdiff.solve_qp(**operands)
    pose(monkeypatch, TorchBackend, shared_bytes=least_shared(module))
    monkeypatch.setattr("qpdiff.engines.compiled.engine.STORED_BYTES", (0, 0))
    sol = qpdiff.solve_qp(**tensors(operands))
    assert sol.linearization.factors.stored.last is None
    assert_same(sol, expected, ("status", "x"))
    assert_same(gradients(sol), gradients(expected), operands, 1e-5)


def test_fewer_blocks_than_problems_where_workspace_is_short(monkeypatch, module):
    operands, least = draw("primal", n=40, m=60), least_shared(module, 40, 60)
    gpu = pose(monkeypatch, TorchBackend, shared_bytes=least)
    workspace = module._sizes(False, 0, (40, 2, 60, True, False, False), 8, least).workspace
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 2 * workspace + 1)
    assert_same(qpdiff.solve_qp(**tensors(operands)), qpdiff.solve_qp(**operands), ("status", "x"))
    assert gpu.launches[0].blocks == 2


def test_shared_matrices_store_their_constants_once(gpu):
    sol = qpdiff.solve_qp(**tensors(draw("dense dual", shared=("Q", "A"))))
    assert sol.linearization.factors.stored.constant.shape[0] == 1
    sol = qpdiff.solve_qp(**tensors(draw("dense dual", shared=("Q",))))
    assert sol.linearization.factors.stored.constant.shape[0] == 5


def test_threads_are_such_as_the_kernels_take(module):
    counts = [module.threads_for(n, linear) for n in (1, 16, 17, 50, 100, 500) for linear in (0, 10, 300)]
    assert {count % 32 for count in counts} == {0}
    assert min(counts) == 32
    assert max(counts) == module.MOST_THREADS <= 256


# ---- derivatives in torch


@pytest.mark.parametrize("parts", ["", "A", "G", "A lb ub", "A G lb ub"])
def test_first_and_second_derivatives(gpu, parts):
    operands = mostly_active(np.random.default_rng(0), parts, 3, 2)
    inputs = [torch.tensor(value, requires_grad=True) for value in operands.values()]

    def solve(*values):
        given = dict(zip(operands, values, strict=True))
        return qpdiff.torch.solve_qp(**given | {"Q": (given["Q"] + given["Q"].mT) / 2}, tol=1e-12, rtol=1e-13).x

    assert gradcheck(solve, inputs, fast_mode=True)
    assert gradgradcheck(solve, inputs, fast_mode=True)
    assert {"solve", "derivative"} == {each.kernel.partition("_")[0] for each in gpu.launches}


# ---- the choice


def problem(**options):
    return qpdiff.validation.make_problem(
        dict.fromkeys(("G", "h", "A", "b", "lb", "ub")) | tensors(draw("primal", **options)), backend=None, dtype=None
    )


def test_auto_takes_it_where_it_is_switched_on(gpu, module, monkeypatch):
    assert choice.choose_engine("auto", problem(), False) is module
    assert choice.choose_engine("auto", problem(), True) is choice.array
    monkeypatch.delenv(choice.GPU_SWITCH)
    assert choice.choose_engine("auto", problem(), False) is choice.array
    assert choice.choose_engine("compiled", problem(), False) is module
    with pytest.raises(ValueError, match="verbose needs engine='array'"):
        choice.choose_engine("compiled", problem(), True)


def test_auto_leaves_large_batches_of_large_problems_to_the_array_engine(monkeypatch, module):
    large, least = {"n": 40, "m": 60}, least_shared(module, 40, 60)
    pose(monkeypatch, TorchBackend, shared_bytes=least)
    monkeypatch.setattr(module, "WAVES", 5 / 132)
    assert choice.choose_engine("auto", problem(**large), False) is module
    assert choice.choose_engine("auto", problem(batch=6), False) is module
    assert choice.choose_engine("auto", problem(**large, batch=6), False) is choice.array
    pose(monkeypatch, TorchBackend, shared_bytes=least // 2)
    with pytest.raises(ValueError, match="bytes of shared memory"):
        choice.choose_engine("compiled", problem(**large), False)


def test_what_is_missing_is_said(gpu, monkeypatch):
    monkeypatch.setattr(choice, "gpu_engine", lambda: (None, "it needs the package cuda-bindings"))
    assert choice.choose_engine("auto", problem(), False) is choice.array
    with pytest.raises(ImportError, match="cuda-bindings"):
        choice.choose_engine("compiled", problem(), False)


def test_the_choice_is_explained_in_the_same_words_everywhere(gpu, module, monkeypatch):
    """`qpdiff info` prints what `automatic_engine` says."""
    assert choice.explain_choice("auto", problem()).startswith("compiled engine on")
    assert choice.automatic_engine(on_gpu=True) == (module, choice.gpu_engine()[1])
    monkeypatch.delenv(choice.GPU_SWITCH)
    assert choice.explain_choice("compiled", problem()).endswith(choice.gpu_engine()[1])
    off = choice.automatic_engine(on_gpu=True)
    assert off == (None, "is off, as no GPU has run its kernels yet; QPDIFF_GPU_ENGINE=1 switches it on")
    assert choice.explain_choice("auto", problem()).endswith(f": the compiled one {off[1]}")
    monkeypatch.setattr(choice, "gpu_engine", lambda: (None, "it needs the package cuda-bindings"))
    _, missing = choice.automatic_engine(on_gpu=True)
    assert missing == "does not run: it needs the package cuda-bindings"
    assert choice.explain_choice("auto", problem()).endswith(f": the compiled one {missing}")


def test_a_solution_pickles(gpu):
    sol = qpdiff.solve_qp(**tensors(draw("dense dual")))
    again = pickle.loads(pickle.dumps(replace(sol)))
    assert_same(gradients(again), gradients(sol), ("Q", "q", "A", "b"), 1e-12)


# ---- the wheel


def test_the_wheel_has_the_sources_that_nvrtc_reads():
    if not SOURCES.exists():
        pytest.skip("no sources")
    needed, queue = set(), [SOURCES / "kernels.cu"]
    while queue:
        path = queue.pop()
        needed.add(path)
        for name in re.findall(r'#include "(.+)"', path.read_text(encoding="utf-8")):
            found = next(p for p in ((path.parent / name).resolve(), SOURCES / name) if p.exists())
            if found not in needed:
                queue.append(found)
    root = Path(__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"]["exclude"]
    sources = [path for path in SOURCES.rglob("*.*") if path.is_file()]
    assert needed == {p for p in sources if not any(p.relative_to(root).match(pattern) for pattern in patterns)}


# ---- the benchmark


class Clock:
    """An event that has been recorded at once."""

    def __init__(self):
        self.time = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.time - self.time)

    def synchronize(self):
        pass


def test_the_benchmark_of_the_kernels(gpu, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    kernels = pytest.importorskip("kernels", exc_type=ImportError)

    def missing(operands):
        raise ImportError("no module named qpth")

    monkeypatch.setattr(kernels.Events, "__init__", lambda self: setattr(self, "kernels", []))
    monkeypatch.setattr(kernels.Events, "event", lambda self: Clock())
    monkeypatch.setattr(kernels, "REPEATS", 1)
    monkeypatch.setattr(kernels, "THREADS", (32, 64))
    kernels.solve_small("torch")
    page = tmp_path / "gpu.md"
    kernels.write(page, [kernels.Row(3, 10, 10, 0)], kernels.Events(), "torch", {"qpth": missing}, "a CPU")
    lines = [line.split("|")[2:4] for line in page.read_text().splitlines() if line.startswith("| 3, 10")]
    assert [who.strip() for who, _ in lines] == ["32 threads", "32 threads", "64 threads", "64 threads", "qpth"]
    assert "ImportError: no module named qpth" in page.read_text()
