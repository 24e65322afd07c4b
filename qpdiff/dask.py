"""Dask: `solve_qp` in blocks of the batch, on the threads of a machine or the workers of a cluster.

A block is solved by one task, whose result is the block's `qpdiff.Solution` with its last factorisation. The fields of
the lazy solution and its derivative read from that, so each block is solved once, whatever is computed together. What a
worker loses, Dask computes again from the graph.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import array_api_compat
import numpy as np

from . import differentiation, solver
from .backend import choose_backend, floating_types, from_host, kinds_of, read_dtype, single_threaded
from .differentiation import Gradients, Tangents
from .prices import price_operands, with_prices
from .problem import OPERANDS, PRICE_NAMES, PRICES, Problem
from .solution import FIELDS, POINT, Solution, check_unsolved, raise_if_unsolved
from .sparse import Pattern, Sparse, check_pattern, is_sparse, read_sparse, stored
from .validation import broadcasts, make_problem

try:
    import dask.array as da
    from dask.array.core import unify_chunks
    from dask.layers import ArraySliceDep
    from dask.sizeof import sizeof
except ImportError as error:
    raise ImportError("qpdiff.dask needs Dask: pip install 'qpdiff[dask]'") from error

_CORES = OPERANDS | PRICES
_CORE = {"x": 1, "y": 1, "z": 1, "z_lb": 1, "z_ub": 1, "status": 0}
"""Core axes of the parts of a solution that a warm start or a cotangent may have."""


def solve_qp(
    Q,
    q,
    G=None,
    h=None,
    A=None,
    b=None,
    lb=None,
    ub=None,
    *,
    elastic=None,
    elastic_quadratic=None,
    unsolved: str = "raise",
    dtype=None,
    tol=None,
    rtol=None,
    max_iterations=solver.MAX_ITERATIONS,
    warm_start=None,
    check=True,
    engine="auto",
) -> Solution:
    """Solve a batch of convex quadratic programs in blocks, lazily; `qpdiff.solve_qp` for Dask.

    Parameters
    ----------
    Q, q, G, h, A, b, lb, ub : dask array, array or list
        As for `qpdiff.solve_qp`; the blocks of dask arrays may be NumPy's or CuPy's. The batch is in blocks as the dask
        arrays are, those of different operands unified; if there is no dask array, it is one block. A block has all of
        an operand's core axes. An operand without batch axes is shared: one task output, which every block reads. The
        values of a `qpdiff.Sparse` may be a dask array.
    elastic, elastic_quadratic : number or dict, optional
        As for `qpdiff.solve_qp`, of numbers, arrays or dask arrays.
    unsolved : {"raise", "nan", "zero"}
        What to do about problems that are not SOLVED: raise where the block is computed, or give them NaN or zero
        gradients. Only the last two let `Solution.status` tell which they are.
    dtype, tol, rtol, max_iterations, check, engine
        As for `qpdiff.solve_qp`, which solves each block on one thread: have at least as many blocks as there are
        threads.
    warm_start : Solution, optional
        As for `qpdiff.solve_qp`, of dask arrays or of arrays.

    Returns
    -------
    Solution
        Whose fields are dask arrays, in blocks along the batch axes; those of `violation` too. Nothing is solved before
        one of them is computed, and what is computed in one call is solved once: ``dask.compute(sol.x, gradients.Q)``.
        See also `persist`.

    Raises
    ------
    TypeError, ValueError
        For operands whose shapes or types do not fit and for bad options, at once. For bad numbers when the block is
        computed.
    RuntimeError
        With ``unsolved="raise"``, when a block is computed that has a problem that is not SOLVED; the error counts them
        and names the first. A note on an error that a block raises tells where in the batch the block is.

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> import qpdiff.dask
    >>> points = da.from_array(np.linspace(-2.0, 2.0, 10)[:, None], chunks=(4, 1))
    >>> # projections onto [-1, 1]
    >>> sol = qpdiff.dask.solve_qp(np.eye(1), -points, lb=[-1.0], ub=[1.0])
    >>> sol.x.shape, sol.x.chunks
    ((10, 1), ((4, 4, 2), (1,)))
    >>> bool(abs(sol.x - da.clip(points, -1.0, 1.0)).max().compute() < 1e-6)
    True
    """
    check_unsolved(unsolved)
    operands = {"Q": Q, "q": q, "G": G, "h": h, "A": A, "b": b, "lb": lb, "ub": ub}
    operands, numbers = with_prices(operands, elastic, elastic_quadratic)
    given = {name: value for name, value in operands.items() if value is not None}
    matrices = {name: read_sparse(name, value) for name, value in given.items() if is_sparse(value)}
    patterns = {name: matrix.pattern for name, matrix in matrices.items()}
    given |= {name: matrix.values for name, matrix in matrices.items()}
    metas = {name: value._meta if isinstance(value, da.Array) else value for name, value in given.items()}
    backend, arrays = choose_backend(metas)
    result = floating_types(backend, kinds_of(arrays, metas), read_dtype(dtype)).result
    for name, value in arrays.items():
        if isinstance(given[name], da.Array):
            arrays[name] = given[name]
        elif not hasattr(given[name], "dtype") and backend.xp.isdtype(value.dtype, "real floating"):
            arrays[name] = backend.xp.astype(value, result)  # a list has no type, but the array that is made of it has
    problem = _with_shapes_of(arrays, patterns)
    shapes = {name: tuple(value.shape) for name, value in arrays.items()}

    options = {"tol": tol, "rtol": rtol, "max_iterations": max_iterations, "check": check, "engine": engine}
    name = np.dtype(result).name
    options["dtype"] = None if dtype is None and name == "float32" else name
    cores = {name: _core(name, shape, name in patterns) for name, shape in shapes.items()}
    none = {k: backend.full((0, *cores[k]) if v.ndim else (), 0, v.dtype) for k, v in arrays.items()}
    empty = solver.solve_qp(**_arguments(none, patterns), **options)
    chunks = _batch_chunks(arrays, {name: len(core) for name, core in cores.items()}, problem.batch_shape)
    warm = _warm_parts(warm_start, problem)
    parts = [(name, value, len(cores[name])) for name, value in arrays.items()]
    parts += [(f"warm_start.{name}", value, _CORE[name]) for name, value in warm.items()]
    axes = _batch_axes(len(chunks))
    where = (ArraySliceDep(chunks), axes) if chunks else ((), None)
    solutions = da.blockwise(
        _solve_block, axes, *where, *_block_arguments(parts, chunks),
        names=tuple(arrays), patterns=patterns, warm=tuple(warm), unsolved=unsolved, options=options,
        adjust_chunks=dict.fromkeys(axes, 1), align_arrays=False, dtype=object, meta=np.empty((0,) * len(axes), object),
        token="qpdiff-solve",
    )  # fmt: skip
    return _fields(Blocks(solutions, shapes, patterns, numbers, chunks, empty, unsolved))


def persist(sol: Solution, **options) -> Solution:
    """Begin to solve the blocks and leave each where it is solved, with what the derivative needs.

    ``dask.persist(sol)`` holds the arrays of the solution only, so that a later `vjp` would solve again.

    Parameters
    ----------
    sol : Solution
        Of `solve_qp`.
    **options
        Of ``dask.array.Array.persist``, such as ``scheduler``, or ``retries`` and ``workers`` on a cluster.

    Returns
    -------
    Solution
        The same one, whose blocks are solved or being solved.

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> import qpdiff.dask
    >>> q = da.ones((6, 2), chunks=(3, 2))
    >>> sol = qpdiff.dask.solve_qp(np.eye(2), q, A=[[1.0, 1.0]], b=[1.0])
    >>> sol = qpdiff.dask.persist(sol)
    >>> x = sol.x.compute()
    >>> # the sum over the six problems of 2·½·½
    >>> qpdiff.dask.vjp(sol, x=x).b.compute().round(6).tolist()
    [3.0]
    """
    blocks = copy.copy(_blocks_of(sol))
    blocks.solutions = blocks.solutions.persist(**options)
    return _fields(blocks)


def vjp(
    sol: Solution,
    x=None,
    y=None,
    z=None,
    z_lb=None,
    z_ub=None,
    *,
    objective=None,
    smoothing=None,
    unsolved: str | None = None,
) -> Gradients:
    """Pull cotangents of a lazy solution back to the operands, lazily; `qpdiff.vjp` for Dask.

    Parameters
    ----------
    sol : Solution
        Of `solve_qp`.
    x, y, z, z_lb, z_ub, objective : dask array, array or list, optional
        Cotangents, as for `qpdiff.vjp`.
    smoothing : float, optional
        As for `qpdiff.vjp`.
    unsolved : {"nan", "zero"}, optional
        What a problem that is not SOLVED contributes; by default what `solve_qp` was told.

    Returns
    -------
    Gradients
        Dask arrays of the shapes in which the operands were given, in the blocks of the solution along the batch axes.
        The gradient of an operand that the blocks share is summed within each of them, and then over them as a tree.
        That of a sparse operand is a `qpdiff.Sparse` whose values are a dask array.

    Raises
    ------
    TypeError, ValueError
        At once, for a solution that is not of `solve_qp`, for a cotangent whose shape does not fit, for bad options.

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> import qpdiff.dask
    >>> q = da.ones((6, 2), chunks=(3, 2))
    >>> sol = qpdiff.dask.solve_qp(np.eye(2), q, A=[[1.0, 1.0]], b=[1.0])
    >>> grads = qpdiff.dask.vjp(sol, x=[1.0, 0.0])
    >>> grads.q.chunks, grads.b.chunks
    (((3, 3), (2,)), ((1,),))
    >>> grads.b.compute().round(6).tolist()
    [3.0]
    """
    blocks = _blocks_of(sol)
    options = {"smoothing": smoothing, "unsolved": blocks.fill if unsolved is None else unsolved}
    empty = differentiation.vjp(blocks.empty, **options)
    given = {"x": x, "y": y, "z": z, "z_lb": z_lb, "z_ub": z_ub, "objective": objective}
    given = {
        name: _fitting(f"cotangent of {name}", value, getattr(sol, name).shape, blocks)
        for name, value in given.items()
        if value is not None
    }
    core = {name: int(name != "objective") for name in given}
    pulled = blocks.map(_vjp_block, given, core, options, "qpdiff-vjp")
    gradients = _by_option({name: _gradient(blocks, pulled, name, _part(empty, name)) for name in blocks.shapes})
    return Gradients(**gradients | {option: sum(gradients[option].values()) for option in blocks.numbers})


def jvp(
    sol: Solution,
    Q=None,
    q=None,
    G=None,
    h=None,
    A=None,
    b=None,
    lb=None,
    ub=None,
    *,
    elastic=None,
    elastic_quadratic=None,
    smoothing=None,
    unsolved: str | None = None,
) -> Tangents:
    """Push tangents of the operands forward to a lazy solution, lazily; `qpdiff.jvp` for Dask.

    Parameters
    ----------
    sol : Solution
        Of `solve_qp`.
    Q, q, G, h, A, b, lb, ub : dask array, array or list, optional
        Tangents, as for `qpdiff.jvp`.
    elastic, elastic_quadratic : number or dict, optional
        As for `qpdiff.jvp`, of numbers, arrays or dask arrays.
    smoothing, unsolved
        As for `vjp`.

    Returns
    -------
    Tangents
        Dask arrays in the blocks of the solution; ``dask.compute`` of it computes its `objective` too.

    Raises
    ------
    TypeError, ValueError
        At once, for a solution that is not of `solve_qp`, for a tangent of an operand that the problem does not have or
        whose shape does not fit, for bad options.

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> import qpdiff.dask
    >>> q = da.ones((2, 2), chunks=(1, 2))
    >>> sol = qpdiff.dask.solve_qp(np.eye(2), q, A=[[1.0, 1.0]], b=[1.0])
    >>> qpdiff.dask.jvp(sol, b=[1.0]).x.compute().round(6).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    blocks = _blocks_of(sol)
    options = {"smoothing": smoothing, "unsolved": blocks.fill if unsolved is None else unsolved}
    empty = differentiation.jvp(blocks.empty, **options)
    given = {"Q": Q, "q": q, "G": G, "h": h, "A": A, "b": b, "lb": lb, "ub": ub}
    given = {name: value for name, value in given.items() if value is not None}
    given |= price_operands(blocks.shapes, "tangent of ", elastic=elastic, elastic_quadratic=elastic_quadratic)
    for name, value in given.items():
        if name not in blocks.shapes:
            raise ValueError(f"tangent of {name} was given, but the problem has no {name}")
        pattern, label = blocks.patterns.get(name), f"tangent of {name}"
        if pattern is not None and is_sparse(value):
            value = read_sparse(label, value)
            check_pattern(label, value, pattern)
            value = value.values
        given[name] = _fitting(label, value, sol.status.shape + blocks.core(name), blocks)
    core = {name: len(blocks.core(name)) for name in given}
    pushed = blocks.map(_jvp_block, given, core, options, "qpdiff-jvp")
    names = *Tangents._fields, "objective"
    return LazyTangents(*(blocks.read(pushed, name, getattr(empty, name)) for name in names))


