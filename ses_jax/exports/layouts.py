"""What families share when their noise goes elsewhere.

A family's module here is named like its pipeline's, and has

    to_latents  `(noise [B, C, h, w], config) -> latents` as the family's diffusers pipeline takes them
    to_noise    `(latents, (C, h, w)) -> noise [B, C, h, w]`, the way back; None where the shapes say that it is no such
    arguments   `(config) -> {name: Python expression}`, more arguments of the diffusers pipeline
    comfy       `(config) -> Comfy`, the parts of its ComfyUI workflow

where `config` is that of a `SearchResult`.
"""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ses_jax.pipelines.registry import FAMILIES

PATCH = 2


class Comfy(NamedTuple):
    """What differs between families in a ComfyUI workflow.

    Attributes:
      network, text_encoders, autoencoder: file names that ComfyUI's own examples use; people may have others.
      text_kind: what the loader of the text encoders calls the family.
      empty: the node that makes an empty latent image.
      distilled: guidance as an input of the network; None for networks without it.
      cfg: scale of classifier-free guidance; None is off.
    """

    network: str
    text_encoders: tuple[str, ...]
    text_kind: str
    autoencoder: str
    empty: str = "EmptySD3LatentImage"
    distilled: float | None = None
    cfg: float | None = None


def of(family: str) -> ModuleType:
    """The module of this room that stands for a pipeline class.

    Raises:
      ValueError: for a model of no family that other programs know.
    """
    if family not in FAMILIES:
        raise ValueError(f"noise of {family!r} has no place in other programs; known: {', '.join(FAMILIES)}")
    return importlib.import_module(f"{__package__}.{FAMILIES[family].__name__.rpartition('.')[2]}")


def pack(noise: Float[np.ndarray, "b c h w"]) -> Float[np.ndarray, "b s d"]:
    """`[B, C, h, w]` to row-major tokens `[B, h/2 * w/2, 4 C]`, ordered (channel, row, column)."""
    batch, channels, rows, columns = noise.shape
    cells = noise.reshape(batch, channels, rows // PATCH, PATCH, columns // PATCH, PATCH)
    return cells.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH**2)


def unpack(tokens: np.ndarray, shape: tuple[int, int, int]) -> Float[np.ndarray, "b c h w"] | None:
    """The inverse of `pack` for noise of that shape; None for what is no such tokens."""
    channels, rows, columns = shape
    if tokens.ndim != 3 or tokens.shape[1:] != (rows * columns // PATCH**2, channels * PATCH**2):
        return None
    cells = tokens.reshape(-1, rows // PATCH, columns // PATCH, channels, PATCH, PATCH)
    return cells.transpose(0, 3, 1, 4, 2, 5).reshape(-1, *shape)


def patchify(noise: Float[np.ndarray, "b c h w"]) -> Float[np.ndarray, "b d y x"]:
    """`[B, C, h, w]` to `[B, 4 C, h/2, w/2]`, channels ordered (channel, row, column)."""
    batch, _, rows, columns = noise.shape
    return pack(noise).transpose(0, 2, 1).reshape(batch, -1, rows // PATCH, columns // PATCH)


def unpatchify(latents: np.ndarray, shape: tuple[int, int, int]) -> Float[np.ndarray, "b c h w"] | None:
    """The inverse of `patchify` for noise of that shape; None for what is no such latents."""
    channels, rows, columns = shape
    if latents.ndim != 4 or latents.shape[1:] != (channels * PATCH**2, rows // PATCH, columns // PATCH):
        return None
    return unpack(latents.reshape(*latents.shape[:2], -1).transpose(0, 2, 1), shape)


def option(config: Mapping[str, Any], name: str, usual: float) -> float:
    """An option of guidance, which is a number (the option "scale") or a mapping."""
    guidance = config.get("guidance")
    guidance = {} if guidance is None else guidance if isinstance(guidance, Mapping) else {"scale": guidance}
    return guidance.get(name, usual)
