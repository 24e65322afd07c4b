"""Solutions as NumPy arrays and as JSON."""

from __future__ import annotations

import json

import numpy as np

import qpdiff


def to_numpy(value) -> np.ndarray:
    """Return an array of any library on the host."""
    if hasattr(value, "get"):
        return value.get()
    return np.asarray(value.cpu() if hasattr(value, "cpu") else value)


def violations(sol: qpdiff.Solution) -> dict[str, np.ndarray]:
    """Return how far x violates the constraints: `violation`, the largest of a problem, and that of A, G, lb and ub.

    Without prices of violations there is nothing to return.
    """
    if sol.violation is None:
        return {}
    parts = {name: to_numpy(part) for name, part in sol.violation._asdict().items() if part is not None}
    largest = np.max(np.concat([*parts.values()], axis=-1), axis=-1, initial=0.0)
    return {"violation": largest} | {f"violation_{name}": part for name, part in parts.items()}


def to_json(result: dict[str, np.ndarray]) -> str:
    """Return a solution as one line of JSON: a list for each field, statuses by name, null for what is not finite."""
    fields = {
        name: np.where(np.isfinite(value), value.astype(object), np.array(None)).tolist()
        for name, value in result.items()
    }
    names = np.array([status.name for status in qpdiff.Status], dtype=object)
    return json.dumps(fields | {"status": np.asarray(names[result["status"]]).tolist()})
