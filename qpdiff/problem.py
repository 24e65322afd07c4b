"""A batch of quadratic programs: its operands with one batch axis, and its constraints.

All constraints are rows of one stacked constraint matrix K with right-hand side k and multipliers v: the equalities
A x = b, the inequalities G x ≤ h, then -x ≤ -lb and x ≤ ub where there are bounds. Two masks say what a row is: an
equality (also a pair of bounds lb = ub, which is one equality in the row of lb), an inequality, or absent (an infinite
bound). K is never formed.
"""

from __future__ import annotations

import math
from functools import lru_cache, wraps
from itertools import accumulate, pairwise, starmap
from typing import Any, NamedTuple

import numpy as np

from .backend import Backend
from .once import cached_property
from .sparse import Pattern, Sparse, apply, full_pattern, gather, stored, to_dense

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
MATRICES = ("Q", "G", "A")
PRICED = ("elastic", "elastic_quadratic")
"""The options of `solve_qp` that let constraints be violated at a price."""
PRICE_NAMES = {option: {of: f"{option}['{of}']" for of in ("A", "G", "bounds")} for option in PRICED}
"""What these options come to, operands too, by the constraints: their names, which errors have for them."""
PRICES = {name: (size,) for names in PRICE_NAMES.values() for name, size in zip(names.values(), "pmn", strict=True)}
"""Their core shapes by these names."""
CORES = OPERANDS | PRICES
"""The core shapes of all operands."""
INFINITE = 1e20
"""Bounds of this magnitude are treated as infinite, as in other solvers, whose users write 1e20 or 1e30."""


def cached(function):
    """Cache a function's values as `lru_cache` does, by the types of arguments too, but not for arguments without a
    hash: sizes that torch traces, and what is no number.
    """
    known = lru_cache(maxsize=256, typed=True)(function)

    @wraps(function)
    def call(*args):
        try:
            return known(*args)
        except TypeError:
            pass
        return function(*args)  # an error of its own it raises again

    return call


