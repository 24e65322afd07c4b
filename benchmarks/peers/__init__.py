"""The solvers of the benchmark, each behind the same four calls.

A peer is a class. `Peer(operands, tolerance, **options)` converts a batch to the solver's own arrays, which is not
timed; `operands` are NumPy arrays named as in `qpdiff.solve_qp`, and what all problems share has no batch axis. Sparse
matrices are `operands.Matrices`. `forward()` solves the batch, `forward_backward()` also computes the gradients of
sum(x) with respect to all operands, and both return once the result is there, on a GPU too. `answer()` gives the arrays
of the last pass by name: x, y, z, z_lb and z_ub after either, and grad_Q, grad_q, ... after `forward_backward()`.

Each module is imported where its solver is installed, and needs nothing beside it but NumPy and SciPy.
"""
