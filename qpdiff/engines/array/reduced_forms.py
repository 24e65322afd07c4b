"""The KKT system reduced to the variables or to the constraints."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from ...problem import Later, Problem, product, product_transposed, take
from ..parameters import DOUBLE, parameters
from ..reduction import Form, has_off_diagonal, preferred_form
from .equilibration import balance
from .kkt import System


class PrimalForm:
    """The KKT system reduced to the variables: n × n, for any Q and any rows."""

    definite = False
    """Whether Q alone is safely positive definite, and needs no ρ."""

    def __init__(self, problem: Problem, constants=None):
        self.problem = problem
        self.constants = constants
        """What does not change in an iteration, beside the problem."""

    @classmethod
    def prepare(cls, problem: Problem) -> tuple[PrimalForm, Any]:
        """The form, and for which problems it is safe (None: for all)."""
        return cls(problem), None

    def select(self, problem: Problem, index) -> PrimalForm:
        """The same for part of the batch."""
        return PrimalForm(problem)

    @cached_property
    def _grams(self):
        """For A and G, where they are given: Kᵀ diag(w) K as a function of the weights, and their place in w."""
        problem = self.problem
        return [
            (problem.backend.gram(K), problem.blocks[name])
            for K, name in ((problem.A, "A"), (problem.G, "G"))
            if K is not None
        ]

    def factor(self, system: System):
        """Factor the reduced matrix; also whether it was positive definite, (B, 1)."""
        problem = self.problem
        weights = 1.0 / (system.theta + system.delta)
        M = problem.Q
        for gram, block in self._grams:
            M = M + gram(weights[:, block])
        diagonal = system.rho + _bound_weights(problem, weights)
        factor, positive = problem.backend.factor_sum(M, diagonal)
        return (factor, weights), positive

    def eliminate(self, factor, r_x):
        """What a solve needs of the right-hand side of the variables (B, n) alone: done once for many solves."""
        return r_x

    def solve_rows(self, factor, eliminated, r_v):
        """The multipliers of `solve`, which with a dense dual form come without the variables."""
        return self.solve(factor, eliminated, r_v)[1]

    def solve(self, factor, eliminated, r_v):
        """Solve for right-hand sides of the variables, after `eliminate`, and of the rows (B, rows)."""
        problem = self.problem
        reduced, weights = factor
        dx = problem.backend.solve(reduced, eliminated + problem.adjoint(weights * r_v))
        return dx, weights * (problem.constraints(dx) - r_v)


class DenseDualForm:
    """The KKT system reduced to the rows, for problems without bounds whose Q = F Fᵀ is safely invertible.

    S = K Q⁻¹ Kᵀ is computed once, and once for the whole batch where Q, A and G are shared.
    """

    definite = True

    def __init__(self, problem: Problem, constants):
        self.problem = problem
        self._later, self.S = constants
        """The backend's root of Q and V = K F⁻ᵀ, to be asked for, and S = V Vᵀ."""

    @classmethod
    def prepare(cls, problem: Problem) -> tuple[DenseDualForm, Any]:
        """The form, and for which problems Q is well enough conditioned for it, (B or 1,)."""
        xp, backend = problem.backend.xp, problem.backend
        diagonal = xp.linalg.diagonal(problem.Q)
        factor, positive = backend.factor(problem.Q)
        blocks = [K for K in (problem.A, problem.G) if K is not None]
        root = backend.substitution(factor)
        V = backend.forward_rows(root, _stack(xp, blocks))
        enough = parameters(problem).smallest_pivot
        good = positive & (diagonal > 0) & (backend.pivots(factor) > enough * diagonal)
        return cls(problem, (Later((root, V)), backend.products(V, V.mT))), xp.all(good, axis=-1)

    @cached_property
    def whitening(self):
        """The backend's root of Q and V, which a step in the rows alone does not ask for."""
        return self._later.now(self.problem.backend.xp)

    @property
    def constants(self):
        return Later(self.whitening), self.S

    def select(self, problem: Problem, index) -> DenseDualForm:
        xp = self.problem.backend.xp
        return DenseDualForm(problem, (self._later.select(xp, index), take(xp, self.S, index)))

    def factor(self, system: System):
        return self.factor_rows(system.theta + system.delta)

    def factor_rows(self, theta):
        """Factor S + diag(θ)."""
        return _factor_rows(self.problem, self.S, theta)

    def eliminate(self, factor, r_x):
        """F⁻¹ r_x, and K Q⁻¹ r_x."""
        root, V = self.whitening
        whitened = self.problem.backend.forward(root, r_x)
        return whitened, product(V, whitened)

    def solve_rows(self, factor, eliminated, r_v):
        return self.problem.backend.solve(factor, eliminated[1] - r_v)

    def solve(self, factor, eliminated, r_v):
        dv = self.solve_rows(factor, eliminated, r_v)
        return self.variables(eliminated[0], dv), dv

    def variables(self, whitened, v):
        """Q⁻¹ (r_x − Kᵀv) for F⁻¹ r_x."""
        root, V = self.whitening
        return self.problem.backend.backward(root, whitened - product_transposed(V, v))


