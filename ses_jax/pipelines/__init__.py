"""Families of text-to-image models: one file each, and the registry that finds the right one for a checkpoint."""

from types import ModuleType
from typing import Any

from ses_jax import hub
from ses_jax.pipelines import z_image
from ses_jax.pipelines.base import Defaults, Guidance, Pipeline

__all__ = ["FAMILIES", "Defaults", "Guidance", "Pipeline", "load_pipeline"]

FAMILIES: dict[str, ModuleType] = {"ZImagePipeline": z_image}


def load_pipeline(source: str = "demo", *, dtype: Any = None) -> Pipeline:
    """Loads a text-to-image model.

    Args:
      source: "demo" (the small checkpoint inside this package), a local folder in diffusers layout, a folder written by
        `python -m ses_jax.convert`, or a Hugging Face id such as "Tongyi-MAI/Z-Image-Turbo".
      dtype: of the weights; None is bfloat16 on GPU and TPU, float32 on CPU.

    Returns:
      The `Pipeline` of its family.

    Raises:
      ValueError: for an unknown source or model family, or a broken checkpoint; the message names file and tensor.
    """
    folder = hub.resolve(source)
    name = hub.read_json(folder / "model_index.json").get("_class_name")
    if name not in FAMILIES:
        raise ValueError(f"{source}: pipeline class {name!r} is not supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[name].load(folder, dtype=dtype)