@dataclass(init=False, repr=False, eq=False)
class LazyTangents(Tangents):  # type: ignore[misc]
    """`Tangents` with the objective among the fields of a data class, by which Dask takes them apart and makes them."""

    x: Any
    y: Any
    z: Any
    z_lb: Any
    z_ub: Any
    objective: Any

    def __new__(cls, x, y, z, z_lb, z_ub, objective=None):
        """Make the tuple of five; pickle makes it of these and sets the objective by itself."""
        out = super().__new__(cls, x, y, z, z_lb, z_ub)
        out.objective = objective
        return out


# ---- the blocks


class Blocks:
    """The lazy solution's stand-in for a linearization.

    No data class and no tuple, which Dask would traverse, to gather what the derivative needs with the solution.

    Parameters
    ----------
    solutions : dask array
        With the batch axes; each of its blocks is no array but the `Solution` of a block.
    shapes : dict
        In which the arrays of the operands were given; of a sparse one the values.
    patterns : dict
        Of the sparse operands.
    numbers : tuple
        The options of prices that were given as one number.
    chunks : tuple
        Of the batch axes.
    empty : Solution
        Of no problem, but with the types of any.
    unsolved : str
    """

    def __init__(
        self,
        solutions,
        shapes: dict[str, tuple[int, ...]],
        patterns: dict[str, Pattern],
        numbers: tuple[str, ...],
        chunks,
        empty: Solution,
        unsolved: str,
    ):
        self.solutions = solutions
        self.shapes = shapes
        self.patterns = patterns
        self.numbers = numbers
        self.chunks = chunks
        self.empty = empty
        self.unsolved = unsolved

    @property
    def problem(self):
        """Read first by `qpdiff.vjp` and `qpdiff.jvp`."""
        raise TypeError("sol is a Solution of qpdiff.dask.solve_qp; qpdiff.dask.vjp and qpdiff.dask.jvp take it")

    @property
    def fill(self) -> str:
        """The contribution to derivatives of problems that are not SOLVED; those of "raise" do not get there."""
        return "zero" if self.unsolved == "zero" else "nan"

    def core(self, name: str) -> tuple[int, ...]:
        """Return the shape of an operand's array without its batch axes."""
        return _core(name, self.shapes[name], name in self.patterns)

    @property
    def axes(self) -> tuple[str, ...]:
        return _batch_axes(len(self.chunks))

    def map(self, function, arrays: dict[str, Any], core: dict[str, int], options: dict[str, Any], token: str):
        """Apply a function to each block and its part of the arrays; the result is no array, like `solutions`."""
        parts = [(name, value, core[name]) for name, value in arrays.items()]
        return da.blockwise(
            function, self.axes, self.solutions, self.axes, *_block_arguments(parts, self.chunks),
            names=tuple(arrays), options=options, adjust_chunks=dict.fromkeys(self.axes, 1),
            align_arrays=False, dtype=object, meta=self.solutions._meta, token=token,
        )  # fmt: skip

    def read(self, values, name: str, empty):
        """Read an attribute of every block's value, as a dask array of what it is in a batch of no problems."""
        core = empty.shape[1:]
        return da.blockwise(
            attrgetter(name), self.axes + _core_axes(name, core), values, self.axes,
            new_axes=dict(zip(_core_axes(name, core), core, strict=True)),
            adjust_chunks=dict(zip(self.axes, self.chunks, strict=True)), align_arrays=False,
            dtype=empty.dtype, meta=empty, token=f"qpdiff-{name}",
        )  # fmt: skip


