"""Operands by their names, and as the arguments of the solver: prices by option, sparse ones with their patterns."""

from __future__ import annotations

from typing import Any

from ..differentiation import Gradients
from ..problem import PRICE_NAMES
from ..sparse import Pattern, Sparse

_NAMED = {name: (option, of) for option, names in PRICE_NAMES.items() for of, name in names.items()}
"""The options of prices, and the constraints, by the names that their operands have."""


def by_option(values: dict[str, Any]) -> dict[str, Any]:
    """Return values by operand with those of prices in a dict for each option."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        option, of = _NAMED.get(name, (None, None))
        if option is None:
            out[name] = value
        else:
            out.setdefault(option, {})[of] = value
    return out


def part_of(gradients: Gradients, name: str):
    """Return the gradient of an operand, of which prices have a dict for each option."""
    option, of = _NAMED.get(name, (name, None))
    value = getattr(gradients, option)
    return value if of is None else value[of]


def arguments(arrays: dict, patterns: dict[str, Pattern]) -> dict:
    """Return the operands as arguments of `solver.solve_qp`."""
    return by_option(with_patterns(arrays, patterns))


def with_patterns(arrays: dict, patterns: dict[str, Pattern]) -> dict:
    """Return operands, sparse where there is a pattern, of their arrays."""
    return arrays | {name: Sparse.of_pattern(arrays[name], pattern) for name, pattern in patterns.items()}
