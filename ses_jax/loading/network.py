"""One network's folder: `config.json` with its weights, published (safetensors) or converted (Orbax).

    published:  config.json  model.safetensors
    converted:  config.json  params/  conversion.json  [unused.safetensors]

Some networks are also published as a single file beside that folder, see `configs`. Exporting writes the first form.

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

from ses_jax.convert import arrays, dialects, engine, matching
from ses_jax.convert.engine import ConversionError, Edits, Placement, Weights
from ses_jax.convert.files import open_files, open_weights, read_json, write_json, write_weights
from ses_jax.convert.table import Component
from ses_jax.loading import checkpoint, configs
from ses_jax.models import quantized

UNUSED, CONVERSION = "unused", "conversion.json"


class Network(NamedTuple):
    """A network that was read from a folder.

    Attributes:
      json: content of its `config.json`.
      config: the network's config.
      params: the weights.
      prefix: what the published names begin with.
      unused: published tensors without a place in the params; their data is read when asked for.
      dropped: names of published tensors that were left out when the folder was converted.
      quantize: how kernels are stored in eight bits; None if they are not.
    """

    json: Mapping[str, Any]
    config: Any
    params: Any
    prefix: str
    unused: Weights
    dropped: tuple[str, ...] = ()
    quantize: str | None = None


def load(
    folder: Path,
    component: Component,
    *,
    dtype: Any = None,
    sharding: Placement | None = None,
    edits: Edits | None = None,
    quantize: str | None = None,
    file: Path | None = None,
) -> Network:
    """Reads a network from a published or a converted folder, or from the single file beside a folder without weights.

    Args:
      folder: the network's own folder.
      component: which network to expect.
      file: safetensors or GGUF with its weights instead of the folder's, under either of their names, see `dialects`.
      dtype: of the params; None keeps that of the files.
      sharding: `(path, shape)` of a leaf to where it is placed, None being NumPy on the host; without it, the default
        device.
      edits: changes of pieces of leaves on their way; None is none.
      quantize: "int8" or "fp8" puts the kernels that the component names into eight bits; None leaves them.

    Raises:
      FileNotFoundError: naming the file that is absent.
      ValueError: naming the file, and the tensors where there are any to name, if something does not fit.
    """
    try:
        json = configs.config_of(folder, component, file)
        how = {"dtype": dtype, "sharding": sharding, "edits": edits, "quantize": quantize}
        return _load(folder, component, json, file, how)
    except configs.ConfigError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def _load(
    folder: Path, component: Component, json: Mapping[str, Any], file: Path | None, how: Mapping[str, Any]
) -> Network:
    """As `load`, `how` being its other arguments; a `ConfigError` names no file."""
    if file:
        weights, table = configs.part_of(dialects.open_file(file), component, json)
        return read(weights, dataclasses.replace(component, table=table), json, **how)
    file = configs.single_file(folder, component)
    if file:
        component = dataclasses.replace(component, table=component.single_file.table)
        return read(dialects.logical(open_files([file])), component, json, **how)
    if (folder / configs.PARAMS).is_dir():
        return _restore(folder, component, json, **how)
    return read(dialects.logical(open_weights(folder, component.stem)), component, json, **how)


def shapes(folder: Path, component: Component, *, dtype: Any, quantize: str | None = None) -> tuple[Any, Any]:
    """Config and params of a network as shapes: of its folder nothing is read but what says what the weights are.

    Args:
      folder: published or converted; its weights need not be there.
      component: which network to expect.
      dtype: of the params.
      quantize: as in `load`.

    Raises:
      FileNotFoundError: naming the file that is absent.
      ValueError: naming the file that makes no network.
    """
    try:
        config = configs.made_of(component, configs.config_of(folder, component))
        abstract = configs.abstract(component, config)
    except configs.ConfigError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    saved = _facts(folder).get("quantize") if (folder / CONVERSION).is_file() else None
    _check_saved(folder, saved, quantize)
    return config, quantized.abstract(quantized.cast(abstract, dtype), component.quantization(saved or quantize))


def read(
    weights: Weights,
    component: Component,
    json: Mapping[str, Any],
    *,
    dtype: Any = None,
    sharding: Placement | None = None,
    edits: Edits | None = None,
    quantize: str | None = None,
) -> Network:
    """Reads a network from published tensors, wherever they lie.

    Args:
      weights: the tensors.
      component: which network to expect.
      json: content of its `config.json`.
      dtype: of the params; None keeps that of the files.
      sharding: `(path, shape)` of a leaf to where it is placed, None being NumPy on the host; without it, the default
        device.
      edits: changes of pieces of leaves on their way; None is none.
      quantize: "int8" or "fp8" puts the kernels that the component names into eight bits; None leaves them.

    Raises:
      ConversionError: naming the tensors that do not fit.
      ConfigError: saying what is wrong with `json`.
    """
    config = configs.made_of(component, json)
    abstract = configs.abstract(component, config)
    plan = matching.plan(component.table(json), abstract, weights.headers)
    rule = component.quantization(quantize)
    params = engine.load(plan, abstract, weights, dtype=dtype, sharding=sharding, edits=edits, quantization=rule)
    unused = Weights({name: weights.headers[name] for name in plan.unused}, weights.read)
    return Network(json, config, params, plan.prefix, unused, quantize=rule and quantize)


def save_converted(folder: Path, network: Network, *, drop_unused: bool = False) -> None:
    """Writes a network's folder in the converted form."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", network.json)
    checkpoint.save(folder / configs.PARAMS, network.params)
    kept = {} if drop_unused else network.unused.headers
    if kept:
        write_weights(folder, UNUSED, _read_all(network.unused))
    dropped = sorted(set(network.dropped) | (network.unused.headers.keys() - kept.keys()))
    facts = {"prefix": network.prefix, "dropped": dropped}
    write_json(folder / CONVERSION, facts | ({"quantize": network.quantize} if network.quantize else {}))


