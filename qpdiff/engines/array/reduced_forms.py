"""The reduced KKT systems: what is left of the system of `kkt` once one of its diagonal blocks is eliminated.

* `PrimalForm` eliminates the constraints: n × n, Q + diag(ρ) + Kᵀ diag(1/(θ + δ)) K;
* `DenseDualForm` and `DiagonalDualForm` eliminate the variables: one row and column for each row of A and G,
  K (Q + diag(ρ))⁻¹ Kᵀ + diag(θ + δ), where Q is factored once, or is diagonal and takes the bounds with it.

All have the methods of `PrimalForm`, whose docstrings say what is asked of them.
"""

from __future__ import annotations

from typing import Any

from ...once import cached_property
from ...problem import DeferredTake, Problem, product, product_transposed, take
from ..parameters import DOUBLE, parameters
from ..reduction import Form, has_off_diagonal, preferred_form
from .equilibration import balance
from .kkt import Diagonals


class PrimalForm:
    """The primal reduced KKT system: n × n, for any Q and any constraints."""

    skips_rho = False
    """True where Q alone is safely positive definite, so that the system has no ρ."""

    def __init__(self, problem: Problem, constants=None):
        self.problem = problem
        self.constants = constants
        """Arrays beside the problem that do not change in the iteration."""

    @classmethod
    def prepare(cls, problem: Problem) -> tuple[PrimalForm, Any]:
        """Compute what does not change; return the form, and for which problems it is safe (None: for all)."""
        return cls(problem), None

    def select(self, problem: Problem, index) -> PrimalForm:
        """Return the form of the problems at some positions, which are those of `problem`."""
        return PrimalForm(problem)

    @cached_property
    def _grams(self):
        """For A and G, where they are given: Kᵀ diag(w) K as a function of weights w, and where in w theirs are."""
        problem = self.problem
        return [
            (problem.backend.gram(K), problem.blocks[name])
            for K, name in ((problem.A, "A"), (problem.G, "G"))
            if K is not None
        ]

    def factor(self, diagonals: Diagonals):
        """Factor the reduced matrix; return the factor, and whether the matrix was positive definite, (B, 1)."""
        problem = self.problem
        weights = 1.0 / (diagonals.theta + diagonals.delta)
        M = problem.Q
        for gram, block in self._grams:
            M = M + gram(weights[:, block])
        diagonal = diagonals.rho + _bound_weights(problem, weights)
        factor, factor_ok = problem.backend.factor_sum(M, diagonal)
        return (factor, weights), factor_ok

    def eliminate(self, factor, r_x):
        """Eliminate the right-hand side of the variables (B, n), once for several solves with the same."""
        return r_x

    def solve_multipliers(self, factor, eliminated, r_v):
        """Return the multipliers of `solve`, for which the dense dual form needs no variables."""
        return self.solve(factor, eliminated, r_v)[1]

    def solve(self, factor, eliminated, r_v):
        """Solve for right-hand sides of the variables, after `eliminate`, and of the constraints (B, constraints)."""
        problem = self.problem
        reduced, weights = factor
        dx = problem.backend.solve(reduced, eliminated + problem.adjoint(weights * r_v))
        return dx, weights * (problem.constraints(dx) - r_v)


class DenseDualForm:
    """The dense dual reduced KKT system, for problems without bounds whose Q = F Fᵀ is safely invertible.

    S = K Q⁻¹ Kᵀ is computed once, and once for the whole batch where Q, A and G are shared.
    """

    skips_rho = True

    def __init__(self, problem: Problem, constants):
        self.problem = problem
        self._deferred, self.S = constants
        """The factor of Q and V = K F⁻ᵀ, not taken before they are used, and S = V Vᵀ."""

    @classmethod
    def prepare(cls, problem: Problem) -> tuple[DenseDualForm, Any]:
        """Factor Q; return the form, and for which problems Q is well enough conditioned for it, (B or 1,)."""
        xp, backend = problem.backend.xp, problem.backend
        diagonal = xp.linalg.diagonal(problem.Q)
        factor, factor_ok = backend.factor(problem.Q)
        blocks = [K for K in (problem.A, problem.G) if K is not None]
        F = backend.substitution(factor)
        V = backend.forward_rows(F, _stack(xp, blocks))
        least = parameters(problem).smallest_pivot
        safe = factor_ok & (diagonal > 0) & (backend.pivots(factor) > least * diagonal)
        return cls(problem, (DeferredTake((F, V)), backend.products(V, V.mT))), xp.all(safe, axis=-1)

    @cached_property
    def factor_of_Q(self):
        """The factor F of Q for substitutions, and V, which steps in the dual space do not use."""
        return self._deferred.evaluate(self.problem.backend.xp)

    @property
    def constants(self):
        return DeferredTake(self.factor_of_Q), self.S

    def select(self, problem: Problem, index) -> DenseDualForm:
        xp = self.problem.backend.xp
        return DenseDualForm(problem, (self._deferred.select(xp, index), take(xp, self.S, index)))

    def factor(self, diagonals: Diagonals):
        return self.factor_dual(diagonals.theta + diagonals.delta)

    def factor_dual(self, theta):
        """Factor S + diag(θ)."""
        return _factor_dual(self.problem, self.S, theta)

    def eliminate(self, factor, r_x):
        """Return F⁻¹ r_x and K Q⁻¹ r_x."""
        F, V = self.factor_of_Q
        forward = self.problem.backend.forward(F, r_x)
        return forward, product(V, forward)

    def solve_multipliers(self, factor, eliminated, r_v):
        return self.problem.backend.solve(factor, eliminated[1] - r_v)

    def solve(self, factor, eliminated, r_v):
        dv = self.solve_multipliers(factor, eliminated, r_v)
        return self.solve_variables(eliminated[0], dv), dv

    def solve_variables(self, forward, v):
        """Return Q⁻¹ (r_x − Kᵀv) for F⁻¹ r_x and v."""
        F, V = self.factor_of_Q
        return self.problem.backend.backward(F, forward - product_transposed(V, v))


