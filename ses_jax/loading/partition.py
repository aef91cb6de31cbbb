"""Meshes of devices, and where on them params and candidates lie.

A mesh has two axes. Along "data" stand different candidates (of one prompt or of several); along "model" the heads and
the feed-forward widths of one network are split, so that a network larger than one device fits. XLA's partitioner
derives everything else from where the params and the rows lie.

On a mesh, shapes are placed like arrays: a `jax.ShapeDtypeStruct` comes back with where it lies, on devices that need
not be there.

A network's rules are ordered pairs of a path pattern and a PartitionSpec; the first that matches a leaf's whole path
counts, and a leaf that none matches is an error.
"""

import contextlib
import functools
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ses_jax.models import quantized, target

DATA, MODEL = "data", "model"
AXES = (DATA, MODEL)
MIB = 2**20
# Bytes of an error that other processes are told.
WORDS = 1000

Rules = Sequence[tuple[str, PartitionSpec]]
AnyMesh = Mesh | AbstractMesh


def parse_mesh(mesh: str | Mesh | None, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """A mesh from its description.

    Args:
      mesh: such as "data=4,model=2"; an axis that is not named has size 1, and a size of -1 is all devices that the
        other leaves over. A `jax.sharding.Mesh` with these axis names is taken as it is; None is no mesh.
      devices: None is all of them.

    Raises:
      ValueError: for anything else, or a mesh that does not use every device.
    """
    if mesh is None:
        return None
    if isinstance(mesh, Mesh):
        if tuple(mesh.axis_names) != AXES:
            raise ValueError(f"mesh has axes {mesh.axis_names}; expected {AXES}")
        return mesh
    devices = list(jax.devices() if devices is None else devices)
    sizes = parse_axes(mesh)
    free = [name for name in AXES if sizes[name] == -1]
    if len(free) == 1:
        taken = sizes[MODEL if free[0] == DATA else DATA]
        sizes[free[0]] = len(devices) // taken
    if sizes[DATA] * sizes[MODEL] != len(devices) or min(sizes.values()) < 1:
        raise ValueError(f"mesh {mesh!r} does not use all {len(devices)} devices; data x model must be {len(devices)}")
    return Mesh(np.array(devices).reshape(sizes[DATA], sizes[MODEL]), AXES)


def alone() -> Mesh:
    """The mesh of JAX's default device. What lies on it lies there for good, and so does all that is computed of it."""
    return Mesh(np.array([[local_device()]]), AXES)


def unused(mesh: Mesh | None, devices: Sequence[jax.Device] | None = None) -> str | None:
    """`unused_word` of a mesh, None being the default device, and of devices, None being all of them."""
    return unused_word(1 if mesh is None else mesh.size, len(jax.devices() if devices is None else devices))


def unused_word(used: int, count: int) -> str | None:
    """A word where fewer devices are used than there are; None where all are."""
    if used >= count:
        return None
    every = f"{DATA}={count}"
    return f'{used} of {count} devices {"is" if used == 1 else "are"} used; mesh="{every}" (--mesh {every}) uses all'


def parse_axes(mesh: str) -> dict[str, int]:
    """Sizes by axis of a description such as "data=4,model=2".

    Raises:
      ValueError: naming what is wrong with it.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in mesh.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(-1|[1-9]\d*)\s*", part)
        if not match or match[1] not in sizes:
            raise ValueError(f"mesh {mesh!r}: expected sizes of the axes {' and '.join(AXES)}, such as data=4,model=2")
        sizes[match[1]] = int(match[2])
    return sizes


def abstract_mesh(mesh: str) -> AbstractMesh:
    """The mesh of a description without devices, for plans."""
    sizes = parse_axes(mesh)
    return AbstractMesh(tuple(sizes[name] for name in AXES), AXES)


def sharding(mesh: AnyMesh, rules: Rules, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where a leaf of a network's params lies.

    Raises:
      ValueError: if no rule matches the path, or a dimension does not divide over its axis.
    """
    spec = _spec(rules, path, len(shape))
    if spec is None:
        raise ValueError(f"no partition rule matches {path} {list(shape)}")
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"{path} {list(shape)}: {size} does not divide over {axis}={mesh.shape[axis]}; "
                f"choose a mesh whose {axis} axis divides it"
            )
    return NamedSharding(mesh, spec)


def _spec(rules: Rules, path: str, axes: int) -> PartitionSpec | None:
    """Of the rule of a path; the scales of a quantised kernel, one for each of its outputs, lie where those do."""
    kernel = path.removesuffix(quantized.SUFFIX) if path.endswith(f"kernel{quantized.SUFFIX}") else path
    spec = next((spec for pattern, spec in rules if re.fullmatch(pattern, kernel)), None)
    if spec is None or kernel == path:
        return spec
    whole = (*spec, *(None,) * (axes + 1 - len(spec)))
    return PartitionSpec(*whole[:-2], whole[-1])


def shardings(mesh: AnyMesh, rules: Mapping[str, Rules], params: Mapping[str, Any]) -> dict[str, Any]:
    """By network, a sharding for every leaf; raises as `sharding` does."""

    def of_network(name):
        return lambda key_path, leaf: sharding(mesh, rules[name], _path(key_path), leaf.shape)

    return {name: jax.tree_util.tree_map_with_path(of_network(name), tree) for name, tree in params.items()}


def place(mesh: Mesh | None, rules: Mapping[str, Rules], params: Mapping[str, Any]) -> dict[str, Any]:
    """Puts networks' params where they belong; what lies there already is not copied.

    Args:
      mesh: None is the default device.
      rules: by network.
      params: by network, arrays of the host or of devices, or shapes.
    """
    if mesh is None:
        return _put_by_default(params)
    return jax.tree.map(_put, params, shardings(mesh, rules, params))


