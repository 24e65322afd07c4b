"""Dask: `solve_qp` in blocks of the batch, on the threads of a machine or the workers of a cluster.

A block is solved by one task, whose result is the block's `qpdiff.Solution` with its last factorisation. The fields of
the lazy solution and its derivative read from that, so each block is solved once, whatever is computed together. What a
worker loses, Dask computes again from the graph.
"""

try:
    import dask.array  # noqa: F401
except ImportError as error:
    raise ImportError("qpdiff.dask needs Dask: pip install 'qpdiff[dask]'") from error

from .call import jvp, persist, solve_qp, vjp

__all__ = ["jvp", "persist", "solve_qp", "vjp"]
