"""CuPy's backend where there is no GPU: its calls against CuPy's signatures, its logic against NumPy's backend.

array-api-strict stands in for CuPy, with a Cholesky factorisation that leaves behind what cuSOLVER may, and SciPy's
triangular solve. What runs on a GPU is tested there, by all tests that take the fixture `xp`.
"""

import ast
import inspect
import pathlib
import pickle
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
from problems import infeasible, parallel_rows, random_problem, repeated_inequalities

import qpdiff
from qpdiff.backend import choose_backend, floating_types
from qpdiff.backend.cupy import CuPyBackend
from qpdiff.differentiation import _cotangent
from qpdiff.problem import make_layout


class Recorder:
    """A namespace that tells how its functions are called: name, number of arguments, keywords; and other names."""

    def __init__(self, namespace, tell, prefix=""):
        self._namespace, self._tell, self._prefix = namespace, tell, prefix

    def __getattr__(self, name):
        value, full = getattr(self._namespace, name), self._prefix + name
        if isinstance(value, ModuleType | SimpleNamespace):
            return Recorder(value, self._tell, f"{full}.")
        if isinstance(value, type) or not callable(value):
            self._tell(full, None, ())
            return value

        def call(*args, **kwargs):
            self._tell(full, len(args), tuple(sorted(kwargs)))
            return value(*args, **kwargs)

        return call


# ---- the stand-in


def failed(M, leftover):
    """What is left of a matrix of which the Cholesky factorisation has failed."""
    if leftover == "nan":
        return np.full_like(M, np.nan)
    L = np.tril(M)
    if leftover == "untouched":
        return L
    for j in range(len(M)):
        pivot = M[j, j] - L[j, :j] @ L[j, :j]
        if not pivot > 0:
            L[j, j] = {"pivot": pivot, "zero": 0.0, "nan on the diagonal": np.nan, "columns to the left": M[j, j]}[
                leftover
            ]
            return L
        L[j, j] = np.sqrt(pivot)
        L[j + 1 :, j] = (M[j + 1 :, j] - L[j + 1 :, :j] @ L[j, :j]) / L[j, j]
    raise AssertionError("this matrix is positive definite")


LEFTOVERS = ["nan", "nan on the diagonal", "pivot", "zero", "untouched", "columns to the left"]


