"""What a batch of quadratic programs is: the operands, their validation, the one batch axis and the constraint rows.

Every constraint is a row: the equalities A x = b, the inequalities G x ≤ h, then -x ≤ -lb and x ≤ ub where there are
bounds. The rest of the package sees one constraint operator K and one right-hand side k over all of them, with one
multiplier a row, and two masks that tell what a row is: an equality (also a bound pair lb = ub, which is one equality
and not two inequalities), an inequality, or nothing at all (an infinite bound). K is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from .backend import Backend, choose_backend, working_dtype

OPERANDS = {
    "Q": ("n", "n"),
    "q": ("n",),
    "G": ("m", "n"),
    "h": ("m",),
    "A": ("p", "n"),
    "b": ("p",),
    "lb": ("n",),
    "ub": ("n",),
}
"""The operands of a quadratic program and their core shapes."""


@dataclass(frozen=True)
class Problem:
    """A batch of quadratic programs with its batch axes flattened to one.

    Each operand is an array whose first axis is the batch, of length `batch`, or of length 1 where the operand is
    shared; an operand that was not given is None.
    """

    backend: Backend
    dtype: Any
    batch_shape: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]]
    """The shape in which the caller gave each operand."""
    Q: Any
    q: Any
    G: Any = None
    h: Any = None
    A: Any = None
    b: Any = None
    lb: Any = None
    ub: Any = None

    @property
    def batch(self) -> int:
        return math.prod(self.batch_shape)

    @property
    def n(self) -> int:
        return self.q.shape[-1]

    @property
    def m(self) -> int:
        return 0 if self.G is None else self.G.shape[-2]

    @property
    def p(self) -> int:
        return 0 if self.A is None else self.A.shape[-2]

    @property
    def operands(self) -> dict[str, Any]:
        """The operands that were given, by name."""
        return {name: value for name in OPERANDS if (value := getattr(self, name)) is not None}

    def astype(self, dtype) -> Problem:
        """The same problems in another floating point type."""
        if dtype == self.dtype:
            return self
        return replace(self, dtype=dtype, **{k: self.backend.xp.astype(v, dtype) for k, v in self.operands.items()})

    # ---- parts of the batch

    def select(self, index) -> Problem:
        """The problems that a slice or an array of positions names; shared operands stay shared."""
        if isinstance(index, slice):
            size = len(range(*index.indices(self.batch)))
            parts = {k: v[index, ...] for k, v in self.operands.items() if v.shape[0] != 1}
        else:
            size = index.shape[0]
            parts = {k: self.backend.xp.take(v, index, axis=0) for k, v in self.operands.items() if v.shape[0] != 1}
        return replace(self, batch_shape=(size,), **parts)

    def chunks(self, size: int) -> Iterator[tuple[slice, Problem]]:
        """The batch in consecutive pieces of at most `size` problems."""
        for start in range(0, self.batch, size):
            piece = slice(start, min(start + size, self.batch))
            yield piece, self.select(piece)

    # ---- the constraint rows

    @cached_property
    def blocks(self) -> dict[str, slice]:
        """Where the rows of each kind lie: those of A, of G, of lb and of ub."""
        sizes = {"A": self.p, "G": self.m, "lb": self.n * (self.lb is not None), "ub": self.n * (self.ub is not None)}
        blocks, start = {}, 0
        for name, size in sizes.items():
            blocks[name] = slice(start, start + size)
            start += size
        return blocks

    @property
    def rows(self) -> int:
        return self.blocks["ub"].stop

    @cached_property
    def _row_data(self):
        """Right-hand side k, equality mask and inequality mask, each (batch or 1, rows)."""
        xp, backend = self.backend.xp, self.backend
        parts, equality, inequality = [], [], []
        fixed = None
        if self.lb is not None and self.ub is not None:
            fixed = self.lb == self.ub
        if self.A is not None:
            parts.append(self.b)
            equality.append(xp.ones_like(self.b, dtype=xp.bool))
            inequality.append(xp.zeros_like(self.b, dtype=xp.bool))
        for sign, bound, takes_fixed in ((1, self.h, False), (-1, self.lb, True), (1, self.ub, False)):
            if bound is None:
                continue
            finite = xp.isfinite(bound)
            parts.append(xp.where(finite, sign * bound, xp.zeros_like(bound)))
            if fixed is None or bound is self.h:
                inequality.append(finite)
                equality.append(xp.zeros_like(finite))
            else:
                inequality.append(finite & ~fixed)
                equality.append(fixed if takes_fixed else xp.zeros_like(fixed))
        if not parts:
            none = backend.full((1, 0), False, xp.bool)
            return backend.full((1, 0), 0.0, self.dtype), none, none
        return tuple(_concat(xp, group) for group in (parts, equality, inequality))

    @property
    def k(self):
        """Right-hand side of the rows, zero where a bound is infinite."""
        return self._row_data[0]

    @property
    def equality(self):
        """Which rows are equalities."""
        return self._row_data[1]

    @property
    def inequality(self):
        """Which rows are inequalities; a row that is neither does not exist."""
        return self._row_data[2]

    # ---- products

    def hessian(self, x):
        """Q x."""
        return product(self.Q, x)

    def constraints(self, x):
        """K x: the left-hand side of every row at x (B, n)."""
        parts = []
        if self.A is not None:
            parts.append(product(self.A, x))
        if self.G is not None:
            parts.append(product(self.G, x))
        if self.lb is not None:
            parts.append(-x)
        if self.ub is not None:
            parts.append(x)
        if not parts:
            return x[:, :0]
        return parts[0] if len(parts) == 1 else self.backend.xp.concat(parts, axis=-1)

    def adjoint(self, v):
        """Kᵀ v: the rows' multipliers (B, rows) mapped to the variables."""
        blocks = self.blocks
        out = None
        for M, name in ((self.A, "A"), (self.G, "G")):
            if M is not None:
                term = product_transposed(M, v[:, blocks[name]])
                out = term if out is None else out + term
        if self.lb is not None:
            out = -v[:, blocks["lb"]] if out is None else out - v[:, blocks["lb"]]
        if self.ub is not None:
            out = v[:, blocks["ub"]] if out is None else out + v[:, blocks["ub"]]
        return self.backend.full((v.shape[0], self.n), 0.0, self.dtype) if out is None else out


