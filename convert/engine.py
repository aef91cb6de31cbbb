"""The conversion engine: strict, driven by a table, both ways.

Loading fills leaf after leaf with the tensors that `matching.plan` found for it; exporting walks the same list.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ses_jax.convert import arrays
from ses_jax.convert.matching import DTYPES, ConversionError, Header, Plan, Slot, by_name, layout, path_of
from ses_jax.convert.table import Table
from ses_jax.models import quantized
from ses_jax.models.quantized import Quantization

Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]
# What changes pieces of leaves while they are loaded: by path of the leaf and place along its leading axis (None where
# it is not stacked), a function of the piece in float32 that gives the changed one, to be cast once.
Edits = Mapping[tuple[str, int | None], Callable[[np.ndarray], np.ndarray]]


class Weights(NamedTuple):
    """Published tensors.

    Attributes:
      headers: by name.
      read: a tensor by its name.
      read_part: part of a tensor by its name and an index of slices, where there is a way to read only that.
    """

    headers: Mapping[str, Header]
    read: Callable[[str], np.ndarray]
    read_part: Callable[[str, tuple[slice, ...]], np.ndarray] | None = None


def load(
    plan: Plan,
    abstract: Any,
    weights: Weights,
    *,
    dtype: Any = None,
    sharding: Placement | None = None,
    edits: Edits | None = None,
    quantization: Quantization | None = None,
) -> Any:
    """Fills the params leaf by leaf, so that the host holds at most one leaf beside the params.

    Leaves in eight bits are filled tensor by tensor.

    Args:
      plan: from `plan`, for the same weights.
      abstract: the params tree as shapes.
      weights: where the tensors are read from.
      dtype: of the params, but for single numbers, which are float32; None keeps each leaf in the dtype of its file.
      sharding: `(path, shape)` of a leaf to where it is placed, None being NumPy on the host; without it, the default
        device.
      edits: changes of pieces on their way; None is none.
      quantization: what to store in eight bits; None is nothing.

    Raises:
      ConversionError: naming a tensor with NaN or infinite values.
    """

    def values(slot):
        published = slot.transform.forward(_read(weights, slot))
        edit = (edits or {}).get((slot.target, slot.index))
        return published if edit is None else edit(quantized.float32(published))

    def fill(key_path, leaf):
        path = path_of(key_path)
        slots = plan.slots[path]
        if quantization is not None and quantization.takes(path):
            stored = _assemble_quantized(slots, leaf.shape, quantization.kind, weights, values)
            return place_quantized(stored, path, sharding)
        own = np.result_type(*(DTYPES[weights.headers[s.name].dtype] for s in slots))
        empty = arrays.empty(leaf.shape, quantized.leaf_dtype(leaf.shape, dtype) if dtype else own)
        return place(_assemble(slots, empty, weights, values), path, sharding)

    return quantized.spread(jax.tree_util.tree_map_with_path(fill, abstract))


def place(values: np.ndarray, path: str, sharding: Placement | None) -> jax.Array | np.ndarray:
    """Puts a leaf where it belongs, and waits for that, which keeps transfers from piling up on the host."""
    return jax.block_until_ready(jax.device_put(values) if sharding is None else _place(values, path, sharding))


def place_quantized(leaf: quantized.Quantized, path: str, sharding: Placement | None) -> quantized.Quantized:
    """A leaf in eight bits where it belongs."""
    return quantized.Quantized(*(place(part, p, sharding) for part, p in zip(leaf, quantized.paths(path), strict=True)))


def export(table: Table, params: Any, prefix: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Published tensors `(name, array)` of params, on the host one leaf at a time, or the leaves that share tensors.

    Args:
      table: the network's conversion table.
      params: the whole tree.
      prefix: what names begin with; None is the published form.
    """
    leaves = {path_of(key_path): leaf for key_path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    slots = layout(table, params, table.prefixes[0] if prefix is None else prefix)
    tensors = by_name(slots).items()
    for targets, group in itertools.groupby(tensors, key=lambda item: [slot.target for slot in item[1]]):
        values = {target: np.asarray(leaves[target]) for target in targets}
        dtype = np.result_type(*values.values())
        for name, parts in group:
            published = np.empty(parts[0].shape, dtype)
            for slot in parts:
                arrays.copy(published[_index(slot)], slot.transform.inverse(_piece(values[slot.target], slot)))
            yield name, published


def edit(values: np.ndarray, path: str, dtype: Any, edits: Edits) -> np.ndarray:
    """A whole leaf of the host in another dtype, with its edits."""
    leaf = np.array(values, dtype)
    for index in (index for target, index in edits if target == path):
        # Exact values are edited, not those that were cast.
        at = ... if index is None else index
        leaf[at] = edits[path, index](np.array(values[at], np.float32))
    return leaf


Values = Callable[[Slot], np.ndarray]


def _assemble(slots: Iterable[Slot], leaf: np.ndarray, weights: Weights, values: Values) -> np.ndarray:
    """One leaf on the host, filled from its published tensors, read and edited one after the other."""
    for slot in slots:
        piece = _piece(leaf, slot)
        arrays.copy(piece, values(slot))
        _check_finite(piece, slot, weights, leaf.dtype)
    return leaf


def _assemble_quantized(
    slots: Iterable[Slot], shape: tuple[int, ...], kind: str, weights: Weights, values: Values
) -> quantized.Quantized:
    """One leaf in eight bits on the host; no more than one of its tensors is there as it was published."""
    leaf = quantized.empty(shape, kind)
    for slot in slots:
        piece = quantized.quantize(values(slot), kind)
        _check_finite(piece.scale, slot, weights, np.dtype(np.float32))
        _piece(leaf.values, slot)[...], _piece(leaf.scale, slot)[...] = piece
    return leaf


def _check_finite(values: np.ndarray, slot: Slot, weights: Weights, dtype: np.dtype) -> None:
    if not arrays.all_finite(values):
        file = weights.headers[slot.name].file
        raise ConversionError(f"{slot.name} in {file} has NaN or infinite values (as {dtype})")


def _piece(leaf: np.ndarray, slot: Slot) -> np.ndarray:
    """The part of a leaf that one published tensor fills, as a view."""
    return leaf if slot.index is None else leaf[slot.index, ...]


def _read(weights: Weights, slot: Slot) -> np.ndarray:
    """What one leaf takes of a published tensor."""
    if slot.bounds is None:
        return weights.read(slot.name).reshape(slot.shape)
    if weights.read_part is None:
        return weights.read(slot.name)[_index(slot)]
    return weights.read_part(slot.name, _index(slot))


def _index(slot: Slot) -> tuple[Any, ...]:
    """The part of a published tensor that goes to one leaf; as a view, where an array is indexed."""
    return (...,) if slot.bounds is None else (*(slice(None),) * slot.axis, slice(*slot.bounds))


def _place(values: np.ndarray, path: str, sharding: Placement) -> jax.Array | np.ndarray:
    target = sharding(path, values.shape)
    if target is None:
        return values
    # Each process puts only its own devices' parts, so this works across hosts.
    return jax.make_array_from_callback(values.shape, target, lambda index: values[index])
