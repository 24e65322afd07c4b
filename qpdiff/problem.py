"""What a batch of quadratic programs is: the operands, their validation, the one batch axis and the constraint rows.

Every constraint is a row: the equalities A x = b, the inequalities G x ≤ h, then -x ≤ -lb and x ≤ ub where there are
bounds. The rest of the package sees one constraint operator K and one right-hand side k over all of them, with one
multiplier a row, and two masks that tell what a row is: an equality (also a bound pair lb = ub, which is one equality
and not two inequalities), an inequality, or nothing at all (an infinite bound). K is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache, partial
from itertools import accumulate, pairwise, starmap
from typing import Any, NamedTuple

import numpy as np

from .backend import Backend, Types, choose_backend, floating_types

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
SIZED_BY = {"h": "G", "b": "A", "lb": "Q", "ub": "Q"}
"""The operands that one number may stand for, and the matrix that has as many rows as they have entries."""
MATRICES = ("Q", "G", "A")
INFINITE = 1e20
"""A bound this far out is none, as in other solvers, whose users write 1e20 or 1e30 for infinity."""


@dataclass(frozen=True)
class Problem:
    """A batch of quadratic programs with its batch axes flattened to one.

    Each operand is an array whose first axis is the batch, of length `batch`, or of length 1 where the operand is
    shared; an operand that was not given is None. Of a part of a batch, matrices are copied when they are asked for.
    """

    backend: Backend
    dtype: Any
    """The floating point type of the operands, in which is computed."""
    batch_shape: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]]
    """The shape in which the caller gave each operand."""
    Q: Any
    q: Any
    G: Any = field(default_factory=type(None))  # an attribute of the class would be found before `__getattr__`
    h: Any = None
    A: Any = field(default_factory=type(None))
    b: Any = None
    lb: Any = None
    ub: Any = None
    result: Any = None
    """The floating point type of the results, by default the one in which is computed."""
    rounding: float = 1e-8
    """How large rounding may be in Q, relative to its largest entry: a matter of the type that Q came in."""
    batch: int = field(init=False)
    n: int = field(init=False)
    m: int = field(init=False)
    p: int = field(init=False)
    blocks: dict[str, slice] = field(init=False)
    """Where the rows of each kind lie: those of A, of G, of lb and of ub."""
    rows: int = field(init=False)

    def __post_init__(self):
        n = self.q.shape[-1]
        m, p = (0 if k is None else k.shape[-1] for k in (self.h, self.b))
        blocks = _blocks(p, m, n * (self.lb is not None), n * (self.ub is not None))
        sizes = {"batch": math.prod(self.batch_shape), "n": n, "m": m, "p": p, "rows": blocks["ub"].stop}
        result = self.dtype if self.result is None else self.result
        self.__dict__.update(sizes, blocks=blocks, result=result)  # past `frozen`, once

    @cached_property
    def operands(self) -> dict[str, Any]:
        """The operands that were given, by name."""
        return {name: value for name in OPERANDS if (value := getattr(self, name)) is not None}

    @property
    def entries(self) -> int:
        """How many numbers the operands have."""
        return sum(math.prod(value.shape) for value in self.operands.values())

    @property
    def layout(self) -> Layout:
        return Layout(
            self.backend, self.dtype, self.batch_shape, tuple(self.shapes.items()), self.result, self.rounding
        )

    def astype(self, dtype) -> Problem:
        """The same problems in another floating point type."""
        if dtype == self.dtype:
            return self
        return replace(self, dtype=dtype, **{k: self.backend.xp.astype(v, dtype) for k, v in self.operands.items()})

    def returned(self, value):
        """An array in the type of the results."""
        return value if value.dtype == self.result else self.backend.xp.astype(value, self.result)

    def reproducibly(self):
        """The context of work whose results the number of threads must not change."""
        longest = max(self.n, self.m + self.p)
        return self.backend.reproducibly(self.dtype, self.n * longest * max(self.batch, longest))

    # ---- parts of the batch

    def select(self, index) -> Problem:
        """The problems that a slice or an array of positions names; shared operands stay shared."""
        xp = self.backend.xp
        if isinstance(index, slice):
            size = len(range(*index.indices(self.batch)))
            if size == self.batch:
                return self
            return replace(self, batch_shape=(size,), **{k: take(xp, v, index) for k, v in self.operands.items()})
        parts: dict[str, Any] = dict.fromkeys(MATRICES)
        parts |= {name: take(xp, getattr(self, name), index) for name in ("q", "h", "b", "lb", "ub")}
        later = {name: (self._later.get(name) or Later(getattr(self, name))).select(xp, index) for name in MATRICES}
        part = replace(self, batch_shape=(index.shape[0],), **parts)
        known = {"bytes_per_problem": self.bytes_per_problem, "_row_data": take(xp, self._row_data, index)}
        part.__dict__.update(known, _later=later)
        for name in MATRICES:
            del part.__dict__[name]
        return part

    @cached_property
    def _later(self) -> dict[str, Later]:
        """Matrices that have not been asked for."""
        return {}

    def __getattr__(self, name: str):
        if name not in self.__dict__.get("_later", ()):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        self.__dict__[name] = matrix = self._later.pop(name).now(self.backend.xp)
        return matrix

    @cached_property
    def bytes_per_problem(self) -> int:
        """About what iterating on one problem takes: its own matrices, the reduced KKT matrix, K F⁻ᵀ."""
        n, linear = self.n, self.m + self.p
        reduced = min(n, linear) if linear else n
        own = sum(math.prod(value.shape[1:]) for value in self.operands.values() if value.shape[0] != 1)
        return 8 * (own + 5 * reduced**2 + linear * n + 24 * (n + self.rows))

    @property
    def workers(self) -> int:
        """How many chunks to work on at a time; where arrays are small, threads only wait for the interpreter."""
        return self.backend.workers if self.bytes_per_problem >= 2**18 else 1

    def chunks(self) -> list[slice]:
        """The batch in pieces that fit the working memory, as many for each worker."""
        limit, data = self.backend.chunk_bytes, 8 * self.entries
        memory = min(limit, max(limit // 3, 5 * data))  # in proportion to the data, where that is worth the while
        count = -(-self.batch * self.bytes_per_problem * self.workers // memory)
        if count > 1:
            count = -(-count // self.workers) * self.workers
        size = max(1, -(-self.batch // max(1, count)))
        return [slice(start, min(start + size, self.batch)) for start in range(0, self.batch, size)]

    # ---- the constraint rows

    @cached_property
    def _row_data(self):
        """Right-hand side k, masks of equalities, of inequalities and of both, each (batch or 1, rows)."""
        xp, backend = self.backend.xp, self.backend
        parts, equality, inequality = [], [], []
        fixed = None
        if self.lb is not None and self.ub is not None:
            fixed = (self.lb == self.ub) & xp.isfinite(self.lb)
        if self.A is not None:
            parts.append(self.b)
            equality.append(xp.ones_like(self.b, dtype=xp.bool))
            inequality.append(xp.zeros_like(self.b, dtype=xp.bool))
        for sign, bound, takes_fixed in ((1, self.h, False), (-1, self.lb, True), (1, self.ub, False)):
            if bound is None:
                continue
            # Where the caller had the numbers unchecked, NaN and infinity on the wrong side are a row that no point
            # satisfies: they must not pass for a bound that is not there.
            limits = ~(sign * bound >= INFINITE)
            equal = fixed if fixed is not None and takes_fixed else xp.zeros_like(limits)
            if fixed is not None and bound is not self.h:
                limits = limits & ~fixed
            impossible = xp.full_like(bound, xp.nan)
            k = xp.where(xp.isfinite(bound), sign * bound, impossible)
            parts.append(xp.where(limits | equal, k, xp.zeros_like(bound)))
            equality.append(equal)
            inequality.append(limits)
        if not parts:
            none = backend.full((1, 0), False, xp.bool)
            return backend.full((1, 0), 0.0, self.dtype), none, none, none
        k, equalities, inequalities = (_concat(xp, group) for group in (parts, equality, inequality))
        return k, equalities, inequalities, equalities | inequalities

    @property
    def k(self):
        """Right-hand side of the rows, zero in those that do not exist."""
        return self._row_data[0]

    @property
    def equality(self):
        """Which rows are equalities."""
        return self._row_data[1]

    @property
    def inequality(self):
        """Which rows are inequalities."""
        return self._row_data[2]

    @property
    def exists(self):
        """Which rows are one or the other; those that are neither do not exist."""
        return self._row_data[3]

    def where_inequality(self, a, other):
        """One array in the rows that are inequalities, another in the others."""
        return a if self._all_inequalities else self.backend.xp.where(self.inequality, a, other)

    def where_exists(self, a, other):
        """One array in the rows that exist, another in the others."""
        return a if self._all_exist else self.backend.xp.where(self.exists, a, other)

    @property
    def may_have_equalities(self) -> bool:
        """Whether there are rows of A, or pairs of bounds that may be equal."""
        return self.p > 0 or (self.lb is not None and self.ub is not None)

    @cached_property
    def _all_inequalities(self) -> bool:
        """Whether that is known of the rows."""
        return self.backend.known_all_false(~self.inequality)

    @cached_property
    def _all_exist(self) -> bool:
        """Whether that is known of the rows."""
        return self.backend.known_all_false(~self.exists)

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


@cache
def _blocks(*sizes: int) -> dict[str, slice]:
    edges = list(accumulate(sizes, initial=0))
    return dict(zip(("A", "G", "lb", "ub"), starmap(slice, pairwise(edges)), strict=True))


class Layout(NamedTuple):
    """What a problem is apart from the numbers in it; hashable."""

    backend: Any
    dtype: Any
    batch_shape: tuple[int, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    result: Any
    rounding: float

    def problem(self, operands: dict[str, Any]) -> Problem:
        return Problem(**self._asdict() | operands | {"shapes": dict(self.shapes)})


class Later(NamedTuple):
    """Arrays of the problems at some positions of a larger batch, to be copied when they are asked for."""

    tree: Any
    """Those of that batch, as for `take`."""
    where: Any = None
    """None: all of it."""

    def select(self, xp, index) -> Later:
        return Later(self.tree, index if self.where is None else xp.take(self.where, index, axis=0))

    def now(self, xp):
        return self.tree if self.where is None else take(xp, self.tree, self.where)


def take(xp, tree, index):
    """The problems at `index`, positions or a slice, of every array in nested tuples; shared arrays stay."""
    if isinstance(tree, tuple):
        leaves = (take(xp, leaf, index) for leaf in tree)
        return type(tree)(*leaves) if hasattr(tree, "_fields") else tuple(leaves)
    if tree is None or tree.shape[0] == 1:
        return tree
    return tree[index, ...] if isinstance(index, slice) else xp.take(tree, index, axis=0)


def product(M, x):
    """M x for matrices (B or 1, k, n) and vectors x (B, n)."""
    if M.shape[0] == 1:
        return x @ M[0, :, :].T
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


def make_problem(operands: dict[str, Any], *, backend: str | None = None, dtype=None) -> Problem:
    """Validate the caller's operands and bring them into the form of a `Problem`.

    Parameters
    ----------
    operands : dict
        The operands by name, None where absent.
    backend, dtype
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
    types = floating_types(chosen, arrays, present, dtype)
    coarsest = max(rounding(chosen.xp, kind) for kind in (arrays["Q"].dtype, types.working))
    with chosen.context():  # what overflows in the working type is refused as infinite
        arrays = {k: v if v.dtype == types.working else chosen.xp.astype(v, types.working) for k, v in arrays.items()}
        return _one_batch_axis(chosen, types, arrays, coarsest)


