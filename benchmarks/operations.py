"""How many floating point operations qpdiff's method takes, multiplications and additions.

With r = m + p rows of G and A, of n variables, the KKT system is reduced to the variables or to the rows, whichever
takes fewer operations (`qpdiff/kkt.py` says how and when):

to variables        an iteration    r n²  Kᵀ W K, symmetric  +  n³/3  Cholesky  +  2 · 2n²  two solves
to rows, once       set-up          n³/3  Cholesky of Q  +  r n²  whitened rows  +  n r²  their products, symmetric
                    an iteration    r³/3  Cholesky  +  2 · 2r²  two solves  +  2 · (4 n r + 2n²)  to rows and back
to rows, diagonal   an iteration    n r²  +  r³/3  +  2 · 2r²  +  2 · 4 n r
each of them        an iteration    2 · (2n² + 4 n r)  products with Q, K and Kᵀ for the two residuals

Q, G and A shared by the batch: what is done once is done once for all. Bounds take no operations worth counting. To
rows once takes a Q without bounds, to rows by a diagonal takes a diagonal Q.
"""

from __future__ import annotations

from rows import Row


def operations(row: Row, iterations: int) -> tuple[str, float]:
    """The form, and the operations of a whole batch whose problems take so many iterations together."""
    n, r = row.n, row.m + row.p
    once = 1 if row.kind == "shared" else row.batch
    residuals = 2 * (2 * n**2 + 4 * n * r)
    forms = {"variables": iterations * (r * n**2 + n**3 / 3 + 4 * n**2 + residuals)}
    if row.kind == "sudoku":
        forms["rows, diagonal"] = iterations * (n * r**2 + r**3 / 3 + 4 * r**2 + 8 * n * r + residuals)
    else:
        set_up = n**3 / 3 + r * n**2 + n * r**2
        forms["rows"] = once * set_up + iterations * (r**3 / 3 + 4 * r**2 + 8 * n * r + 4 * n**2 + residuals)
    form = min(forms, key=forms.__getitem__)
    return form, forms[form]
