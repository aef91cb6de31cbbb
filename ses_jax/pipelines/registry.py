"""Families of text-to-image models: one file each, and the registry that finds the right one for a checkpoint."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ses_jax.loading import adapters, formats, hub, network, partition
from ses_jax.loading.configs import config_of
from ses_jax.loading.lora_files import Loras, open_adapters, pairs
from ses_jax.loading.tokenizers import load_tokenizer
from ses_jax.models import quantized
from ses_jax.pipelines import flux1, flux2, qwen_image, z_image
from ses_jax.pipelines.base import Parts, Pipeline, Published
from ses_jax.pipelines.schedule import check_override

FAMILIES: dict[str, ModuleType] = {
    "ZImagePipeline": z_image,
    "FluxPipeline": flux1,
    "Flux2Pipeline": flux2,
    "Flux2KleinPipeline": flux2,
    "QwenImagePipeline": qwen_image,
}


def load_pipeline(
    source: str = "demo",
    *,
    dtype: Any = None,
    mesh: str | Mesh | None = None,
    offload_text_encoder: bool = False,
    lora: Loras | None = None,
    schedule: Mapping[str, Any] | None = None,
    quantize: str | None = None,
    **options: Any,
) -> Pipeline:
    """Loads a text-to-image model.

    Args:
      source: "demo" (the small checkpoint inside this package), a local folder in diffusers layout, a folder written by
        `ses-jax convert`, or a Hugging Face id such as "Tongyi-MAI/Z-Image-Turbo".
      dtype: of the weights, bfloat16, float16 or float32; None is bfloat16 on GPU and TPU, float32 on CPU.
      mesh: devices to spread the weights and candidates over, such as "data=4,model=2" (see `partition.parse_mesh`);
        weights go from the files straight into their shards. None is the default device.
      offload_text_encoder: keep the weights in host memory. A search or render then puts the text encoders on the
        device, encodes its prompts, drops them, and only then puts the other networks there, so that the device holds
        the larger of the two and never their sum.
      lora: adapters to merge into the weights while these are read, which costs a search nothing: a mapping of files,
        folders or Hugging Face ids ("organisation/name", "organisation/name:file.safetensors") to strengths, such as
        {"style.safetensors": 0.8}, a sequence of such pairs, or one of them alone, at strength 1. All are added in
        float32, and the sum is cast once.
      schedule: entries of the checkpoint's scheduler_config.json to override, for adapters that were distilled with
        another schedule, such as {"use_dynamic_shifting": False, "shift": 3.0, "shift_terminal": None}; and `sigmas`,
        the noise levels before the shift, one a step, as diffusers' pipelines take them.
      quantize: "int8" or "fp8" puts the linear layers of the transformer's blocks and of large text encoders into eight
        bits as they are read, with a scale for each output; None leaves them as they are, also those of a folder that
        was converted so.
      options: the family's own, see its module in `ses_jax.pipelines`; or by the name of a network, such as
        `transformer`, a file with its weights instead of the folder's, safetensors or GGUF, quantised as it may be:
        its name in the folder, a path, or "organisation/name/file" of the Hugging Face hub. Or a folder like the
        network's own.

    Returns:
      The `Pipeline` of its family.

    Raises:
      ValueError: for an unknown source, model family or option, a mesh that does not fit, or a broken checkpoint; the
        message names file and tensor. For adapters that do not fit the model, before any weights are read, naming all
        of their tensors that don't.
    """
    if not isinstance(offload_text_encoder, bool):
        raise ValueError(f"offload_text_encoder={offload_text_encoder!r} is not true or false")
    asked = dtype and hub.params_dtype(dtype).name
    dtype = hub.params_dtype(dtype)
    quantized.check_kind(quantize)
    given = _given(options, dtype=asked, lora=lora, schedule=schedule, quantize=quantize)
    files = {name: options.pop(name) for name in _networks() & options.keys()}
    folder = hub.resolve(source, weights=None if not files else "")
    index = hub.read_json(folder / "model_index.json")
    family = _family(source, index.get("_class_name"))
    files = _files(source, folder, family, files)
    _check_options(source, family, options)
    check_override(schedule or {})
    places = {name: _place_of(folder / name, files.get(name)) for name in family.COMPONENTS}
    edits = _edits(places, family, lora)
    scheduler = hub.read_json(folder / "scheduler" / "scheduler_config.json")
    tokenizers = {name: load_tokenizer(folder / name) for name in family.TOKENIZERS}
    mesh = partition.parse_mesh(mesh) or partition.alone()
    shardings = {
        name: hub.on_host if offload_text_encoder else partition.loader(mesh, part.partition)
        for name, part in family.COMPONENTS.items()
    }
    configs, params = _read(family, places, shardings, edits, {"dtype": dtype, "quantize": quantize})
    parts = Parts(folder, configs, params, tokenizers, scheduler, index, hub.settings(folder), schedule or {})
    pipeline = _placed(family, _assembled(family, parts, options), mesh)
    changes = {"lora": [list(pair) for pair in pairs(lora)], "schedule": dict(schedule or {})}
    changes |= {"quantize": quantized.kind_of(params), "files": {name: str(file) for name, file in files.items()}}
    changes = {name: change for name, change in changes.items() if change}
    return dataclasses.replace(pipeline, source=str(source), options=given, changes=changes)


def _read(
    family: ModuleType,
    files: Mapping[str, tuple[Path, Path | None]],
    shardings: Mapping[str, Any],
    edits: Mapping[str, Any],
    how: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configs and params of the family's networks, by network."""
    loaded = {
        name: hub.load_component(
            files[name][0], part, file=files[name][1], sharding=shardings[name], edits=edits.get(name), **how
        )
        for name, part in family.COMPONENTS.items()
    }
    configs, params = ({name: pair[place] for name, pair in loaded.items()} for place in (0, 1))
    return configs, params