class StandIn:
    """CuPy's backend on arrays of array-api-strict.

    Attributes
    ----------
    calls : set
        How functions of CuPy's were called.
    elsewhere : set
        Those that were called while the arrays' GPU need not have been the current one.
    copied : list of tuple
        The shapes of matrices that a product of CuPy's would have copied.
    """

    def __init__(self, strict, monkeypatch, leftover):
        self.strict, self.calls, self.elsewhere, self.copied = strict, set(), set(), []
        self.device, self.depth = strict.Device("device1"), 0
        array = type(strict.asarray(0.0))

        def cholesky(M):
            assert M.shape[-1] > 0
            assert M.shape[0] > 0
            out = [self._cholesky(matrix, leftover) for matrix in np.reshape(M._array, (-1, *M.shape[-2:]))]
            return self.array(np.reshape(np.stack(out), M.shape))

        def solve_triangular(L, R, trans, lower):
            assert L.shape[:-2] == R.shape[:-2], "batches do not broadcast"
            assert L.ndim == R.ndim
            assert 0 not in R.shape
            options = {"trans": trans, "lower": lower, "check_finite": False}
            return self.array(scipy.linalg.solve_triangular(L._array, R._array, **options))

        strict_linalg = {name: getattr(strict.linalg, name) for name in strict.linalg.__all__}
        added = {
            "linalg": SimpleNamespace(**strict_linalg | {"cholesky": cholesky}),
            "ascontiguousarray": lambda a: self.array(np.ascontiguousarray(a._array)),
            "cuda": SimpleNamespace(Device=self.current, runtime=SimpleNamespace(is_hip=False)),
        }
        public = {name: getattr(strict, name) for name in dir(strict) if not name.startswith("_")}
        self.xp = Recorder(SimpleNamespace(**public | added), self.tell)
        modules = {
            "cupyx": SimpleNamespace(errstate=lambda linalg: np.errstate(all="ignore")),
            "cupyx.scipy": SimpleNamespace(),
            "cupyx.scipy.linalg": SimpleNamespace(solve_triangular=solve_triangular),
        }
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, Recorder(module, self.tell, f"{name}."))
        monkeypatch.setattr("qpdiff.validation.choose_backend", self.choose)
        product = array.__matmul__

        def matmul(a, b):
            if a.ndim > 2 or b.ndim > 2:  # cupy/_core/_routines_linalg.pyx: both go through ascontiguousarray
                matrices = (m for m in (a, b) if min(m.shape[-2:]) > 1)
                self.copied += [m.shape for m in matrices if not m._array.flags.c_contiguous]
            return product(a, b)

        monkeypatch.setattr(array, "__matmul__", matmul)
        for name in ("__index__", "__imatmul__", "__setitem__", "to_device"):
            monkeypatch.setattr(array, name, lambda *_: pytest.fail("not for arrays of CuPy's, or of the caller's"))

    def _cholesky(self, M, leftover):
        try:
            return np.linalg.cholesky(M)
        except np.linalg.LinAlgError:
            return failed(M, leftover)

    def tell(self, name, count, keywords):
        self.calls.add((name, count, keywords))
        if count is not None and not self.depth:
            self.elsewhere.add(name)

    @contextmanager
    def current(self, device):
        assert device == self.device
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def choose(self, operands, name):
        backend, arrays = choose_backend(operands, name)
        return CuPyBackend(self.xp, backend.device) if backend.xp is self.strict else backend, arrays

    def array(self, value, dtype=None):
        return self.strict.asarray(np.asarray(value, dtype=dtype), device=self.device)

    def operands(self, operands, dtype="float64"):
        return {name: self.array(value, dtype) for name, value in operands.items()}

    def to_numpy(self, value):
        return np.asarray(self.strict.asarray(value, device=self.strict.Device("CPU_DEVICE")))


@pytest.fixture
def stand_in(request, strict, monkeypatch):
    return StandIn(strict, monkeypatch, getattr(request, "param", "nan"))


# ---- the logic


FORMS = {
    "no constraints": ("", "pd"),
    "primal": ("A G lb ub", "psd"),
    "primal, linear program": ("G lb", "lp"),
    "dense dual": ("A", "pd"),
    "diagonal dual": ("A lb ub", "diagonal"),
}


def draw(form, *, batch=6, shared=()):
    parts, cost = FORMS[form]
    return random_problem(np.random.default_rng(0), parts, cost=cost, batch=(batch,), n=9, m=12, p=2, shared=shared)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("stand_in", LEFTOVERS, indirect=True)
