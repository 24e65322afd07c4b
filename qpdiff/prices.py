"""The options that let constraints be violated at a price, as operands of a problem: `problem.PRICES`."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any

from .problem import PRICE_NAMES, PRICED

_PLAIN = frozenset({type(None), int, float})


def with_prices(operands: dict, elastic, elastic_quadratic) -> tuple[dict, tuple[str, ...]]:
    """Add what prices come to, to the caller's operands; also return the options that are one number."""
    if elastic is None and elastic_quadratic is None:
        return operands, ()
    if type(elastic) in _PLAIN and type(elastic_quadratic) in _PLAIN:
        prices, numbers = _of_numbers(
            tuple([name for name in ("A", "G") if operands[name] is not None]), elastic, elastic_quadratic
        )
        return operands | prices, numbers
    prices = {"elastic": elastic, "elastic_quadratic": elastic_quadratic}
    present = [name for name, value in operands.items() if value is not None]
    return operands | price_operands(present, **prices), price_numbers(**prices)


@lru_cache
def _of_numbers(present: tuple[str, ...], elastic, elastic_quadratic) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what `with_prices` adds for numbers of Python's, once for the many calls that have the same."""
    prices = {"elastic": elastic, "elastic_quadratic": elastic_quadratic}
    return price_operands(present, **prices), price_numbers(**prices)


def price_operands(present: Collection[str], kind: str = "", **options) -> dict[str, Any]:
    """Return the operands that prices come to, by name, for those of `qpdiff.solve_qp`'s options that are not None.

    Parameters
    ----------
    present : collection of str
        The operands of the problem.
    kind : str
        What an error calls the option besides its name.
    **options
        Of `PRICED`: each a number, which stands for A and G, or a dict.

    Raises
    ------
    TypeError, ValueError
        For what is neither, and for prices of constraints that are not there.
    """
    out = {}
    for option, value in options.items():
        if value is None:
            continue
        if isinstance(value, dict):
            given = value
        elif is_number(value):
            given = {of: value for of in ("A", "G") if of in present}
            if not given:
                raise ValueError(
                    f"{kind}{option} is a number, the price of violating A and G, but the problem has neither; pass "
                    f"{option}={{'bounds': ...}} for that of bounds"
                )
        else:
            raise TypeError(
                f"{kind}{option} is a {type(value).__name__}; expected a number for all rows of A and G, or a dict of "
                "numbers or arrays with some of 'A', 'G' and 'bounds'"
            )
        for of, price in given.items():
            if of not in PRICE_NAMES[option]:
                raise ValueError(f"{kind}{option} has {of!r}; expected some of 'A', 'G' and 'bounds'")
            if of not in present and not (of == "bounds" and {"lb", "ub"} & set(present)):
                there = "bounds" if of == "bounds" else of
                raise ValueError(f"{kind}{option}[{of!r}] was given, but the problem has no {there}")
            if price is not None:
                out[PRICE_NAMES[option][of]] = price
    return out


def is_number(value) -> bool:
    """Return whether a price is one number: Python's, NumPy's or an array without axes."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain or getattr(value, "shape", None) == ()


def price_numbers(**options) -> tuple[str, ...]:
    """Return those of `PRICED` that were given as one number."""
    return tuple(option for option in PRICED if is_number(options.get(option)))
