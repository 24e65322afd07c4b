"""How many floating point operations qpdiff's compiled engine takes, multiplications and additions.

With r = m + p rows of G and A, of n variables, the KKT system is reduced by the count in
`qpdiff/engines/reduction.py`:

primal             an iteration    r n²  Kᵀ W K, symmetric  +  n³/3  Cholesky  +  2 · 2n²  two solves
                                   +  2 · (2n² + 4 n r)  products with Q, K and Kᵀ for the two residuals
dense dual         set-up          n³/3  Cholesky of Q  +  r n²  K F⁻ᵀ  +  n r²  their products, symmetric
                   an iteration    r³/3  Cholesky  +  2 · 2r²  two solves  +  2r²  S₀ dv
                   a problem       5 · (n² + 2 n r)  to the dual space and back at the start and at two points
                                   +  2 · (2n² + 4 n r)  the residuals at these
dense dual, lanes  an iteration    in place of the last three  2 · (4 n r + 2n²)  and the residuals
diagonal dual      an iteration    n r²  +  r³/3  +  2 · 2r²  +  2 · 4 n r  and the residuals

Q, G and A shared by the batch: the set-up is done once for all. Bounds take no operations worth counting. The dense
dual form takes no bounds, the diagonal dual form a diagonal Q.
"""

from __future__ import annotations

from rows import Row

IN_LANES = 32
"""Up to so many variables and rows, problems of a batch are solved in lane groups."""


def operations(row: Row, iterations: int) -> tuple[str, float]:
    """The form, and the operations of a whole batch whose problems take so many iterations together."""
    n, r = row.n, row.m + row.p
    residuals = 2 * (2 * n**2 + 4 * n * r)
    if row.kind == "sudoku":
        return "diagonal dual", iterations * (n * r**2 + r**3 / 3 + 4 * r**2 + 8 * n * r + residuals)
    set_up = n**3 / 3 + r * n**2 + n * r**2
    if n**3 / 3 + r * n**2 <= r**3 / 3 + set_up / 10:
        return "primal", iterations * (r * n**2 + n**3 / 3 + 4 * n**2 + residuals)
    total = (1 if row.kind == "shared" else row.batch) * set_up + iterations * (r**3 / 3 + 4 * r**2)
    if row.batch > 1 and max(n, r) <= IN_LANES:
        return "dense dual, lanes", total + iterations * (8 * n * r + 4 * n**2 + residuals)
    return "dense dual", total + iterations * 2 * r**2 + row.batch * (5 * (n**2 + 2 * n * r) + residuals)