def test_matrices_that_are_not_positive_definite_are_flagged(stand_in, dtype, scale):
    rng, n = np.random.default_rng(0), 7
    vectors = np.linalg.qr(rng.normal(size=(200, n, n)))[0]
    values = rng.uniform(0.1, 1.0, size=(200, n)) * np.where(rng.uniform(size=(200, n)) < 0.1, -1.0, 1.0)
    M = scale * (vectors * values[:, None, :]) @ vectors.mT
    M[0, 2, 1] = M[0, 1, 2] = np.nan
    expected = np.all(values > 0, axis=-1) & np.all(np.isfinite(M), axis=(-2, -1))
    backend, r = CuPyBackend(stand_in.xp, stand_in.device), rng.normal(size=(200, n))
    for size in (1, 200):  # one matrix has a routine of its own
        for i in range(0, 200 if size == 200 else 20, size):
            part = slice(i, i + size)
            factor, positive = backend.factor(stand_in.array(M[part], dtype))
            x = stand_in.to_numpy(backend.solve(factor, stand_in.array(r[part], dtype)))
            inverse = stand_in.to_numpy(backend.substitution(factor))
            good = expected[part]
            np.testing.assert_array_equal(stand_in.to_numpy(positive), good[:, None])
            within = {"rtol": 1e-9 if dtype == "float64" else 1e-3, "atol": 0.0}
            np.testing.assert_allclose(x[~good], r[part][~good].astype(dtype), **within)
            solution = np.linalg.solve(M[part][good], r[part][good][..., None])
            error = np.linalg.norm(x[good] - solution[..., 0], axis=-1) / np.linalg.norm(solution[..., 0], axis=-1)
            assert np.max(error, initial=0.0) <= within["rtol"]
            np.testing.assert_allclose((inverse.mT @ inverse @ M[part])[good], np.eye(n) + 0 * M[part][good], atol=1e-3)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shared", [(), ("Q", "A", "G")], ids=["own", "shared"])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_solutions_and_derivatives_as_numpy(stand_in, form, shared, dtype):
    operands = {name: value.astype(dtype) for name, value in draw(form, shared=shared).items()}
    sol = qpdiff.solve_qp(**stand_in.operands(operands, dtype), dtype=dtype)
    expected = qpdiff.solve_qp(**operands, dtype=dtype, engine="array")
    within = {"rtol": 1e-6, "atol": 1e-6} if dtype == "float64" else {"rtol": 2e-2, "atol": 2e-2}
    assert set(stand_in.to_numpy(sol.status)) == set(expected.status) == {qpdiff.Status.SOLVED}
    for name in ("x", "y", "z", "z_lb", "z_ub"):
        np.testing.assert_allclose(stand_in.to_numpy(getattr(sol, name)), getattr(expected, name), **within)
    weights = np.random.default_rng(1).normal(size=expected.x.shape).astype(dtype)
    gradients, wanted = qpdiff.vjp(sol, x=stand_in.array(weights)), qpdiff.vjp(expected, x=weights)
    tangents = qpdiff.jvp(sol, q=stand_in.array(weights))
    if dtype == "float64" and FORMS[form][1] != "lp":  # where the derivative is well conditioned
        for name in operands:
            np.testing.assert_allclose(stand_in.to_numpy(getattr(gradients, name)), getattr(wanted, name), atol=1e-4)
        np.testing.assert_allclose(stand_in.to_numpy(tangents.x), qpdiff.jvp(expected, q=weights).x, atol=1e-4)


