"""cvxpylayers: a solver for its layers, ``CvxpyLayer(problem, ..., solver=qpdiff.cvxpylayers.LayerSolver())``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import scipy.sparse as sp

from .differentiation import vjp
from .problem import MATRICES
from .solution import raise_if_unsolved
from .solver import solve_qp
from .sparse import Pattern, Sparse, keeps_sparse, pattern_at

try:
    from cvxpylayers.interfaces.base import SolverInterface
except ImportError as error:
    raise ImportError("qpdiff.cvxpylayers needs cvxpylayers 1.2: pip install 'qpdiff[cvxpylayers]'") from error

OTHER_CONES = {
    "soc": "second-order cone", "exp": "exponential cone", "psd": "cone of positive semidefinite matrices",
    "p3d": "power cone", "pnd": "power cone of several dimensions",
}  # fmt: skip
"""The cones that are no constraints of a QP, by their names in CVXPY's dimensions."""
ADVICE = (
    "The function of qpdiff.from_cvxpy goes on without them: it returns a status, and its vjp takes unsolved='zero'"
)
"""A layer of cvxpylayers has a value for every problem of a batch, or none."""


class LayerSolver(SolverInterface):
    """`qpdiff.solve_qp` and `qpdiff.vjp` as the solver of a layer of cvxpylayers, in torch.

    For problems that CVXPY turns into quadratic or linear programs; a batch is solved in one call. What no parameter
    enters is shared by the batch. Large matrices that are mostly zeros are sparse. Options of `qpdiff.solve_qp` are the
    layer's `solver_args`. It computes on the CPU, and has first derivatives. A solver belongs to one layer.

    The JAX layer of cvxpylayers 1.2.0 calls no solver but its own; in JAX, `qpdiff.from_cvxpy` gives the operands of
    `qpdiff.jax.solve_qp`.

    Raises
    ------
    ValueError
        From the layer, for a problem that needs another cone, which it names, and for the solver of another layer.
    RuntimeError
        From a call of the layer, when a problem is not SOLVED.

    References
    ----------
    A. Agrawal, B. Amos, S. Barratt, S. Boyd, S. Diamond, J. Z. Kolter, "Differentiable convex optimization layers",
    NeurIPS 2019.

    Examples
    --------
    >>> import cvxpy as cp
    >>> import torch
    >>> from cvxpylayers.torch import CvxpyLayer
    >>> x, point = cp.Variable(3), cp.Parameter(3)
    >>> cost, simplex = cp.sum_squares(x - point), [cp.sum(x) == 1, x >= 0]
    >>> problem = cp.Problem(cp.Minimize(cost), simplex)
    >>> layer = CvxpyLayer(problem, [point], [x], solver=LayerSolver())
    >>> points = torch.tensor([[0.4, 0.5, 0.3], [2.0, 0.0, 0.0]]).double()
    >>> (values,) = layer(points)
    >>> values.numpy().round(4).tolist()
    [[0.3333, 0.4333, 0.2333], [1.0, 0.0, 0.0]]
    """

    canon_solver = "CLARABEL"  # quadratic objectives, every cone: so that the one that is not for a QP can be named
    supports_quad_obj = True

    _where: dict | None = None
    _values: Mapping[str, tuple[Pattern, sp.csr_array]] = MappingProxyType({})
    """The patterns of matrices that are kept sparse, and the maps from CVXPY's entries to the values there."""

    def setup(self, ctx) -> None:
        """Read where the canonical program has the operands of the QP.

        CVXPY has the entries of P, and those of [A, b], where −Ax + b is zero in the first rows and nonnegative in the
        others, in compressed columns.
        """
        if self._where is not None:
            raise ValueError("this solver belongs to another layer; make one for each layer")
        found = [text for name, text in OTHER_CONES.items() if np.any(getattr(ctx.cone_dims, name, 0))]
        if found:
            raise ValueError(f"the problem is not a QP, it needs the {' and the '.join(found)}")
        n, p = ctx.q.shape[0] - 1, ctx.cone_dims.zero
        rows, columns, constant = _entries(ctx.reduced_A)
        size = p + ctx.cone_dims.nonneg
        equality, side = rows < p, columns == n
        self._where = {}
        for matrix, vector, count, own in (("A", "b", p, equality), ("G", "h", size - p, ~equality)):
            if count:
                first = 0 if matrix == "A" else p
                at = own & ~side
                self._where[matrix] = (
                    (count, n), (rows[at] - first, columns[at]), np.flatnonzero(at), -1, constant[at].all(),
                )  # fmt: skip
                at = own & side
                self._where[vector] = ((count,), (rows[at] - first,), np.flatnonzero(at), 1, constant[at].all())
        rows, columns, constant = _entries(ctx.reduced_P)
        self._where["Q"] = ((n, n), (rows, columns), np.arange(len(rows)), 1, constant.all())
        self._p = p
        matrices = [name for name in self._where if name in MATRICES]
        numbers = sum(math.prod(self._where[name][0]) for name in matrices)
        if keeps_sparse(numbers, 2 * sum(len(self._where[name][2]) for name in matrices)):
            self._values = {name: _values(*self._where[name][:2], symmetric=name == "Q") for name in matrices}

    def solve_numpy_batch(self, P, q, A, dims, solver_args, needs_grad):
        """Solve a batch.

        Parameters
        ----------
        P, q, A : array (B, nnz_P) or None, (B, n + 1), (B, nnz_A)
            Entries of the canonical program.
        dims, needs_grad
            Not used.
        solver_args : dict
            Options of `qpdiff.solve_qp`.

        Returns
        -------
        tuple
            x (B, n), the multipliers (B, p + m), and what `derivative_numpy_batch` needs.
        """
        operands = {"q": np.asarray(q)[:, :-1]}
        for name, (shape, index, entries, sign, constant) in self._where.items():
            source = P if name == "Q" else A
            batch = 1 if constant else len(q)
            if name in self._values:
                pattern, take = self._values[name]
                values = sign * np.asarray(source)[:batch, entries] @ take.T if len(entries) else np.zeros((batch, 0))
                operands[name] = Sparse.of_pattern(values[0] if constant else values, pattern)
                continue
            operand = np.zeros((batch, *shape), dtype=operands["q"].dtype)
            if len(entries):
                operand[(slice(None), *index)] = sign * np.asarray(source)[:batch, entries]
            if name == "Q":
                operand = (operand + np.swapaxes(operand, -1, -2)) / 2
            operands[name] = operand[0] if constant else operand
        sol = solve_qp(**operands, **solver_args)
        raise_if_unsolved(sol.status, advice=ADVICE)
        return sol.x, np.concat([sol.y, sol.z], axis=-1), (sol, None if P is None else P.shape, A.shape)

    def derivative_numpy_batch(self, dprimal, ddual, saved_state):
        """Pull cotangents of x (B, n) and of the multipliers (B, p + m) back to P, q and A.

        Entries that no parameter enters get zeros, which the layer drops.
        """
        sol, shape_P, shape_A = saved_state
        gradients = vjp(sol, x=dprimal, y=ddual[:, : self._p], z=ddual[:, self._p :])
        of_A = np.zeros(shape_A, dtype=gradients.q.dtype)
        of_P = None if shape_P is None else np.zeros(shape_P, dtype=gradients.q.dtype)
        for name, (_, index, entries, sign, constant) in self._where.items():
            target = of_P if name == "Q" else of_A
            if constant:
                continue
            gradient = getattr(gradients, name)
            if name in self._values:
                target[:, entries] = sign * (gradient.values @ self._values[name][1])
            else:
                target[:, entries] = sign * gradient[(slice(None), *index)]
        return of_P, np.pad(gradients.q, ((0, 0), (0, 1))), of_A

    # The defaults of cvxpylayers take a batch of tensors apart before they go to NumPy.

    def solve_torch_batch(self, P, q, A, dims, solver_args, needs_grad):
        """Solve a batch of tensors; see `solve_numpy_batch`."""
        arrays = (None if value is None else _to_numpy(value) for value in (P, q, A))
        primal, dual, state = self.solve_numpy_batch(*arrays, dims, solver_args, needs_grad)
        return _to_torch(primal, q), _to_torch(dual, q), state

    def derivative_torch_batch(self, dprimal, ddual, saved_state):
        """Pull back tensors; see `derivative_numpy_batch`."""
        gradients = self.derivative_numpy_batch(_to_numpy(dprimal), _to_numpy(ddual), saved_state)
        return tuple(None if value is None else _to_torch(value, dprimal) for value in gradients)


