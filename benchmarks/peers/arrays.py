"""Move NumPy arrays to the library and the device that a solver works on, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Arrays(NamedTuple):
    """A library of arrays on one device."""

    put: Callable[[np.ndarray], Any]
    get: Callable[[Any], np.ndarray]
    synchronize: Callable[[], None]
    """Wait until the device has done all its work."""


def arrays_of(library: str) -> Arrays:
    """Return the arrays of "numpy", "cupy", "torch" (on the CPU) or "torch-cuda"."""
    if library == "numpy":
        return Arrays(np.asarray, np.asarray, lambda: None)
    if library == "cupy":
        import cupy

        return Arrays(cupy.asarray, cupy.asnumpy, lambda: cupy.cuda.get_current_stream().synchronize())
    import torch

    if library == "torch":
        return Arrays(torch.from_numpy, lambda tensor: tensor.detach().numpy(), lambda: None)
    return Arrays(
        lambda array: torch.from_numpy(array).to("cuda"),
        lambda tensor: tensor.detach().cpu().numpy(),
        torch.cuda.synchronize,
    )
