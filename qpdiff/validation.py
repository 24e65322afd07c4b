"""Validation: which operands are refused, and in which words.

Types, shapes and the presence of operands are checked where they are made into a `Problem`; the numbers in them are
checked by `check_values`, or by the compiled engine on its way through them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from .backend import Backend, Kind, choose_backend, floating_types, read_dtype
from .problem import CORES, INFINITE, MATRICES, OPERANDS, PRICE_NAMES, PRICES, Layout, Problem, cached, core_sizes
from .sparse import Pattern, Sparse, gather, is_sparse, read_sparse, stored

SIZED_BY = {"h": "G", "b": "A", "lb": "Q", "ub": "Q"} | {
    name: {"p": "A", "m": "G", "n": "Q"}[size] for name, (size,) in PRICES.items()
}
"""Operands that one number may stand for, and the matrix that has as many rows as they have entries."""
_PRICES_OF_BOUNDS = [names["bounds"] for names in PRICE_NAMES.values()]
EIGENVALUE_BYTES = 2**25
"""Memory of a dense Q up to which the error about an indefinite sparse one names its smallest eigenvalue."""
Shape = tuple[int, ...]
_ARRAYS, _NUMBERS = frozenset({np.ndarray}), frozenset({int, float})


def make_problem(
    operands: dict[str, Any], *, backend: str | None = None, dtype=None, price_numbers: tuple[str, ...] = ()
) -> Problem:
    """Check the types and shapes of the caller's operands and bring them into the form of a `Problem`.

    Parameters
    ----------
    operands : dict
        The operands by name, None where absent.
    backend, dtype
        As in `qpdiff.solve_qp`.
    price_numbers : tuple
        The options of prices that are one number each.

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
    numbers = _pop_price_numbers(present) if len(operands) > len(OPERANDS) else {}
    patterns = _patterns(present)
    chosen, arrays = choose_backend(present, backend)
    described = tuple(
        [(name, tuple(value.shape), value.dtype, hasattr(present[name], "dtype")) for name, value in arrays.items()]
    )
    cores = tuple([(name, pattern.shape) for name, pattern in patterns.items()]) if patterns else ()
    named = tuple(numbers)
    layout, changes = _plan(chosen, chosen.widest_float, described, read_dtype(dtype), cores, named, price_numbers)
    if "Q" in patterns:
        _check_symmetric(patterns["Q"])
    if changes:
        with chosen.context():  # what overflows in the working type is refused as infinite
            for name, change in changes.items():
                arrays[name] = change(chosen.xp, arrays[name])
    for name, number in numbers.items():
        arrays[name] = chosen.row_of(number, getattr(layout, *PRICES[name]), layout.dtype)
    arrays = chosen.for_products(arrays)
    for name, pattern in patterns.items():
        arrays[name] = Sparse.of_pattern(arrays[name], pattern)
    return Problem(layout, arrays)


def _pop_price_numbers(operands: dict[str, Any]) -> dict[str, float]:
    """Remove prices that are numbers of Python's, which are quicker to fill in than to convert, and return them."""
    numbers = {name: value for name, value in operands.items() if type(value) in _NUMBERS and name in PRICES}
    for name in numbers:
        del operands[name]
    return numbers


def _patterns(operands: dict[str, Any]) -> dict[str, Pattern]:
    """Replace sparse operands by their values; return the patterns by name."""
    patterns: dict[str, Pattern] = {}
    if _ARRAYS.issuperset(map(type, operands.values())):  # to ask each takes time in a small solve
        return patterns
    for name, value in operands.items():
        if type(value) is np.ndarray or not is_sparse(value):
            continue
        if name not in MATRICES:
            raise TypeError(f"{name} is a sparse matrix; expected an array: of the operands Q, G and A may be sparse")
        matrix = read_sparse(name, value)
        operands[name], patterns[name] = matrix.values, matrix.pattern
    return patterns


def _check_symmetric(pattern: Pattern) -> None:
    """Refuse a pattern of Q that is not symmetric, also without checks of the numbers: engines rely on it."""
    try:
        pattern.mirror  # noqa: B018
    except ValueError as error:
        raise ValueError(f"Q {error}") from None


