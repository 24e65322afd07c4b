"""The layer `OptNet`."""

from __future__ import annotations

import math

import torch
from torch import nn

from .. import solver
from ..differentiation import check_smoothing
from ..prices import price_operands
from ..problem import PRICED
from ..solution import check_unsolved
from .call import solve_qp


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
        Options of `qpdiff.torch.solve_qp`, such as ``unsolved="zero"``, ``smoothing=0.1`` or ``elastic=10.0``.

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
    >>> layer = qpdiff.torch.OptNet(3, m=4)
    >>> net = torch.nn.Sequential(torch.nn.Linear(5, 3), layer)
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
        for_solver = dict(options)
        check_unsolved(for_solver.pop("unsolved", "raise"))
        check_smoothing(for_solver.pop("smoothing", None))
        present = [name for name, there in (("A", p), ("G", m), ("lb", nonnegative)) if there]
        price_operands(present, **{option: for_solver.pop(option, None) for option in PRICED})  # for its errors
        solver.check_options("OptNet", for_solver)
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