def _fields(blocks: Blocks) -> Solution:
    lazy = {name: blocks.read(blocks.solutions, name, getattr(blocks.empty, name)) for name in FIELDS}
    violation = blocks.empty.violation
    if violation is not None:
        parts = {name: part for name, part in violation._asdict().items() if part is not None}
        read = {name: blocks.read(blocks.solutions, f"violation.{name}", part) for name, part in parts.items()}
        violation = violation._replace(**read)
    return Solution(**lazy, violation=violation, linearization=blocks)


def _blocks_of(sol) -> Blocks:
    blocks = getattr(sol, "linearization", None)
    if not isinstance(blocks, Blocks):
        kind = "one that is not lazy" if isinstance(sol, Solution) else f"a {type(sol).__name__}"
        raise TypeError(f"sol is {kind}; expected the Solution of qpdiff.dask.solve_qp")
    return blocks


def _gradient(blocks: Blocks, pulled, name: str, empty):
    """Return the gradient of an operand: read from each block, summed over the batch axes that the operand lacks."""
    shape, axes, empty = blocks.shapes[name], blocks.axes, stored(empty)
    core = empty.shape[1:]
    leading = (1,) * (len(axes) + len(core) - len(shape)) + shape[: len(shape) - len(core)]
    lacking = tuple(i for i, sizes in enumerate(blocks.chunks) if leading[i] != sum(sizes))
    chunks = {axis: 1 if i in lacking else blocks.chunks[i] for i, axis in enumerate(axes)}
    gradient = da.blockwise(
        _read_gradient, axes + _core_axes(name, core), pulled, axes, operand=name, dims=len(leading) + len(core),
        new_axes=dict(zip(_core_axes(name, core), core, strict=True)), adjust_chunks=chunks, align_arrays=False,
        dtype=empty.dtype, meta=empty, token=f"qpdiff-gradient-{name}",
    )  # fmt: skip
    if lacking:
        gradient = gradient.sum(axis=lacking, keepdims=True)
    gradient = gradient[(0,) * (gradient.ndim - len(shape))]
    return Sparse.of_pattern(gradient, blocks.patterns[name]) if name in blocks.patterns else gradient


