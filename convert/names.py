"""The names that adapters have for a network's tensors: those of its conversion tables, in all their spellings."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ses_jax.convert import matching
from ses_jax.convert.matching import ConversionError, Slot
from ses_jax.convert.table import Component, Table

WEIGHT, BIAS = "weight", "bias"


class Vocabulary(NamedTuple):
    """What a network's tensors are called.

    Attributes:
      tensors: by a name of a layer and "weight" or "bias", the places of that published tensor in the params. Layers go
        by their names in every table, dotted or with underscores; a tensor that is neither goes by its own name.
      ignored: whether a name is one of a layer that the published checkpoint has and the network does not load.
    """

    tensors: Mapping[tuple[str, str], tuple[Slot, ...]]
    ignored: Callable[[str], bool]


def vocabulary(component: Component, json: Mapping[str, Any]) -> Vocabulary:
    """All names of a network's tensors.

    Args:
      component: the network.
      json: content of its `config.json`.

    Raises:
      ConversionError: if two tensors go by one name.
    """
    abstract = component.abstract(component.from_json(json))
    single, aliases = component.single_file, component.aliases
    whole = [component.table(json), *([single.table(json)] if single else [])]
    tensors: dict[tuple[str, str], tuple[Slot, ...]] = {}
    for table in [*whole, *([aliases(json)] if aliases else [])]:
        for name, slots in _named(table, abstract, whole=table in whole):
            if tensors.setdefault(name, slots) != slots:
                raise ConversionError(f"two tensors go by the name {' '.join(name)}")
    return Vocabulary(tensors, functools.partial(_ignored, [_spelled(table) for table in whole]))


def window(slot: Slot) -> tuple[slice, ...]:
    """The part of a published tensor that a leaf takes, a slice a dimension."""
    index = [slice(None)] * len(slot.shape)
    if slot.bounds is not None:
        index[slot.axis] = slice(*slot.bounds)
    return tuple(index)


def _named(table: Table, abstract: Any, *, whole: bool) -> Iterator[tuple[tuple[str, str], tuple[Slot, ...]]]:
    slots = matching.layout(table, abstract, whole=whole)
    for published, group in matching.by_name(slots).items():
        layer, _, kind = published.rpartition(".")
        layer, kind = (layer, kind) if kind in (WEIGHT, BIAS) else (published, WEIGHT)
        places = tuple(slot._replace(name="") for slot in group)  # the same place, whatever it is called
        for prefix in {*table.prefixes, ""}:
            yield (f"{prefix}{layer}", kind), places
            yield (f"{prefix}{layer}".replace(".", "_"), kind), places


def _spelled(table: Table) -> tuple[Table, Table]:
    """The names that a table ignores, dotted and with underscores."""
    prefixes = tuple(prefix.replace(".", "_") for prefix in table.prefixes)
    return table, Table((), tuple(template.replace(".", "_") for template in table.ignored), prefixes)


def _ignored(spellings: list[tuple[Table, Table]], layer: str) -> bool:
    return any(
        matching.is_ignored(table, f"{layer}{separator}{WEIGHT}", prefix)
        for tables in spellings
        for table, separator in zip(tables, "._", strict=True)
        for prefix in {*table.prefixes, ""}
    )