class DiagonalDualForm:
    """The KKT system reduced to the rows of A and G, for a diagonal Q, to which bounds only add."""

    definite = False

    def __init__(self, problem: Problem, constants):
        self.problem = problem
        self.constants = constants
        """The diagonal of Q, and the rows of A and G."""
        self.gram = problem.backend.gram(constants[1].mT)

    @classmethod
    def prepare(cls, problem: Problem) -> tuple[DiagonalDualForm, Any]:
        """The form, and for which problems every variable has enough curvature, (B or 1,).

        Without, the weight of a variable that is away from its bounds tends to ρ, and its inverse drowns the rest.
        """
        xp = problem.backend.xp
        diagonal = xp.linalg.diagonal(problem.Q)
        scaled = diagonal * balance(problem).D ** 2
        rows = _stack(xp, [K for K in (problem.A, problem.G) if K is not None])
        safe = xp.all(scaled > DOUBLE.smallest_scaled_curvature, axis=-1)
        return cls(problem, (diagonal + _own_terms(problem, diagonal), rows)), safe

    def select(self, problem: Problem, index) -> DiagonalDualForm:
        return DiagonalDualForm(problem, take(self.problem.backend.xp, self.constants, index))

    def factor(self, system: System):
        problem, linear = self.problem, self.problem.p + self.problem.m
        theta = system.theta + system.delta
        weights = 1.0 / theta
        hessian = self.constants[0] + _bound_weights(problem, weights)
        factor, positive = _factor_rows(problem, self.gram(1.0 / hessian), theta[:, :linear])
        return (factor, hessian, weights[:, linear:]), positive

    def eliminate(self, factor, r_x):
        return r_x

    def solve_rows(self, factor, eliminated, r_v):
        return self.solve(factor, eliminated, r_v)[1]

    def solve(self, factor, eliminated, r_v):
        problem, (reduced, hessian, weights), (_, rows) = self.problem, factor, self.constants
        linear = problem.p + problem.m
        bounds = r_v[:, linear:]
        r_x = eliminated + self._bounds_adjoint(weights * bounds)
        dv = problem.backend.solve(reduced, product(rows, r_x / hessian) - r_v[:, :linear])
        dx = (r_x - product_transposed(rows, dv)) / hessian
        of_bounds = weights * (problem.constraints(dx)[:, linear:] - bounds)
        return dx, problem.backend.xp.concat([dv, of_bounds], axis=-1)

    def _bounds_adjoint(self, v):
        problem = self.problem
        if problem.lb is None:
            return v
        if problem.ub is None:
            return -v
        return v[:, problem.n :] - v[:, : problem.n]


_CLASSES: dict[Form, Any] = {
    Form.PRIMAL: PrimalForm, Form.DENSE_DUAL: DenseDualForm, Form.DIAGONAL_DUAL: DiagonalDualForm
}  # fmt: skip


def choose_form(problem: Problem):
    """The preferred form, and for which problems it is safe (None: for all)."""
    return _CLASSES[preferred_form(problem)].prepare(problem)


def choose_traced_form(problem: Problem):
    """The form that the shapes prefer, and one truth value: whether it is safe for all problems (None: it is)."""
    xp = problem.backend.xp
    form, safe = _CLASSES[preferred_form(problem, diagonal=True)].prepare(problem)
    if safe is None:
        return form, None
    return form, xp.all(safe) & ~xp.any(has_off_diagonal(problem)) if not form.definite else xp.all(safe)


def _factor_rows(problem: Problem, S, theta):
    """Factor S + diag(θ), where rows that do not exist have infinite θ; and whether it was positive definite."""
    xp, backend = problem.backend.xp, problem.backend
    # They get a diagonal that is huge but harmless to the factorisation.
    theta = backend.clip(theta, most=xp.finfo(problem.dtype).max ** 0.5)
    return backend.factor_sum(S, theta)


def _stack(xp, matrices):
    """The rows of matrices (B or 1, ·, n) as those of one."""
    if len(matrices) == 1:
        return matrices[0]
    batch = max(M.shape[0] for M in matrices)
    return xp.concat([xp.broadcast_to(M, (batch, *M.shape[1:])) for M in matrices], axis=-2)


def _bound_weights(problem: Problem, weights):
    parts = [weights[:, problem.blocks[name]] for name in ("lb", "ub") if getattr(problem, name) is not None]
    return sum(parts[1:], parts[0]) if parts else 0.0


def _own_terms(problem: Problem, diagonal):
    """The dual forms' proximal terms on the variables: so small a share of Q that they need not follow the solver's."""
    xp = problem.backend.xp
    return parameters(problem).diagonal_regularization * diagonal + xp.finfo(problem.dtype).smallest_normal