def _given(options: Mapping[str, Any], *, lora: Loras | None, **more: Any) -> dict[str, Any]:
    """The arguments of `load_pipeline` that images depend on, as plain JSON values."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    plain |= {"lora": [list(pair) for pair in pairs(lora)]}
    plain |= {name: dict(value) if isinstance(value, Mapping) else value for name, value in more.items()}
    return {name: value for name, value in plain.items() if value not in (None, [], {})}


def _assembled(family: ModuleType, parts: Parts, options: Mapping[str, Any]) -> Pipeline:
    """The pipeline of parts that were read from files, which may say anything."""
    try:
        pipeline = family.assemble(parts, **options)
        if steps := len(parts.schedule.get("sigmas", ())):
            defaults = dataclasses.replace(pipeline.defaults, steps=steps, preview_steps=steps)
            pipeline = dataclasses.replace(pipeline, defaults=defaults)
        sizes = pipeline.defaults.height, pipeline.defaults.width
        if not np.isfinite(pipeline.sigmas(steps or 1, *sizes)).all():
            raise ValueError("its scheduler gives noise levels that are not finite")
        return pipeline
    except ValueError as error:
        if str(parts.folder) in str(error):
            raise
        raise ValueError(f"{parts.folder}: {error}") from error
    except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
        raise ValueError(
            f"{parts.folder}: its configs, or the options {dict(options)}, make no pipeline: "
            f"{type(error).__name__}: {error}"
        ) from error


def abstract_pipeline(
    source: str, *, dtype: Any = jnp.bfloat16, mesh: Mesh | None = None, quantize: str | None = None, **options: Any
) -> Pipeline:
    """A model as shapes: its functions can be traced, planned and compiled without weights.

    Args:
      source: the Hugging Face id of one of the families' `PUBLISHED` checkpoints; or "demo", or a local folder, of
        which the configs are read.
      dtype: of the weights.
      mesh: devices to compile for, which need not be there (see `jax.experimental.topologies`); None is none in
        particular.
      quantize: as in `load_pipeline`.
      options: the family's own.

    Returns:
      A `Pipeline` whose params are `jax.ShapeDtypeStruct`s and which has no tokenizer (see `blank_tokens`).

    Raises:
      FileNotFoundError: for a folder, or a config, that is not there.
      ValueError: for another source, and for configs that make no model.
    """
    quantized.check_kind(quantize)
    folder = hub.local(source)
    if folder is not None:
        family, parts = _local_parts(source, folder, dtype, quantize)
        _check_options(source, family, options)
        pipeline = _assembled(family, parts, options)
        pipeline = dataclasses.replace(pipeline, source=str(source))
        return pipeline if mesh is None else _placed(family, pipeline, mesh)
    for family in FAMILIES.values():
        for published in family.PUBLISHED:
            if published.source == source and published.configs:
                _check_options(source, family, options)
                pipeline = family.assemble(_abstract_parts(family, published, dtype, quantize), **options)
                return pipeline if mesh is None else _placed(family, pipeline, mesh)
    known = ", ".join(_published_names())
    raise ValueError(f"{source}: no published model of that name, and no folder; known: {known}, demo")


def _edits(places: Mapping[str, tuple[Path, Path | None]], family: ModuleType, lora: Loras | None) -> dict[str, Any]:
    """What adapters change in the networks, by network; nothing but headers of the networks is read."""
    opened = open_adapters(lora)
    changed = {name: part for name, part in family.COMPONENTS.items() if opened and name in adapters.PREFIXES}
    configs = {name: config_of(places[name][0], part, places[name][1]) for name, part in changed.items()}
    return adapters.plan_edits(opened, {name: (part, configs[name]) for name, part in changed.items()})


def _place_of(network: Path, own: Path | None) -> tuple[Path, Path | None]:
    """A network's folder, and the file with its weights if that is another."""
    if own is None:
        return network, None
    return (own, None) if own.is_dir() else (network, own)


