"""Qwen-Image elsewhere: diffusers packs 2x2 cells of its noise into tokens, ComfyUI gives it an axis of time.

ComfyUI's guidance does not rescale each token to the norm of the positive branch, so its images differ where guidance
is on.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from ses_jax.exports.layouts import Comfy, option, pack, unpack

to_noise = unpack


def to_latents(noise: Float[np.ndarray, "b c h w"], config: Mapping[str, Any]) -> Float[np.ndarray, "b s d"]:
    """Tokens of 64 numbers."""
    return pack(noise)


def arguments(config: Mapping[str, Any]) -> dict[str, str]:
    """Of `QwenImagePipeline`; without a negative prompt it would leave guidance out."""
    negative = config.get("negative_prompt")
    return {
        "true_cfg_scale": repr(option(config, "scale", 4.0)),
        "negative_prompt": repr(" " if negative is None else negative),
    }


def comfy(config: Mapping[str, Any]) -> Comfy:
    """Guidance is classifier-free."""
    scale = option(config, "scale", 4.0)
    encoders = ("qwen_2.5_vl_7b.safetensors",)
    cfg = scale if scale > 1 else None
    return Comfy("qwen_image_bf16.safetensors", encoders, "qwen_image", "qwen_image_vae.safetensors", cfg=cfg)
