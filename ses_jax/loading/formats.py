"""How kernels lie in a TPU's memory, where that is not with their last axis innermost.

A TPU's product writes heads as attention wants them if its kernel lies with the inputs innermost. The compiler turns
one that lies otherwise round at the start of each program, and keeps both: of FLUX.1's kernels of queries, keys and
values 4.3 GB. What a kernel is does not change: JAX arrays say how they lie, and programs are compiled for it.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding

LOG = logging.getLogger("ses_jax")


def arranged(patterns: Sequence[str], params: Any, *, give_up: bool = False) -> Any:
    """A network's params with some kernels turned round in the memory of a TPU; on other devices as they are.

    Args:
      patterns: of the paths of kernels `[.., in, out]`, see `Component.turned`.
      params: arrays of devices, or shapes with a sharding, which then say how they lie; arrays of the host stay.
      give_up: whether arrays that are turned are deleted at once, for want of room beside them.

    Those that a runtime cannot turn stay as they lie, with a warning in the log.
    """

    def of_leaf(key_path, leaf):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if not any(re.fullmatch(pattern, path) for pattern in patterns):
            return leaf
        return _arrange(leaf, give_up=give_up)

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def _arrange(leaf: Any, *, give_up: bool) -> Any:
    is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
    if (not is_shape and not isinstance(leaf, jax.Array)) or not _turns(leaf.sharding):
        return leaf
    wanted = Format(Layout(_inputs_innermost(leaf.ndim)), leaf.sharding)
    if is_shape:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=wanted)
    if leaf.format.layout.major_to_minor == wanted.layout.major_to_minor:
        return leaf
    try:
        found = jax.block_until_ready(jax.device_put(leaf, wanted))
    except jax.errors.JaxRuntimeError as error:  # no room, or a runtime without layouts: programs run as well without
        LOG.warning("kernels stay as they lie, programs are slower for it: %s", " ".join(str(error).split())[:200])
        return leaf
    if give_up:
        leaf.delete()
    return found


def _turns(sharding: Sharding) -> bool:
    """Whether devices gain from it."""
    return next(iter(sharding.device_set)).platform == "tpu"


def _inputs_innermost(axes: int) -> tuple[int, ...]:
    return (*range(axes - 2), axes - 1, axes - 2)
