"""One network's folder: `config.json` with its weights, published (safetensors) or converted (Orbax).

    published:  config.json  model.safetensors
    converted:  config.json  params/  conversion.json  [unused.safetensors]

Some networks are also published as a single file beside that folder, under other names and without a `config.json`.
Exporting writes the first form.

Tensors that the network doesn't load (layers above the wanted one, heads) survive in `unused.safetensors`, so that
exporting gives back the published checkpoint bit for bit.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ses_jax.convert import engine
from ses_jax.convert.engine import ConversionError, Placement, Weights
from ses_jax.convert.files import open_files, open_weights, read_json, write_json, write_weights
from ses_jax.convert.table import Component
from ses_jax.loading import checkpoint
from ses_jax.models.config import check

PARAMS, UNUSED, CONVERSION = "params", "unused", "conversion.json"


class Network(NamedTuple):
    """A network that was read from a folder.

    Attributes:
      json: content of its `config.json`.
      config: the network's config.
      params: the weights.
      prefix: what the published names begin with.
      unused: published tensors without a place in the params; their data is read when asked for.
      dropped: names of published tensors that were left out when the folder was converted.
    """

    json: Mapping[str, Any]
    config: Any
    params: Any
    prefix: str
    unused: Weights
    dropped: tuple[str, ...] = ()


def load(
    folder: Path,
    component: Component,
    *,
    dtype: Any = None,
    sharding: Placement | None = None,
) -> Network:
    """Reads a network from a published or a converted folder, or from the single file beside a folder without weights.

    Args:
      folder: the network's own folder.
      component: which network to expect.
      dtype: of the params; None keeps that of the files.
      sharding: `(path, shape)` of a leaf to where it is placed, None being NumPy on the host; without it, the default
        device.

    Raises:
      FileNotFoundError: naming the file that is absent.
      ValueError: naming the file, and the tensors where there are any to name, if something does not fit.
    """
    try:
        return _load(folder, component, dtype, sharding)
    except ConfigError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def _load(folder: Path, component: Component, dtype: Any, sharding: Placement | None) -> Network:
    """As `load`; a ConfigError names no file."""
    file = _single_file(folder, component)
    if file:
        weights = open_files([file])
        json = _single_file_config(file, weights, folder, component)
        component = dataclasses.replace(component, table=component.single_file.table)
        return read(weights, component, json, dtype=dtype, sharding=sharding)
    json, config = read_config(folder / "config.json", component)
    if (folder / PARAMS).is_dir():
        params = checkpoint.restore(folder / PARAMS, _abstract(component, config), dtype=dtype, sharding=sharding)
        _check_finite(folder, params)
        return _with_facts(folder, json, config, params)
    return read(open_weights(folder, component.stem), component, json, dtype=dtype, sharding=sharding)


def read_config(file: Path, component: Component) -> tuple[dict[str, Any], Any]:
    """The content of a network's config file, and the config that it makes.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the file, if the network can't be made from it.
    """
    json = read_json(file)
    try:
        return json, _config(component, json)
    except ConfigError as error:
        raise ValueError(f"{file}: {error}") from error


class ConfigError(ValueError):
    """A config that no network can be made from."""


def _config(component: Component, json: Mapping[str, Any]) -> Any:
    """The config that a file's content makes; raises ValueError for content of another shape."""
    try:
        return check(component.from_json(json))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except KeyError as error:
        raise ConfigError(f"lacks {error}") from error
    except Exception as error:  # a text in the place of an object, a size of 0: whatever comes of it
        raise ConfigError(f"makes no network: {type(error).__name__}: {error}") from error


def _abstract(component: Component, config: Any) -> Any:
    """The params as shapes; raises ConfigError where the config's numbers do not go together."""
    try:
        return component.abstract(config)
    except Exception as error:
        raise ConfigError(f"makes no network: {' '.join(str(error).split())[:200]}") from error


