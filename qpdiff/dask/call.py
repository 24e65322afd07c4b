"""`solve_qp`, `persist`, `vjp` and `jvp` for Dask."""

from __future__ import annotations

import copy

import dask.array as da
import numpy as np
from dask.layers import ArraySliceDep

from .. import differentiation, solver
from ..backend import choose_backend, floating_types, kinds_of, read_dtype
from ..differentiation import Gradients, Tangents
from ..prices import price_operands, with_prices
from ..solution import Solution, check_unsolved
from ..sparse import check_pattern, is_sparse, read_sparse
from .blocks import Blocks, LazyTangents, blocks_of, fitting, gradient_of, lazy_solution
from .chunks import CORE_AXES, batch_axes, batch_chunks, block_arguments, core_shape, warm_parts, with_shapes_of
from .operands import arguments, by_option, part_of
from .tasks import jvp_block, solve_block, vjp_block


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
    problem = with_shapes_of(arrays, patterns)
    shapes = {name: tuple(value.shape) for name, value in arrays.items()}

    options = {"tol": tol, "rtol": rtol, "max_iterations": max_iterations, "check": check, "engine": engine}
    name = np.dtype(result).name
    options["dtype"] = None if dtype is None and name == "float32" else name
    cores = {name: core_shape(name, shape, name in patterns) for name, shape in shapes.items()}
    none = {k: backend.full((0, *cores[k]) if v.ndim else (), 0, v.dtype) for k, v in arrays.items()}
    empty = solver.solve_qp(**arguments(none, patterns), **options)
    chunks = batch_chunks(arrays, {name: len(core) for name, core in cores.items()}, problem.batch_shape)
    warm = warm_parts(warm_start, problem)
    parts = [(name, value, len(cores[name])) for name, value in arrays.items()]
    parts += [(f"warm_start.{name}", value, CORE_AXES[name]) for name, value in warm.items()]
    axes = batch_axes(len(chunks))
    where = (ArraySliceDep(chunks), axes) if chunks else ((), None)
    solutions = da.blockwise(
        solve_block, axes, *where, *block_arguments(parts, chunks),
        names=tuple(arrays), patterns=patterns, warm=tuple(warm), unsolved=unsolved, options=options,
        adjust_chunks=dict.fromkeys(axes, 1), align_arrays=False, dtype=object, meta=np.empty((0,) * len(axes), object),
        token="qpdiff-solve",
    )  # fmt: skip
    return lazy_solution(Blocks(solutions, shapes, patterns, numbers, chunks, empty, unsolved))


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
    blocks = copy.copy(blocks_of(sol))
    blocks.solutions = blocks.solutions.persist(**options)
    return lazy_solution(blocks)


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
    blocks = blocks_of(sol)
    options = {"smoothing": smoothing, "unsolved": blocks.fill if unsolved is None else unsolved}
    empty = differentiation.vjp(blocks.empty, **options)
    given = {"x": x, "y": y, "z": z, "z_lb": z_lb, "z_ub": z_ub, "objective": objective}
    given = {
        name: fitting(f"cotangent of {name}", value, getattr(sol, name).shape, blocks)
        for name, value in given.items()
        if value is not None
    }
    core = {name: int(name != "objective") for name in given}
    pulled = blocks.map(vjp_block, given, core, options, "qpdiff-vjp")
    gradients = by_option({name: gradient_of(blocks, pulled, name, part_of(empty, name)) for name in blocks.shapes})
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
    blocks = blocks_of(sol)
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
        given[name] = fitting(label, value, sol.status.shape + blocks.core(name), blocks)
    core = {name: len(blocks.core(name)) for name in given}
    pushed = blocks.map(jvp_block, given, core, options, "qpdiff-jvp")
    names = *Tangents._fields, "objective"
    return LazyTangents(*(blocks.read(pushed, name, getattr(empty, name)) for name in names))
