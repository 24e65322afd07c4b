"""A CVXPY problem as a QP whose data are affine in the parameters, as maps between flat arrays."""

from __future__ import annotations

from typing import NamedTuple

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
from cvxpy.error import SolverError
from cvxpy.lin_ops.lin_op import CONSTANT_ID
from cvxpy.problems.problem_form import ProblemForm
from cvxpy.reductions.cvx_attr2constr import SYMMETRIC_ATTRIBUTES, lower_value, recover_value_for_leaf

from ..sparse import Pattern, keeps_sparse, pattern_at
from .maps import AffineMap, SparseMatrix
from .solver import CVXPYSolver


class Canonical(NamedTuple):
    """A CVXPY problem as a QP."""

    maps: dict[str, AffineMap]
    """The operands of `qpdiff.solve_qp`, and the offset of the objective, as functions of the parameters."""
    patterns: dict[str, Pattern]
    """Of the operands that are sparse, of which the maps give the values."""
    recoveries: list[SparseMatrix]
    """What takes x to the values of the variables."""


def canonicalize(problem, parameters, variables) -> Canonical:
    """Return the canonical form of a problem as a function of parameters.

    Raises
    ------
    ValueError
        For a problem that is not a QP or whose data are not affine in the parameters, naming the parts that are to
        blame.
    """
    check_problem(problem)
    # A problem of its own, so that the caller's keeps what it has compiled for another solver.
    copy = cp.Problem(problem.objective, problem.constraints)
    try:
        data, chain, _ = copy.get_problem_data(CVXPYSolver(), enforce_dpp=True)
    except SolverError as error:
        raise ValueError(f"CVXPY does not make a QP of the problem: {error}") from error
    program = data[cp.settings.PARAM_PROB]
    if program.is_mixed_integer():
        raise ValueError("the problem is not a QP: CVXPY turns it into one with integer variables")
    (tensors, patterns), lowered = _tensors(program), chain.compose_param_id_map()
    fixed = [parameter for parameter in problem.parameters() if parameter.id not in {p.id for p in parameters}]
    arguments = {i: _columns(program, lowered, parameter) for i, parameter in enumerate(parameters)}
    constants = [(*_columns(program, lowered, parameter), _fixed_value(parameter)) for parameter in fixed]
    maps = {}
    for name, (shape, tensor) in tensors.items():
        columns = sp.csc_array(tensor)
        constant = columns[:, [program.param_id_to_col[CONSTANT_ID]]].toarray().ravel()
        for where, lowering, value in constants:
            constant = constant + columns[:, where] @ (lowering @ value)
        matrices = {i: SparseMatrix(columns[:, where] @ lowering) for i, (where, lowering) in arguments.items()}
        matrices = {i: matrix for i, matrix in matrices.items() if matrix.matrix.nnz}
        if matrices or not (name in ("lb", "ub") and np.all(np.isinf(constant))):
            maps[name] = AffineMap(shape, constant, matrices)
    recoveries = [_recovery(program, chain.compose_var_id_map(), variable) for variable in variables]
    return Canonical(maps, patterns, recoveries)


def check_problem(problem) -> None:
    """Refuse what is not a QP, or does not depend on its parameters as it must."""
    if not problem.variables():
        raise ValueError("the problem has no variables")
    for kind, attributes, leaves in (
        ("integer or boolean", ("integer", "boolean"), problem.variables()),
        ("complex", ("complex", "imag", "hermitian"), problem.variables() + problem.parameters()),
    ):
        found = ", ".join(leaf.name() for leaf in leaves if any(leaf.attributes[name] for name in attributes))
        if found:
            raise ValueError(f"the problem is not a QP, it has what is {kind}: {found}")

    def to_blame(fine) -> str:
        parts = [(problem.objective, cp.Problem(problem.objective))]
        parts += [(constraint, cp.Problem(cp.Minimize(0), [constraint])) for constraint in problem.constraints]
        return "; ".join(str(part) for part, alone in parts if not fine(alone)) or str(problem)

    def is_dpp(part) -> bool:
        return part.is_dpp(quad_form_dpp="qp")

    def is_qp(part) -> bool:
        return not part.variables() or CVXPYSolver().can_solve(ProblemForm(part))

    if not problem.is_dcp():
        raise ValueError(f"the problem is not convex by CVXPY's rules (DCP): {to_blame(cp.Problem.is_dcp)}")
    if not is_dpp(problem):
        raise ValueError(
            "the problem is not DPP (https://www.cvxpy.org/tutorial/dpp), so its data are not affine in the "
            f"parameters: {to_blame(is_dpp)}"
        )
    if not is_qp(problem):
        cones = ProblemForm(problem).cones(quad_obj=True) - set(CVXPYSolver.SUPPORTED_CONSTRAINTS)
        names = ", ".join(sorted(cone.__name__ for cone in cones))
        raise ValueError(f"the problem is not a QP, it needs the cones {names}: {to_blame(is_qp)}")


