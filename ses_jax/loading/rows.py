"""Large stacks of layers in a saved tree (Orbax): stored, and read, a layer at a time."""

from pathlib import Path
from typing import Any

import numpy as np

from ses_jax.convert.engine import Edits
from ses_jax.models import quantized
from ses_jax.models.quantized import Quantized

# Bytes of a stack above which it is stored a layer at a time; below, more files would only be slower.
LARGE = 1 << 27


def save_args(leaf: Any) -> Any:
    """How Orbax is to store a leaf."""
    import orbax.checkpoint as ocp

    return ocp.SaveArgs(shard_axes=(0,) if leaf.ndim > 2 and leaf.nbytes > LARGE else ())


def stored(folder: Path, path: str) -> Any:
    """A leaf of a saved tree whose layers `leaf[i].read().result()` reads; None where it is not stored so."""
    import tensorstore

    kvstore = {"driver": "ocdbt", "base": f"file://{folder.absolute()}/", "path": f"{path.replace('/', '.')}/"}
    try:
        leaf = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, read=True).result()
    except ValueError:  # in another form, which Orbax may know
        return None
    return leaf if leaf.ndim > 2 and leaf.chunk_layout.read_chunk.shape[0] == 1 < leaf.shape[0] else None


def quantize(leaf: Any, kind: str, path: str, edits: Edits) -> Quantized:
    """A leaf from `stored` in eight bits on the host, which holds no more than a layer as it was stored.

    Args:
      leaf: `[n, in, out]`.
      kind: a name of `quantized.KINDS`.
      path: of the leaf.
      edits: changes of layers before that.
    """
    out = quantized.empty(leaf.shape, kind)
    for index in range(leaf.shape[0]):
        layer, edit = leaf[index].read().result(), edits.get((path, index))
        layer = layer if edit is None else edit(np.array(layer, np.float32))
        out.values[index], out.scale[index] = quantized.quantize(layer, kind)
    return out
