"""A CVXPY problem as a function of its parameters, that solves batches and differentiates.

CVXPY brings a problem that follows its rules for parameters (DPP) into a canonical form whose data are affine in the
parameters. So the problem is a QP between two linear maps::

    parameters  ─ operands →  Q, q, G, h, ...  ─ qpdiff.solve_qp →  x  ─ values →  variables

References
----------
A. Agrawal, B. Amos, S. Barratt, S. Boyd, S. Diamond, J. Z. Kolter, "Differentiable convex optimization layers",
NeurIPS 2019.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

import cvxpy as cp
import numpy as np

from .. import differentiation, solver
from ..backend import choose_backend, floating_types, kinds_of, read_dtype
from ..differentiation import Gradients, as_tangent, summed
from ..problem import OPERANDS
from ..solution import Solution, Status
from ..sparse import Sparse, apply, stored
from ..validation import make_problem, rounding
from .attributes import check_parameter
from .canonical import Canonical, canonicalize

_ORIGINALS: WeakValueDictionary[tuple[str, int], Any] = WeakValueDictionary()
"""The caller's variables by the key of their layer and their position in it.

A copied or pickled layer has its key, but variables of its own. Their ids tell nothing: CVXPY gives a copy a new one,
and in another process the same one may be any variable's.
"""


def from_cvxpy(problem, parameters, variables=None) -> Layer:
    """Make a CVXPY problem a function of its parameters, that solves batches and differentiates.

    Parameters
    ----------
    problem : cvxpy.Problem
        A quadratic or linear program, or what CVXPY turns into one (norms 1 and ∞, maxima, Huber losses, ...), that
        depends on its parameters by the rules of disciplined parametrized programming (DPP).
    parameters : sequence of cvxpy.Parameter
        What the function takes, in this order. Any other parameter of the problem keeps the value that it has now.
    variables : sequence of cvxpy.Variable, optional
        What the function gives, in this order; all variables of the problem by default.

    Returns
    -------
    Layer
        The function.

    Raises
    ------
    TypeError, ValueError
        For a problem that is not convex, not DPP or not a QP, naming the parts that are to blame; for integer, boolean
        and complex variables; for parameters and variables that the problem does not have; for a parameter that is not
        listed and has no value.

    Notes
    -----
    CVXPY compiles the problem once, here; the caller's problem keeps its values and what it was compiled to before.
    All operands are of the size of CVXPY's canonical form, which may have more variables and rows than the problem.
    Large matrices that are mostly zeros are sparse, the others dense.

    References
    ----------
    .. [1] A. Agrawal, B. Amos, S. Barratt, S. Boyd, S. Diamond, J. Z. Kolter, "Differentiable convex optimization
       layers", NeurIPS 2019.

    Examples
    --------
    Nonnegative least squares for two right-hand sides, and the gradients of the sum of the solutions:

    >>> import cvxpy as cp
    >>> import numpy as np
    >>> import qpdiff
    >>> x = cp.Variable(2, nonneg=True)
    >>> A, b = cp.Parameter((3, 2)), cp.Parameter(3)
    >>> problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)))
    >>> layer = qpdiff.from_cvxpy(problem, parameters=[A, b])
    >>> matrix = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    >>> solution = layer(matrix, np.array([[1.0, 2.0, 3.0], [-1.0, 1.0, 0.0]]))
    >>> np.abs(solution[x].round(6)).tolist()
    [[1.0, 1.0], [0.0, 0.5]]
    >>> solution.value.round(6).tolist()
    [9.0, 1.0]
    >>> gradient_of_A, gradient_of_b = layer.vjp(solution, np.ones((2, 2)))
    >>> np.abs(gradient_of_b.round(6)).tolist()
    [[1.0, 0.5, 0.0], [0.0, 0.5, 0.0]]
    >>> gradient_of_A.shape
    (3, 2)
    """
    if not isinstance(problem, cp.Problem):
        raise TypeError(f"problem is a {type(problem).__name__}; expected a cvxpy.Problem")
    variables = problem.variables() if variables is None else variables
    parameters = _checked("parameters", parameters, cp.Parameter, problem.parameters())
    variables = _checked("variables", variables, cp.Variable, problem.variables())
    canonical = canonicalize(problem, parameters, variables)
    return Layer(parameters, variables, canonical, maximize=isinstance(problem.objective, cp.Maximize))


def _checked(what: str, given, kind, known: list) -> tuple:
    """Return the parameters or variables that the caller lists."""
    if not isinstance(given, Sequence):
        raise TypeError(f"{what} is a {type(given).__name__}; expected a list")
    for position, leaf in enumerate(given):
        if not isinstance(leaf, kind):
            raise TypeError(f"{what}[{position}] is a {type(leaf).__name__}; expected a cvxpy.{kind.__name__}")
        if leaf.id not in {other.id for other in known}:
            raise ValueError(f"{what}[{position}], {leaf.name()}, is not in the problem")
        if leaf.id in {other.id for other in given[:position]}:
            raise ValueError(f"{what}[{position}], {leaf.name()}, is listed twice")
    return tuple(given)


@dataclass(frozen=True)
class LayerSolution:
    """The solution of a CVXPY problem for every value of its parameters.

    Arrays are of the library of the parameters; `batch` stands for their broadcast batch axes. One variable's value is
    also found by the variable or by its name: ``solution[x]``, ``solution["x"]``, also after the layer was copied or
    pickled; in another process by the name, or by a variable that was pickled with the layer.

    Attributes
    ----------
    variables : tuple of arrays (*batch, *shape)
        The values of the variables, in the order of `Layer.variables`.
    value : array (*batch)
        The objective as the problem states it, constant terms and the sign of what is maximised included. Of a problem
        without a feasible point it is the worst there is, +∞ where the problem minimises, and of an unbounded problem
        the best.
    status : integer array (*batch)
        `qpdiff.Status` codes.
    solution : qpdiff.Solution
        Of the canonical QP.
    """

    variables: tuple[Any, ...]
    value: Any
    status: Any
    solution: Solution
    layer: Layer = field(repr=False)
    parameters: tuple[Any, ...] = field(repr=False)
    """The arrays that the layer was called with."""

    def __getitem__(self, key):
        return self.variables[self.layer._position(key)]


class LayerTangents(tuple):
    """Tangents of the variables of a layer, in their order.

    Attributes
    ----------
    value : array (*batch)
        Tangent of `LayerSolution.value`. It is not among the entries of the tuple.
    """

    value: Any = None


class Layer:
    """A CVXPY problem as a function of its parameters; `qpdiff.from_cvxpy` makes it.

    Calling it solves the problem for a batch of parameters; `vjp` and `jvp` differentiate the variables and the
    objective by the parameters. A parameter is an array of its CVXPY shape with any leading batch axes, and these
    broadcast together.
    Operands of the QP that depend on parameters without batch axes only are shared by all problems: factored once where
    that can be, and never copied.

    An adapter to a framework that differentiates array operations by itself, as torch and JAX do, can compose the parts
    of a layer, `operands` and `values`, with its own ``solve_qp``; they are linear, and nothing but array operations::

        x = qpdiff.torch.solve_qp(**layer.operands(A, b)).x
        (value,) = layer.values(x)

    For a framework that wants functions with their adjoints there are `operands_adjoint` and `values_adjoint`.

    Attributes
    ----------
    parameters, variables : tuple
        The CVXPY parameters that the layer takes and the CVXPY variables that it gives.
    """

    def __init__(self, parameters, variables, canonical: Canonical, *, maximize: bool):
        self.parameters = parameters
        self.variables = variables
        self._maps, self._patterns, self._recoveries = canonical
        self._sense = -1.0 if maximize else 1.0
        self._key = uuid4().hex
        _ORIGINALS.update({(self._key, i): variable for i, variable in enumerate(variables)})

    def _position(self, key) -> int:
        """Return the position in `variables` of a variable, also by its name, or of the one that it was before copying.

        Raises
        ------
        KeyError
            For what is not among them, and for the name of several.
        """
        found = []
        for i, variable in enumerate(self.variables):
            same = key is variable or key is _ORIGINALS.get((self._key, i), variable)
            if same or (isinstance(key, str) and variable.name() == key):
                found.append(i)
        if len(found) == 1:
            return found[0]
        if found:
            raise KeyError(f"{key} is the name of several variables")
        names = [variable.name() for variable in self.variables]
        another = f"; it has another one of this name, solution[{str(key)!r}]" if str(key) in names else ""
        raise KeyError(f"{key} is not among the variables of the layer: {', '.join(names)}{another}")

    def __call__(self, *parameters, backend=None, dtype=None, check=True, **options) -> LayerSolution:
        """Solve the problem for every value of the parameters.

        Parameters
        ----------
        *parameters : array (..., *shape)
            A value for each parameter, in the order of `parameters`.
        backend, dtype, check, **options
            As in `qpdiff.solve_qp`. `check` also checks that the parameters are what their attributes say (nonneg,
            symmetric, PSD, bounds, ...), because CVXPY has relied on it.

        Returns
        -------
        LayerSolution
            The values of the variables and the objective, with a status for each problem.

        Raises
        ------
        TypeError, ValueError
            For a parameter of a wrong shape or with wrong numbers, naming it, and for what `qpdiff.solve_qp` refuses.
        """
        for name in ("smoothing", "unsolved"):
            if name in options:
                raise TypeError(f"{name} is an option of the layer's vjp and jvp, and of solve_qp in torch and JAX")
        solver.check_names("layer", options)
        backend, types, arrays = self._arrays(parameters, backend, dtype)
        backend.reuse_freed_memory()  # for the operands, whose memory takes longer to get than they take to compute
        xp = backend.xp
        coarsest = [max(rounding(xp, array.dtype), rounding(xp, types.working)) for array in arrays]
        if check:
            for parameter, array, tolerance in zip(self.parameters, arrays, coarsest, strict=True):
                check_parameter(backend, parameter, array, tolerance)
        with backend.no_grad():
            data = self._data(backend, types.working, arrays)
        offset = data.pop("offset")
        problem = make_problem(dict.fromkeys(OPERANDS) | data)
        of_Q = [problem.rounding, *(coarsest[i] for i in self._maps["Q"].matrices)]
        problem = problem.with_layout(result=types.result, rounding=max(of_Q))
        sol = solver.solve_problem(problem, check=check, **options)
        value = self._sense * (sol.objective + offset)
        for status, sign in ((Status.PRIMAL_INFEASIBLE, 1.0), (Status.DUAL_INFEASIBLE, -1.0)):
            value = xp.where(sol.status == int(status), sign * self._sense * xp.inf, value)
        return LayerSolution(self.values(sol.x), value, sol.status, sol, self, arrays)

    def vjp(self, solution: LayerSolution, *cotangents, value=None, smoothing=None, unsolved: str = "nan") -> tuple:
        """Pull cotangents of the variables and of the objective back to the parameters.

        Parameters
        ----------
        solution : LayerSolution
            Of this layer.
        *cotangents : array, optional
            One for each variable, of a shape that broadcasts to that of its value; None means zero.
        value : array, optional
            The cotangent of `LayerSolution.value`, of a shape that broadcasts to that of the batch.
        smoothing, unsolved
            As in `qpdiff.vjp`.

        Returns
        -------
        tuple of arrays
            A gradient for each parameter, of the shape in which it was given: summed over the batch axes that it lacks.
            The gradient of a symmetric (PSD, NSD) parameter is symmetric; that of a diagonal or sparse one is zero
            where the parameter is.

        Raises
        ------
        TypeError, ValueError
            For a number of cotangents that is neither 0 nor that of the variables, or one whose shape does not fit,
            naming the variable.
        """
        problem = self._problem(solution)
        given: dict[int, Any] = {}
        if cotangents or value is None:
            given = self._tangents("cotangent", problem, self.variables, cotangents)
        x = self.values_adjoint(*(given.get(i) for i in range(len(self.variables))))
        options = {"smoothing": smoothing, "unsolved": unsolved}
        if value is None:
            gradients = differentiation.vjp(solution.solution, x=x, **options)
            return self.operands_adjoint(gradients, *solution.parameters)
        objective = self._sense * as_tangent(problem, "cotangent of the value", value, problem.batch_shape)
        gradients = differentiation.vjp(solution.solution, x=x, objective=objective, **options)
        of_offset = problem.returned(_where_solved(problem, solution, objective, unsolved))
        return self._operands_adjoint(gradients, solution.parameters, offset=of_offset)

    def jvp(self, solution: LayerSolution, *tangents, smoothing=None, unsolved: str = "nan") -> LayerTangents:
        """Push tangents of the parameters forward to the variables and the objective.

        Parameters
        ----------
        solution : LayerSolution
            Of this layer.
        *tangents : array, optional
            One for each parameter, of a shape that broadcasts to that of the parameter with the batch axes; None means
            zero. The symmetric part of that of a symmetric (PSD, NSD) parameter counts, and of a diagonal or sparse one
            what may differ from zero.
        smoothing, unsolved
            As in `qpdiff.jvp`.

        Returns
        -------
        LayerTangents
            A tuple of arrays (*batch, *shape), a tangent for each variable, with the attribute `value`.

        Raises
        ------
        TypeError, ValueError
            For a number of tangents that is not that of the parameters, or one whose shape does not fit, naming the
            parameter.
        """
        problem = self._problem(solution)
        given = self._tangents("tangent", problem, self.parameters, tangents)
        flat = {i: _flattened(problem.backend.xp, value, self.parameters[i].shape) for i, value in given.items()}
        moved = {name: self._maps[name].linear(problem.backend, flat) for name in OPERANDS if name in self._maps}
        of_solution = differentiation.jvp(solution.solution, **moved, smoothing=smoothing, unsolved=unsolved)
        of_offset, value = self._maps["offset"].linear(problem.backend, flat), of_solution.objective
        if of_offset is not None:
            of_offset = problem.backend.xp.astype(of_offset, value.dtype)
            value = value + _where_solved(problem, solution, of_offset, unsolved)
        out = LayerTangents(self.values(of_solution.x))
        out.value = self._sense * value
        return out

    # ---- the linear maps before and after the QP

    def operands(self, *parameters, backend=None, dtype=None) -> dict[str, Any]:
        """Return the operands of `qpdiff.solve_qp`, by name: affine functions of the parameters.

        An operand has the batch axes of the parameters that it depends on. Large matrices of which at most a tenth is
        stored are each a `qpdiff.Sparse`. `backend` and `dtype` are those of
        `qpdiff.solve_qp`. The numbers are not checked.
        """
        backend, types, arrays = self._arrays(parameters, backend, dtype)
        data = self._data(backend, types.working, arrays)
        given = {name: data[name] for name in OPERANDS if name in data}
        return {k: apply(lambda a: backend.xp.astype(a, types.result, copy=False), value) for k, value in given.items()}

    def operands_adjoint(self, gradients: Gradients, *parameters) -> tuple:
        """Return the adjoint of the linear part of `operands`: gradients of the operands pulled back to the parameters.

        Each gradient has the shape of its operand, None means zero; the parameters are those that `operands` was given,
        of which only the shapes matter.
        """
        return self._operands_adjoint(gradients, parameters)

    def _operands_adjoint(self, gradients: Gradients, parameters: tuple, **others) -> tuple:
        """Return `operands_adjoint` with gradients of other maps than the operands."""
        given = {name: stored(value) for name, value in gradients._asdict().items() if value is not None} | others
        backend, given = choose_backend(given)
        xp, dtype = backend.xp, floating_types(backend, kinds_of(given, given)).result
        out = []
        for i, (parameter, value) in enumerate(zip(self.parameters, parameters, strict=True)):
            parts = []
            for name, gradient in given.items():
                shape, _, matrices = self._maps[name]
                if i in matrices:
                    part = matrices[i].T.product(backend, _flattened(xp, gradient, shape))
                    part = xp.reshape(part, (*part.shape[:-1], *parameter.shape))
                    parts.append(summed(xp, part, tuple(value.shape)))
            out.append(sum(parts[1:], parts[0]) if parts else backend.full(tuple(value.shape), 0.0, dtype))
        return tuple(out)

    def values(self, x) -> tuple:
        """Return the values (*batch, *shape) of the variables at a solution x (*batch, n): linear functions of it."""
        backend, given = choose_backend({"x": x})
        found = [recovery.product(backend, given["x"]) for recovery in self._recoveries]
        return tuple(
            backend.xp.reshape(value, (*value.shape[:-1], *variable.shape))
            for variable, value in zip(self.variables, found, strict=True)
        )

    def values_adjoint(self, *cotangents):
        """Return the adjoint of `values`: cotangents (*batch, *shape) of the variables pulled back to x.

        None means zero, and is what all None give.
        """
        given = {i: value for i, value in enumerate(cotangents) if value is not None}
        backend, given = choose_backend(given)
        parts = [
            self._recoveries[i].T.product(backend, _flattened(backend.xp, value, self.variables[i].shape))
            for i, value in given.items()
        ]
        return sum(parts[1:], parts[0]) if parts else None

    # ---- arguments

    def _arrays(self, values, backend, dtype):
        """Check the parameters' shapes; return them in one library, with the types to compute in and return."""
        if len(values) != len(self.parameters):
            names = ", ".join(parameter.name() for parameter in self.parameters)
            raise TypeError(f"{len(values)} parameters were given; expected {len(self.parameters)}: {names}")
        named = {f"parameter {p.name()}": value for p, value in zip(self.parameters, values, strict=True)}
        backend, arrays = choose_backend(named, backend)
        types = floating_types(backend, kinds_of(arrays, named), read_dtype(dtype))
        batch = ()
        for parameter, (label, array) in zip(self.parameters, arrays.items(), strict=True):
            shape, core = tuple(array.shape), parameter.shape
            leading = shape[: len(shape) - len(core)]
            if shape[len(leading) :] != core:
                raise ValueError(f"{label} has shape {shape}; expected {('...', *core)}".replace("'...'", "..."))
            try:
                batch = np.broadcast_shapes(batch, leading)
            except ValueError as error:
                raise ValueError(
                    f"{label} has batch axes {leading}, which do not broadcast with the batch axes {batch} of the "
                    "parameters before it"
                ) from error
        return backend, types, tuple(arrays.values())

    def _data(self, backend, dtype, arrays) -> dict[str, Any]:
        xp = backend.xp
        flat = {
            i: _flattened(xp, xp.astype(array, dtype, copy=False), self.parameters[i].shape)
            for i, array in enumerate(arrays)
        }
        data = {name: affine.value(backend, dtype, flat) for name, affine in self._maps.items()}
        return data | {name: Sparse.of_pattern(data[name], pattern) for name, pattern in self._patterns.items()}

    def _problem(self, solution: LayerSolution):
        if not isinstance(solution, LayerSolution) or solution.layer._key != self._key:
            raise TypeError("solution is not one of this layer's")
        return solution.solution.linearization.problem

    def _tangents(self, kind: str, problem, leaves: tuple, values: tuple) -> dict[int, Any]:
        """Tangents of parameters or cotangents of variables by position, with the batch axes; without those of None."""
        if len(values) != len(leaves):
            names = ", ".join(leaf.name() for leaf in leaves)
            raise TypeError(f"{len(values)} {kind}s were given; expected {len(leaves)}: {names}")
        return {
            i: as_tangent(problem, f"{kind} of {leaf.name()}", value, (*problem.batch_shape, *leaf.shape))
            for i, (leaf, value) in enumerate(zip(leaves, values, strict=True))
            if value is not None
        }


def _where_solved(problem, solution: LayerSolution, value, unsolved: str):
    """Return numbers (*batch) with those that problems get that are not SOLVED, as in `qpdiff.vjp`."""
    return problem.backend.xp.where(solution.status == int(Status.SOLVED), value, differentiation.FILL[unsolved])


def _flattened(xp, value, core: tuple[int, ...]):
    """Return an array (..., *core) with its core axes made one, in row-major order."""
    leading = value.shape[: value.ndim - len(core)]
    return xp.reshape(value, (*leading, math.prod(core)))