# ---- in a task


def _solve_block(where, *values, names, patterns, warm, unsolved: str, options) -> Solution:
    """Solve the block at the slices `where`; the values are those of the operands and of a warm start, by name."""
    parts = [_whole(value) for value in values]
    if warm:
        start = dict.fromkeys(FIELDS) | dict(zip(warm, parts[len(names) :], strict=True))
        options = options | {"warm_start": Solution(**start)}
    try:
        with single_threaded():
            sol = solver.solve_qp(**_arguments(dict(zip(names, parts, strict=False)), patterns), **options)
        if unsolved == "raise":
            raise_if_unsolved(array_api_compat.to_device(sol.status, "cpu"))
    except (TypeError, ValueError, RuntimeError) as error:
        if where:
            slices = ", ".join(f"{axis.start}:{axis.stop}" for axis in where)
            error.add_note(f"This is about the block [{slices}] of the batch; problems are counted from its start.")
        raise
    return sol


def _vjp_block(sol: Solution, *values, names, options) -> Gradients:
    with single_threaded():
        return differentiation.vjp(sol, **dict(zip(names, map(_whole, values), strict=True)), **options)


def _jvp_block(sol: Solution, *values, names, options) -> Tangents:
    with single_threaded():
        return differentiation.jvp(sol, **_by_option(dict(zip(names, map(_whole, values), strict=True))), **options)


