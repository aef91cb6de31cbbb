"""Which published tensor fills which leaf: by names and shapes, before any data is read.

Everything follows from one list, `layout`: the published name and shape of each piece of the params, derived from the
table and the abstract params tree.
"""

import collections
import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ses_jax.convert.table import Rule, Table, Transform

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
MAX_LISTED = 20


class ConversionError(ValueError):
    """Weights that do not fit the network, or a table that does not fit the params."""


class Header(NamedTuple):
    """What a file says about a tensor before its data is read.

    Attributes:
      shape: of the tensor.
      dtype: by the name that safetensors has for it.
      file: where it lies.
      squeezed: whether axes of one may be missing at the front of the shape.
    """

    shape: tuple[int, ...]
    dtype: str
    file: str
    squeezed: bool = False


class Slot(NamedTuple):
    """Where one published tensor, or a part of one, sits in the params.

    Attributes:
      name: published name, with its prefix.
      shape: published shape, of the whole tensor.
      target: path of the leaf.
      index: place along the leaf's leading axis; None where the leaf is not stacked.
      transform: published tensor to leaf, and back.
      part: number of the part of a tensor that several leaves share; None where the tensor goes to one leaf.
      axis: of the tensor, along which the parts lie.
      bounds: where the part begins and ends along that axis; None where the tensor goes to one leaf.
    """

    name: str
    shape: tuple[int, ...]
    target: str
    index: int | None
    transform: Transform
    part: int | None = None
    axis: int = 0
    bounds: tuple[int, int] | None = None


class Plan(NamedTuple):
    """A checked correspondence between a checkpoint's tensors and a network's params.

    Attributes:
      slots: by leaf, the published tensors that fill it.
      unused: published names that the table ignores.
      prefix: what the published names begin with.
    """

    slots: Mapping[str, tuple[Slot, ...]]
    unused: tuple[str, ...]
    prefix: str


def plan(table: Table, abstract: Any, headers: Mapping[str, Header]) -> Plan:
    """Matches a checkpoint's headers with the params, reading no data.

    Args:
      table: the network's conversion table.
      abstract: the params tree as shapes.
      headers: by name, every tensor in the checkpoint.

    Raises:
      ConversionError: naming every tensor that is missing, unexpected, of the wrong shape or of an unusable dtype.
    """
    prefix = _find_prefix(table, headers)
    slots = layout(table, abstract, prefix)
    wanted = {slot.name: slot for slot in slots}
    unused = tuple(name for name in headers if name not in wanted and is_ignored(table, name, prefix))
    unexpected = [name for name in headers if name not in wanted and name not in unused]
    once = wanted.values()
    problems = [f"missing: {s.name} {list(s.shape)}, for {s.target}" for s in once if s.name not in headers]
    problems += [f"unexpected: {name} in {headers[name].file}" for name in unexpected]
    problems += [p for slot in once if slot.name in headers for p in _header_problems(slot, headers[slot.name])]
    _raise_if(problems, f"weights do not fit the network ({_files(headers)})")
    return Plan(_by_target(slots), unused, prefix)


def layout(table: Table, abstract: Any, prefix: str = "", *, whole: bool = True) -> tuple[Slot, ...]:
    """Every published tensor of a params tree, in the order of its leaves.

    Args:
      table: the network's conversion table.
      abstract: the params tree as shapes.
      prefix: what names begin with.
      whole: whether every leaf needs a rule.

    Raises:
      ConversionError: for a leaf without exactly one rule, and for a published name that is used twice.
    """
    slots, problems = [], []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        path = path_of(key_path)
        rules = [rule for rule in table.rules if _pattern(rule.target).fullmatch(path)]
        if len(rules) == 1:
            slots += _slots(rules[0], path, leaf.shape, prefix)
        elif rules or whole:
            claims = " and ".join(f"{r.source} -> {r.target}" for r in rules) or "none"
            problems.append(f"{path} needs exactly one rule, has {len(rules)}: {claims}")
    shared = by_name(slots)
    problems += [p for name, group in shared.items() for p in _sharing_problems(name, group)]
    _raise_if(problems, "the conversion table does not fit the network")
    places = {name: _places(group) for name, group in shared.items() if group[0].part is not None}
    return tuple(slot if slot.part is None else places[slot.name][slot.part] for slot in slots)