@cached
def _plan(
    backend: Backend,
    widest,
    described,
    dtype: str | None,
    cores: tuple,
    numbers: tuple[str, ...],
    price_numbers: tuple[str, ...],
) -> tuple[Layout, dict[str, Callable]]:
    """Check types and shapes, once for the many calls that have the same.

    Parameters
    ----------
    widest
        The widest floating point type of the library now, which a setting may change.
    described : tuple
        Name, shape, dtype and `Kind.typed` of each array: of sparse operands, those of the values.
    cores : tuple
        Name, and rows and columns, of each sparse operand.
    numbers : tuple
        Names of the prices that are numbers of Python's, which are no arrays yet.

    Returns
    -------
    layout
    changes : dict
        By the name of an operand, the function of the array namespace and the array that gives it the working type and
        one batch axis, where it does not have both.
    """
    types = floating_types(backend, [Kind(name, kind, typed) for name, _, kind, typed in described], dtype)
    dtypes = {name: kind for name, _, kind, _ in described}
    arrays = {name: shape for name, shape, *_ in described}
    given = arrays | {name: arrays[name][:-1] + core for name, core in cores} | dict.fromkeys(numbers, ())
    whole = {name: _shape_of_number(name, given) or shape for name, shape in given.items()}
    _check_core_shapes(whole)
    batch_shape = _broadcast_batch(whole)
    changes, flat, stored_shapes = {}, {}, whole | {name: arrays[name] for name, _ in cores}
    for name in arrays:
        shape = stored_shapes[name]
        axes = len(whole[name]) - len(CORES[name])
        leading, core = shape[:axes], shape[axes:]
        if len(leading) == 1 and leading in (batch_shape, (1,)):
            flat[name] = shape
        elif math.prod(leading) == 1:
            flat[name] = (1, *core)
        else:
            flat[name] = (math.prod(batch_shape), *core)
        if flat[name] != arrays[name] or dtypes[name] != types.working:
            broadcast = shape if math.prod(leading) == 1 else batch_shape + core
            changes[name] = _change(arrays[name], broadcast, flat[name], types.working)
    layout = Layout(
        backend=backend,
        dtype=types.working,
        result=types.result,
        rounding=max(rounding(backend.xp, kind) for kind in (dtypes["Q"], types.working)),
        batch_shape=batch_shape,
        shapes=tuple(given.items()),
        sparse=bool(cores),
        numbers=price_numbers,
        **core_sizes(flat),
    )
    return layout, changes


def _shape_of_number(name: str, shapes: dict[str, Shape]) -> Shape | None:
    """Return the shape of a vector with the same number in every entry, for a number where that has a meaning."""
    if shapes[name] or name not in SIZED_BY or len(shapes[SIZED_BY[name]]) < 2:
        return None
    return shapes[SIZED_BY[name]][-2:-1]


def _change(given: Shape, broadcast: Shape, flat: Shape, dtype) -> Callable:
    def change(xp, value):
        if value.dtype != dtype:
            value = xp.astype(value, dtype)
        if flat == given:
            return value
        if flat == (1, *given):
            return value[None, ...]
        return xp.reshape(value if broadcast == given else xp.broadcast_to(value, broadcast), flat)

    return change


@cache
def rounding(xp, dtype) -> float:
    """Bound the rounding error in a matrix that was computed in this type, relative to its largest entry."""
    eps = float(xp.finfo(dtype).eps) if xp.isdtype(dtype, "real floating") else 0.0
    if eps > xp.finfo(xp.float32).eps:  # half precision
        return 10 * eps
    return 1e-4 if eps > xp.finfo(xp.float64).eps else 1e-8


def symmetrized(problem: Problem) -> Problem:
    """Remove the asymmetry of Q that is rounding error in the type that it came in.

    In a finer type that would be data: the engines, of which some read one triangle where others read both, would solve
    different problems. What is more than rounding stays, for `check_values`.
    """
    xp, backend = problem.backend.xp, problem.backend
    if problem.rounding <= rounding(xp, problem.dtype):
        return problem
    Q, transposed = _both_sides(problem)
    if backend.known_all_false(transposed != Q):
        return problem
    difference = transposed - Q
    small = xp.abs(difference) < problem.rounding * _largest(backend, problem.Q)
    changed = Q + xp.where(small, difference, xp.zeros_like(Q)) / 2
    return problem.with_operands(Q=problem.Q.with_values(changed) if isinstance(problem.Q, Sparse) else changed)


