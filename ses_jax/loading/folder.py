"""Whole checkpoint folders, published layout to converted and back: networks are converted, small files are copied."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp

from ses_jax.convert import clip
from ses_jax.convert.files import INDEX, read_json
from ses_jax.convert.table import Component
from ses_jax.loading import configs, network
from ses_jax.models import quantized

# Weights in any layout; what is not a weight is small, and copied.
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf"}


def components(folder: Path, families: Mapping[str, ModuleType]) -> dict[str, Component]:
    """The networks of a checkpoint, by subfolder ("." is the folder itself).

    Args:
      folder: a pipeline (`model_index.json`), with or without its own reward in `clip/`, or a CLIP checkpoint.
      families: by pipeline class, the modules whose `COMPONENTS` say what a pipeline consists of.

    Raises:
      ValueError: naming the folder, for a pipeline or a model that is not known.
    """
    if not (folder / "model_index.json").is_file():
        model_type = read_json(folder / "config.json").get("model_type")
        if model_type != "clip":
            raise ValueError(f"{folder}: model type {model_type!r} is not supported; expected a pipeline or 'clip'")
        return {".": clip.COMPONENT}
    name = read_json(folder / "model_index.json").get("_class_name")
    if not isinstance(name, str) or name not in families:
        raise ValueError(f"{folder}: pipeline class {name!r} is not supported; known: {', '.join(families)}")
    reward = {"clip": clip.COMPONENT} if (folder / "clip").is_dir() else {}
    return families[name].COMPONENTS | reward


def convert(
    source: Path,
    out: Path,
    parts: Mapping[str, Component],
    *,
    dtype: Any = None,
    drop_unused: bool = False,
    export: bool = False,
    quantize: str | None = None,
) -> None:
    """Converts a checkpoint folder.

    Args:
      source: published or converted.
      out: appears only when it is complete.
      parts: its networks, from `components`.
      dtype: of the weights that are written; None keeps that of the source.
      drop_unused: leave out the tensors that no network loads; such a folder can't be exported.
      export: write the published layout.
      quantize: "int8" or "fp8" writes the large kernels in eight bits; such a folder can't be exported.

    Raises:
      FileExistsError: if `out` is there already.
      ValueError: naming the file, and the tensors where there are any to name, if something does not fit.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already; choose a new folder")
    if export and quantized.check_kind(quantize):
        raise ValueError(f"cannot export to {out} quantised: no published layout has our {quantize}; leave one out")
    out.parent.mkdir(parents=True, exist_ok=True)
    dtype = dtype and jnp.dtype(dtype)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        unfinished = Path(scratch) / out.name
        _copy_small_files(source, unfinished)
        for name, component in parts.items():
            loaded = network.load(source / name, component, dtype=dtype, quantize=quantize)
            if export:
                network.save_published(unfinished / name, component, loaded)
            else:
                network.save_converted(unfinished / name, loaded, drop_unused=drop_unused)
        unfinished.rename(out)


def _copy_small_files(source: Path, out: Path) -> None:
    """Copies everything but weights; file by file, because folders may be read-only and files may be links."""
    for name in _small_files(source):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, out / name)


def _small_files(folder: Path) -> Iterator[Path]:
    """What is no weights in a folder, also where a subfolder is a link to that of another checkpoint."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        inside = os.path.realpath(parent)
        folders[:] = [each for each in folders if not _leads_back(inside, os.path.join(parent, each))]
        names = (Path(parent, file).relative_to(folder) for file in files)
        yield from (name for name in names if (folder / name).is_file() and not _is_weights(name))


def _leads_back(inside: str, folder: str) -> bool:
    """Whether a folder is one that holds it."""
    return Path(inside).is_relative_to(os.path.realpath(folder))


def _is_weights(name: Path) -> bool:
    hidden = any(part.startswith(".") for part in name.parts)
    ours = configs.PARAMS in name.parts or name.name == network.CONVERSION
    return hidden or ours or name.suffix in WEIGHT_SUFFIXES or name.name.endswith(INDEX)
