"""Noise that comes from somewhere: arrays, tensors and files, in the layouts that other programs have."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file

from ses_jax.exports import layouts

# By ending, the name of the tensor that a file's noise has.
TENSORS = {".safetensors": "latents", ".latent": "latent_tensor"}


def read(source: Any) -> np.ndarray:
    """Noise as float32, in whatever layout it has.

    Args:
      source: an array; a tensor of torch; a `.npy` file; a `.safetensors` file with one tensor, or one named "latents";
        a `.latent` file of ComfyUI; or the folder of a result.

    Raises:
      ValueError: for files that hold no noise, and for values that are not finite.
      OSError: if a file cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        array, name = _from_file(Path(os.path.expanduser(source))), f"noise of {source}"
    else:
        # A tensor of torch may lie on another device, and be of a dtype that NumPy does not know.
        source = source.detach().cpu().float() if hasattr(source, "detach") else source
        array, name = np.asarray(source), "noise"
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} is of dtype {array.dtype}; it must be of floating point")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds values that are not finite")
    return array


def _from_file(path: Path) -> np.ndarray:
    path = path / "noise.npy" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:  # np.load takes what it does not know for a pickle, and says so
                return np.lib.format.read_array(file, allow_pickle=False)
        tensors = load_file(path) if path.suffix in TENSORS else None
    except Exception as error:  # safetensors raises one of its own
        raise ValueError(f"{path} cannot be read: {error}") from error
    if tensors is None:
        raise ValueError(f"{path}: noise is a .npy, .safetensors or .latent file, or the folder of a result")
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    if TENSORS[path.suffix] not in tensors:
        raise ValueError(f"{path} has no tensor {TENSORS[path.suffix]!r} but {', '.join(sorted(tensors))}")
    return tensors[TENSORS[path.suffix]]


def as_noise(array: np.ndarray, family: str, shape: tuple[int, int, int], count: int) -> Float[np.ndarray, "b c h w"]:
    """Noise of `count` images as the family's pipeline has it.

    Args:
      array: with or without a leading axis of images, in the pipeline's own layout, in that of the family's diffusers
        pipeline, or in ComfyUI's. One image's noise stands for all.
      family: name of the pipeline class.
      shape: `(C, h, w)` of one image.
      count: how many images.

    Raises:
      ValueError: for an array that is none of these, saying which shapes are.
    """
    for candidate in (array, array[None]):
        found = _in_layout(candidate, family, tuple(shape))
        if found is not None and len(found) in (1, count):
            return np.repeat(found, count // len(found), axis=0)
    raise ValueError(f"noise has shape {array.shape}; {_wanted(family, tuple(shape), count)}")


def _in_layout(array: np.ndarray, family: str, shape: tuple[int, int, int]) -> np.ndarray | None:
    if array.shape[1:] == shape:
        return array
    if array.ndim == 5 and array.shape[2] == 1:  # an image is a film of one frame to some of ComfyUI's models
        return _in_layout(array[:, :, 0], family, shape)
    return layouts.of(family).to_noise(array, shape) if _is_known(family) else None


def _wanted(family: str, shape: tuple[int, int, int], count: int) -> str:
    text = f"images of this size and model need {shape}, or {(count, *shape)} for {count}"
    if not _is_known(family):
        return text
    height = shape[1] * 8
    elsewhere = layouts.of(family).to_latents(np.zeros((1, *shape), np.float32), {"height": height}).shape
    return text if elsewhere[1:] == shape else f"{text}, or {elsewhere} as in diffusers"


def _is_known(family: str) -> bool:
    return family in layouts.FAMILIES
