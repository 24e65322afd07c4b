"""torch tensors, on the CPU or a GPU."""

from __future__ import annotations

import warnings
from contextlib import ExitStack, nullcontext
from typing import Any

import numpy as np
import torch

from .base import Backend


class TorchBackend(Backend):
    """torch tensors: LAPACK's, or MAGMA's and cuSOLVER's batched Cholesky, failures flagged on the device."""

    # To ask array-api-compat takes several times as long.

    @staticmethod
    def owns(value, xp) -> bool:
        return isinstance(value, torch.Tensor)

    @staticmethod
    def device_of(array):
        return array.device

    @staticmethod
    def current_device(xp):
        return torch.get_default_device()

    @property
    def chunk_bytes(self):
        return (64 * 2**20) if self.device.type == "cpu" else 2 * 2**30

    @property
    def launch_bound_bytes(self):
        return 0 if self.device.type == "cpu" else 2**28

    @property
    def gpu(self) -> int | None:
        # What torch calls CUDA is AMD's ROCm where it was built for that.
        if self.device.type != "cuda" or not torch.version.cuda:
            return None
        return torch.cuda.current_device() if self.device.index is None else self.device.index

    def stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream

    def located(self, array) -> tuple[int, int, Any]:
        array = array.detach().resolve_neg()  # torch may negate when it reads
        if not (array.is_contiguous() or array[0].is_contiguous()):
            array = array.contiguous()
        return array.data_ptr(), array.stride(0) if array.shape[0] > 1 else 0, array

    def contiguous(self, array):
        return array.contiguous()

    def asarray(self, value, dtype=None):
        if isinstance(value, np.ndarray) and (not value.flags.writeable or min(value.strides, default=0) < 0):
            value = value.copy()  # torch warns of the first and refuses the second
        return super().asarray(value, dtype)

    def to_host(self, array):
        return array.numpy(force=True) if self.device.type == "cpu" else None

    def zeros_of_all(self, batch: int, n: int, dtype):
        if batch == 1:  # an operation of torch's takes a good part of a small solve
            return torch.zeros((1, n), dtype=dtype, device=self.device)
        return torch.zeros((1, n), dtype=dtype, device=self.device).expand(batch, n)

    def no_grad(self):
        # The iterations are not what is to be differentiated: nothing of them is recorded.
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        stack.enter_context(self.in_full_precision())
        stack.enter_context(super().no_grad())
        return stack

    def in_full_precision(self):
        """Return a context in which autocast leaves matrix products as they are."""
        kind = self.device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()

    def warn_of_gradients(self, operands) -> None:
        if not torch.is_grad_enabled():
            return
        for name, value in operands.items():
            if getattr(value, "requires_grad", False):  # the operands of the caller, numbers and None among them
                warnings.warn(
                    f"{name} requires a gradient, which does not go through qpdiff.solve_qp; use "
                    f"qpdiff.torch.solve_qp, or pass {name}.detach()",
                    stacklevel=3,
                )
                return

    def known_all_false(self, mask) -> bool:
        return self.device.type == "cpu" and not bool(torch.any(mask))

    def clip(self, a, least=None, most=None):
        return torch.clamp(a, least, most)  # torch's maximum takes tensors only, and a number would have to be copied

    def factor(self, M):
        L, info = torch.linalg.cholesky_ex(M)
        diagonal = torch.diagonal(L, dim1=-2, dim2=-1)
        positive = (info == 0) & torch.isfinite(diagonal).all(-1)
        return (torch.where(positive[:, None, None], L, self.eye(M.shape[-1], M.dtype)),), positive[:, None]

    def pivots(self, factor):
        return torch.diagonal(factor[0], dim1=-2, dim2=-1) ** 2

    def solve(self, factor, r):
        (L,) = factor
        if L.shape[0] == 1:
            return torch.cholesky_solve(r.mT, L[0]).mT
        return torch.cholesky_solve(r[:, :, None], L)[:, :, 0]

    def substitution(self, factor):
        (L,) = factor
        return torch.linalg.solve_triangular(L, self.eye(L.shape[-1], L.dtype), upper=False)