def read(
    weights: Weights,
    component: Component,
    json: Mapping[str, Any],
    *,
    dtype: Any = None,
    sharding: Placement | None = None,
) -> Network:
    """Reads a network from published tensors, wherever they lie.

    Args:
      weights: the tensors.
      component: which network to expect.
      json: content of its `config.json`.
      dtype: of the params; None keeps that of the files.
      sharding: `(path, shape)` of a leaf to where it is placed, None being NumPy on the host; without it, the default
        device.

    Raises:
      ConversionError: naming the tensors that do not fit.
      ConfigError: saying what is wrong with `json`.
    """
    config = _config(component, json)
    abstract = _abstract(component, config)
    plan = engine.plan(component.table(json), abstract, weights.headers)
    params = engine.load(plan, abstract, weights, dtype=dtype, sharding=sharding)
    unused = Weights({name: weights.headers[name] for name in plan.unused}, weights.read)
    return Network(json, config, params, plan.prefix, unused)


def save_converted(folder: Path, network: Network, *, drop_unused: bool = False) -> None:
    """Writes a network's folder in the converted form."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", network.json)
    checkpoint.save(folder / PARAMS, network.params)
    kept = {} if drop_unused else network.unused.headers
    if kept:
        write_weights(folder, UNUSED, _read_all(network.unused))
    dropped = sorted(set(network.dropped) | (network.unused.headers.keys() - kept.keys()))
    write_json(folder / CONVERSION, {"prefix": network.prefix, "dropped": dropped})


def save_published(folder: Path, component: Component, network: Network) -> None:
    """Writes a network's folder in the published form.

    Raises:
      ConversionError: if the network was converted without tensors that its published form has.
    """
    if network.dropped:
        names = ", ".join(network.dropped[:5]) + (", ..." if len(network.dropped) > 5 else "")
        raise ConversionError(
            f"cannot export to {folder}: converted with --drop-unused, which left out {names}; convert again without it"
        )
    export(folder, component, network.json, network.params, prefix=network.prefix, unused=_read_all(network.unused))


def export(
    folder: Path,
    component: Component,
    json: Mapping[str, Any],
    params: Any,
    *,
    prefix: str | None = None,
    unused: Iterable[tuple[str, np.ndarray]] = (),
) -> None:
    """Writes params as the published `config.json` and safetensors of one network.

    Args:
      folder: the network's own folder; created where absent.
      component: the network.
      json: content of its published `config.json`.
      params: the weights, in the dtype to write.
      prefix: what the published names begin with; None is the table's own choice.
      unused: published tensors, under their whole names, that the network does not load.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", json)
    tensors = engine.export(component.table(json), params, prefix)
    write_weights(folder, component.stem, itertools.chain(tensors, unused))


def _single_file(folder: Path, component: Component) -> Path | None:
    """The file in the checkpoint's root that holds a network whose own folder has no weights, if there is one."""
    if component.single_file is None or (folder / PARAMS).is_dir() or any(folder.glob(f"{component.stem}*")):
        return None
    found = [folder.parent / name for name in component.single_file.files if (folder.parent / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} has no weights, and {' and '.join(map(str, found))} both could be its; keep one")
    return found[0] if found else None


def _single_file_config(file: Path, weights: Weights, folder: Path, component: Component) -> dict[str, Any]:
    """The content of the network's `config.json`, made up from the file's tensors where there is none."""
    if (folder / "config.json").is_file():
        return read_config(folder / "config.json", component)[0]
    try:
        return component.single_file.config(weights.headers)
    except (KeyError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ConversionError(f"{file}: {reason}") from error


def _with_facts(folder: Path, json: Mapping[str, Any], config: Any, params: Any) -> Network:
    """A converted network with what its conversion noted down."""
    facts = read_json(folder / CONVERSION)
    dropped = facts.get("dropped")
    if not isinstance(facts.get("prefix"), str) or not isinstance(dropped, list) or set(map(type, dropped)) - {str}:
        raise ValueError(f"{folder / CONVERSION} is damaged: expected a prefix and a list of dropped names")
    unused = open_weights(folder, UNUSED) if any(folder.glob(f"{UNUSED}*")) else open_files([])
    return Network(json, config, params, facts["prefix"], unused, tuple(facts["dropped"]))


def _check_finite(folder: Path, params: Any) -> None:
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        # One leaf after the other, each where it lies.
        if not (np.isfinite(leaf).all() if isinstance(leaf, np.ndarray) else _all_finite(leaf)):
            path = jax.tree_util.keystr(key_path, simple=True, separator="/")
            raise ConversionError(f"{path} in {folder / PARAMS} has NaN or infinite values")


@jax.jit
def _all_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


def _read_all(weights: Weights) -> Iterator[tuple[str, np.ndarray]]:
    return ((name, weights.read(name)) for name in weights.headers)
