"""JAX: `solve_qp` under jit, vmap, grad, jacfwd, jacrev and hessian.

On the CPU the compiled engine solves, in callbacks. On a GPU such callbacks launch its kernels, on the stream of JAX's
program and with the addresses of its buffers. Elsewhere the array engine is traced, so that it compiles for any device
of JAX's and nothing goes to the host. With each of them the derivative is that of the KKT conditions.
"""

from ..solution import FIELDS, Solution
from ..sparse import Sparse

try:
    import jax
except ImportError as error:
    raise ImportError("qpdiff.jax needs JAX: pip install 'qpdiff[jax]'") from error

from .call import solve_qp

__all__ = ["solve_qp"]

jax.tree_util.register_dataclass(
    Solution, data_fields=[*FIELDS, "violation"], meta_fields=[], drop_fields=["linearization"]
)
jax.tree_util.register_pytree_node(
    Sparse,
    lambda matrix: ((matrix.values,), matrix.pattern),
    lambda pattern, leaves: Sparse.of_pattern(leaves[0], pattern),
)
