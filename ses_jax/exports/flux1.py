"""FLUX.1 elsewhere: diffusers packs 2x2 cells of its noise into tokens, ComfyUI leaves it as it is."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from ses_jax.exports.layouts import Comfy, option, pack, unpack

to_noise = unpack
# CLIP-L and T5.
TEXT_ENCODERS = ("clip_l.safetensors", "t5xxl_fp16.safetensors")


def to_latents(noise: Float[np.ndarray, "b c h w"], config: Mapping[str, Any]) -> Float[np.ndarray, "b s d"]:
    """Tokens of 64 numbers."""
    return pack(noise)


def arguments(config: Mapping[str, Any]) -> dict[str, str]:
    """Of `FluxPipeline`; schnell reads fewer tokens of T5."""
    tokens = config.get("load", {}).get("max_tokens")
    named = {
        "guidance_scale": repr(option(config, "scale", 3.5)),
        "max_sequence_length": repr(tokens) if tokens else "512 if pipe.transformer.config.guidance_embeds else 256",
    }
    if _cfg(config) is not None:
        named |= {"true_cfg_scale": repr(_cfg(config)), "negative_prompt": repr(config["negative_prompt"])}
    return named


def comfy(config: Mapping[str, Any]) -> Comfy:
    """dev's guidance is an input of the network; schnell has none."""
    scale = option(config, "scale", 3.5)
    network = "flux1-dev.safetensors" if scale > 0 else "flux1-schnell.safetensors"
    return Comfy(network, TEXT_ENCODERS, "flux", "ae.safetensors", distilled=scale or None, cfg=_cfg(config))


def _cfg(config: Mapping[str, Any]) -> float | None:
    scale = option(config, "true_cfg", 1.0)
    return scale if scale > 1 and config.get("negative_prompt") is not None else None
