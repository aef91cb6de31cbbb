"""What ComfyUI needs for a found noise: a custom node, and a workflow in the form of its API."""

from collections.abc import Mapping
from typing import Any

from ses_jax.exports.layouts import Comfy

LATENT = "ses_noise.latent"

NODE = '''"""A node of ComfyUI that starts sampling from noise which ses_jax found.

Put this folder into ComfyUI/custom_nodes and the .latent file into ComfyUI/input. The node gives the noise, for
SamplerCustomAdvanced, and the sigmas of the search.
"""

import hashlib
from pathlib import Path

import folder_paths
import safetensors.torch


class FoundNoise:
    """What SamplerCustomAdvanced takes as noise."""

    seed = 0

    def __init__(self, noise):
        self.noise = noise

    def generate_noise(self, input_latent):
        samples = input_latent["samples"]
        # Some models have an axis of time, which is of length 1 for images.
        shapes = [[n for n in x.shape[1:] if n != 1] for x in (self.noise, samples)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the noise has shape {tuple(self.noise.shape)}, the latent image {tuple(samples.shape)}: "
                "use the model, width and height of the search"
            )
        noise = self.noise.reshape(1, *samples.shape[1:]).to(samples.dtype)
        return noise.expand(samples.shape).clone().cpu()


class SESNoise:
    """Noise and sigmas of a .latent file."""

    @classmethod
    def INPUT_TYPES(cls):
        files = sorted(path.name for path in Path(folder_paths.get_input_directory()).glob("*.latent"))
        return {"required": {"latent": (files,)}}

    RETURN_TYPES = ("NOISE", "SIGMAS")
    FUNCTION = "load"
    CATEGORY = "sampling/custom_sampling/noise"

    def load(self, latent):
        tensors = safetensors.torch.load_file(folder_paths.get_annotated_filepath(latent))
        return FoundNoise(tensors["latent_tensor"].float()), tensors["sigmas"]

    @classmethod
    def IS_CHANGED(cls, latent):
        return hashlib.sha256(Path(folder_paths.get_annotated_filepath(latent)).read_bytes()).hexdigest()


NODE_CLASS_MAPPINGS = {"SESNoise": SESNoise}
NODE_DISPLAY_NAME_MAPPINGS = {"SESNoise": "SES Noise (ses_jax)"}
'''


def workflow(parts: Comfy, prompt: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The nodes by name, as `POST /prompt` and the window take them; an input `[name, i]` is output i of a node."""
    size = {"width": config["width"], "height": config["height"], "batch_size": 1}
    sampler = {"noise": ["noise", 0], "sigmas": ["noise", 1], "sampler": ["euler", 0], "latent_image": ["empty", 0]}
    return {
        "network": _node("UNETLoader", unet_name=parts.network, weight_dtype="default"),
        "text_encoder": _text_encoder(parts),
        "autoencoder": _node("VAELoader", vae_name=parts.autoencoder),
        "prompt": _node("CLIPTextEncode", text=prompt, clip=["text_encoder", 0]),
        **_guider(parts, config),
        "noise": _node("SESNoise", latent=LATENT),
        "euler": _node("KSamplerSelect", sampler_name="euler"),
        "empty": _node(parts.empty, **size),
        "sampler": _node("SamplerCustomAdvanced", guider=["guider", 0], **sampler),
        "decode": _node("VAEDecode", samples=["sampler", 0], vae=["autoencoder", 0]),
        "save": _node("SaveImage", images=["decode", 0], filename_prefix="ses_jax"),
    }


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _text_encoder(parts: Comfy) -> dict[str, Any]:
    if len(parts.text_encoders) == 1:
        return _node("CLIPLoader", clip_name=parts.text_encoders[0], type=parts.text_kind)
    names = {f"clip_name{i}": name for i, name in enumerate(parts.text_encoders, 1)}
    return _node("DualCLIPLoader", **names, type=parts.text_kind)


def _guider(parts: Comfy, config: Mapping[str, Any]) -> dict[str, Any]:
    """The guider, and what comes before it."""
    nodes, positive = {}, ["prompt", 0]
    if parts.distilled is not None:
        nodes["guidance"] = _node("FluxGuidance", conditioning=positive, guidance=parts.distilled)
        positive = ["guidance", 0]
    if parts.cfg is None:
        return nodes | {"guider": _node("BasicGuider", model=["network", 0], conditioning=positive)}
    negative = _node("CLIPTextEncode", text=config.get("negative_prompt") or "", clip=["text_encoder", 0])
    guided = {"positive": positive, "negative": ["negative", 0], "cfg": parts.cfg}
    return nodes | {"negative": negative, "guider": _node("CFGGuider", model=["network", 0], **guided)}
