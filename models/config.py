"""What the configs of the networks share: how they are read from published files."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any


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