@pytest.mark.parametrize("stand_in", LEFTOVERS, indirect=True)
def test_a_failed_factorisation_disturbs_no_other_problem(stand_in):
    operands = draw("primal")
    expected = qpdiff.solve_qp(**operands, engine="array")
    spoilt = operands["Q"].copy()
    spoilt[2] -= 1e3 * np.eye(9)
    with pytest.raises(ValueError, match=r"Q is not positive semidefinite.*\(problem 2 of the batch\)"):
        qpdiff.solve_qp(**stand_in.operands(operands | {"Q": spoilt}))
    sol = qpdiff.solve_qp(**stand_in.operands(operands | {"Q": spoilt}), check=False)
    others = np.arange(6) != 2
    np.testing.assert_array_equal(stand_in.to_numpy(sol.status) == qpdiff.Status.SOLVED, others)
    np.testing.assert_allclose(stand_in.to_numpy(sol.x)[others], expected.x[others], atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_no_matrix_is_copied_in_an_iteration(stand_in, form):
    operands = {name: value.mT.copy().mT if value.ndim > 2 else value for name, value in draw(form).items()}
    operands = stand_in.operands(operands)
    assert not operands["Q"]._array.flags.c_contiguous
    copies = []
    for limit in (1, 3, 200):
        stand_in.copied.clear()
        sol = qpdiff.solve_qp(**operands, max_iterations=limit)
        copies.append(list(stand_in.copied))
    assert copies[0] == copies[1] == copies[2]
    assert len(copies[0]) <= 2, "the dense dual form makes its matrix once"
    stand_in.copied.clear()
    qpdiff.vjp(sol, x=sol.x)
    qpdiff.jvp(sol, q=sol.x)
    assert not stand_in.copied


def test_a_product_with_a_transpose_would_be_copied(stand_in):
    M = stand_in.array(np.ones((4, 3, 2)))
    assert M.mT @ M is not None
    assert stand_in.copied == [(4, 2, 3)]


@pytest.mark.parametrize("idle", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_one_transfer_an_iteration(stand_in, transfers, monkeypatch, form, idle):
    monkeypatch.setattr(CuPyBackend, "launch_bound_bytes", CuPyBackend.launch_bound_bytes if idle else 0)
    operands, on_top = stand_in.operands(draw(form)), set()
    for limit in (1, 3, 200):
        transfers.clear()
        sol = qpdiff.solve_qp(**operands, max_iterations=limit)
        count = len(transfers)
        # Steps in the rows alone also ask how many problems want their x computed.
        in_rows = form == "dense dual" and not idle
        on_top.add(count - (1 + in_rows) * int(np.max(stand_in.to_numpy(sol.iterations))))
    assert len(on_top) == 1
    assert max(on_top) <= 5


# ---- the calls


def exercise(stand_in):
    """What calls everything that the array engine calls."""
    for form in FORMS:
        for shared in ((), ("Q", "A", "G")):
            for kind, dtype in (("float64", None), ("float32", None), ("float32", "float32")):
                operands = draw(form, shared=shared)
                sol = qpdiff.solve_qp(**stand_in.operands(operands, kind) | {"Q": operands["Q"].tolist()}, dtype=dtype)
                again = qpdiff.solve_qp(**stand_in.operands(operands, kind), dtype=dtype, warm_start=sol)
                qpdiff.vjp(again, x=sol.x, z=sol.z, z_lb=sol.z_lb, smoothing=1e-3)
                tangents = stand_in.operands({name: np.ones_like(value) for name, value in operands.items()}, kind)
                qpdiff.jvp(again, **tangents, unsolved="zero")
    operands = stand_in.operands(random_problem(np.random.default_rng(0), "A G lb ub", fixed=2, infinite=0.5))
    qpdiff.vjp(qpdiff.solve_qp(**operands, verbose=True), z_ub=np.ones((4, 6)))
    operands = stand_in.operands(repeated_inequalities(np.random.default_rng(0), (20,), 6).operands)
    qpdiff.vjp(qpdiff.solve_qp(**operands), x=np.ones(6))
    large = random_problem(np.random.default_rng(0), "A G", batch=(20,), n=60, m=10)  # x computed for a few of a batch
    assert np.all(stand_in.to_numpy(qpdiff.solve_qp(**stand_in.operands(large)).status) == 0)
    qpdiff.solve_qp(**stand_in.operands(infeasible(np.random.default_rng(0), parallel_rows, "pd", (5, 4, 2))))
    qpdiff.solve_qp(**{name: value[:0, ...] for name, value in stand_in.operands(draw("primal")).items()})
    for wrong in ({"Q": -np.ones((6, 9, 9))}, {"lb": np.full(9, 1e3)}, {"q": np.full(9, np.nan)}):
        with pytest.raises(ValueError, match=r"of the batch|nan"):
            qpdiff.solve_qp(**stand_in.operands(draw("primal") | wrong))


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


def find(name):
    """What a name stands for in CuPy as the array engine sees it."""
    if name == "cupyx.scipy.linalg.solve_triangular":
        return solve_triangular_of_cupy()
    import cupyx
    from array_api_compat import cupy as namespace

    value = namespace
    for part in name.split("."):
        value = cupyx if part == "cupyx" else getattr(value, part)
    return value


def solve_triangular_of_cupy():
    """The function itself, or one with its arguments where it cannot be imported without cuBLAS."""
    try:
        from cupyx.scipy.linalg import solve_triangular
    except ImportError:
        import cupyx

        source = pathlib.Path(cupyx.__file__).with_name("scipy") / "linalg" / "_solve_triangular.py"
        functions = (node for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef))
        function = next(node for node in functions if node.name == "solve_triangular")
        function.decorator_list, function.body, scope = [], [ast.Pass()], {}
        exec(ast.unparse(function), scope)
        return scope["solve_triangular"]
    return solve_triangular


def fits(cupy, name, count, keywords):
    """Whether CuPy has a function of this name that can be called like this; a count of None is no call."""
    try:
        function = find(name)
    except AttributeError:
        return False
    if count is None:
        return True
    if isinstance(function, cupy.ufunc):
        return count == function.nin and {"out", "dtype", "casting"}.issuperset(keywords)
    if function is cupy.cuda.Device:  # compiled, without a signature
        return count <= 1 and not keywords
    signature = inspect.signature(function)
    try:
        signature.bind(*range(count), **dict.fromkeys(keywords))
    except TypeError:
        return False
    return set(keywords) <= set(signature.parameters)  # not swallowed by **kwargs


def test_cupy_has_every_function_with_these_arguments(cupy, strict):
    with pytest.MonkeyPatch.context() as patch:
        stand_in = StandIn(strict, patch, "nan")
        exercise(stand_in)
    names = {name for name, *_ in stand_in.calls}
    assert {"linalg.cholesky", "cupyx.scipy.linalg.solve_triangular", "cupyx.errstate", "cuda.Device"} <= names
    assert len(names) > 40
    assert not {"clip", "nonzero", "repeat"} & names, "array-api-compat's clip and CuPy's others wait for the device"
    assert [call for call in sorted(stand_in.calls, key=str) if not fits(cupy, *call)] == []


def test_all_work_is_done_on_the_gpu_of_the_arrays(stand_in):
    exercise(stand_in)
    # What moves data there names the GPU; types are no work.
    assert stand_in.elsewhere <= {"asarray", "finfo", "isdtype", "cuda.Device", "cupyx.errstate"}


@pytest.mark.parametrize(
    "call",
    [
        ("no_such_function", 1, ()), ("float16x", None, ()), ("linalg.eigh_batched", 1, ()), ("sum", 1, ("axes",)),
        ("where", 4, ()), ("maximum", 1, ()), ("maximum", 2, ("axis",)), ("linalg.cholesky", 1, ("lower",)),
        ("argsort", 1, ("order",)), ("cupyx.errstate", 0, ("cholesky",)), ("cuda.Device", 2, ()),
        ("cupyx.scipy.linalg.solve_triangular", 2, ("transposed",)),
    ],
)  # fmt: skip
def test_a_call_that_cupy_does_not_take_is_found(cupy, call):
    assert not fits(cupy, *call)


def test_cupy_has_every_attribute_and_operator_of_an_array(cupy, strict):
    unused = {
        "__index__",
        "__imatmul__",
        "to_device",
        "__array_namespace__",
        "__buffer__",
    }  # the first three are watched
    names = [name for name in vars(type(strict.asarray(0.0))) if name.startswith("__") or not name.startswith("_")]
    missing = [name for name in names if name not in unused and not hasattr(cupy.ndarray, name)]
    assert set(missing) <= {"__weakref__"}


@pytest.fixture
def on_gpu(cupy):
    """Arrays of CuPy's on a GPU that need not be there, as long as nobody looks into them."""

    def empty(shape, number=0, dtype="float64"):
        memory = cupy.cuda.UnownedMemory(4096, 2**20, None, number)
        return cupy.ndarray(shape, dtype=dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))

    return empty


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_arrays_of_cupy_choose_its_backend_on_their_gpu(on_gpu, number, dtype):
    operands = {"Q": on_gpu((3, 3), number, dtype), "q": on_gpu((5, 3), number, dtype)}
    backend, arrays = choose_backend(operands)
    assert isinstance(backend, CuPyBackend)
    assert backend.device == number
    assert backend is choose_backend(operands)[0]
    assert all(arrays[name] is operands[name] for name in operands)
    types = floating_types(backend, arrays, operands)
    assert [np.dtype(kind) for kind in types] == ["float64", dtype]
    again = pickle.loads(pickle.dumps(backend))  # arrays go to the current GPU of the process that unpickles them
    assert (type(again), again.xp, again.device) == (CuPyBackend, backend.xp, None)


