"""A found noise as a folder for another program.

diffusers   noise.safetensors ("latents", as `latents=` takes it) and generate.py, which makes the image
comfyui     ses_noise.latent, ses_noise/ (a custom node that feeds it to the sampler) and workflow.json
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save

from ses_jax.exports import comfyui, layouts
from ses_jax.loading import hub

# "organisation/name", and a file in it.
HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+?)[:/](.+)")
PEFT_FILE = "adapter_model.safetensors"
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
# The adapters of the search's model: what diffusers loads, the file in it, and the strength.
ADAPTERS = {adapters!r}
# How the search's model differed from MODEL, by arguments of ses_jax.load_pipeline; nothing of it is loaded here.
CHANGES = {changes!r}
LATENTS = load_file(Path(__file__).with_name("noise.safetensors"))["latents"]


def adapted(pipe):
    """The pipeline with the adapters, which takes the package peft."""
    for place, (source, file, _) in enumerate(ADAPTERS):
        pipe.load_lora_weights(source, adapter_name=f"adapter_{{place}}", **({{"weight_name": file}} if file else {{}}))
    if ADAPTERS:
        names = [f"adapter_{{place}}" for place in range(len(ADAPTERS))]
        pipe.set_adapters(names, adapter_weights=[strength for *_, strength in ADAPTERS])
    return pipe


@torch.no_grad()
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
    render(adapted(pipe).to("cuda" if gpu else "cpu")).save("best.png")


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
    adapters = [_adapter(*pair) for pair in config.get("lora", ())]
    taken = ("lora",) if None not in adapters else ()
    changes = {name: config[name] for name in ("lora", "schedule", "quantize", "files") if config.get(name)}
    changes = {name: change for name, change in changes.items() if name not in taken}
    facts = {"prompt": prompt, "model": _model(config), "changes": changes, "adapters": adapters if taken else []}
    snippet = SNIPPET.format(arguments="\n".join(lines), **facts, **names)
    about = {"prompt": prompt, "family": config["family"], "made_by": "ses_jax"}
    return {"noise.safetensors": save({"latents": latents}, about), "generate.py": snippet}


def _adapter(source: str, strength: float) -> tuple[str, str | None, float] | None:
    """What diffusers loads an adapter by; None where it would miss the scale that peft keeps in a file beside it."""
    path = Path(source).expanduser()
    if path.is_dir() and len(list(path.glob("*.safetensors"))) == 1:
        path = next(path.glob("*.safetensors"))
    if path.is_file():
        folder, file = str(path.absolute().parent), path.name
    else:
        name = HUB_FILE.fullmatch(source)
        folder, file = (source, None) if name is None else name.groups()
    return None if file == PEFT_FILE or (Path(folder).is_dir() and file is None) else (folder, file, strength)


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
