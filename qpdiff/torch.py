"""torch: `solve_qp` whose solution differentiates, to any order and in both modes; the layer `OptNet`; `QPFunction`.

Two functions with rules of their own: the solution as a function of the operands, and the solve with its KKT matrix as
a function of the operands, the solution and the right-hand side (see `qpdiff.differentiation`). Their derivatives are
made of the second and of torch's operations. Under `torch.func.vmap` they solve all problems as one batch.

Tensors on the CPU go to the solver as the NumPy arrays that share their memory, so that the compiled engine runs. On
any other device they are solved there, in torch's operations (batched `cholesky_ex`): that takes no second library,
stays on torch's stream and in its memory, and on a GPU took a little less time than CuPy does.
"""

from __future__ import annotations

import enum
import functools
import math
import re
from typing import Any

import numpy as np

from . import solver
from .adjoint import kkt_jvp, kkt_vjp, right_hand_side, solution_vjp
from .backend import choose_backend
from .differentiation import solve_kkt
from .problem import OPERANDS, Problem, make_layout, split_rows
from .solution import FIELDS, POINT, Solution, check_unsolved, raise_if_unsolved
from .validation import make_problem

try:
    import torch
except ImportError as error:
    raise ImportError("qpdiff.torch needs torch: pip install 'qpdiff[torch]'") from error
from torch import nn
from torch.autograd import Function