def product(M, x):
    """M x for matrices (B or 1, k, n) and vectors x (B, n)."""
    if M.shape[0] == 1:
        return x @ M[0, :, :].mT
    return (M @ x[:, :, None])[:, :, 0]


def product_transposed(M, v):
    """Mᵀ v for matrices (B or 1, k, n) and vectors v (B, k), without a transposed copy."""
    if M.shape[0] == 1:
        return v @ M[0, :, :]
    return (v[:, None, :] @ M)[:, 0, :]


def _concat(xp, arrays):
    """Join (B or 1, ·) arrays along their last axis."""
    batch = max(a.shape[0] for a in arrays)
    return xp.concat([xp.broadcast_to(a, (batch, a.shape[-1])) for a in arrays], axis=-1)


# ---- from the caller's operands to a Problem


def make_problem(operands: dict[str, Any], *, backend: str | None = None, dtype=None, check: bool = True) -> Problem:
    """Validate the caller's operands and bring them into the form of a `Problem`.

    Parameters
    ----------
    operands : dict
        The operands by name, None where absent.
    backend, dtype, check
        As in `qpdiff.solve_qp`.

    Raises
    ------
    TypeError, ValueError
        Naming the operand, what it has and what was expected.
    """
    for name in ("Q", "q"):
        if operands[name] is None:
            raise TypeError(f"{name} is None; every problem needs Q and q (pass zeros for a linear program)")
    for matrix, vector in (("G", "h"), ("A", "b")):
        if (operands[matrix] is None) != (operands[vector] is None):
            given, missing = (matrix, vector) if operands[vector] is None else (vector, matrix)
            raise ValueError(f"{given} was given without {missing}; they come together")
    present = {name: value for name, value in operands.items() if value is not None}
    chosen, arrays = choose_backend(present, backend)
    dtype = working_dtype(chosen, arrays, present, dtype)
    arrays = {name: chosen.xp.astype(value, dtype, copy=False) for name, value in arrays.items()}

    _check_core_shapes(arrays)
    batch_shape = _broadcast_batch(arrays)
    batch = math.prod(batch_shape)
    flat = {}
    for name, value in arrays.items():
        core = len(OPERANDS[name])
        leading, trailing = value.shape[: value.ndim - core], value.shape[value.ndim - core :]
        if math.prod(leading) == 1:
            flat[name] = chosen.xp.reshape(value, (1, *trailing))
        else:
            if leading != batch_shape:
                value = chosen.xp.broadcast_to(value, batch_shape + trailing)
            flat[name] = chosen.xp.reshape(value, (batch, *trailing))
    problem = Problem(
        backend=chosen,
        dtype=dtype,
        batch_shape=batch_shape,
        shapes={name: tuple(value.shape) for name, value in arrays.items()},
        **flat,
    )
    if check and batch > 0:
        _check_values(problem)
    return problem


