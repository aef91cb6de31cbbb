"""A found noise as a folder for another program.

diffusers   noise.safetensors ("latents", as `latents=` takes it) and generate.py, which makes the image
comfyui     ses_noise.latent, ses_noise/ (a custom node that feeds it to the sampler) and workflow.json
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save

from ses_jax.exports import comfyui, layouts
from ses_jax.loading import hub

SNIPPET = '''"""The image that ses_jax found, made by diffusers.

python generate.py [MODEL] makes best.png; MODEL is the search's own by default. The noise came from a search at
{steps} steps of {width} x {height} pixels: other sizes and steps are other images.
"""

import sys
from pathlib import Path

import torch
from diffusers import {family}
from safetensors.torch import load_file

MODEL = {model!r}
PROMPT = {prompt!r}
# How the search's model differed from MODEL, by arguments of ses_jax.load_pipeline; nothing of it is loaded here.
CHANGES = {changes!r}
LATENTS = load_file(Path(__file__).with_name("noise.safetensors"))["latents"]


def render(pipe, **more):
    """The image; `more` are arguments of the pipeline."""
    own = {{
        "height": {height},
        "width": {width},
        "num_inference_steps": {steps},
{arguments}
    }}
    return pipe(prompt=PROMPT, latents=LATENTS.to(pipe.device), **(own | more)).images[0]


def main():
    if CHANGES:
        print(f"another image than the search's, whose model was loaded with {{CHANGES}}", file=sys.stderr)
    gpu = torch.cuda.is_available()
    model = sys.argv[1] if len(sys.argv) > 1 else MODEL
    pipe = {family}.from_pretrained(model, torch_dtype=torch.bfloat16 if gpu else torch.float32)
    render(pipe.to("cuda" if gpu else "cpu")).save("best.png")


if __name__ == "__main__":
    main()
'''


def export(noise: Float[np.ndarray, "c h w"], prompt: str, config: Mapping[str, Any], to: str) -> dict[str, bytes]:
    """The files of the folder, by their names.

    Args:
      noise: of the image.
      prompt: of the image.
      config: of the result.
      to: a name of `TARGETS`.

    Raises:
      ValueError: for another target, and for a model that other programs don't know.
    """
    if to not in TARGETS:
        raise ValueError(f"cannot export to {to!r}; known: {', '.join(TARGETS)}")
    needed = ("family", "model", *(("sigmas",) if to == "comfyui" else ()))
    unknown = [name for name in needed if name not in config]
    if unknown:
        raise ValueError(f"the result does not say its {', '.join(unknown)}: it is of an older version; search again")
    files = TARGETS[to](np.asarray(noise, np.float32)[None], prompt, config)
    return {name: content.encode() if isinstance(content, str) else content for name, content in files.items()}


def for_diffusers(
    noise: Float[np.ndarray, "1 c h w"], prompt: str, config: Mapping[str, Any]
) -> dict[str, str | bytes]:
    """The files' contents by name."""
    family = layouts.of(config["family"])
    latents = np.ascontiguousarray(family.to_latents(noise, config))
    lines = [f'        "{name}": {value},' for name, value in family.arguments(config).items()]
    names = {name: config[name] for name in ("family", "height", "width", "steps")}
    changes = {name: config[name] for name in ("lora", "schedule", "quantize", "files") if config.get(name)}
    facts = {"prompt": prompt, "model": _model(config), "changes": changes}
    snippet = SNIPPET.format(arguments="\n".join(lines), **facts, **names)
    about = {"prompt": prompt, "family": config["family"], "made_by": "ses_jax"}
    return {"noise.safetensors": save({"latents": latents}, about), "generate.py": snippet}


def _model(config: Mapping[str, Any]) -> str:
    """What diffusers loads: of the packaged model, its folder on this machine."""
    return str(hub.DEMO) if config["model"] == "demo" else config["model"]


def for_comfyui(noise: Float[np.ndarray, "1 c h w"], prompt: str, config: Mapping[str, Any]) -> dict[str, str | bytes]:
    """The files' contents by name."""
    family = layouts.of(config["family"])
    # ComfyUI has FLUX.2's noise as diffusers has it, and the others' before it is packed into tokens.
    latents = family.to_latents(noise, config)
    latents = np.ascontiguousarray(latents if latents.ndim == 4 else noise)
    tensors = {
        "latent_tensor": latents,
        "latent_format_version_0": np.zeros(0, np.float32),  # says that nothing is to be scaled
        "sigmas": np.asarray(config["sigmas"], np.float32),
    }
    workflow = comfyui.workflow(family.comfy(config), prompt, config)
    return {
        comfyui.LATENT: save(tensors, {"prompt": prompt}),
        "ses_noise/__init__.py": comfyui.NODE,
        "workflow.json": json.dumps(workflow, indent=2) + "\n",
    }


TARGETS = {"diffusers": for_diffusers, "comfyui": for_comfyui}