def _not_traced(function):
    """Mark a function at which torch.compile breaks its graph instead of tracing the solver."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        run = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return run(*args, **kwargs)

    return call


@_not_traced
def solve_qp(
    Q, q, G=None, h=None, A=None, b=None, lb=None, ub=None, *, unsolved: str = "raise", warm_start=None, **options
) -> Solution:
    """Solve a batch of convex quadratic programs; `qpdiff.solve_qp` for torch.

    Parameters
    ----------
    Q, q, G, h, A, b, lb, ub : tensor
        As for `qpdiff.solve_qp`; any of them may require a gradient. Arrays, lists and numbers become tensors on the
        device of the others.
    unsolved : {"raise", "nan", "zero"}
        What to do about problems that are not SOLVED: raise, or give them NaN or zero gradients.
    warm_start : Solution, optional
        As for `qpdiff.solve_qp`; of this function or that one. No gradient goes through it.
    **options
        Further options of `qpdiff.solve_qp`, but for `backend`.

    Returns
    -------
    Solution
        Whose x, y, z, z_lb and z_ub differentiate. The other fields are constants. Under `torch.func.vmap` all are
        those of one sample; the function that is mapped returns the ones that it wants.

    Raises
    ------
    RuntimeError
        With ``unsolved="raise"``, when a problem is not SOLVED; the error counts them and names the first. The axes
        that `torch.func.vmap` maps over come first in its position.

    Examples
    --------
    >>> import torch
    >>> import qpdiff.torch
    >>> point = torch.tensor([2.0, -3.0], requires_grad=True)
    >>> projection = qpdiff.torch.solve_qp(torch.eye(2), -point, lb=torch.zeros(2)).x
    >>> torch.sum((projection - point) ** 2).backward()
    >>> point.grad.round(decimals=3).abs().tolist()
    [0.0, 6.0]
    """
    check_unsolved(unsolved)
    operands = {"Q": Q, "q": q, "G": G, "h": h, "A": A, "b": b, "lb": lb, "ub": ub}
    operands = {name: _stacked(value) for name, value in operands.items()}
    problem = make_problem(operands, backend="torch", dtype=options.pop("dtype", None))
    warm: list[Any] = []
    if isinstance(warm_start, Solution):
        warm = [torch.as_tensor(getattr(warm_start, k), device=problem.backend.device).detach() for k in _WARM]
    elif warm_start is not None:
        options["warm_start"] = warm_start  # for the solver to refuse
    layer = _Layer(problem, unsolved, options)
    x, v, *constants = _Solution.apply(layer, problem.batch_shape, *problem.operands.values(), *warm)
    parts = dict(zip(("x", "y", "z", "z_lb", "z_ub"), (x, *split_rows(problem, v, v)), strict=True))
    parts |= dict(zip(_CONSTANT, constants, strict=True))
    parts |= {name: problem.returned(parts[name]) for name in POINT}
    return Solution(**{name: part.reshape((*problem.batch_shape, *part.shape[1:])) for name, part in parts.items()})


def _stacked(value):
    """Return a list with tensors in it as one tensor."""
    if not isinstance(value, (list, tuple)):
        return value
    parts = [_stacked(part) for part in value]
    tensors = any(isinstance(part, torch.Tensor) for part in parts)
    return torch.stack([torch.as_tensor(part) for part in parts]) if tensors else value


# ---- the two functions; operands and solutions have one batch axis, of length 1 where an operand is shared


_WARM = ("x", "y", "z", "z_lb", "z_ub", "status")
_CONSTANT = tuple(name for name in FIELDS if name not in _WARM[:-1])


class _Layer:
    """The arguments of both functions beside tensors, and the linearization that the first leaves for the second."""

    def __init__(self, problem: Problem, unsolved: str, options: dict[str, Any]):
        self.backend: Any = problem.backend
        self.names = tuple(problem.operands)
        self.rounding = problem.rounding
        self.unsolved, self.options = unsolved, options
        self.linearization: Any = None

    def solve(self, batch_shape, operands, warm):
        host = _on_host(self.backend.device)
        arrays = {name: _unflattened(_array(a), batch_shape) for name, a in zip(self.names, operands, strict=True)}
        options = dict(self.options)
        if warm:
            known = dict.fromkeys(_CONSTANT) | dict(zip(_WARM, map(_array, warm), strict=True))
            options["warm_start"] = Solution(**known)
        problem = make_problem(dict.fromkeys(OPERANDS) | arrays, backend="numpy" if host else "torch")
        sol = solver.solve_problem(problem.with_layout(rounding=self.rounding), **options)
        if self.unsolved == "raise":
            raise_if_unsolved(np.asarray(sol.status if host else sol.status.cpu()))
        self.linearization = sol.linearization
        batch = math.prod(batch_shape)
        constants = (getattr(sol, name) for name in _CONSTANT)
        flat = [a.reshape((batch, *a.shape[len(batch_shape) :])) for a in constants]
        return tuple(map(_tensor, (sol.linearization.x, sol.linearization.v, *flat)))

    def solve_kkt(self, r_x, r_v):
        unsolved = "zero" if self.unsolved == "raise" else self.unsolved
        with self.linearization.problem.backend.no_grad():
            return tuple(map(_tensor, solve_kkt(self.linearization, _array(r_x), _array(r_v), unsolved=unsolved)))

    def problem(self, x, operands) -> Problem:
        """Return the problem in torch's operands and operations."""
        named = dict(zip(self.names, operands, strict=True))
        return make_layout(self.backend, (x.shape[0],), named).problem(named)


def _on_host(device) -> bool:
    return device.type == "cpu"


def _array(tensor):
    """Return what the solver takes for a tensor: the NumPy array in the same memory, if it is on the CPU."""
    try:
        tensor = tensor.detach()
    except RuntimeError as error:
        raise RuntimeError(
            "qpdiff.torch does not run under torch's first vmap, which torch.autograd.grad(is_grads_batched=True) and "
            "torch.autograd.functional.jacobian(vectorize=True) use; take torch.func.jacrev, jacfwd or vmap instead"
        ) from error
    return tensor.resolve_neg().numpy() if _on_host(tensor.device) else tensor


def _tensor(array):
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array.detach()


def _unflattened(array, batch_shape):
    """Return an operand (B or 1, core) with all batch axes, or none where it is shared."""
    core = array.shape[1:]
    return array.reshape((*batch_shape, *core)) if array.shape[0] == math.prod(batch_shape) else array.reshape(core)


