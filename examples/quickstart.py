"""Solve 128 quadratic programs at once and differentiate through all of them."""

import numpy as np

import qpdiff

rng = np.random.default_rng(0)
B, n, m = 128, 20, 10
L = np.tril(rng.uniform(size=(B, n, n))) + np.eye(n)
Q = L @ L.mT + 1e-3 * np.eye(n)
q, G = rng.normal(size=(B, n)), rng.normal(size=(m, n))  # G has no batch axis: all problems share it
h = G @ rng.normal(size=n) + 1

sol = qpdiff.solve_qp(Q, q, G, h)
print(f"{np.sum(sol.status == qpdiff.Status.SOLVED)} of {B} solved in at most {sol.iterations.max()} iterations")

grads = qpdiff.vjp(sol, x=np.ones((B, n)))  # the gradients of sum(x)
step = 1e-5 * rng.normal(size=(m, n))
change = qpdiff.solve_qp(Q, q, G + step, h).x.sum() - qpdiff.solve_qp(Q, q, G - step, h).x.sum()
print(f"sum(x) along a random direction of G: gradient {np.sum(grads.G * step):.8f}, difference {change / 2:.8f}")