def _tensors(program):
    """Return the shape of each operand, and the matrix from CVXPY's parameters, and 1, to it in row-major order; and
    the patterns of those that are kept sparse, of which that is to the values.

    CVXPY has one matrix each for P, for [q; d] and for [F, g], in column-major order, where the objective is
    ½ xᵀPx + qᵀx + d, Fx + g = 0 in the first rows, and Fx + g ≥ 0 in the others.
    """
    n, rows, p = program.x.size, program.constr_size, program.cone_dims.zero
    P, Fg, qd = _Entries(program.P, n), _Entries(program.A, rows), sp.csr_array(program.q)
    i, j = Fg.places
    stored = {
        "Q": np.concatenate([P.places, P.places[::-1]], axis=1),
        "A": Fg.places[:, (i < p) & (j < n)],
        "G": Fg.places[:, (i >= p) & (j < n)] - [[p], [0]],
    }
    numbers, sizes = n * (n + rows), {"Q": n, "A": p, "G": rows - p}
    sparse = keeps_sparse(numbers, sum(places.shape[1] for places in stored.values()))
    places, shapes, patterns = {}, {}, {}
    for name, size in sizes.items():
        if sparse:
            flat = np.unique(stored[name][0] * n + stored[name][1])
            places[name], shapes[name] = (flat // n, flat % n), (len(flat),)
            patterns[name] = pattern_at(flat, (size, n))
        else:
            places[name], shapes[name] = tuple(np.indices((size, n)).reshape(2, -1)), (size, n)
    i, j = places["Q"]
    tensors = {
        "Q": (shapes["Q"], (P.at(i, j) + P.at(j, i)) / 2),
        "q": ((n,), qd[:n]),
        "offset": ((), qd[n:]),
    }
    for matrix, vector, first, sign in (("A", "b", 0, 1), ("G", "h", p, -1)):
        if sizes[matrix] > 0:
            i, j = places[matrix]
            side = np.arange(first, first + sizes[matrix])
            tensors[matrix] = (shapes[matrix], sign * Fg.at(i + first, j))
            tensors[vector] = ((sizes[matrix],), -sign * Fg.at(side, np.full(len(side), n)))
    for name, bounds, tensor in (
        ("lb", program.lower_bounds, program.lb_tensor),
        ("ub", program.upper_bounds, program.ub_tensor),
    ):
        if tensor is not None:
            tensors[name] = ((n,), tensor)
        elif bounds is not None:
            constant = (np.arange(n), np.full(n, program.param_id_to_col[CONSTANT_ID]))
            tensors[name] = ((n,), sp.csr_array((bounds, constant), (n, program.total_param_size + 1)))
    return tensors, {name: pattern for name, pattern in patterns.items() if name in tensors}


class _Entries:
    """The entries of a matrix that are not always 0, as functions of CVXPY's parameters.

    Parameters
    ----------
    tensor : sparse matrix
        With a row for each entry, in column-major order.
    rows : int
        Of the matrix.
    """

    def __init__(self, tensor, rows: int):
        tensor = sp.coo_array(tensor)
        self._rows = rows
        self._stored, row = np.unique(tensor.coords[0].astype(np.int64), return_inverse=True)
        self._tensor = sp.csr_array((tensor.data, (row, tensor.coords[1])), (len(self._stored), tensor.shape[1]))

    @property
    def places(self) -> np.ndarray:
        """The rows and the columns of the entries, (2, entries)."""
        return np.stack([self._stored % max(self._rows, 1), self._stored // max(self._rows, 1)])

    def at(self, i: np.ndarray, j: np.ndarray) -> sp.csr_array:
        """Return the rows of the tensor for the entries (i, j), without numbers for those that are always 0."""
        wanted = i.astype(np.int64) + self._rows * j.astype(np.int64)
        found = np.searchsorted(self._stored, wanted)
        (known,) = np.nonzero(np.append(self._stored, -1)[found] == wanted)
        select = sp.csr_array((np.ones(len(known)), (known, found[known])), (len(wanted), len(self._stored)))
        return select @ self._tensor


def _columns(program, lowered_ids: dict, parameter):
    """Return the columns of a parameter in the tensors, and the matrix from its row-major order to what they multiply.

    That is the parameter in column-major order, or the upper triangle of a symmetric one, the diagonal of a diagonal
    one, and so on.
    """

    def select(index):
        entries = np.ravel(lower_value(parameter, index), order="F")
        return sp.csr_array((np.ones(len(entries)), (np.arange(len(entries)), entries)), (len(entries), parameter.size))

    index = np.arange(parameter.size).reshape(parameter.shape)
    lowering = select(index)
    if any(parameter.attributes[name] for name in SYMMETRIC_ATTRIBUTES):
        lowering = (lowering + select(index.T)) / 2  # both triangles count the same, and so do their gradients
    (name,) = lowered_ids.get(parameter.id, [parameter.id])
    start = program.param_id_to_col[name]
    return slice(start, start + lowering.shape[0]), lowering


def _fixed_value(parameter) -> np.ndarray:
    """Return the value of a parameter that is not an argument, in row-major order."""
    value = parameter.value if parameter.sparse_idx is None else parameter.value_sparse
    if value is None:
        raise ValueError(
            f"the parameter {parameter.name()} has no value and is not listed; list it in parameters, or give it one"
        )
    return np.ravel(value.toarray() if sp.issparse(value) else value)


def _recovery(program, lowered_ids: dict, variable) -> SparseMatrix:
    """Return the matrix that picks a variable, in row-major order, from all of the canonical program's."""
    (name,) = lowered_ids.get(variable.id, [variable.id])
    if name not in program.id_to_var:  # its constraints were empty: 0, as in CVXPY
        return SparseMatrix(sp.csr_array((variable.size, program.x.size)))
    lowered, start = program.id_to_var[name], program.var_id_to_col[name]
    position = np.arange(1.0, lowered.size + 1).reshape(lowered.shape, order="F")
    value = recover_value_for_leaf(variable, position, project=False)
    entries = np.ravel(value.toarray() if sp.issparse(value) else value).astype(int)  # 0 where the variable must be 0
    (rows,) = np.nonzero(entries)
    return SparseMatrix(
        sp.csr_array((np.ones(len(rows)), (rows, start + entries[rows] - 1)), (variable.size, program.x.size))
    )
