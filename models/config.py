"""What the configs of the networks share: how they are read from published files."""

import dataclasses
import math
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

# More than any network has; a file that says otherwise is damaged.
LAYERS, WIDTH, ENTRIES = 1024, 2**31, 1024


def known_fields(cls: type, config: Mapping[str, Any], *, skip: Collection[str] = ()) -> dict[str, Any]:
    """The entries of a `config.json` that are fields of a dataclass, with lists as tuples.

    Args:
      cls: the dataclass; entries that it has no field for do not shape its network.
      config: content of the file; an entry of null is left to the dataclass's default.
      skip: fields that no published file sets.
    """
    names = {field.name for field in dataclasses.fields(cls)} - set(skip)
    known = {name: value for name, value in config.items() if name in names and value is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}


def check(config: Any) -> Any:
    """A dataclass as it is, once every field is of its type and every number one that a network could have.

    Raises:
      ValueError: naming the field.
    """
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _is(value, kinds[field.name]):
            raise ValueError(f"{field.name}={_short(value)} must be {_name(kinds[field.name])}")
        if dataclasses.is_dataclass(value):
            check(value)
        limit = LAYERS if "layers" in field.name or field.name == "taps" else WIDTH
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, int | float) and not abs(number) < limit:
                raise ValueError(f"{field.name}={_short(value)} must be less than {limit}")
    return config


def _is(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON is of a kind that an annotation names."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_is(value, one) for one in arguments)
    if origin is tuple:
        every = arguments[:1] * len(value) if isinstance(value, tuple) and arguments[-1] is ... else arguments
        whole = isinstance(value, tuple) and len(value) == len(every) and len(value) <= ENTRIES
        return whole and all(map(_is, value, every))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if kind in (None, type(None)):
        return value is None
    return isinstance(value, kind) if isinstance(kind, type) else True


def _name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(map(_name, typing.get_args(kind)))
    return "a list of numbers" if typing.get_origin(kind) is tuple else names.get(kind, str(kind))


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