def _entries(reduced):
    """Return the rows and columns of the entries of a matrix in compressed columns, and which no parameter enters."""
    if reduced.problem_data_index is None or reduced.reduced_mat is None:
        return np.zeros(0, int), np.zeros(0, int), np.zeros(0, bool)
    rows, starts, _ = reduced.problem_data_index
    columns = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return rows, columns, np.diff(reduced.reduced_mat[:, :-1].tocsr().indptr) == 0


def _values(shape, index, *, symmetric: bool) -> tuple[Pattern, sp.csr_array]:
    """Return the pattern of the entries at an index, and the matrix that takes them to the values on it.

    With `symmetric` that of the symmetric part.
    """
    (rows, columns), entry = index, np.arange(len(index[0]))
    weight = np.ones(len(entry))
    if symmetric:
        rows, columns = np.concatenate([rows, columns]), np.concatenate([columns, rows])
        entry, weight = np.tile(entry, 2), np.tile(weight / 2, 2)
    places, place = np.unique(np.int64(shape[1]) * rows + columns, return_inverse=True)
    return pattern_at(places, shape), sp.csr_array((weight, (place, entry)), (len(places), len(index[0])))


def _to_numpy(tensor):
    return tensor.detach().cpu().numpy()


def _to_torch(array, like):
    import torch

    return torch.tensor(array, dtype=like.dtype, device=like.device)  # a copy: the solution's arrays are read-only