def _networks() -> set[str]:
    """Names of networks of any family."""
    return {name for family in FAMILIES.values() for name in family.COMPONENTS}


def _files(source: str, folder: Path, family: ModuleType, files: Mapping[str, str | Path]) -> dict[str, Path]:
    """The files of networks that have one of their own; of all others the weights are there afterwards."""
    unknown = files.keys() - family.COMPONENTS.keys()
    if unknown:
        raise ValueError(f"{source} has no {', '.join(sorted(unknown))}; its networks: {', '.join(family.COMPONENTS)}")
    found = {name: hub.resolve_file(file, folder) for name, file in files.items()}
    if found:
        hub.resolve(source, weights=tuple(f"{name}/*.safetensors" for name in family.COMPONENTS if name not in found))
    return found


def _placed(family: ModuleType, pipeline: Pipeline, mesh: Mesh | None) -> Pipeline:
    """The pipeline on a mesh."""
    return dataclasses.replace(pipeline, mesh=mesh, place=functools.partial(_place, family, mesh))


def _place(family: ModuleType, mesh: Mesh | None, params: Mapping[str, Any]) -> dict[str, Any]:
    """Networks' params, or shapes, where they belong, and as they lie there."""
    parts = family.COMPONENTS
    placed = partition.place(mesh, {name: part.partition for name, part in parts.items()}, params)
    return {name: formats.arranged(parts[name].turned, tree) for name, tree in placed.items()}


def _abstract_parts(family: ModuleType, published: Published, dtype: Any, quantize: str | None) -> Parts:
    def shapes(name, component):
        cast = quantized.cast(component.abstract(published.configs[name]), dtype)
        return quantized.abstract(cast, component.quantization(quantize))

    params = {name: shapes(name, component) for name, component in family.COMPONENTS.items()}
    return Parts(Path(published.source), published.configs, params, {}, published.scheduler, published.index)


def _local_parts(source: str, folder: Path, dtype: Any, quantize: str | None) -> tuple[ModuleType, Parts]:
    """The family and the parts of a folder, from its configs."""
    index = hub.read_json(folder / "model_index.json")
    family = _family(source, index.get("_class_name"))
    how = {"dtype": hub.params_dtype(dtype), "quantize": quantize}
    found = {name: network.shapes(folder / name, part, **how) for name, part in family.COMPONENTS.items()}
    configs, params = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
    scheduler = hub.read_json(folder / "scheduler" / "scheduler_config.json")
    return family, Parts(folder, configs, params, {}, scheduler, index, hub.settings(folder))


def _family(source: str, name: Any) -> ModuleType:
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"{source}: pipeline class {name!r} is not supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _check_options(source: str, family: ModuleType, options: Mapping[str, Any]) -> None:
    unknown = options.keys() - set(family.OPTIONS)
    if unknown:
        known = ", ".join(family.OPTIONS) or "none"
        raise ValueError(f"{source}: unknown options {sorted(unknown)}; this family takes: {known}")


def _published_names() -> list[str]:
    return [p.source for family in dict.fromkeys(FAMILIES.values()) for p in family.PUBLISHED if p.configs]