def test_arrays_on_two_gpus(on_gpu):
    with pytest.raises(ValueError, match="q is on device 1 but Q on 0; move all to one device"):
        choose_backend({"Q": on_gpu((3, 3), 0), "q": on_gpu((3,), 1)})


def test_a_cotangent_of_numpy_moves(on_gpu, monkeypatch):
    """CuPy shares NumPy's types of numbers, which must not pass for its arrays."""
    moved = []
    monkeypatch.setattr(CuPyBackend, "asarray", lambda self, value, dtype=None: moved.append(value) or on_gpu((5, 3)))
    operands = {"Q": on_gpu((5, 3, 3)), "q": on_gpu((5, 3))}
    problem = make_layout(choose_backend(operands)[0], (5,), operands).problem(operands)
    cotangent = np.ones((5, 3))
    sol = SimpleNamespace(x=on_gpu((5, 3)), linearization=SimpleNamespace(problem=problem))
    assert type(_cotangent(sol, "x", cotangent)) is type(operands["q"])
    assert moved[0] is cotangent


def test_the_backend_flag_moves_data_from_the_host(on_gpu, monkeypatch):
    class Tensor:
        """Of another library, on the CPU, from where CuPy takes arrays of NumPy's alone."""

        def __init__(self, value):
            self.__dlpack__, self.__dlpack_device__ = value.__dlpack__, value.__dlpack_device__

        def to_device(self, device, **options):
            return self

    moved = []
    monkeypatch.setattr(CuPyBackend, "asarray", lambda self, value, dtype=None: moved.append(value))
    choose_backend({"Q": on_gpu((2, 2)), "q": Tensor(np.arange(2.0))}, "cupy")
    np.testing.assert_array_equal(moved, [np.arange(2.0)])