@cache
def rounding(xp, dtype) -> float:
    """How large rounding may be in a matrix that was computed in this type, relative to its largest entry."""
    eps = float(xp.finfo(dtype).eps) if xp.isdtype(dtype, "real floating") else 0.0
    if eps > xp.finfo(xp.float32).eps:  # half precision
        return 10 * eps
    return 1e-4 if eps > xp.finfo(xp.float64).eps else 1e-8


def _one_batch_axis(chosen: Backend, types: Types, arrays, coarsest: float) -> Problem:
    """The problem in the caller's arrays of the working type, their shapes looked at."""
    shapes = whole = {name: tuple(value.shape) for name, value in arrays.items()}
    if () in shapes.values():
        arrays = {name: _repeated(chosen, name, arrays) for name in arrays}
        whole = {name: tuple(value.shape) for name, value in arrays.items()}
    batch_shape = _batch_shape(tuple(whole.items()))
    batch = math.prod(batch_shape)
    flat = {}
    for name, value in arrays.items():
        core = len(OPERANDS[name])
        leading, trailing = value.shape[: value.ndim - core], value.shape[value.ndim - core :]
        if len(leading) == 1 and (leading == batch_shape or leading == (1,)):
            flat[name] = value
        elif math.prod(leading) == 1:
            flat[name] = chosen.xp.reshape(value, (1, *trailing))
        else:
            if leading != batch_shape:
                value = chosen.xp.broadcast_to(value, batch_shape + trailing)
            flat[name] = chosen.xp.reshape(value, (batch, *trailing))
    return Problem(
        backend=chosen,
        dtype=types.working,
        batch_shape=batch_shape,
        shapes=shapes,
        result=types.result,
        rounding=coarsest,
        **{name: chosen.for_products(value) for name, value in flat.items()},
    )