def _both_sides(problem: Problem):
    """Return Q and its transpose; of a sparse one the values, and those of the transpose in the same places."""
    Q = problem.Q
    if isinstance(Q, Sparse):
        return Q.values, gather(problem.backend, Q.values, Q.pattern.mirror)
    return Q, Q.mT


def _check_core_shapes(shapes: dict[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        core = CORES[name]
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
        core = CORES[name]
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
        leading = shape[: len(shape) - len(CORES[name])]
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
    """Return whether an array of one shape broadcasts to another."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))


# ---- the numbers


class Rule(NamedTuple):
    """Something that must hold for the numbers of some operands."""

    operands: tuple[str, ...]
    """The operands that it reads, the one to name first."""
    complaint: str
    broken: Callable[[Problem], Any]
    """The entries that break it, True in an array (B, ...)."""
    evidence: Callable[[Problem, tuple[int, ...]], str]
    """Says what is wrong with an entry of one problem."""


def check_values(problem: Problem, convexity: bool = True) -> None:
    """Check the numbers: one transfer to the host for the whole batch, more only to describe an error.

    To find whether Q is positive semidefinite takes a factorisation; without `convexity` it is taken for granted.
    """
    xp = problem.backend.xp
    rules = [rule for rule in _rules(problem) if convexity or rule.broken is not indefinite]

    def check(chunk: slice):
        part, found = problem.select(chunk), []
        for rule in rules:
            # The first chunk decides a rule over shared operands for the whole batch.
            if chunk.start == 0 or _depends_on_batch(problem, rule):
                broken = rule.broken(part)
                found.append((rule, chunk, part, ~xp.any(xp.reshape(broken, (broken.shape[0], -1)), axis=-1)))
        return found

    results = problem.backend.map(check, problem.chunks(), problem.workers)
    verdicts = [verdict for result in results for verdict in result]
    if bool(xp.all(xp.stack([xp.all(good) for *_, good in verdicts]))):
        return
    rule, where, part, good = next(verdict for verdict in verdicts if not bool(xp.all(verdict[-1])))
    first = int(xp.argmin(xp.astype(good, xp.int8)))
    one = part.select(slice(first, first + 1))
    entry = _first(xp, rule.broken(one)[0, ...])
    raise _error(problem, rule, rule.evidence(one, entry), where.start + first)


def _error(problem: Problem, rule: Rule, evidence: str, position: int) -> ValueError:
    """Return the error for a problem at a position of the batch that breaks a rule."""
    index = ""
    if problem.batch_shape and _depends_on_batch(problem, rule):
        axes = [int(i) for i in np.unravel_index(position, problem.batch_shape)]
        index = f" (problem {axes[0] if len(axes) == 1 else tuple(axes)} of the batch)"
    return ValueError(f"{rule.operands[0]} {rule.complaint}: {evidence}{index}")


def indefinite_error(problem: Problem, position: int) -> ValueError:
    """Return the error for the Q at a position of the batch, which an engine has found to be indefinite."""
    one = problem.select(slice(position, position + 1))
    evidence = "its factorisation has negative pivots; if that is rounding, pass check=False"
    if 8 * problem.n**2 <= EIGENVALUE_BYTES:
        evidence = _smallest_eigenvalue(one.made_dense(), ())
    return _error(problem, CONVEXITY, evidence, position)


def _depends_on_batch(problem: Problem, rule: Rule) -> bool:
    return any(getattr(problem, name).shape[0] > 1 for name in rule.operands)


def _rules(problem: Problem) -> list[Rule]:
    """Return the rules for the operands of a problem, in the order in which they are to be reported."""
    rules = []
    # In float32 the infinite entry may have been finite where it came from.
    single = " in float32" if problem.dtype == problem.backend.xp.float32 else ""
    for name in problem.operands:
        if name == "lb":
            complaint = f"has NaN or +inf{single}; a lower bound is finite or -inf"
        elif name in PRICES:
            complaint = f"has NaN or negative entries{single}; a price is ≥ 0, +inf where the constraint is hard"
            if not _may_be_infinite(name):
                complaint = f"has NaN, negative or infinite entries{single}; σ is ≥ 0, 0 where there is none"
        elif name in ("ub", "h"):
            complaint = f"has NaN or -inf{single}; {name} is finite or +inf"
        else:
            complaint = f"has NaN or infinite entries{single}; all must be finite"
        rules.append(Rule((name,), complaint, partial(_out_of_range, name), partial(_entry, name)))
    complaint = "is not symmetric; pass (Q + Qᵀ)/2, which has the same objective"
    rules.append(Rule(("Q",), complaint, _asymmetric, _two_sides))
    rules.append(CONVEXITY)
    if problem.lb is not None and problem.ub is not None:
        bounds = "lb", "ub", *[name for name in problem.operands if name in _PRICES_OF_BOUNDS]
        rules.append(Rule(bounds, "is greater than ub for a variable", _crossed, _both_bounds))
    return rules


def _out_of_range(name: str, problem: Problem):
    xp, value = problem.backend.xp, stored(getattr(problem, name))
    if name == "lb":
        return ~(value < xp.inf)
    if name in PRICES:
        return ~(value >= 0) | ((value == xp.inf) & (not _may_be_infinite(name)))
    if name in ("ub", "h"):
        return ~(value > -xp.inf)
    return ~xp.isfinite(value)


def _largest(backend: Backend, Q):
    """Return the largest entry of Q, (B, 1, 1), or the smallest number to which rounding is relative.

    Of a sparse Q, (B, 1).
    """
    xp = backend.xp
    largest = backend.norm(Q.values) if isinstance(Q, Sparse) else xp.max(xp.abs(Q), axis=(-2, -1), keepdims=True)
    return backend.clip(largest, float(xp.finfo(Q.dtype).smallest_normal))


def _asymmetric(problem: Problem):
    Q, transposed = _both_sides(problem)
    return problem.backend.xp.abs(Q - transposed) > problem.rounding * _largest(problem.backend, problem.Q)


def indefinite(problem: Problem):
    """Return a mask (B, 1) of the Q with an eigenvalue negative beyond rounding."""
    return has_negative_eigenvalue(problem.backend, problem.Q, problem.rounding)


def has_negative_eigenvalue(backend: Backend, Q, tolerance: float):
    """Return a mask (B, 1) of symmetric matrices that have no factor when shifted by a part of their largest entry."""
    # Divided by its largest entry, because the shift would overflow with huge and vanish with denormal numbers.
    shift = tolerance * backend.eye(Q.shape[-1], Q.dtype)
    _, positive = backend.factor(Q / _largest(backend, Q) + shift)
    return ~positive


def _may_be_infinite(price: str) -> bool:
    return not price.startswith("elastic_quadratic")


def _crossed(problem: Problem):
    crossed = problem.lb > problem.ub
    for name in _PRICES_OF_BOUNDS if problem.is_elastic else ():
        if (price := getattr(problem, name)) is not None:
            crossed = crossed & ~((price < INFINITE) if _may_be_infinite(name) else (price > 0))
    return crossed


def _first(xp, entries) -> tuple[int, ...]:
    """Position of the first True."""
    flat = int(xp.argmax(xp.astype(xp.reshape(entries, (-1,)), xp.int8)))
    return tuple(int(i) for i in np.unravel_index(flat, entries.shape))


def _entry(name: str, problem: Problem, entry) -> str:
    value = getattr(problem, name)
    number = float(stored(value)[(0, *entry)])
    if isinstance(value, Sparse):
        (place,) = entry
        entry = int(value.pattern.rows[place]), int(value.indices[place])
    return f"{name}[{', '.join(map(str, entry))}] = {number}"


def _two_sides(problem: Problem, entry) -> str:
    other = (int(problem.Q.pattern.mirror[entry[0]]),) if isinstance(problem.Q, Sparse) else entry[::-1]
    return f"{_entry('Q', problem, entry)}, {_entry('Q', problem, other)}"


def _both_bounds(problem: Problem, entry) -> str:
    return f"{_entry('lb', problem, entry)}, {_entry('ub', problem, entry)}"


def _smallest_eigenvalue(problem: Problem, entry) -> str:
    xp, largest = problem.backend.xp, _largest(problem.backend, problem.Q)
    unit = float(xp.min(xp.linalg.eigvalsh(problem.Q / largest)))
    smallest = unit * float(largest[0, 0, 0])
    return (
        f"its smallest eigenvalue is {smallest:.3g}, {unit:.2g} of its largest entry; if that is rounding, add "
        f"{-smallest:.3g} to its diagonal or pass check=False"
    )


CONVEXITY = Rule(
    ("Q",), "is not positive semidefinite, so the problem is not convex", indefinite, _smallest_eigenvalue
)  # fmt: skip