def test_no_gpu(cupy):
    if cupy.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="backend='cupy' needs an NVIDIA GPU"):
        qpdiff.solve_qp(np.eye(2), np.ones(2), backend="cupy")


# ---- on a GPU


@pytest.fixture
def gpu(cupy):
    if not cupy.cuda.is_available():
        pytest.skip("no GPU")
    return cupy


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("n", [3, 40, 200])
def test_what_cusolver_leaves_behind_is_flagged(gpu, n, dtype):
    rng = np.random.default_rng(n)
    vectors = np.linalg.qr(rng.normal(size=(60, n, n)))[0]
    values = rng.uniform(0.1, 1.0, size=(60, n))
    values[::3, 0] *= -1.0
    M = (vectors * values[:, None, :]) @ vectors.mT
    backend, _ = choose_backend({"M": gpu.asarray(M, dtype=dtype)})
    for part in (slice(0, 1), slice(1, 2), slice(0, 60)):
        factor, positive = backend.factor(gpu.asarray(M[part], dtype=dtype))
        good = positive[:, 0].get()
        np.testing.assert_array_equal(good, np.all(values[part] > 0, axis=-1))
        x = backend.solve(factor, gpu.ones((len(good), n), dtype=dtype)).get()
        np.testing.assert_allclose((M[part] @ x[..., None])[good, :, 0], 1.0, atol=1e-8 if dtype == "float64" else 1e-2)


def test_the_callers_setting_for_errors_of_cusolver(gpu):
    import cupyx

    operands = draw("primal")
    operands["Q"][2] -= 1e3 * np.eye(9)
    with cupyx.errstate(linalg="raise"):
        sol = qpdiff.solve_qp(**{name: gpu.asarray(value) for name, value in operands.items()}, check=False)
    np.testing.assert_array_equal(sol.status.get() == qpdiff.Status.SOLVED, np.arange(6) != 2)


def test_the_callers_arrays_stay_as_they_are(gpu):
    operands = draw("primal")
    arrays = {name: gpu.asarray(value) for name, value in operands.items()}
    sol = qpdiff.solve_qp(**arrays)
    qpdiff.vjp(sol, x=np.ones((6, 9)))
    for name, value in operands.items():
        np.testing.assert_array_equal(arrays[name].get(), value)


def test_a_gpu_that_is_not_the_current_one(gpu):
    if gpu.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU")
    expected = qpdiff.solve_qp(**draw("primal"))
    with gpu.cuda.Device(1):
        operands = {name: gpu.asarray(value) for name, value in draw("primal").items()}
    with gpu.cuda.Device(0):
        sol = qpdiff.solve_qp(**operands)
        gradients = qpdiff.vjp(sol, x=np.ones((6, 9)))
    assert sol.x.device == gradients.Q.device == gpu.cuda.Device(1)
    np.testing.assert_allclose(sol.x.get(), expected.x, atol=1e-6)