def _repeated(chosen: Backend, name: str, arrays):
    """An operand, as a vector with the same number in every entry where it is a number and that has a meaning."""
    value = arrays[name]
    sizes = arrays[SIZED_BY[name]].shape[-2:] if name in SIZED_BY and not value.shape else ()
    return chosen.xp.broadcast_to(value, sizes[:1]) if len(sizes) == 2 else value


def symmetrized(problem: Problem) -> Problem:
    """The problem without the asymmetry of Q that is rounding in the type that it came in.

    In a finer type that would be data: the engines, of which some read one triangle where others read both, would solve
    different problems. What is more than rounding stays, for `check_values`.
    """
    Q, xp, backend = problem.Q, problem.backend.xp, problem.backend
    if problem.rounding <= rounding(xp, problem.dtype) or backend.known_all_false(Q.mT != Q):
        return problem
    difference = Q.mT - Q
    small = xp.abs(difference) < problem.rounding * _largest(problem)
    return replace(problem, Q=Q + xp.where(small, difference, xp.zeros_like(Q)) / 2)


@lru_cache(maxsize=256)
def _batch_shape(items: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[int, ...]:
    """The batch axes of operands with these shapes, looked at once for the many calls that have the same."""
    shapes = dict(items)
    _check_core_shapes(shapes)
    return _broadcast_batch(shapes)


def _check_core_shapes(shapes: dict[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        core = OPERANDS[name]
        if len(shape) < len(core):
            raise ValueError(
                f"{name} has shape {shape}; expected (..., {', '.join(core)}), at least "
                f"{'one axis' if len(core) == 1 else 'two axes'}"
            )
    n = shapes["Q"][-1]
    if shapes["Q"][-2] != n:
        raise ValueError(f"Q has shape {shapes['Q']}; expected (..., n, n), square")
    if n == 0:
        raise ValueError(f"Q has shape {shapes['Q']}; a problem needs at least one variable")
    sizes = {"n": n}
    for name, shape in shapes.items():
        core = OPERANDS[name]
        for size, letter in zip(shape[len(shape) - len(core) :], core, strict=True):
            if sizes.setdefault(letter, size) != size:
                source = {"n": "Q", "m": "G", "p": "A"}[letter]
                raise ValueError(
                    f"{name} has shape {shape}; expected (..., {', '.join(core)}) with {letter} = {sizes[letter]} "
                    f"from {source} of shape {shapes[source]}"
                )


def _broadcast_batch(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    batch_shape: tuple[int, ...] = ()
    so_far: list[str] = []
    for name, shape in shapes.items():
        leading = shape[: len(shape) - len(OPERANDS[name])]
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


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of one shape broadcasts to another."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))


# ---- the numbers


class Rule(NamedTuple):
    """Something that must hold for the numbers of some operands."""

    operands: tuple[str, ...]
    """The operands it looks at, the one to name first."""
    complaint: str
    broken: Callable[[Problem], Any]
    """The entries that break it, True in an array (B, ...)."""
    evidence: Callable[[Problem, tuple[int, ...]], str]
    """What is wrong with an entry of one problem, in words."""


def check_values(problem: Problem, convexity: bool = True) -> None:
    """Look at the numbers: one transfer to the host for the whole batch, more only to describe an error.

    Whether Q is positive semidefinite takes a factorisation; without `convexity` it is taken for granted.
    """
    xp = problem.backend.xp
    rules = [rule for rule in _rules(problem) if convexity or rule.broken is not indefinite]

    def look(chunk: slice):
        piece, found = problem.select(chunk), []
        for rule in rules:
            # The first piece settles a rule over shared operands for the whole batch.
            if chunk.start == 0 or _depends_on_batch(problem, rule):
                broken = rule.broken(piece)
                found.append((rule, chunk, piece, ~xp.any(xp.reshape(broken, (broken.shape[0], -1)), axis=-1)))
        return found

    parts = problem.backend.map(look, problem.chunks(), problem.workers)
    verdicts = [verdict for part in parts for verdict in part]
    if bool(xp.all(xp.stack([xp.all(good) for *_, good in verdicts]))):
        return
    rule, where, piece, good = next(verdict for verdict in verdicts if not bool(xp.all(verdict[-1])))
    first = int(xp.argmin(xp.astype(good, xp.int8)))
    one = piece.select(slice(first, first + 1))
    index = ""
    if problem.batch_shape and _depends_on_batch(problem, rule):
        axes = [int(i) for i in np.unravel_index(where.start + first, problem.batch_shape)]
        index = f" (problem {axes[0] if len(axes) == 1 else tuple(axes)} of the batch)"
    entry = _first(xp, rule.broken(one)[0, ...])
    raise ValueError(f"{rule.operands[0]} {rule.complaint}: {rule.evidence(one, entry)}{index}")


def _depends_on_batch(problem: Problem, rule: Rule) -> bool:
    return any(getattr(problem, name).shape[0] > 1 for name in rule.operands)


def _rules(problem: Problem) -> list[Rule]:
    """The rules for the operands of a problem, in the order in which they are to be reported."""
    rules = []
    # In float32 the infinite entry may have been finite where it came from.
    single = " in float32" if problem.dtype == problem.backend.xp.float32 else ""
    for name in problem.operands:
        if name == "lb":
            complaint = f"has NaN or +inf{single}; a lower bound is finite or -inf"
        elif name in ("ub", "h"):
            complaint = f"has NaN or -inf{single}; {name} is finite or +inf"
        else:
            complaint = f"has NaN or infinite entries{single}; all must be finite"
        rules.append(Rule((name,), complaint, partial(_out_of_range, name), partial(_entry, name)))
    complaint = "is not symmetric; pass (Q + Qᵀ)/2, which has the same objective"
    rules.append(Rule(("Q",), complaint, _asymmetric, _two_sides))
    complaint = "is not positive semidefinite, so the problem is not convex"
    rules.append(Rule(("Q",), complaint, indefinite, _smallest_eigenvalue))
    if problem.lb is not None and problem.ub is not None:
        rules.append(Rule(("lb", "ub"), "is greater than ub for a variable", _crossed, _both_bounds))
    return rules


def _out_of_range(name: str, problem: Problem):
    xp, value = problem.backend.xp, getattr(problem, name)
    if name == "lb":
        return ~(value < xp.inf)
    if name in ("ub", "h"):
        return ~(value > -xp.inf)
    return ~xp.isfinite(value)


def _largest(problem: Problem):
    """The largest entry of Q, (B, 1, 1), or the smallest number to which rounding is relative."""
    xp = problem.backend.xp
    largest = xp.max(xp.abs(problem.Q), axis=(-2, -1), keepdims=True)
    return problem.backend.clip(largest, float(xp.finfo(problem.dtype).smallest_normal))


def _asymmetric(problem: Problem):
    return problem.backend.xp.abs(problem.Q - problem.Q.mT) > problem.rounding * _largest(problem)


def indefinite(problem: Problem):
    """Whether Q has an eigenvalue that is negative beyond rounding, (B, 1): where the shifted Q has no factor."""
    # Divided by its largest entry, because the shift would overflow with huge and vanish with denormal numbers.
    shift = problem.rounding * problem.backend.eye(problem.n, problem.dtype)
    _, positive = problem.backend.factor(problem.Q / _largest(problem) + shift)
    return ~positive


def _crossed(problem: Problem):
    return problem.lb > problem.ub


def _first(xp, entries) -> tuple[int, ...]:
    """Position of the first True."""
    flat = int(xp.argmax(xp.astype(xp.reshape(entries, (-1,)), xp.int8)))
    return tuple(int(i) for i in np.unravel_index(flat, entries.shape))


def _entry(name: str, problem: Problem, entry) -> str:
    return f"{name}[{', '.join(map(str, entry))}] = {float(getattr(problem, name)[(0, *entry)])}"


def _two_sides(problem: Problem, entry) -> str:
    return f"{_entry('Q', problem, entry)}, {_entry('Q', problem, entry[::-1])}"


def _both_bounds(problem: Problem, entry) -> str:
    return f"{_entry('lb', problem, entry)}, {_entry('ub', problem, entry)}"


def _smallest_eigenvalue(problem: Problem, entry) -> str:
    xp, largest = problem.backend.xp, _largest(problem)
    unit = float(xp.min(xp.linalg.eigvalsh(problem.Q / largest)))
    smallest = unit * float(largest[0, 0, 0])
    return (
        f"its smallest eigenvalue is {smallest:.3g}, {unit:.2g} of its largest entry; if that is rounding, add "
        f"{-smallest:.3g} to its diagonal or pass check=False"
    )