def _check_core_shapes(arrays) -> None:
    for name, value in arrays.items():
        core = OPERANDS[name]
        if value.ndim < len(core):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected (..., {', '.join(core)}), at least {len(core)} axes"
            )
    n = arrays["Q"].shape[-1]
    if n == 0:
        raise ValueError(f"Q has shape {tuple(arrays['Q'].shape)}; a problem needs at least one variable")
    sizes = {"n": n}
    for name, value in arrays.items():
        shape, core = tuple(value.shape), OPERANDS[name]
        for size, letter in zip(shape[len(shape) - len(core) :], core, strict=True):
            if sizes.setdefault(letter, size) != size:
                source = {"n": "Q", "m": "G", "p": "A"}[letter]
                raise ValueError(
                    f"{name} has shape {shape}; expected (..., {', '.join(core)}) with {letter} = {sizes[letter]} "
                    f"from {source} of shape {tuple(arrays[source].shape)}"
                )


def _broadcast_batch(arrays) -> tuple[int, ...]:
    batch_shape: tuple[int, ...] = ()
    so_far: list[str] = []
    for name, value in arrays.items():
        leading = tuple(value.shape[: value.ndim - len(OPERANDS[name])])
        width = max(len(leading), len(batch_shape))
        old, new = (1,) * (width - len(batch_shape)) + batch_shape, (1,) * (width - len(leading)) + leading
        if any(a != b and 1 not in (a, b) for a, b in zip(old, new, strict=True)):
            raise ValueError(
                f"{name} has batch axes {leading}, which do not broadcast with the batch axes {batch_shape} of "
                f"{', '.join(so_far)}"
            )
        batch_shape = tuple(b if a == 1 else a for a, b in zip(old, new, strict=True))
        so_far.append(name)
    return batch_shape


def _check_values(problem: Problem) -> None:
    """Look at the numbers: one transfer to the host for the whole batch, more only to describe an error."""
    xp = problem.backend.xp
    bytes_per_problem = 8 * problem.n * (problem.n + 1)
    pieces = list(problem.chunks(max(1, problem.backend.chunk_bytes // bytes_per_problem)))
    verdicts = [
        (position, name, complaint, good)
        for position, (_, piece) in enumerate(pieces)
        for name, complaint, good in _findings(piece, first=position == 0)
    ]
    if bool(xp.all(xp.stack([xp.all(good) for *_, good in verdicts]))):
        return
    for position, name, complaint, good in verdicts:
        if bool(xp.all(good)):
            continue
        where = ""
        if good.shape[0] > 1 or (problem.batch_shape and getattr(problem, name).shape[0] > 1):
            flat = pieces[position][0].start + int(xp.argmin(xp.astype(good, xp.int8)))
            index = tuple(int(i) for i in np.unravel_index(flat, problem.batch_shape))
            where = f" (problem {index[0] if len(index) == 1 else index} of the batch)"
        raise ValueError(f"{name} {complaint}{where}")


def _findings(piece: Problem, *, first: bool):
    """(operand, complaint, good): for each rule a flag a problem, False where it is broken."""
    xp = piece.backend.xp

    def fresh(*names):
        """Whether the first piece has not settled a rule over these operands for the whole batch."""
        return first or any(getattr(piece, name).shape[0] > 1 for name in names)

    for name, value in piece.operands.items():
        if not fresh(name):
            continue
        axes = tuple(range(1, value.ndim))
        if name == "lb":
            yield name, "has NaN or +inf; a lower bound is finite or -inf", xp.all(value < xp.inf, axis=axes)
        elif name in ("ub", "h"):
            yield name, f"has NaN or -inf; {name} is finite or +inf", xp.all(value > -xp.inf, axis=axes)
        else:
            yield name, "has NaN or infinite entries; all must be finite", xp.all(xp.isfinite(value), axis=axes)
    if fresh("Q"):
        Q = piece.Q
        largest = xp.max(xp.abs(Q), axis=(-2, -1))
        tolerance = 1e-8 if piece.dtype == xp.float64 else 1e-4
        asymmetry = xp.max(xp.abs(Q - Q.mT), axis=(-2, -1))
        # ¬(a > b) rather than a ≤ b: a NaN has its own complaint above.
        symmetric = ~(asymmetry > tolerance * largest)
        yield "Q", "is not symmetric; pass (Q + Qᵀ)/2, which has the same objective", symmetric
        shift = tolerance * xp.where(largest > 0, largest, xp.ones_like(largest))
        eye = piece.backend.eye(piece.n, piece.dtype)
        _, positive = piece.backend.factor(Q + shift[:, None, None] * eye)
        yield "Q", "is not positive semidefinite, so the problem is not convex", positive[:, 0]
    if piece.lb is not None and piece.ub is not None and fresh("lb", "ub"):
        yield "lb", "is greater than ub for a variable", ~xp.any(piece.lb > piece.ub, axis=-1)
