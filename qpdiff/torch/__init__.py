"""torch: `solve_qp` whose solution differentiates, to any order and in both modes; the layer `OptNet`; `QPFunction`.

Two functions with rules of their own: the solution, and the optimal value with it, as a function of the operands; and
the solve with its KKT matrix, with the gradients of operands that follow from it, as a function of the operands, the
solution and the right-hand side (see `qpdiff.differentiation`). First derivatives of the solution are the second
function, which the engine computes in one pass; those of the optimal value are products of the solution. The second
function's derivatives are made of itself and of torch's operations. Under `torch.func.vmap` they solve all problems as
one batch. In eager calls they are two `torch.autograd.Function`, which have rules for forward mode and `torch.func`;
where `torch.compile` or `torch.export` traces, two operators with the same rules but for these.

Tensors on the CPU go to the solver as the NumPy arrays that share their memory, so that the compiled engine runs. Where
neither transforms nor forward mode are under way, and all matrices are dense, the first function is a third
`torch.autograd.Function` there, of which torch has less to record: see `untransformed`.

On any other device tensors are solved there, in torch's operations (batched `cholesky_ex`): that takes no second
library, stays on torch's stream and in its memory, and on a GPU took a little less time than CuPy does.
"""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError("qpdiff.torch needs torch: pip install 'qpdiff[torch]'") from error

from .call import solve_qp
from .optnet import OptNet
from .qpth import QPFunction, QPSolvers

__all__ = ["OptNet", "QPFunction", "QPSolvers", "solve_qp"]
