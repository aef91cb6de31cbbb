"""Settings that say which model, and where: their kinds."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from ses_jax.engine.settings import Kind, shown
from ses_jax.pipelines.base import Pipeline

# What `load_pipeline` takes that is a setting of its own.
APART = ("source", "mesh")


def _model(value: Any) -> Any:
    if isinstance(value, Pipeline):
        return value
    if isinstance(value, str | os.PathLike):
        return check_path(value, "model") if isinstance(value, str) else Path(check_path(value, "model"))
    if any(kind.__module__.partition(".")[0] == "diffusers" for kind in type(value).__mro__):
        raise ValueError(
            f"model={type(value).__name__} is a pipeline of diffusers; pass the folder or Hugging Face id that it was "
            "loaded from"
        )
    raise TypeError


def check_path(value: Any, name: str) -> str | os.PathLike[str]:
    """A path as it is.

    Raises:
      ValueError: naming the setting, for one that no file can have.
    """
    try:
        encoded = b"\0" if isinstance(value, bytes) else os.fsencode(value)
    except (UnicodeEncodeError, TypeError):
        encoded = b"\0"
    if b"\0" in encoded:
        raise ValueError(f"{name}={shown(value)} is no path")
    return value


def _mesh(value: Any) -> Any:
    if not isinstance(value, str | Mesh):
        raise TypeError
    return value


def _load(value: Any) -> dict[str, Any]:
    names = list(value) if isinstance(value, Mapping) else [None]
    if not all(isinstance(name, str) for name in names):
        raise TypeError
    for name in APART:
        if name in names:
            raise ValueError(f"load={shown(value)}: {name!r} is a setting of its own; pass it beside load")
    return dict(value)


MODEL = Kind('"demo", a folder, a Hugging Face id or a loaded pipeline', _model, _model)
MESH = Kind('a mesh such as "data=4,model=2"', _mesh, _mesh)
LOAD = Kind('a mapping of options such as {"offload_text_encoder": True}', _load, _load)
