"""What an option of a searcher is: a field of a frozen dataclass that is checked when one is made.

Frozen and compared by value, so that searches with equal searchers share compiled programs.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any


def option(default: Any, check: Callable[[Any], Any], doc: str) -> Any:
    """A field of a searcher.

    Args:
      default: of the option.
      check: from what a caller passes to the value; raises ValueError, saying what it must be, for anything else.
      doc: what it means, in lower case, without a full stop.
    """
    return dataclasses.field(default=default, metadata={"check": check, "doc": doc})


class Options:
    """Base of the searchers that have a name; the frozen dataclasses of their options."""

    __no_type_check__ = True  # to type checkers at run time: wrong values get a message of their own

    def __post_init__(self):
        for field in dataclasses.fields(self):
            try:
                value = field.metadata["check"](getattr(self, field.name))
            except ValueError as error:
                raise ValueError(f"{field.name}={getattr(self, field.name)!r} {error}") from None
            object.__setattr__(self, field.name, value)


def whole(at_least: int) -> Callable[[Any], int]:
    """A whole number."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < at_least:
            raise ValueError(f"must be a whole number, at least {at_least}")
        return int(value)

    return check


def share(value: Any) -> float:
    """A number above 0 and up to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 < value <= 1:
        raise ValueError("must be more than 0 and at most 1")
    return float(value)


def number(at_least: float, below: float) -> Callable[[Any], float]:
    """A number."""

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not at_least <= value < below:
            raise ValueError(f"must be at least {at_least:g} and less than {below:g}")
        return float(value)

    return check


def one_of(*known: str | None) -> Callable[[Any], str | None]:
    """One of some words."""

    def check(value: Any) -> str | None:
        if value not in known:
            raise ValueError(f"must be one of {', '.join(str(word).lower() for word in known)}")
        return value

    return check