def _read_gradient(gradients: Gradients, operand: str, dims: int):
    value = stored(_part(gradients, operand))
    return value.reshape((1,) * (dims - value.ndim) + value.shape)


def _whole(value):
    """Return the one block along the core axes, of which Dask makes a list for each."""
    while isinstance(value, list):
        (value,) = value
    return value


@sizeof.register(Solution)
def _size_of_solution(sol: Solution) -> int:
    """Estimate the bytes of a block; its variables and multipliers are in its linearization, if of the same type."""
    lin = sol.linearization
    if lin is None:
        return sum(sizeof(getattr(sol, name)) for name in FIELDS)
    own = [name for name in FIELDS if name not in POINT or lin.problem.result != lin.problem.dtype]
    return sizeof(tuple(lin)) + sum(sizeof(getattr(sol, name)) for name in own) + sizeof(sol.violation)


@sizeof.register(Problem)
def _size_of_problem(problem: Problem) -> int:
    return sizeof({name: stored(value) for name, value in problem.operands.items()})


# ---- shapes and chunks


_NAMED = {name: (option, of) for option, names in PRICE_NAMES.items() for of, name in names.items()}
"""The options of prices, and the constraints, by the names that their operands have."""


def _by_option(values: dict[str, Any]) -> dict[str, Any]:
    """Return values by operand with those of prices in a dict for each option."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        option, of = _NAMED.get(name, (None, None))
        if option is None:
            out[name] = value
        else:
            out.setdefault(option, {})[of] = value
    return out


def _part(gradients: Gradients, name: str):
    """Return the gradient of an operand, of which prices have a dict for each option."""
    option, of = _NAMED.get(name, (name, None))
    value = getattr(gradients, option)
    return value if of is None else value[of]


def _arguments(arrays: dict, patterns: dict[str, Pattern]) -> dict:
    """Return the operands as arguments of `solver.solve_qp`."""
    return _by_option(_with_patterns(arrays, patterns))


def _with_patterns(arrays: dict, patterns: dict[str, Pattern]) -> dict:
    """Return operands, sparse where there is a pattern, of their arrays."""
    return arrays | {name: Sparse.of_pattern(arrays[name], pattern) for name, pattern in patterns.items()}


def _with_shapes_of(arrays, patterns) -> Problem:
    """Make the problem of these shapes, which it checks, with one number in place of the data."""
    for name, value in arrays.items():
        if any(size != size for size in value.shape):
            raise ValueError(
                f"{name} has shape {value.shape}, with sizes that Dask does not know; call compute_chunk_sizes() on it"
            )
    zeros = {name: np.broadcast_to(0.0, value.shape) for name, value in arrays.items()}
    return make_problem(dict.fromkeys(OPERANDS) | _with_patterns(zeros, patterns))


def _batch_chunks(arrays, cores: dict[str, int], batch_shape) -> tuple[tuple[int, ...], ...]:
    """Return the blocks of the batch axes: those of the dask arrays that have them, unified."""
    pairs = []
    for name, value in arrays.items():
        if isinstance(value, da.Array) and value.ndim:
            core = cores[name]
            whole = value.rechunk(dict.fromkeys(range(value.ndim - core, value.ndim), -1))
            pairs += [whole, _index(name, value, core, len(batch_shape))]
    known, _ = unify_chunks(*pairs)
    blocks = (tuple(known.get(axis, ())) for axis in _batch_axes(len(batch_shape)))
    return tuple(sizes if sum(sizes) == size else (size,) for sizes, size in zip(blocks, batch_shape, strict=True))


def _block_arguments(parts, chunks):
    """Arrays (name, array, number of core axes) as arguments of `blockwise`, chunked as the batch is."""
    arguments = []
    for name, value, core in parts:
        leading = value.ndim - core
        batch = chunks[len(chunks) - leading :]
        blocks = tuple((1,) if size == 1 else sizes for size, sizes in zip(value.shape, batch, strict=False))
        blocks += tuple((size,) for size in value.shape[leading:])
        lazy = value.rechunk(blocks) if isinstance(value, da.Array) else da.from_array(value, chunks=blocks)
        arguments += [lazy, _index(name, value, core, len(chunks))]
    return arguments


def _index(name: str, value, core: int, batch: int):
    """Labels of an array's axes, those of the batch as NumPy broadcasts them."""
    leading = value.ndim - core
    return _batch_axes(batch)[batch - leading :] + _core_axes(name, value.shape[leading:])


def _core(name: str, shape: tuple[int, ...], sparse: bool) -> tuple[int, ...]:
    """Return the shape of an operand's array without its batch axes; a number that stands for all entries has none."""
    return shape[max(0, len(shape) - (1 if sparse else len(_CORES[name]))) :]


def _batch_axes(count: int) -> tuple[str, ...]:
    return tuple(f"batch-{axis}" for axis in range(count))


def _core_axes(name: str, core) -> tuple[str, ...]:
    return tuple(f"{name}-{axis}" for axis in range(len(core)))


def _fitting(label: str, value, shape, blocks: Blocks):
    """Return a tangent or cotangent, which must broadcast to the shape."""
    if not isinstance(value, da.Array) and not hasattr(value, "dtype"):
        value = from_host(label, value, blocks.empty.linearization.problem.backend)
    if not broadcasts(value.shape, shape):
        raise ValueError(f"{label} has shape {tuple(value.shape)}; expected {tuple(shape)}")
    return value


def _warm_parts(sol, problem: Problem):
    """Return the fields that `solver.warm_point` reads."""
    if sol is None:
        return {}
    solver.check_warm_start(problem, sol)
    return {name: getattr(sol, name) for name in _CORE}
