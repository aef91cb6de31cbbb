"""Z-Image elsewhere: its noise is the same everywhere.

diffusers' guidance is ours; ComfyUI counts from the negative prompt, so that its scale is one more.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from ses_jax.exports.layouts import Comfy, option


def to_latents(noise: Float[np.ndarray, "b c h w"], config: Mapping[str, Any]) -> np.ndarray:
    """As it is."""
    return noise


def to_noise(latents: np.ndarray, shape: tuple[int, int, int]) -> Float[np.ndarray, "b c h w"] | None:
    """There is no other layout."""
    return None


def arguments(config: Mapping[str, Any]) -> dict[str, str]:
    """Of `ZImagePipeline`."""
    named = {"guidance_scale": option(config, "scale", 0.0)}
    if named["guidance_scale"] > 0:
        named["cfg_normalization"] = option(config, "normalization", 0.0)
        named["cfg_truncation"] = option(config, "truncation", 1.0)
        named["negative_prompt"] = config.get("negative_prompt") or ""
    return {name: repr(value) for name, value in named.items()}


def comfy(config: Mapping[str, Any]) -> Comfy:
    """Turbo has no guidance."""
    scale = option(config, "scale", 0.0)
    network = "z_image_bf16.safetensors" if scale > 0 else "z_image_turbo_bf16.safetensors"
    cfg = 1 + scale if scale > 0 else None
    return Comfy(network, ("qwen_3_4b.safetensors",), "lumina2", "ae.safetensors", cfg=cfg)