class _Layout(NamedTuple):
    backend: Any
    dtype: Any
    """The floating point type of the operands, in which is computed."""
    result: Any
    """The floating point type of the results."""
    rounding: float
    """Bound on the rounding error in Q, relative to its largest entry; it follows from the type that Q came in."""
    batch_shape: tuple[int, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """The operands that were given, with the shape in which the caller gave each."""
    n: int
    m: int
    p: int
    lower: bool
    """There are lower bounds; `upper` likewise."""
    upper: bool
    own: int
    """Numbers that a problem does not share with the others of its batch."""
    sparse: bool
    """A matrix is sparse, with which the problem is."""
    numbers: tuple[str, ...] = ()
    """Those of `PRICED` that the caller gave as one number for A and G."""


class Layout(_Layout):
    """All that a problem is but the numbers in it; hashable. What follows from it is computed once."""

    def __getstate__(self):
        return None  # the fields are what there is to pickle

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """The attributes that all problems of this layout have alike."""
        names = ("backend", "dtype", "result", "rounding", "batch_shape", "n", "m", "p", "sparse")
        blocks = _blocks(self.p, self.m, self.n * self.lower, self.n * self.upper)
        return {name: getattr(self, name) for name in names} | {
            "batch": math.prod(self.batch_shape), "shapes": dict(self.shapes), "blocks": blocks,
            "rows": blocks["ub"].stop,
            "flat": all(len(shape) - len(CORES[name]) == 1 == len(self.batch_shape) for name, shape in self.shapes),
        }  # fmt: skip

    def problem(self, operands: dict[str, Any]) -> Problem:
        return Problem(self, operands)


def make_layout(backend: Backend, batch_shape, operands: dict[str, Any], rounding: float = 1e-8) -> Layout:
    """Read the layout of operands that have one batch axis and are returned in their own type."""
    shapes = tuple([(name, tuple(value.shape)) for name, value in operands.items()])
    of_values = tuple([(k, tuple(value.values.shape)) for k, value in operands.items() if isinstance(value, Sparse)])
    return _layout(backend, operands["q"].dtype, rounding, tuple(batch_shape), shapes, of_values)


@cached
def _layout(backend: Backend, dtype, rounding: float, batch_shape, shapes, of_values) -> Layout:
    """Make a layout, once for the many calls that have the same."""
    sizes = core_sizes(dict(shapes) | dict(of_values))
    return Layout(backend, dtype, dtype, rounding, batch_shape, shapes, sparse=bool(of_values), **sizes)


def core_sizes(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the fields of a `Layout` that follow from the shapes of arrays with one batch axis: of sparse operands,
    that of the values.
    """
    return {
        "n": shapes["q"][-1],
        "m": shapes["h"][-1] if "h" in shapes else 0,
        "p": shapes["b"][-1] if "b" in shapes else 0,
        "lower": "lb" in shapes,
        "upper": "ub" in shapes,
        "own": sum(math.prod(shape[1:]) for shape in shapes.values() if shape[0] != 1),
    }


class RowData(NamedTuple):
    """The constraint rows but for their matrix, each (B or 1, rows)."""

    k: Any
    """Right-hand side, 0 in rows that are absent."""
    equality: Any
    """Mask of the equalities."""
    inequality: Any
    """Mask of the inequalities, and of the equalities whose violation has a linear price: of all rows with a slack."""
    exists: Any
    """Mask of both; the other rows are absent."""
    elastic: Elastic | None = None
    """The prices of violations, where there are any."""


class Elastic(NamedTuple):
    """The constraint rows that may be violated at a price, each (B or 1, rows)."""

    upper: Any
    """The linear price, which is the upper limit of the multiplier; infinite where there is none."""
    compliance: Any
    """σ of the quadratic price; 0 where there is none."""
    limited: Any
    """Mask of the rows with a linear price."""
    two_sided: Any
    """Mask of those that are equalities, whose multipliers have the lower limit −`upper` too."""

    @property
    def soft(self):
        """Mask of the rows with a price, which contradict nothing."""
        return self.limited | (self.compliance > 0)


class Problem:
    """A batch of quadratic programs with its batch axes flattened to one.

    Each operand is an array whose first axis is the batch, of length `batch`, or of length 1 where the operand is
    shared; an operand that was not given is None. Of Q, G and A any may be a `Sparse`, with values (B or 1, nnz). It is
    not to be changed.

    Parameters
    ----------
    layout : Layout
    operands : dict
        Those that were given, by name. A matrix may be a `DeferredTake`.
    row_data : RowData, optional
        Computed from the operands when it is first asked for, if it is not known.

    Attributes
    ----------
    blocks : dict
        Slices of the constraint rows by the operand that they come from: "A", "G", "lb", "ub".
    rows : int
        Constraint rows.
    shapes : dict
        The shape in which the caller gave each operand.
    flat : bool
        Whether the caller gave all operands with one batch axis, as they are here.
    """

    backend: Any
    dtype: Any
    result: Any
    rounding: float
    batch_shape: tuple[int, ...]
    n: int
    m: int
    p: int
    sparse: bool
    batch: int
    shapes: dict[str, tuple[int, ...]]
    flat: bool
    blocks: dict[str, slice]
    rows: int

    def __init__(self, layout: Layout, operands: dict[str, Any], row_data: RowData | None = None):
        self.layout = layout
        vars(self).update(layout.attributes)
        self.q = operands["q"]
        self.h: Any = operands.get("h")
        self.b: Any = operands.get("b")
        self.lb: Any = operands.get("lb")
        self.ub: Any = operands.get("ub")
        self.is_elastic = not PRICES.keys().isdisjoint(operands)
        self._operands = operands
        self._row_data = row_data
        self._deferred = False
        """Whether a matrix may be a `DeferredTake`, which to ask of each takes time in a small solve."""

    @property
    def Q(self):
        return self._matrix("Q")

    @property
    def G(self):
        return self._matrix("G")

    @property
    def A(self):
        return self._matrix("A")

    def __getattr__(self, name: str):
        """Return the price of that name, None where it was not given."""
        if name in PRICES:
            return self._operands.get(name)
        raise AttributeError(f"a problem has no {name!r}")

    def _matrix(self, name: str):
        value = self._operands.get(name)
        if self._deferred and isinstance(value, DeferredTake):
            self._operands[name] = value = value.evaluate(self.backend.xp)
        return value

    @property
    def operands(self) -> dict[str, Any]:
        """The operands that were given, by name."""
        if self._deferred:
            for name in MATRICES:
                self._matrix(name)
            self._deferred = False
        return self._operands

    @cached_property
    def patterns(self) -> tuple[Pattern, Pattern, Pattern]:
        """The patterns of Q, A and G; that of a dense matrix is full."""
        return _pattern(self.Q, self.n), _pattern(self.A, self.n), _pattern(self.G, self.n)

    @property
    def entries(self) -> int:
        """Numbers in all operands."""
        return sum(math.prod(stored(value).shape) for value in self.operands.values())

    @property
    def dense_bytes(self) -> int:
        """Memory that the matrices of the batch take as dense ones."""
        return 8 * sum(math.prod(getattr(self, name).shape) for name in MATRICES if name in self._operands)

    def made_dense(self) -> Problem:
        """Return the same problems with dense matrices."""
        if not self.sparse:
            return self
        operands = {
            name: to_dense(self.backend, value) if isinstance(value, Sparse) else value
            for name, value in self.operands.items()
        }
        sizes = core_sizes({name: tuple(value.shape) for name, value in operands.items()})
        return Problem(self.layout._replace(own=sizes["own"], sparse=False), operands, self._row_data)

    def with_operands(self, **changed) -> Problem:
        """Return the same problems but for some operands."""
        return Problem(self.layout, self.operands | changed)

    def with_layout(self, **changed) -> Problem:
        """Return the same problems but for some fields of the layout."""
        return Problem(self.layout._replace(**changed), self.operands, self._row_data)

    def astype(self, dtype) -> Problem:
        """Return the same problems in another floating point type."""
        if dtype == self.dtype:
            return self
        astype = self.backend.xp.astype
        operands = {name: apply(lambda a: astype(a, dtype), value) for name, value in self.operands.items()}
        return Problem(self.layout._replace(dtype=dtype), operands)

    def returned(self, value):
        """Return an array, or a `Sparse`, in the type of the results."""
        return value if value.dtype == self.result else apply(lambda a: self.backend.xp.astype(a, self.result), value)

    def reproducibly(self):
        """Return the context of work whose results the number of threads must not change."""
        longest = max(self.n, self.m + self.p)
        return self.backend.reproducibly(self.dtype, self.n * longest * max(self.batch, longest))

    # ---- a selection of the batch

    def select(self, index) -> Problem:
        """Select the problems that a slice or an array of positions names.

        Shared operands stay shared. Matrices at positions are copied when they are first asked for: dual-space steps do
        without them, and a batch is selected from several times.
        """
        xp = self.backend.xp
        if isinstance(index, slice):
            size = len(range(*index.indices(self.batch)))
            if size == self.batch:
                return self
            operands = {name: take(xp, value, index) for name, value in self.operands.items()}
            return Problem(self.layout._replace(batch_shape=(size,)), operands)
        operands = {}
        for name, value in self._operands.items():
            if name in MATRICES:
                deferred = value if isinstance(value, DeferredTake) else DeferredTake(value)
                operands[name] = deferred.select(xp, index)
            else:
                operands[name] = take(xp, value, index)
        layout = self.layout._replace(batch_shape=(index.shape[0],))
        selected = Problem(layout, operands, take(xp, self.row_data, index))
        selected._deferred = True
        return selected

    @property
    def bytes_per_problem(self) -> int:
        """About what iterating on one problem takes: its own numbers, the reduced KKT matrix, V = F⁻ᵀKᵀ."""
        n, linear = self.n, self.m + self.p
        if self.sparse:  # no engine iterates on chunks of these, so that it is what the checks take
            return 8 * (self.layout.own + 24 * (n + self.rows))
        reduced = min(n, linear) if linear else n
        return 8 * (self.layout.own + 5 * reduced**2 + linear * n + 24 * (n + self.rows))

    @property
    def workers(self) -> int:
        """Chunks to work on at a time; where arrays are small, threads only wait for the interpreter."""
        return self.backend.workers if self.bytes_per_problem >= 2**18 else 1

    def chunks(self) -> list[slice]:
        """Slices of the batch that fit the working memory, as many for each worker."""
        limit, data = self.backend.chunk_bytes, 8 * self.entries
        memory = min(limit, max(limit // 3, 5 * data))  # in proportion to the data, where that is worth the while
        count = -(-self.batch * self.bytes_per_problem * self.workers // memory)
        if count > 1:
            count = -(-count // self.workers) * self.workers
        size = max(1, -(-self.batch // max(1, count)))
        return [slice(start, min(start + size, self.batch)) for start in range(0, self.batch, size)]

    # ---- the constraint rows

    @property
    def row_data(self) -> RowData:
        if self._row_data is None:
            self._row_data = _row_data(self)
        return self._row_data

    @cached_property
    def fixed(self):
        """Mask (B or 1, n) of the variables that lb = ub fixes; None where none is, as far as is known."""
        if self.lb is None or self.ub is None:
            return None
        equal = self.lb == self.ub
        if type(equal) is np.ndarray and not equal.any():  # other libraries may trace, or compute somewhere else
            return None
        return equal & self.backend.xp.isfinite(self.lb)

    @property
    def k(self):
        """Right-hand side of the rows, 0 in those that are absent."""
        return self.row_data.k

    @property
    def equality(self):
        """Mask of the rows that are equalities."""
        return self.row_data.equality

    @property
    def inequality(self):
        """Mask of the rows that are inequalities."""
        return self.row_data.inequality

    @property
    def elastic(self) -> Any:
        """The prices of violations as `Elastic`; None where there are none."""
        return self.row_data.elastic if self.is_elastic else None

    @property
    def exists(self):
        """Mask of the rows that are one or the other; the others are absent."""
        return self.row_data.exists

    def where_inequality(self, a, other):
        """One array in the rows that are inequalities, another in the others."""
        return a if self._all_inequalities else self.backend.xp.where(self.inequality, a, other)

    def where_exists(self, a, other):
        """One array in the rows that exist, another in the others."""
        return a if self._all_exist else self.backend.xp.where(self.exists, a, other)

    @property
    def may_have_equalities(self) -> bool:
        """True if there are rows of A, or pairs of bounds that may be equal."""
        return self.p > 0 or (self.lb is not None and self.ub is not None)

    @cached_property
    def _all_inequalities(self) -> bool:
        """True if all rows are known to be inequalities."""
        return self.backend.known_all_false(~self.inequality)

    @cached_property
    def _all_exist(self) -> bool:
        """True if no row is known to be absent."""
        return self.backend.known_all_false(~self.exists)

    # ---- products

    def product(self, M, x):
        """Compute M x for matrices (B or 1, k, n), dense or sparse, and vectors x (B, n)."""
        if isinstance(M, Sparse):
            return M.pattern.row_sums.sums(self.backend, M.values * gather(self.backend, x, M.indices))
        return product(M, x)

    def product_transposed(self, M, v):
        """Compute Mᵀ v for matrices (B or 1, k, n), dense or sparse, and vectors v (B, k)."""
        if isinstance(M, Sparse):
            return M.pattern.column_sums.sums(self.backend, M.values * gather(self.backend, v, M.pattern.rows))
        return product_transposed(M, v)

    def hessian(self, x):
        """Compute Q x."""
        return self.product(self.Q, x)

    def constraints(self, x):
        """Compute K x, the left-hand side of every row, for x (B, n)."""
        parts = []
        if self.A is not None:
            parts.append(self.product(self.A, x))
        if self.G is not None:
            parts.append(self.product(self.G, x))
        if self.lb is not None:
            parts.append(-x)
        if self.ub is not None:
            parts.append(x)
        if not parts:
            return x[:, :0]
        return parts[0] if len(parts) == 1 else self.backend.xp.concat(parts, axis=-1)

    def adjoint(self, v):
        """Compute Kᵀ v, (B, n), for multipliers of the rows, (B, rows)."""
        blocks = self.blocks
        out = None
        for M, name in ((self.A, "A"), (self.G, "G")):
            if M is not None:
                term = self.product_transposed(M, v[:, blocks[name]])
                out = term if out is None else out + term
        if self.lb is not None:
            out = -v[:, blocks["lb"]] if out is None else out - v[:, blocks["lb"]]
        if self.ub is not None:
            out = v[:, blocks["ub"]] if out is None else out + v[:, blocks["ub"]]
        return self.backend.full((v.shape[0], self.n), 0.0, self.dtype) if out is None else out


@cached
def _blocks(*sizes: int) -> dict[str, slice]:
    edges = list(accumulate(sizes, initial=0))
    return dict(zip(("A", "G", "lb", "ub"), starmap(slice, pairwise(edges)), strict=True))


def _row_data(problem: Problem) -> RowData:
    xp, backend = problem.backend.xp, problem.backend
    parts, equality, inequality = [], [], []
    fixed = problem.fixed
    if problem.b is not None:
        parts.append(problem.b)
        equality.append(xp.ones_like(problem.b, dtype=xp.bool))
        inequality.append(xp.zeros_like(problem.b, dtype=xp.bool))
    for sign, bound, takes_fixed in ((1, problem.h, False), (-1, problem.lb, True), (1, problem.ub, False)):
        if bound is None:
            continue
        # Of numbers that were not checked, NaN and infinity on the wrong side make a row that no point satisfies: they
        # must not pass for a bound that is absent.
        limits = ~(sign * bound >= INFINITE)
        equal = fixed if fixed is not None and takes_fixed else xp.zeros_like(limits)
        if fixed is not None and bound is not problem.h:
            limits = limits & ~fixed
        impossible = xp.full_like(bound, xp.nan)
        k = xp.where(xp.isfinite(bound), sign * bound, impossible)
        parts.append(xp.where(limits | equal, k, xp.zeros_like(bound)))
        equality.append(equal)
        inequality.append(limits)
    if not parts:
        none = backend.full((1, 0), False, xp.bool)
        return RowData(backend.full((1, 0), 0.0, problem.dtype), none, none, none)
    k, equalities, inequalities = (concat_last(xp, group) for group in (parts, equality, inequality))
    if problem.is_elastic:
        return _priced(problem, k, equalities, inequalities)
    return RowData(k, equalities, inequalities, equalities | inequalities)


def _priced(problem: Problem, k, equalities, inequalities) -> RowData:
    """Return the data of rows that may be violated at a price."""
    xp = problem.backend.xp
    upper = price_rows(problem, problem.operands, "elastic", xp.inf)
    compliance = price_rows(problem, problem.operands, "elastic_quadratic", 0.0)
    # Of numbers that were not checked, NaN and those below 0 make a row that no point satisfies.
    k = xp.where((upper >= 0) & (compliance >= 0), k, xp.nan)
    counts = upper != 0  # what costs nothing is no constraint
    equalities, inequalities = equalities & counts, inequalities & counts
    exists = equalities | inequalities
    limited = exists & (upper < INFINITE)
    elastic = Elastic(
        upper=xp.where(limited, upper, xp.inf), compliance=xp.where(exists, compliance, 0.0), limited=limited,
        two_sided=limited & equalities,
    )  # fmt: skip
    return RowData(xp.where(exists, k, 0.0), equalities & ~limited, inequalities | elastic.two_sided, exists, elastic)


def least_distance(eps: float) -> float:
    """Return the least distance of a multiplier from a limit that counts, against the limit."""
    return eps**0.625


def limit_distances(problem: Problem, v):
    """Return how far multipliers (B, rows) are from their lower and their upper limits.

    At least a small share of the limit, because derivatives of higher order divide the rounding error of multipliers by
    it. In rows without a limit it is a number other than 0.
    """
    backend, elastic, accuracy = problem.backend, problem.elastic, problem.backend.xp.finfo(v.dtype)
    xp, one = backend.xp, backend.xp.ones_like(v)
    upper = xp.where(elastic.limited, elastic.upper, 1.0)
    least, tiny = least_distance(float(accuracy.eps)) * upper, float(accuracy.smallest_normal) ** 0.25
    z = backend.clip(xp.where(problem.inequality, v, one), tiny)
    z = xp.where(elastic.two_sided, xp.maximum(v + upper, least), z)
    return z, xp.where(elastic.limited, xp.maximum(upper - v, least), one)


def price_rows(problem: Problem, values: dict[str, Any], option: str, missing: float):
    """Join what an option of `PRICED` comes to, (B or 1, core) by name, into values of the rows, (B or 1, rows)."""
    blocks, parts = problem.blocks, []
    for name, vector, of in (("A", "b", "A"), ("G", "h", "G"), ("lb", "lb", "bounds"), ("ub", "ub", "bounds")):
        size = blocks[name].stop - blocks[name].start
        if getattr(problem, vector) is not None:
            value = values.get(PRICE_NAMES[option][of])
            parts.append(problem.backend.full((1, size), missing, problem.dtype) if value is None else value)
    return concat_last(problem.backend.xp, parts)


def slack(xp, s, h):
    """Return the slacks of G x ≤ h, infinite where h is."""
    return xp.where(h >= INFINITE, float("inf"), s)


# ---- rows and named parts: two linear maps, each the transpose of the other
#
# A fixed variable, lb = ub, is one equality in the row of lb. The sign of its multiplier tells which bound holds the
# variable against the cost; that is the one whose multiplier, cotangent or gradient is not 0.


def _pattern(matrix, n: int) -> Pattern:
    if isinstance(matrix, Sparse):
        return matrix.pattern
    return full_pattern(0 if matrix is None else matrix.shape[1], n)


def split_rows(problem: Problem, values, v):
    """Split values (B, rows) of the constraint rows into those of A, G, lb and ub.

    Parameters
    ----------
    v : array (B, rows)
        Multipliers.

    Returns
    -------
    of_A, of_G, of_lb, of_ub : arrays (B, p), (B, m), (B, n), (B, n)
        Zeros for bounds that were not given.
    """
    zero: Any = None
    if problem.lb is None or problem.ub is None:
        zero = problem.backend.zeros_of_all(values.shape[0], problem.n, problem.dtype)
    return split_blocks(problem.backend.xp, problem.blocks, values, v, zero, problem.fixed)


def split_blocks(xp, blocks: dict[str, slice], values, v, zero, fixed):
    """Split as `split_rows` does, with the zeros of a bound that was not given and the mask of the fixed variables."""
    lower, upper = blocks["lb"], blocks["ub"]
    of_lb = values[:, lower] if lower.start < lower.stop else zero
    of_ub = values[:, upper] if upper.start < upper.stop else zero
    if fixed is not None:
        at_lower = v[:, lower] >= 0
        zero = xp.zeros_like(of_lb)
        of_ub = xp.where(fixed, xp.where(at_lower, zero, -of_lb), of_ub)
        of_lb = xp.where(fixed & ~at_lower, zero, of_lb)
    return values[:, blocks["A"]], values[:, blocks["G"]], of_lb, of_ub


def join_rows(problem: Problem, of_A, of_G, of_lb, of_ub, v=None):
    """Join values of A, G, lb and ub, (B or 1, ·), into those of the constraint rows.

    Parameters
    ----------
    v : array (B, rows), optional
        Multipliers; by default the values themselves are multipliers.

    Returns
    -------
    array (B or 1, rows)
    """
    xp, lower = problem.backend.xp, problem.blocks["lb"]
    if (fixed := problem.fixed) is not None:
        at_lower = of_lb >= of_ub if v is None else v[:, lower] >= 0
        of_lb = xp.where(fixed & ~at_lower, -of_ub, of_lb)
    bounds = [part for bound, part in ((problem.lb, of_lb), (problem.ub, of_ub)) if bound is not None]
    return concat_last(xp, [of_A, of_G, *bounds])


# ---- arrays of a batch


class DeferredTake(NamedTuple):
    """Arrays of the problems at some positions of a larger batch, to be copied when they are asked for."""

    tree: Any
    """The arrays of that batch, as for `take`."""
    positions: Any = None
    """None: all of it."""

    def select(self, xp, index) -> DeferredTake:
        return DeferredTake(self.tree, index if self.positions is None else xp.take(self.positions, index, axis=0))

    def evaluate(self, xp):
        return self.tree if self.positions is None else take(xp, self.tree, self.positions)


def take(xp, tree, index):
    """Take the problems at `index`, positions or a slice, of every array in nested tuples; shared arrays stay."""
    if isinstance(tree, tuple):
        leaves = (take(xp, leaf, index) for leaf in tree)
        return type(tree)(*leaves) if hasattr(tree, "_fields") else tuple(leaves)
    if isinstance(tree, Sparse):
        return tree.with_values(take(xp, tree.values, index))
    if tree is None or tree.shape[0] == 1:
        return tree
    return tree[index, ...] if isinstance(index, slice) else xp.take(tree, index, axis=0)


def product(M, x):
    """Compute M x for matrices (B or 1, k, n) and vectors x (B, n)."""
    if M.shape[0] == 1:
        return x @ M[0, :, :].T
    return (M @ x[:, :, None])[:, :, 0]


def product_transposed(M, v):
    """Compute Mᵀ v for matrices (B or 1, k, n) and vectors v (B, k), without a transposed copy."""
    if M.shape[0] == 1:
        return v @ M[0, :, :]
    return (v[:, None, :] @ M)[:, 0, :]


def concat_last(xp, arrays):
    """Join arrays (B or 1, ·) along their last axis."""
    batch = next((a.shape[0] for a in arrays if a.shape[0] != 1), 1)  # 0 where the batch is empty
    return xp.concat([xp.broadcast_to(a, (batch, a.shape[-1])) for a in arrays], axis=-1)
