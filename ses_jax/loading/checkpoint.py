"""Params on disk in our own layout (Orbax): restored straight onto their devices.

Orbax takes a second to import and only converted checkpoints need it, so it is imported where it is used.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]


def save(folder: Path, params: Any) -> None:
    """Writes a tree of arrays; the folder appears only when it is complete, and replaces one that is there."""
    with _checkpointer() as checkpointer:
        checkpointer.save(folder.absolute(), params, force=True)


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
      dtype: to cast to; None keeps what was saved.
      sharding: `(path, shape)` of a leaf to where it is placed, None being NumPy on the host; without it, the default
        device.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: naming the folder, if it is damaged or holds another tree.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist")
    try:
        with _checkpointer() as checkpointer:
            saved = checkpointer.metadata(folder.absolute()).item_metadata.tree
            _check_tree(folder, saved, abstract)
            return checkpointer.restore(folder.absolute(), _target(saved, abstract, dtype, sharding))
    except (OSError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder} is not a complete checkpoint: {error}") from error


@contextlib.contextmanager
def leaf_reader(folder: Path, abstract: Any) -> Iterator[Callable[[str], np.ndarray]]:
    """What reads a leaf by its path, on the host, of a tree that `save` wrote; raises as `restore` does."""
    import orbax.checkpoint as ocp

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist")

    def read(path):
        item, as_numpy = 0, ocp.RestoreArgs(restore_type=np.ndarray)
        for name in reversed(path.split("/")):
            item, as_numpy = {name: item}, {name: as_numpy}
        args = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
        return jax.tree.leaves(checkpointer.restore(folder.absolute(), args=args))[0]

    try:
        _check_tree(folder, metadata(folder), abstract)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            yield read
    except (OSError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder} is not a complete checkpoint: {error}") from error


def metadata(folder: Path) -> Any:
    """The tree that `save` wrote, as shapes."""
    with _checkpointer() as checkpointer:
        saved = checkpointer.metadata(folder.absolute()).item_metadata.tree
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)


def _checkpointer() -> Any:
    """Orbax's checkpointer, for this process alone: processes share no checkpoint that is written."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def _check_tree(folder: Path, saved: Any, abstract: Any) -> None:
    found, wanted = _shapes(saved), _shapes(abstract)
    wrong = [path for path in sorted(found.keys() | wanted.keys()) if found.get(path) != wanted.get(path)]
    lines = [f"{path}: expected {wanted.get(path, 'nothing')}, found {found.get(path, 'nothing')}" for path in wrong]
    if lines:
        raise ValueError(f"{folder} holds other params than its config asks for:\n  " + "\n  ".join(lines[:20]))


def _shapes(tree: Any) -> dict[str, list[int]]:
    return {_path(key_path): list(leaf.shape) for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _target(saved: Any, abstract: Any, dtype: Any, sharding: Placement | None) -> Any:
    """The abstract tree with the dtype and the place of every leaf."""
    place = sharding or (lambda path, shape: jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    dtypes = {_path(key_path): leaf.dtype for key_path, leaf in jax.tree_util.tree_leaves_with_path(saved)}

    def leaf_target(key_path, leaf):
        path = _path(key_path)
        target = place(path, leaf.shape)
        if target is None:
            return np.empty(leaf.shape, dtype or dtypes[path])  # asks for NumPy; its memory is never touched
        return jax.ShapeDtypeStruct(leaf.shape, dtype or dtypes[path], sharding=target)

    return jax.tree_util.tree_map_with_path(leaf_target, abstract)


def _path(key_path: tuple) -> str:
    return jax.tree_util.keystr(key_path, simple=True, separator="/")