class _Solution(Function):
    """The variables (B, n), the multipliers of all rows (B, rows), and what of a Solution is constant."""

    @staticmethod
    def forward(layer, batch_shape, *tensors):
        count = len(layer.names)
        return layer.solve(batch_shape, tensors[:count], tensors[count:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.layer, ctx.others = inputs[0], len(inputs) - 2 - len(inputs[0].names)
        ctx.mark_non_differentiable(*output[2:])
        _save(ctx, *inputs[2 : len(inputs) - ctx.others], *output[:2])

    @staticmethod
    def backward(ctx, g_x, g_v, *_):
        layer = ctx.layer
        *operands, x, v = ctx.saved_tensors
        wanted = [name for name, needed in zip(layer.names, ctx.needs_input_grad[2:], strict=False) if needed]
        u_x, u_v = _KKTSolve.apply(layer, g_x, g_v, x, v, *operands)
        with layer.backend.in_full_precision():
            gradients = solution_vjp(layer.problem(x, operands), x, v, u_x, u_v, wanted)
        return None, None, *map(gradients.get, layer.names), *[None] * ctx.others

    @staticmethod
    def jvp(ctx, _, __, *tangents):
        layer = ctx.layer
        *operands, x, v = ctx.saved_tensors
        with layer.backend.in_full_precision():
            r_x, r_v = right_hand_side(layer.problem(x, operands), x, v, _given(layer, tangents))
        return *_KKTSolve.apply(layer, r_x, r_v, x, v, *operands), *[None] * len(_CONSTANT)

    @staticmethod
    def vmap(info, in_dims, layer, batch_shape, *tensors):
        size, batch, count = info.batch_size, math.prod(batch_shape), len(layer.names)
        pairs = list(zip(tensors, in_dims[2:], strict=True))
        operands = [_joined(*pair, size, batch) for pair in pairs[:count]]
        operands[1] = operands[1].expand(size * batch, -1)  # q, so that an operand has the mapped axis in any case
        cores = [name != "status" for name in _WARM]
        warm = [_padded(*pair, size, len(batch_shape) + core) for pair, core in zip(pairs[count:], cores, strict=False)]
        output = _Solution.apply(layer, (size, *batch_shape), *operands, *warm)
        return tuple(_parted(part, size, batch) for part in output), (0,) * len(output)


class _KKTSolve(Function):
    """K⁻¹ r with the KKT matrix K at the solution x, v of the operands: (B, n) and (B, rows)."""

    @staticmethod
    def forward(layer, r_x, r_v, x, v, *operands):
        return layer.solve_kkt(r_x, r_v)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.layer = inputs[0]
        _save(ctx, *inputs[3:], *output)

    @staticmethod
    def backward(ctx, g_x, g_v):
        layer = ctx.layer
        x, v, *operands, u_x, u_v = ctx.saved_tensors
        wanted = [name for name, needed in zip(layer.names, ctx.needs_input_grad[5:], strict=True) if needed]
        t_x, t_v = _KKTSolve.apply(layer, g_x, g_v, x, v, *operands)
        with layer.backend.in_full_precision():
            x_bar, v_bar, gradients = kkt_vjp(layer.problem(x, operands), x, v, u_x, u_v, t_x, t_v, wanted)
        return None, t_x, t_v, x_bar, v_bar, *map(gradients.get, layer.names)

    @staticmethod
    def jvp(ctx, _, dr_x, dr_v, dx, dv, *tangents):
        layer = ctx.layer
        x, v, *operands, u_x, u_v = ctx.saved_tensors
        with layer.backend.in_full_precision():
            problem = layer.problem(x, operands)
            r_x, r_v = kkt_jvp(problem, x, v, u_x, u_v, _or_zeros(dx, x), _or_zeros(dv, v), _given(layer, tangents))
        return _KKTSolve.apply(layer, _or_zeros(dr_x, x) + r_x, _or_zeros(dr_v, v) + r_v, x, v, *operands)

    @staticmethod
    def vmap(info, in_dims, layer, *tensors):
        size, pairs = info.batch_size, list(zip(tensors, in_dims[1:], strict=True))
        if in_dims[3] is None:  # several right-hand sides for each problem
            columns = [t.unbind(dim) if dim is not None else (t,) * size for t, dim in pairs[:2]]
            solved = [_KKTSolve.apply(layer, *r, *tensors[2:]) for r in zip(*columns, strict=True)]
            return tuple(map(torch.stack, zip(*solved, strict=True))), (0, 0)
        batch = tensors[2].movedim(in_dims[3], 0).shape[1]
        vectors = [_joined(*pair, size, batch).expand(size * batch, -1) for pair in pairs[:4]]
        output = _KKTSolve.apply(layer, *vectors, *(_joined(*pair, size, batch) for pair in pairs[4:]))
        return tuple(_parted(part, size, batch) for part in output), (0, 0)


def _save(ctx, *tensors) -> None:
    """Save tensors for derivatives in either mode."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _given(layer: _Layer, tangents) -> dict[str, Any]:
    return {name: t for name, t in zip(layer.names, tangents, strict=False) if t is not None}


def _or_zeros(tangent, value):
    return torch.zeros_like(value) if tangent is None else tangent


# ---- an axis that is mapped over and the batch axis


def _joined(tensor, dim: int | None, size: int, batch: int):
    """Return a tensor (batch or 1, core) with `size` times the batch; of length 1 still where all problems share it."""
    if dim is None and tensor.shape[0] == 1:
        return tensor
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    core = tensor.shape[2:]
    return tensor.expand(size, batch, *core).reshape(size * batch, *core)


def _parted(tensor, size: int, batch: int):
    """Split the joined axis into the two again."""
    return tensor.reshape(size, batch, *tensor.shape[1:])


def _padded(tensor, dim: int | None, size: int, axes: int):
    """Return a tensor of up to `axes` axes with the mapped axis in front of so many."""
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.reshape(size, *[1] * (axes + 1 - tensor.ndim), *tensor.shape[1:])


# ---- layers


class OptNet(nn.Module):
    """A layer that minimises ½ xᵀQx + qᵀx over learned constraints, for its input q.

    ::

        Q = L Lᵀ + εI                          L lower triangular
        G x ≤ h,   h = G z₀ + softplus(s₀)
        A x = b,   b = A z₀
        x ≥ 0                                  where asked for; z₀ is softplus(z₀) then

    Whatever the parameters, z₀ satisfies all constraints and Q is positive definite, so that every problem has exactly
    one solution. The operands are computed in float64, whatever the type of the parameters: rounded to float32, Q need
    not be definite, and A x = b need not have a solution where rows of A are dependent. The output has the type of the
    input.

    Parameters
    ----------
    n : int
        Variables: features of input and output.
    m, p : int
        Learned inequalities and equalities.
    nonnegative : bool
        Whether x ≥ 0 is required.
    eps : float
        ε > 0.
    device, dtype
        Of the parameters.
    **options
        Options of `qpdiff.torch.solve_qp`, such as ``unsolved="zero"``.

    Attributes
    ----------
    L : Parameter (n, n)
        Entries above the diagonal do not matter.
    G, A, z0, s0 : Parameter (m, n), (p, n), (n), (m)
        None where there are no such constraints, so that no parameter is empty; z₀ where there are neither.

    Notes
    -----
    The paper's layer [1]_, with the initial values of its code [2]_: L and A uniform in [0, 1], G in [−1, 1], z₀ = 0
    (with x ≥ 0: 1), slack 1. There training may make the slack negative; with softplus it stays positive.

    References
    ----------
    .. [1] B. Amos, J. Z. Kolter, "OptNet: differentiable optimization as a layer in neural networks", ICML 2017,
       section 3.
    .. [2] https://github.com/locuslab/optnet

    Examples
    --------
    >>> import torch
    >>> import qpdiff.torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(5, 3), qpdiff.torch.OptNet(3, m=4))
    >>> net(torch.randn(10, 5)).shape
    torch.Size([10, 3])
    """

    L: nn.Parameter
    G: nn.Parameter | None
    A: nn.Parameter | None
    z0: nn.Parameter | None
    s0: nn.Parameter | None

    def __init__(
        self, n: int, m: int = 0, p: int = 0, *, nonnegative=False, eps=1e-4, device=None, dtype=None, **options
    ):
        super().__init__()
        if not eps > 0:
            raise ValueError(f"eps is {eps!r}; expected a number > 0, which makes the solution unique")
        self.nonnegative, self.eps, self.options = nonnegative, eps, options
        shapes = {"L": (n, n), "G": (m, n), "A": (p, n), "z0": (n,) if m or p else (0,), "s0": (m,)}
        for name, shape in shapes.items():
            value = None if 0 in shape else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        one = math.log(math.e - 1)  # softplus of it is 1
        with torch.no_grad():
            self.L.uniform_().tril_()
            if self.G is not None:
                self.G.uniform_(-1, 1)
            if self.A is not None:
                self.A.uniform_()
            if self.z0 is not None:
                self.z0.fill_(one if self.nonnegative else 0.0)
            if self.s0 is not None:
                self.s0.fill_(one)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Earlier versions saved empty parameters of constraints that are not there, and z₀ in any case.
        for name in ("G", "A", "z0", "s0"):
            saved = state_dict.get(prefix + name)
            if getattr(self, name) is None and saved is not None and (name == "z0" or not saved.numel()):
                del state_dict[prefix + name]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def operands(self) -> dict[str, torch.Tensor]:
        """Return the operands of `solve_qp` but for q, by name, in float64."""
        L, names = self.L.tril().double(), ("G", "A", "z0", "s0")
        given = {name: value.double() for name in names if (value := getattr(self, name)) is not None}
        out = {"Q": L @ L.mT + self.eps * torch.eye(len(L), dtype=L.dtype, device=L.device)}
        if self.nonnegative:
            out["lb"] = L.new_zeros(len(L))
        if "z0" in given:
            point = nn.functional.softplus(given["z0"]) if self.nonnegative else given["z0"]
            if "G" in given:
                out |= {"G": given["G"], "h": given["G"] @ point + nn.functional.softplus(given["s0"])}
            if "A" in given:
                out |= {"A": given["A"], "b": given["A"] @ point}
        return out

    def forward(self, q):
        """Return the solutions x (..., n) for linear terms q (..., n), in the type of q."""
        return solve_qp(q=q, **self.operands(), dtype="float64", **self.options).x.to(q.dtype)

    def extra_repr(self) -> str:
        rows = {name: 0 if value is None else len(value) for name, value in (("m", self.G), ("p", self.A))}
        shown = {"n": len(self.L), **rows, "nonnegative": self.nonnegative, "eps": self.eps, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


# ---- qpth's function


class QPSolvers(enum.Enum):
    """qpth's names of its solvers."""

    PDIPM_BATCHED = 1
    CVXPY = 2


def QPFunction(eps=1e-12, verbose=0, notImprovedLim=3, maxIter=20, solver=QPSolvers.PDIPM_BATCHED, check_Q_spd=True):
    """Stand in for qpth's ``QPFunction``: its users change one import, ``from qpdiff.torch import QPFunction``.

    The function that it returns takes ``(Q, p, G, h, A, b)`` and returns the variables (batch, n) that minimise
    ½ zᵀQz + pᵀz subject to Gz ≤ h, Az = b, for Q (n, n) or (batch, n, n), p (n) or (batch, n), and so on; an empty
    tensor, or None, stands for constraints that are not there. Arrays and lists become tensors on the device of the
    others. As with qpth the gradient of an operand without batch axis is the **mean** over the batch; that of
    `solve_qp` is the sum, which is the derivative, and so is that of a batch axis of length 1, which broadcasts. All is
    computed in float64 and returned in the type of p.

    Parameters
    ----------
    eps : float
        Tolerance, where it is above 1e-8, that of `qpdiff.solve_qp`.
    verbose : int
        1: a line an iteration.
    notImprovedLim, maxIter, solver
        Without effect. qpth returns the best point so far when its iterations come to these limits.
    check_Q_spd : bool
        Check the numbers in the operands before solving. Q may also be semidefinite; only its symmetric part counts.

    Raises
    ------
    TypeError, ValueError
        For bad operands, as `solve_qp` does, naming them; for Q or p that is None or empty.
    RuntimeError
        When a problem cannot be solved; qpth prints a warning and returns what it has.

    Examples
    --------
    >>> import torch
    >>> from qpdiff.torch import QPFunction
    >>> e = torch.Tensor()
    >>> QPFunction()(torch.eye(2), torch.tensor([1.0, -1.0]), -torch.eye(2), torch.zeros(2), e, e).round(decimals=2) + 0
    tensor([[0., 1.]])
    """

    def solve(Q, p, G, h, A, b):
        axes = {"Q": 3, "p": 2, "G": 3, "h": 2, "A": 3, "b": 2}
        given = _tensors(dict(zip(axes, (Q, p, G, h, A, b), strict=True)))
        batch = _batch(given, axes)
        given = {name: value for name, value in given.items() if 0 not in value.shape[1 - axes[name] :]}
        for name, value in (("Q", Q), ("p", p)):
            if name not in given:
                what = "None" if value is None else "empty"
                raise TypeError(f"{name} is {what}; every problem needs Q and p (pass zeros for what it lacks)")
        kind = given["p"].dtype
        given = {k: v if v.ndim == axes[k] else _MeanGradient.apply(v, batch) for k, v in given.items()}
        Q, q = given.pop("Q"), given.pop("p")
        options = {"dtype": "float64", "tol": max(eps, 1e-8), "check": check_Q_spd, "verbose": verbose == 1}
        try:
            x = solve_qp((Q + Q.mT) / 2 if Q.shape[-1] == Q.shape[-2] else Q, q, **given, **options).x
        except (TypeError, ValueError) as error:
            raise type(error)(re.sub(r"\bq\b", "p", str(error))) from error  # as it is called here
        return x.expand(batch, x.shape[-1]).to(kind if kind.is_floating_point else x.dtype)

    return solve


def _tensors(operands: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the operands but for those that are None, as tensors on the device of those that are tensors."""
    device = next((value.device for value in operands.values() if isinstance(value, torch.Tensor)), None)
    given = {name: _stacked(value) for name, value in operands.items() if value is not None}
    return {
        name: value if isinstance(value, torch.Tensor) else choose_backend({name: value}, "torch")[1][name].to(device)
        for name, value in given.items()
    }


def _batch(tensors: dict[str, torch.Tensor], axes: dict[str, int]) -> int:
    """Return the length of the batch axis, with which an operand has so many axes."""
    batch, first = 1, ""
    for name, value in tensors.items():
        few = axes[name] - 1
        if value.ndim not in (few, few + 1) and value.numel():
            raise ValueError(f"{name} has {value.ndim} axes; expected {few}, or {few + 1} with that of the batch")
        if value.ndim == few + 1 and len(value) not in (1, batch):
            if batch != 1:
                raise ValueError(f"{name} has a batch of {len(value)}, but {first} one of {batch}; expected the same")
            batch, first = len(value), name
    return batch


class _MeanGradient(Function):
    """The identity, whose gradient is divided by a number."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value, count):
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.count = inputs[1]

    @staticmethod
    def backward(ctx, g):
        return g / max(ctx.count, 1), None