def replicate(mesh: Mesh | None, tree: Any) -> Any:
    """Puts a whole copy of every array on each device of a mesh; None is the default device. Takes shapes too."""
    if mesh is None:
        return _put_by_default(tree)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: _put(leaf, everywhere), tree)


def bytes_per_device(mesh: AnyMesh, rules: Rules, params: Any) -> int:
    """Bytes of a network's params, arrays or shapes, that each device holds."""

    def of_leaf(key_path, leaf):
        shard = sharding(mesh, rules, _path(key_path), leaf.shape).shard_shape(leaf.shape)
        return int(np.prod(shard)) * np.dtype(leaf.dtype).itemsize

    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(of_leaf, params)))


def constrain(mesh: Mesh | None, tree: Any, *axes: str) -> Any:
    """Inside a compiled function: splits every array's leading axis over mesh axes; over none, all have the whole."""
    if mesh is None:
        return tree
    spec = PartitionSpec(axes) if axes else PartitionSpec()
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, spec))


def compiled_for(mesh: Mesh | None) -> contextlib.AbstractContextManager[None]:
    """Inside a compiled function: what is traced in it runs on a mesh; None is the default device."""
    return target.compiled_for(mesh)


def differentiated() -> contextlib.AbstractContextManager[None]:
    """Inside a compiled function: derivatives are taken of what is traced in it."""
    return target.differentiated()


def compiled_for_none() -> contextlib.AbstractContextManager[None]:
    """Inside a compiled function that is only traced, and read: no device's own kernels, whatever devices there are."""
    return target.compiled_for(types.SimpleNamespace(platform="cpu", device_kind="cpu"))


def device_of(params: Any) -> jax.Device | None:
    """One of the devices that params lie on; None for params of the host or without arrays."""
    placed = (leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array))
    first = next(placed, None)
    return None if first is None else min(first.sharding.device_set, key=lambda device: device.id)


def platform(mesh: Mesh | None) -> str:
    """What JAX calls the kind of a mesh's devices; None is the default device."""
    return (target.device() if mesh is None else mesh.devices.flat[0]).platform


def size(mesh: Mesh | None, *axes: str) -> int:
    """How many parts a split over mesh axes has."""
    return 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in axes]))


def leads(mesh: Mesh | None) -> bool:
    """Whether this process writes for all that share a mesh; without one each writes for itself."""
    return mesh is None or mesh.devices.flat[0].process_index == jax.process_index()


def any_process(mesh: Mesh | None, value: bool) -> bool:
    """Whether the value holds in any of the processes that share a mesh, in which all have to do the same."""
    if mesh is None or mesh.is_multi_process is False:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(value)).any())


def local_device() -> Any:
    """JAX's default device, one of this process."""
    said = jax.config.jax_default_device
    return said if hasattr(said, "platform") else jax.local_devices(backend=said)[0]


def least(mesh: Mesh | None, size: int | None) -> int | None:
    """The smallest of the sizes in bytes that the processes which share a mesh have; None where one has none."""
    if mesh is None or mesh.is_multi_process is False:
        return size
    from jax.experimental import multihost_utils

    found = multihost_utils.process_allgather(np.int32(-1 if size is None else size // MIB)).min()
    return None if found < 0 else int(found) * MIB


def by_leader(mesh: Mesh | None, shape: tuple[int, ...], compute: Callable[[], np.ndarray]) -> np.ndarray:
    """What `compute` gives, float32 of a shape; called in one of the processes that share a mesh, which all get it.

    Raises:
      RuntimeError: in the other processes, with the words of the error that comes through in that one.
    """
    if mesh is None or mesh.is_multi_process is False:
        return compute()
    from jax.experimental import multihost_utils

    found, words, error = np.zeros(shape, np.float32), b"", None
    if leads(mesh):
        try:
            found = np.asarray(compute(), np.float32)
        except BaseException as caught:  # whatever it is, the others wait
            error, words = caught, f"{type(caught).__name__}: {caught}".encode(errors="replace")[:WORDS]
    text = np.frombuffer(words.ljust(WORDS, b"\0"), np.uint8)
    found, text = multihost_utils.broadcast_one_to_all((found, text), is_source=leads(mesh))
    if error is not None:
        raise error
    if words := text.tobytes().rstrip(b"\0"):
        raise RuntimeError(f"the process that leads the mesh failed with {words.decode(errors='replace')}")
    return found


def loader(mesh: Mesh | None, rules: Rules) -> Any:
    """`(path, shape) -> Sharding` for reading one network's files straight into their shards; None without a mesh."""
    return None if mesh is None else functools.partial(sharding, mesh, rules)


def _put_by_default(tree: Any) -> Any:
    """Arrays on the default device, shapes as they are."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [not isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves]
    placed = iter(jax.device_put([leaf for leaf, is_array in zip(leaves, arrays, strict=True) if is_array]))
    return structure.unflatten(
        [next(placed) if is_array else leaf for leaf, is_array in zip(leaves, arrays, strict=True)]
    )


def _put(leaf: Any, target: NamedSharding) -> Any:
    """A leaf where it belongs, on a mesh of this process or of several that all have the leaf."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(sharding=target)
    placed = isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)
    if placed and leaf.sharding.is_equivalent_to(target, leaf.ndim):
        return leaf
    if target.is_fully_addressable:
        return jax.device_put(leaf, target)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), target))
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, target, lambda index: values[index])


def _path(key_path: tuple) -> str:
    return jax.tree_util.keystr(key_path, simple=True, separator="/")
