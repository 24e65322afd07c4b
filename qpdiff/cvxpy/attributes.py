"""Checks of the attributes of a CVXPY parameter, on which CVXPY's rules rely."""

from __future__ import annotations

import math

import numpy as np
import scipy.sparse as sp

from ..validation import has_negative_eigenvalue

ROUNDING = 1e-10
"""By how much a number may miss its sign, its bounds or its zero, as in CVXPY."""


def check_parameter(backend, parameter, value, tolerance: float) -> None:
    """Refuse a value (..., *shape) that has NaN or is not what the attributes of the parameter promise.

    `tolerance` is that of `qpdiff.validation.rounding` for the type that the value came in.
    """
    xp, batch = backend.xp, tuple(value.shape[: value.ndim - parameter.ndim])
    if math.prod(value.shape) == 0:
        return
    if value.dtype not in (xp.float32, backend.widest_float):  # integers, and half precision, which has no eigenvalues
        value = xp.astype(value, backend.widest_float)
    for what, wrong in _violations(backend, parameter, value, tolerance):
        if bool(xp.any(wrong)):
            problems = xp.any(xp.reshape(wrong, (math.prod(batch), -1)), axis=-1)
            first = [int(i) for i in np.unravel_index(int(xp.argmax(xp.astype(problems, xp.int8))), batch)]
            where = f" (problem {first[0] if len(first) == 1 else tuple(first)} of the batch)" if batch else ""
            raise ValueError(f"parameter {parameter.name()} {what}{where}")


def _violations(backend, parameter, value, tolerance: float):
    """Return what is wrong in words, and a mask of where, whose leading axes are those of the batch."""
    xp, has = backend.xp, parameter.attributes
    yield "has NaN", xp.isnan(value)
    if has["nonneg"] or has["pos"]:
        yield "is declared nonnegative, but has negative entries", value < -ROUNDING
    if has["nonpos"] or has["neg"]:
        yield "is declared nonpositive, but has positive entries", value > ROUNDING
    if has["bounds"] is not None:
        lower, upper = (
            backend.asarray(bound.toarray() if sp.issparse(bound) else np.asarray(bound), dtype=value.dtype)
            for bound in has["bounds"]
        )
        outside = (value < lower - ROUNDING) | (value > upper + ROUNDING)
        yield "is declared with bounds, but has entries beyond them", outside
    for kind in ("integer", "boolean"):
        if has[kind] is True:
            off = xp.abs(value - xp.round(value if kind == "integer" else xp.clip(value, 0.0, 1.0)))
            yield f"is declared {kind}, but has entries that are not", off > ROUNDING
    if has["diag"] or has["sparsity"]:
        zero = ~np.eye(parameter.shape[-1], dtype=bool) if has["diag"] else np.ones(parameter.shape, bool)
        if has["sparsity"]:
            zero[parameter.sparse_idx] = False
        kind = "diagonal" if has["diag"] else "sparse"
        yield f"is declared {kind}, but has entries elsewhere", (xp.abs(value) > ROUNDING) & backend.asarray(zero)
    if has["symmetric"] or has["PSD"] or has["NSD"]:
        largest = xp.max(xp.abs(value), axis=(-2, -1), keepdims=True)
        yield "is declared symmetric (PSD, NSD), but is not", xp.abs(value - value.mT) > tolerance * largest
        for kind, sign in (("PSD", 1.0), ("NSD", -1.0)):
            if has[kind]:
                symmetric = xp.reshape(sign * (value + value.mT) / 2, (-1, *value.shape[-2:]))
                yield f"is declared {kind}, but is not", has_negative_eigenvalue(backend, symmetric, tolerance)