class DiagonalDualForm:
    """The diagonal dual reduced KKT system, for a diagonal Q, to which bounds only add."""

    skips_rho = False

    def __init__(self, problem: Problem, constants):
        self.problem = problem
        self.constants = constants
        """The diagonal of Q with the regularisation of its own, and the rows of A and G."""
        self.gram = problem.backend.gram(constants[1].mT)

    @classmethod
    def prepare(cls, problem: Problem) -> tuple[DiagonalDualForm, Any]:
        """Return the form, and for which problems every variable has enough curvature, (B or 1,).

        Without it, the weight of a variable away from its bounds tends to ρ, whose inverse drowns the rest.
        """
        xp = problem.backend.xp
        diagonal = xp.linalg.diagonal(problem.Q)
        scaled = diagonal * balance(problem).D ** 2
        rows = _stack(xp, [K for K in (problem.A, problem.G) if K is not None])
        safe = xp.all(scaled > DOUBLE.smallest_scaled_curvature, axis=-1)
        return cls(problem, (diagonal + _own_regularization(problem, diagonal), rows)), safe

    def select(self, problem: Problem, index) -> DiagonalDualForm:
        return DiagonalDualForm(problem, take(self.problem.backend.xp, self.constants, index))

    def factor(self, diagonals: Diagonals):
        problem, linear = self.problem, self.problem.p + self.problem.m
        theta = diagonals.theta + diagonals.delta
        weights = 1.0 / theta
        hessian = self.constants[0] + _bound_weights(problem, weights)
        factor, factor_ok = _factor_dual(problem, self.gram(1.0 / hessian), theta[:, :linear])
        return (factor, hessian, weights[:, linear:]), factor_ok

    def eliminate(self, factor, r_x):
        return r_x

    def solve_multipliers(self, factor, eliminated, r_v):
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
    """Return the preferred form, and for which problems it is safe (None: for all)."""
    return _CLASSES[preferred_form(problem)].prepare(problem)


def choose_traced_form(problem: Problem):
    """Return the form that the shapes prefer, and one truth value: whether it is safe for all (None: it is)."""
    xp = problem.backend.xp
    form, safe = _CLASSES[preferred_form(problem, diagonal=True)].prepare(problem)
    if safe is None:
        return form, None
    return form, xp.all(safe) & ~xp.any(has_off_diagonal(problem)) if not form.skips_rho else xp.all(safe)


def _factor_dual(problem: Problem, S, theta):
    """Factor S + diag(θ), where constraints that do not exist have infinite θ; also return whether it was definite."""
    xp, backend = problem.backend.xp, problem.backend
    # These get a diagonal that is huge but harmless to the factorisation.
    theta = backend.clip(theta, most=xp.finfo(problem.dtype).max ** 0.5)
    return backend.factor_sum(S, theta)


def _stack(xp, matrices):
    """Join the rows of matrices (B or 1, ·, n)."""
    if len(matrices) == 1:
        return matrices[0]
    batch = max(M.shape[0] for M in matrices)
    return xp.concat([xp.broadcast_to(M, (batch, *M.shape[1:])) for M in matrices], axis=-2)


def _bound_weights(problem: Problem, weights):
    """Return what the weights of the bounds add to the diagonal of the variables."""
    terms = [weights[:, problem.blocks[name]] for name in ("lb", "ub") if getattr(problem, name) is not None]
    return sum(terms[1:], terms[0]) if terms else 0.0


def _own_regularization(problem: Problem, diagonal):
    """Return the diagonal dual form's primal regularisation, a share of Q too small to have to follow the solver's."""
    xp = problem.backend.xp
    return parameters(problem).diagonal_regularization * diagonal + xp.finfo(problem.dtype).smallest_normal
