"""Families of text-to-image models: one file each, and the registry that finds the right one for a checkpoint."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ses_jax.loading import hub, partition
from ses_jax.pipelines import flux1, flux2, qwen_image, z_image
from ses_jax.pipelines.base import Parts, Pipeline, Published

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
      options: the family's own, see its module in `ses_jax.pipelines`.

    Returns:
      The `Pipeline` of its family.

    Raises:
      ValueError: for an unknown source, model family or option, a mesh that does not fit, or a broken checkpoint; the
        message names file and tensor.
    """
    dtype = hub.params_dtype(dtype)
    folder = hub.resolve(source)
    index = hub.read_json(folder / "model_index.json")
    family = _family(source, index.get("_class_name"))
    _check_options(source, family, options)
    scheduler = hub.read_json(folder / "scheduler" / "scheduler_config.json")
    tokenizers = {name: hub.load_tokenizer(folder / name) for name in family.TOKENIZERS}
    mesh = partition.parse_mesh(mesh)
    rules = {name: part.partition for name, part in family.COMPONENTS.items()}
    loaded = {
        name: hub.load_component(
            folder / name,
            part,
            dtype=dtype,
            sharding=hub.on_host if offload_text_encoder else partition.loader(mesh, rules[name]),
        )
        for name, part in family.COMPONENTS.items()
    }
    configs = {name: config for name, (config, _) in loaded.items()}
    params = {name: params for name, (_, params) in loaded.items()}
    parts = Parts(folder, configs, params, tokenizers, scheduler, index, hub.settings(folder))
    pipeline = dataclasses.replace(family.assemble(parts, **options), source=str(source), options=options)
    return _placed(family, pipeline, mesh)


def abstract_pipeline(source: str, *, dtype: Any = jnp.bfloat16, mesh: Mesh | None = None, **options: Any) -> Pipeline:
    """A published model as shapes: its functions can be traced, planned and compiled without weights.

    Args:
      source: the Hugging Face id of one of the families' `PUBLISHED` checkpoints.
      dtype: of the weights.
      mesh: devices to compile for, which need not be there (see `jax.experimental.topologies`); None is none in
        particular.
      options: the family's own.

    Returns:
      A `Pipeline` whose params are `jax.ShapeDtypeStruct`s and which has no tokenizer (see `blank_tokens`).

    Raises:
      ValueError: for another source.
    """
    for family in FAMILIES.values():
        for published in family.PUBLISHED:
            if published.source == source and published.configs:
                _check_options(source, family, options)
                pipeline = family.assemble(_abstract_parts(family, published, dtype), **options)
                return pipeline if mesh is None else _placed(family, pipeline, mesh)
    raise ValueError(f"{source}: no published model of that name; known: {', '.join(_published_names())}")


def _placed(family: ModuleType, pipeline: Pipeline, mesh: Mesh | None) -> Pipeline:
    """The pipeline on a mesh."""
    rules = {name: part.partition for name, part in family.COMPONENTS.items()}
    return dataclasses.replace(pipeline, mesh=mesh, place=functools.partial(partition.place, mesh, rules))


def _abstract_parts(family: ModuleType, published: Published, dtype: Any) -> Parts:
    def cast(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    params = {
        name: jax.tree.map(cast, component.abstract(published.configs[name]))
        for name, component in family.COMPONENTS.items()
    }
    return Parts(Path(published.source), published.configs, params, {}, published.scheduler, published.index)


def _family(source: str, name: str | None) -> ModuleType:
    if name not in FAMILIES:
        raise ValueError(f"{source}: pipeline class {name!r} is not supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _check_options(source: str, family: ModuleType, options: Mapping[str, Any]) -> None:
    unknown = options.keys() - set(family.OPTIONS)
    if unknown:
        known = ", ".join(family.OPTIONS) or "none"
        raise ValueError(f"{source}: unknown options {sorted(unknown)}; this family takes: {known}")


def _published_names() -> list[str]:
    return [p.source for family in dict.fromkeys(FAMILIES.values()) for p in family.PUBLISHED if p.configs]
