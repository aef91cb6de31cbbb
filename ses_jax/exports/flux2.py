"""FLUX.2 elsewhere: the noise is the grid that the network sees, 2x2 cells of the autoencoder in its channels."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from ses_jax.exports.layouts import Comfy, option, patchify, unpatchify

CELL = 16


def to_latents(noise: Float[np.ndarray, "b c h w"], config: Mapping[str, Any]) -> Float[np.ndarray, "b d y x"]:
    """As it is, but for noise of `band="unpacked"`, which lies on the autoencoder's grid."""
    return noise if noise.shape[2] == config["height"] // CELL else patchify(noise)


def to_noise(latents: np.ndarray, shape: tuple[int, int, int]) -> Float[np.ndarray, "b c h w"] | None:
    """Where the search has `band="unpacked"`."""
    return unpatchify(latents, shape)


def arguments(config: Mapping[str, Any]) -> dict[str, str]:
    """Of `Flux2Pipeline` and `Flux2KleinPipeline`, which takes negative prompts only encoded."""
    named = {"guidance_scale": repr(option(config, "scale", 1.0))}
    if config.get("negative_prompt"):
        named["negative_prompt_embeds"] = f"pipe.encode_prompt({config['negative_prompt']!r})[0]"
    return named


def comfy(config: Mapping[str, Any]) -> Comfy:
    """dev's guidance is an input of the network, klein base has classifier-free guidance, klein none."""
    scale = option(config, "scale", 1.0)
    empty = "EmptyFlux2LatentImage"
    if config["family"] == "Flux2Pipeline":
        encoders = ("mistral_3_small_flux2_bf16.safetensors",)
        return Comfy("flux2-dev.safetensors", encoders, "flux2", "flux2-vae.safetensors", empty, distilled=scale)
    cfg = scale if scale > 1 else None
    kind = "klein" if cfg is None else "klein-base"
    size, encoder = ("9b", "qwen_3_8b") if "9b" in str(config.get("model")).lower() else ("4b", "qwen_3_4b")
    network = f"flux-2-{kind}-{size}.safetensors"
    return Comfy(network, (f"{encoder}.safetensors",), "flux2", "flux2-vae.safetensors", empty, cfg=cfg)