def save_published(folder: Path, component: Component, network: Network) -> None:
    """Writes a network's folder in the published form.

    Raises:
      ConversionError: if the network was converted without tensors that its published form has, or quantised.
    """
    if network.quantize:
        raise ConversionError(
            f"cannot export to {folder}: the weights are quantised ({network.quantize}), and what was rounded off is "
            "gone; export the checkpoint that they were made of"
        )
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


def _restore(
    folder: Path,
    component: Component,
    json: Mapping[str, Any],
    *,
    quantize: str | None,
    edits: Edits | None,
    **how: Any,
) -> Network:
    """A converted network with what its conversion noted down."""
    config, facts = configs.made_of(component, json), _facts(folder)
    abstract, saved = configs.abstract(component, config), facts.get("quantize")
    _check_saved(folder, saved, quantize)
    if saved and edits:
        raise ValueError(f"{folder} is quantised already ({saved}); adapters are merged into its original")
    rule = component.quantization(saved or quantize)
    if edits or (rule and not saved):
        params = checkpoint.restore_changed(folder / configs.PARAMS, abstract, quantization=rule, edits=edits, **how)
    else:
        params = checkpoint.restore(folder / configs.PARAMS, quantized.abstract(abstract, rule), **how)
    _check_finite(folder, params)
    unused = open_weights(folder, UNUSED) if any(folder.glob(f"{UNUSED}*")) else open_files([])
    return Network(json, config, params, facts["prefix"], unused, tuple(facts["dropped"]), rule and rule.kind)


def _check_saved(folder: Path, saved: str | None, quantize: str | None) -> None:
    """Raises ValueError where a folder is in eight bits already, and others are asked for."""
    if saved and quantize not in (saved, None):
        raise ValueError(f"{folder} is quantised already ({saved}); quantize={quantize!r} takes its original")


def _facts(folder: Path) -> dict[str, Any]:
    """What the conversion of a network noted down."""
    facts = read_json(folder / CONVERSION)
    dropped, quantize = facts.get("dropped"), facts.get("quantize")
    names = isinstance(dropped, list) and not set(map(type, dropped)) - {str}
    if not names or not isinstance(facts.get("prefix"), str) or quantize not in (None, *quantized.KINDS):
        raise ValueError(f"{folder / CONVERSION} is damaged: expected a prefix and a list of dropped names")
    return facts


def _check_finite(folder: Path, params: Any) -> None:
    """Raises ConversionError for values that no conversion leaves there; each leaf is looked at where it lies."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    elsewhere = [leaf for _, leaf in leaves if not _on_host(leaf)]
    found = iter(jax.device_get(_all_finite(elsewhere)) if elsewhere else [])
    for key_path, leaf in leaves:
        if not (_finite_on_host(leaf) if _on_host(leaf) else next(found)):
            path = jax.tree_util.keystr(key_path, simple=True, separator="/")
            raise ConversionError(f"{path} in {folder / configs.PARAMS} has NaN or infinite values")


def _on_host(leaf: np.ndarray | jax.Array) -> bool:
    """Whether NumPy can look at it without a copy: compiling a program for every shape would take longer."""
    return isinstance(leaf, np.ndarray) or (leaf.is_fully_addressable and next(iter(leaf.devices())).platform == "cpu")


def _finite_on_host(leaf: np.ndarray | jax.Array) -> bool:
    parts = [leaf] if isinstance(leaf, np.ndarray) else [shard.data for shard in leaf.addressable_shards]
    return all(arrays.all_finite(np.asarray(part)) for part in parts)


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def _read_all(weights: Weights) -> Iterator[tuple[str, np.ndarray]]:
    return ((name, weights.read(name)) for name in weights.headers)
