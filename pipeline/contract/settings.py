"""Checks of settings: one form of error, and the name that was probably meant."""

from __future__ import annotations

import datetime
import difflib
import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

RULES: dict[str, Callable[[Any], bool]] = {  # as an error says it → whether a value keeps it
    "must be given": bool,
    "must be finite": math.isfinite,
    "must be at least 0": lambda value: value >= 0,
    "must be at least 1": lambda value: value >= 1,
    "must be at least 2": lambda value: value >= 2,
    "must be above 0": lambda value: value > 0,
    "must be in [0, 1]": lambda value: 0 <= value <= 1,
    "must be in (0, 1]": lambda value: 0 < value <= 1,
    "must be in [0, 1)": lambda value: 0 <= value < 1,
}


def require(holds: bool, name: str, rule: str, got: Any) -> None:
    """Checks one rule of a setting.

    Example:
      >>> require(1 >= 2, "batch_size", "must be at least 2", 1)
      Traceback (most recent call last):
      ValueError: batch_size must be at least 2, got 1; change batch_size.

    Raises:
      ValueError: the rule does not hold; the message names rule, value and setting, which is a flag
        or an argument of that name.
    """
    if not holds:
        raise ValueError(f"{name} {rule}, got {got!r}; change {name}.")


def require_all(settings: Any, rule: str, *names: str) -> None:
    """Checks one of `RULES` for several settings of a command, whole where the default is.

    Example:
      >>> require_all(slice(1, 5), "must be at least 1", "start", "stop")

    Raises:
      ValueError: as `require`.
    """
    for name in names:
        value, default = getattr(settings, name), getattr(type(settings), name, None)
        if rule != "must be given":
            require(isinstance(value, Real), name, "must be a number", value)
            whole = isinstance(value, Integral) or not isinstance(default, int)
            require(whole, name, "must be a number without decimals", value)
        require(RULES[rule](value), name, rule, value)


def require_in_corpus(settings: Any, name: str, num_candidates: int) -> None:
    """Raises ValueError where a cut-off that somebody chose, no default, is above the corpus."""
    value, default = getattr(settings, name), getattr(type(settings), name)
    largest = max(value) if isinstance(value, tuple) else value
    rule = f"must be at most {num_candidates}, the number of candidates"
    require(value == default or largest <= num_candidates, name, rule, largest)


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of an error about an unknown name: the nearest known one, or `otherwise`."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {near[0]}?" if near else otherwise


def utc_seconds(name: str, moment: str) -> int:
    """A date or a date with a time → seconds since 1970; without an offset it is in UTC.

    Example:
      >>> utc_seconds("test_from", "2026-01-01")
      1767225600

    Raises:
      ValueError: the text is not a date; the message names the setting.
    """
    try:
        time = datetime.datetime.fromisoformat(moment)
    except ValueError:
        time = None
    rule = "must be a date such as 2026-01-01 or 2026-01-01T12:00:00 (UTC)"
    require(time is not None, name, rule, moment)
    assert time is not None
    return int((time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp())