def _slots(rule: Rule, path: str, shape: tuple[int, ...], prefix: str) -> list[Slot]:
    """The published tensors of one leaf: one, or one for each row of its leading axis."""
    numbers = _pattern(rule.target).fullmatch(path).groupdict()
    stacked = sorted(set(_pattern(rule.source).groupindex) - set(numbers))
    if len(stacked) > 1:
        raise ConversionError(f"rule {rule.source} stacks along more than one placeholder: {', '.join(stacked)}")
    if not stacked:
        name = prefix + rule.source.format(**numbers)
        return [Slot(name, _published_shape(rule.transform, shape), path, None, rule.transform, rule.part, rule.axis)]
    published = _published_shape(rule.transform, shape[1:])
    names = (prefix + rule.source.format(**numbers, **{stacked[0]: i}) for i in range(shape[0]))
    return [Slot(name, published, path, i, rule.transform, rule.part, rule.axis) for i, name in enumerate(names)]


def _sharing_problems(name: str, slots: Sequence[Slot]) -> list[str]:
    """What keeps slots from being the parts 0, 1, 2, ... of one tensor, or its only one."""
    parts = [slot.part for slot in slots]
    if parts == [None]:
        return []
    if None in parts:
        return [f"{name} fills {len(slots)} leaves"]
    if sorted(parts) != list(range(len(parts))):
        return [f"{name} is split into the parts {', '.join(map(str, parts))}"]
    if len({(slot.axis, *_replace(slot.shape, slot.axis, 0)) for slot in slots}) > 1:
        return [f"{name} is split into parts that do not fit together: {[list(slot.shape) for slot in slots]}"]
    return []


def _places(slots: Iterable[Slot]) -> list[Slot]:
    """The parts of one tensor in order, each with the whole tensor's shape and its own bounds."""
    ordered = sorted(slots, key=lambda slot: slot.part)
    sizes = [slot.shape[slot.axis] for slot in ordered]
    ends = list(itertools.accumulate(sizes))
    return [
        slot._replace(shape=_replace(slot.shape, slot.axis, ends[-1]), bounds=(end - size, end))
        for slot, size, end in zip(ordered, sizes, ends, strict=True)
    ]


def _replace(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    """A shape with another size along one axis."""
    return (*shape[:axis], size, *shape[axis + 1 :])


def _header_problems(slot: Slot, header: Header) -> list[str]:
    problems = []
    if not _fits(slot, header):
        problems.append(
            f"wrong shape: {slot.name} in {header.file} is {list(header.shape)}, expected {list(slot.shape)}"
        )
    if header.dtype not in DTYPES:
        problems.append(f"wrong dtype: {slot.name} in {header.file} is {header.dtype}, expected {', '.join(DTYPES)}")
    return problems


def _fits(slot: Slot, header: Header) -> bool:
    shape = tuple(header.shape)
    if header.squeezed and slot.bounds is None:
        shape = (1,) * (len(slot.shape) - len(shape)) + shape
    return shape == slot.shape


def _find_prefix(table: Table, names: Iterable[str]) -> str:
    """The longest of the table's prefixes that occurs."""
    names = list(names)
    return max((p for p in table.prefixes if any(name.startswith(p) for name in names)), key=len, default="")


def is_ignored(table: Table, name: str, prefix: str = "") -> bool:
    """Whether a published name is one that the network does not load."""
    return any(_pattern(template).fullmatch(name.removeprefix(prefix)) for template in table.ignored)


def _by_target(slots: Iterable[Slot]) -> dict[str, tuple[Slot, ...]]:
    return {target: tuple(group) for target, group in itertools.groupby(slots, key=lambda slot: slot.target)}


def by_name(slots: Iterable[Slot]) -> dict[str, list[Slot]]:
    """The slots of each published tensor."""
    groups = collections.defaultdict(list)
    for slot in slots:
        groups[slot.name].append(slot)
    return groups


def _published_shape(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The transform applied to an array without storage."""
    return transform.inverse(np.broadcast_to(np.int8(0), shape)).shape


@functools.cache
def _pattern(template: str) -> re.Pattern:
    """Regex of a template: `{name}` is a number, `*` is anything, the rest is literal."""
    parts = re.split(r"(\{\w+\}|\*)", template)
    return re.compile("".join(_part(part) for part in parts))


def _part(part: str) -> str:
    if part == "*":
        return ".*"
    return rf"(?P<{part[1:-1]}>0|[1-9]\d*)" if part.startswith("{") else re.escape(part)


def path_of(key_path: tuple) -> str:
    """The path of a leaf."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def _files(headers: Mapping[str, Header]) -> str:
    return ", ".join(sorted({header.file for header in headers.values()})) or "no tensors"


def _raise_if(problems: list[str], what: str) -> None:
    if problems:
        rest = f"\n  ... and {len(problems) - MAX_LISTED} more" * (len(problems) > MAX_LISTED)
        raise ConversionError(f"{what}:\n  " + "\n  ".join(problems[:MAX_LISTED]) + rest)
