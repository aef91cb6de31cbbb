"""Searchers by name, with their options."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

from ses_jax.searchers.best_of_n import BestOfN
from ses_jax.searchers.evosax import Evosax
from ses_jax.searchers.gradient import Gradient
from ses_jax.searchers.searcher import Searcher
from ses_jax.searchers.ses import Ses
from ses_jax.searchers.zero_order import ZeroOrder

SEARCHERS: dict[str, type] = {
    "ses": Ses,
    "best-of-n": BestOfN,
    "zero-order": ZeroOrder,
    "gradient": Gradient,
    "evosax": Evosax,
}
AUTO = "zero-order"  # what won where all of them had as many evaluations: docs/measured.md
WORDS = {"none": None, "true": True, "false": False}
SPACES = ("low", "whole")


def load(spec: Any) -> Searcher:
    """A searcher.

    Args:
      spec: a name, or "auto" for the one that won; `"ses,renormalise=channel,explore=20"`; `{"name": "ses", "explore":
        20}`; or an object with `space`, `init`, `ask` and `tell` (see `searcher.Searcher`).

    Raises:
      ValueError: for an unknown name or option, a bad value, or an object that is no searcher; begins with "searcher=".
    """
    if isinstance(spec, str):
        return _named(spec, _parsed(spec))
    if isinstance(spec, Mapping):
        return _named(dict(spec), dict(spec))
    lacking = [name for name in ("space", "init", "ask", "tell") if isinstance(spec, type) or not hasattr(spec, name)]
    if lacking:
        known = ", ".join(SEARCHERS)
        raise ValueError(f"searcher={spec!r} is neither one of {known} nor an object with {', '.join(lacking)}")
    if type(spec) not in SEARCHERS.values() and spec.space not in SPACES:
        raise ValueError(f"searcher={spec!r} has space {spec.space!r}; known: {', '.join(SPACES)}")
    if not isinstance(spec, Hashable):
        raise ValueError(f"searcher={spec!r} must be hashable, such as a frozen dataclass")
    return spec


def describe(searcher: Searcher) -> Any:
    """A searcher as plain JSON values: what `load` takes; a user's own in words that every process has."""
    for name, kind in SEARCHERS.items():
        if type(searcher) is kind:
            return {"name": name} | dataclasses.asdict(searcher)
    kind = type(searcher)
    return f"{kind.__module__}:{kind.__qualname__}" if kind.__repr__ is object.__repr__ else repr(searcher)


def _named(spec: Any, options: dict[str, Any]) -> Searcher:
    name = options.pop("name", None)
    name = AUTO if name == "auto" else name
    if name not in SEARCHERS:
        raise ValueError(f"searcher={spec!r} is unknown; known: auto, {', '.join(SEARCHERS)}, or an object of your own")
    known = [field.name for field in dataclasses.fields(SEARCHERS[name])]
    for option in options:
        if option not in known:
            raise ValueError(f"searcher={spec!r} has an unknown option {option!r}; {name} takes {', '.join(known)}")
    try:
        return SEARCHERS[name](**options)
    except ValueError as error:
        raise ValueError(f"searcher={spec!r}: {error}") from None


def _parsed(text: str) -> dict[str, Any]:
    """`"ses,explore=20"` as a mapping."""
    name, *options = (part.strip() for part in text.split(","))
    parsed = {"name": name}
    for part in options:
        option, separator, value = part.partition("=")
        if not separator:
            raise ValueError(f"searcher={text!r}: {part!r} is no option such as explore=20")
        parsed[option.strip()] = _value(value.strip())
    return parsed


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return WORDS.get(text.lower(), text)
