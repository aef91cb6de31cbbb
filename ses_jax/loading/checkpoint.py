"""Params on disk in our own layout (Orbax): restored straight onto their devices.

Orbax takes a second to import and only converted checkpoints need it, so it is imported where it is used.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ses_jax.convert import engine
from ses_jax.convert.engine import Edits
from ses_jax.loading import partition, rows
from ses_jax.models import quantized
from ses_jax.models.quantized import Quantization

Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]


class MismatchError(ValueError):
    """A checkpoint that is whole and holds something else."""


def save(folder: Path, params: Any) -> None:
    """Writes a tree of arrays; the folder appears only when it is complete, and replaces one that is there.

    Uncompressed: weights get a quarter smaller at most, and would take two to three times as long to read.
    """
    import orbax.checkpoint as ocp

    args = ocp.args.PyTreeSave(params, save_args=jax.tree.map(rows.save_args, params))
    with _tree_checkpointer(use_compression=False, save_concurrent_gb=_at_once(params)) as checkpointer:
        checkpointer.save(folder.absolute(), args=args, force=True)


def restore(
    folder: Path,
    abstract: Any,
    *,
    dtype: Any = None,
    sharding: Placement | None = None,
) -> Any:
    """Reads a tree that `save` wrote.

    Args:
      folder: the saved tree.
      abstract: the expected tree as shapes.
      dtype: to cast to; None keeps what was saved, as do leaves in eight bits and their scales.
      sharding: `(path, shape)` of a leaf to where it is placed, None being NumPy on the host; without it, the default
        device.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: naming the folder, if it is damaged or holds another tree.
    """
    with _opened(folder, abstract, restore_concurrent_gb=_at_once(abstract)) as (checkpointer, saved):
        return checkpointer.restore(folder.absolute(), _target(saved, abstract, dtype, sharding))


def restore_changed(
    folder: Path,
    abstract: Any,
    *,
    quantization: Quantization | None = None,
    edits: Edits | None = None,
    dtype: Any = None,
    sharding: Placement | None = None,
) -> Any:
    """Reads a tree that `save` wrote leaf by leaf, or large stacks by the layer, and changes leaves on the host.

    Args:
      quantization: what to put into eight bits, after the edits; None is nothing.
      edits: changes of pieces of leaves; None is none.

    Other arguments and errors are those of `restore`.
    """
    edited = {path for path, _ in edits or {}}

    def read(key_path, leaf):
        path = _path(key_path)
        taken = quantization is not None and quantization.takes(path)
        if not taken and path not in edited:
            return _restore_leaf(folder, path, _target(saved, _nested(path, leaf), dtype, sharding))
        stack = rows.stored(folder, path) if taken and (path, None) not in (edits or {}) else None
        if stack is not None:
            return engine.place_quantized(rows.quantize(stack, quantization.kind, path, edits or {}), path, sharding)
        values = _restore_leaf(folder, path, _target(saved, _nested(path, leaf), None, lambda path, shape: None))
        if path in edited:
            values = engine.edit(values, path, np.float32 if taken else dtype or values.dtype, edits)
        if taken:
            return engine.place_quantized(quantized.quantize(values, quantization.kind), path, sharding)
        return engine.place(values, path, sharding)

    with _opened(folder, abstract) as (_, saved):
        return quantized.spread(jax.tree_util.tree_map_with_path(read, abstract))


def metadata(folder: Path) -> Any:
    """The tree that `save` wrote, as shapes; raises ValueError naming the folder, if it is damaged."""
    try:
        with _checkpointer() as checkpointer:
            saved = checkpointer.metadata(folder.absolute()).item_metadata.tree
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)
    except Exception as error:  # Orbax raises anything for damaged files
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> ValueError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ValueError(f"{folder} is not a complete checkpoint: {reason[:300]}")


def _at_once(tree: Any) -> int:
    """GB of a tree that are on their way at a time: each leaf by itself fits, and the host has little beside them."""
    sizes = (math.prod(leaf.shape) * max(4, leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))
    return max(sizes, default=0) // 10**9 + 2


def _checkpointer(**options: Any) -> Any:
    """Orbax's checkpointer."""
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer(**options, **_processes())


def _tree_checkpointer(**options: Any) -> Any:
    """Orbax's checkpointer of which more can be asked for."""
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options, **_processes()), **_processes())


def _processes() -> dict[str, Any]:
    """Orbax's options for this process alone: processes share no checkpoint that is written."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return {}
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    return {"multiprocessing_options": options}


@contextlib.contextmanager
def _opened(folder: Path, abstract: Any, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A checkpointer and what it says of a folder, which holds the expected tree; errors name the folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist")
    try:
        with _checkpointer(**options) as checkpointer:
            saved = checkpointer.metadata(folder.absolute()).item_metadata.tree
            _check_tree(folder, saved, abstract)
            yield checkpointer, saved
    except (MismatchError, engine.ConversionError):
        raise
    except Exception as error:  # Orbax raises anything for damaged files
        raise _damaged(folder, error) from error


def _restore_leaf(folder: Path, path: str, target: Any) -> Any:
    """One leaf of a saved tree, `target` being that tree with nothing else in it."""
    import orbax.checkpoint as ocp

    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
    with _tree_checkpointer() as checkpointer:
        return jax.tree.leaves(checkpointer.restore(folder.absolute(), args=args))[0]


def _nested(path: str, leaf: Any) -> Any:
    """A tree of that leaf alone."""
    return functools.reduce(lambda tree, name: {name: tree}, reversed(path.split("/")), leaf)


def _default_device(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(partition.local_device())


def _check_tree(folder: Path, saved: Any, abstract: Any) -> None:
    found, wanted = _shapes(saved), _shapes(abstract)
    wrong = [path for path in sorted(found.keys() | wanted.keys()) if found.get(path) != wanted.get(path)]
    lines = [f"{path}: expected {wanted.get(path, 'nothing')}, found {found.get(path, 'nothing')}" for path in wrong]
    if lines:
        raise MismatchError(f"{folder} holds other params than its config asks for:\n  " + "\n  ".join(lines[:20]))


def _shapes(tree: Any) -> dict[str, list[int]]:
    return {_path(key_path): list(leaf.shape) for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _target(saved: Any, abstract: Any, dtype: Any, sharding: Placement | None) -> Any:
    """The abstract tree with the dtype and the place of every leaf."""
    place = sharding or _default_device
    dtypes = {_path(key_path): leaf.dtype for key_path, leaf in jax.tree_util.tree_leaves_with_path(saved)}

    def leaf_target(key_path, leaf):
        path = _path(key_path)
        target = place(path, leaf.shape)
        kept = dtype is None or quantized.keeps_dtype(path, dtypes[path])
        wanted = dtypes[path] if kept else quantized.leaf_dtype(leaf.shape, dtype)
        if target is None:
            return np.empty(leaf.shape, wanted)  # asks for NumPy; its memory is never touched
        return jax.ShapeDtypeStruct(leaf.shape, wanted, sharding=target)

    return jax.tree_util.tree_map_with_path(leaf_target, abstract)


def _path(key_path: tuple) -> str:
    return jax.tree_util.keystr(key_path, simple=True, separator="/")
