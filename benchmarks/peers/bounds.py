"""Lower bounds as rows of G x ≤ h, for solvers that have no bounds."""

from __future__ import annotations

import numpy as np

EMPTY = np.empty(0)
"""What qpth and QPLayer take for an operand that is not there."""


def bounds_as_rows(operands: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the operands with the rows −x ≤ −lb below those of G."""
    if "lb" not in operands:
        return operands
    n = operands["q"].shape[-1]
    without = {name: value for name, value in operands.items() if name != "lb"}
    G, h = operands.get("G", np.zeros((0, n))), operands.get("h", np.zeros(0))
    return without | {"G": _append(G, -np.eye(n), -2), "h": _append(h, -operands["lb"], -1)}


def bounds_from_rows(operands: dict[str, np.ndarray], answer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the answer in terms of the operands, given the answer in terms of `bounds_as_rows` of them."""
    if "lb" not in operands:
        return answer
    m = operands["h"].shape[-1] if "h" in operands else 0
    answer = dict(answer)
    if "z" in answer:
        answer["z"], answer["z_lb"] = np.split(answer["z"], [m], axis=-1)
    if "grad_h" in answer:
        answer["grad_h"], grad_lb = np.split(answer["grad_h"], [m], axis=-1)
        answer["grad_G"], answer["grad_lb"] = answer["grad_G"][..., :m, :], -grad_lb
    return answer


def _append(own, more, axis):
    batch = own.shape[: own.ndim - more.ndim]
    return np.concatenate([own, np.broadcast_to(more, (*batch, *more.shape))], axis=axis)
