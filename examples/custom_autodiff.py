"""solve_qp and vjp in an autodiff framework of one's own: a reverse-mode tape, a layer, and a loss.

All that a framework needs is in `solve_qp`: the forward solve, and a function from the cotangent of the solution to
the gradients of the operands.
"""

from __future__ import annotations

import numpy as np

import qpdiff

# ---- a framework: variables that remember how they were made


class Variable:
    """A value, the variables it was made of, and how to pull a cotangent back to them."""

    def __init__(self, value, parents=(), pull_back=None):
        self.value = np.asarray(value, dtype=float)
        self.parents, self.pull_back = parents, pull_back
        self.grad = np.zeros_like(self.value)

    def backward(self):
        """Add the derivative of this variable (a scalar) to the `grad` of all it depends on."""
        order, seen = [], set()

        def visit(node):
            if id(node) not in seen:
                seen.add(id(node))
                for parent in node.parents:
                    visit(parent)
                order.append(node)

        visit(self)
        self.grad = np.ones_like(self.value)
        for node in reversed(order):
            if node.parents:
                for parent, gradient in zip(node.parents, node.pull_back(node.grad), strict=True):
                    parent.grad = parent.grad + gradient


def affine(W, x, c):
    """Compute X Wᵀ + c for a batch of rows X."""
    return Variable(x.value @ W.value.T + c.value, (W, x, c), lambda g: (g.T @ x.value, g @ W.value, g.sum(axis=0)))


def squared_distance(x, target):
    """Compute Σ (x − target)² for a constant target."""
    return Variable(np.sum((x.value - target) ** 2), (x,), lambda g: (2 * g * (x.value - target),))


# ---- qpdiff in the framework


def solve_qp(**operands):
    """Return the solution x of a quadratic program; any operand may be a Variable."""
    sol = qpdiff.solve_qp(**{name: getattr(value, "value", value) for name, value in operands.items()})
    variables = {name: value for name, value in operands.items() if isinstance(value, Variable)}

    def pull_back(cotangent):
        grads = qpdiff.vjp(sol, x=cotangent)
        return [getattr(grads, name) for name in variables]

    return Variable(sol.x, tuple(variables.values()), pull_back)


# ---- a network that ends in a projection onto a polytope G x ≤ h, which it learns too


def main():
    """Compare the gradient of every parameter with a central difference."""
    rng = np.random.default_rng(0)
    inputs, target = rng.normal(size=(32, 5)), rng.normal(size=(32, 3))
    parameters = {
        "W": rng.normal(size=(3, 5)),
        "c": rng.normal(size=3),
        "G": rng.normal(size=(4, 3)),
        "h": rng.uniform(0.5, 1.0, size=4),
    }

    def loss(values):
        leaves = {name: Variable(value) for name, value in values.items()}
        q = affine(leaves["W"], Variable(inputs), leaves["c"])
        x = solve_qp(Q=np.eye(3), q=q, G=leaves["G"], h=leaves["h"])
        return squared_distance(x, target), leaves

    value, leaves = loss(parameters)
    value.backward()
    print(f"loss {value.value:.6f}")
    for name, parameter in parameters.items():
        direction = rng.normal(size=parameter.shape)
        plus, minus = (loss(parameters | {name: parameter + s * 1e-5 * direction})[0].value for s in (1, -1))
        difference, gradient = (plus - minus) / 2e-5, np.sum(leaves[name].grad * direction)
        print(f"{name}: along a random direction {gradient:.8f} by the tape, {difference:.8f} by central differences")
        assert abs(gradient - difference) < 1e-4 * max(1.0, abs(difference))


if __name__ == "__main__":
    main()
