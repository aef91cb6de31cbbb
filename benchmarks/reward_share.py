"""How much of a generation goes into decoding and scoring, and that no image leaves the device for it.

`python benchmarks/reward_share.py` runs on the demo. With a published model, say `--model Tongyi-MAI/Z-Image-Turbo`, it
runs that and CLIP ViT-H/14 at their real sizes, on random bfloat16 weights made on the device, which must hold them
(`ses-jax plan` says whether it does). Generations run under a guard that refuses transfers from the device to the host.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import random_weights
import tyro

import ses_jax
from ses_jax.engine import denoising, generation, previews, tasks
from ses_jax.engine.program import Inputs, Program
from ses_jax.loading.programs import compiled


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Times the parts of one generation.

    Attributes:
      model: the demo, or the Hugging Face id of a published model, which gets random weights.
      height, width, preview_steps: None is the model's default.
      population: candidates.
      chunk: candidates at a time; None is as many as fit.
      repeats: timed runs; the median counts.
      out: folder of the JSON.
    """

    model: str = "demo"
    height: int | None = None
    width: int | None = None
    preview_steps: int | None = None
    population: int = 10
    chunk: int | None = None
    repeats: int = 5
    out: Path = common.RESULTS


def main(args: Arguments) -> Path:
    pipeline, reward = demo() if args.model == "demo" else random_weights.random_model(args.model)
    config = ses_jax.SearchConfig(
        budget=args.population,
        population=args.population,
        elites=min(5, args.population - 1),
        height=args.height,
        width=args.width,
        preview_steps=args.preview_steps,
        chunk=args.chunk,
    ).resolve(pipeline)
    task = tasks.fitted(tasks.prepare(pipeline, reward, config, ["a red circle left of a blue square"], [0]))
    state = tasks.first_state(task)
    shape = pipeline.noise_shape(config.height, config.width)
    noise = jax.random.normal(jax.random.key(1), (args.population, *shape))
    given = task.program, task.params, task.inputs
    step = functools.partial(generation.generation_step, *given, jax.device_put(np.int32(0)), state)
    seconds = {
        "generation": median_seconds(step, args.repeats),
        "denoise": median_seconds(functools.partial(denoise, *given, noise), args.repeats),
        "decode and reward": median_seconds(functools.partial(decode_and_score, *given, noise), args.repeats),
    }
    share = seconds["decode and reward"] / (seconds["denoise"] + seconds["decode and reward"])
    _, scored = step()
    result_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(scored))
    image_bytes = args.population * config.height * config.width * 3 * 4
    print(*(f"{name} {value:.4f} s" for name, value in seconds.items()), sep=", ")
    print(
        f"decode and reward take {share:.1%}; {result_bytes} bytes go to the host, the images are {image_bytes} bytes"
    )
    arguments = {name: value for name, value in dataclasses.asdict(args).items() if name != "out"}
    result = {"arguments": arguments, "config": config.as_json(), "seconds": seconds, "share": share}
    result |= {"bytes_to_host": result_bytes, "bytes_of_images": image_bytes}
    name = f"reward_share_{Path(args.model).name}_{jax.default_backend()}"
    path = common.save(name, result, args.out)
    print(path)
    return path


@compiled(static=1)
def denoise(program: Program, params: Any, inputs: Inputs, noise: jax.Array) -> jax.Array:
    """Noise to latents, as in a generation."""
    model = program.model._replace(decode=lambda params, latents: latents)
    rows = denoising.Rows(noise, jnp.zeros(len(noise), jnp.int32))
    prompts = inputs.sigmas, inputs.condition
    return denoising.images(model, program.chunk, params[0], prompts, rows, denoising.IMAGES)[1]


@compiled(static=1)
def decode_and_score(program: Program, params: Any, inputs: Inputs, latents: jax.Array) -> jax.Array:
    """Latents to scores, as in a generation."""
    rows = denoising.Rows(latents, jnp.zeros(len(latents), jnp.int32))
    finish = previews.components_alone(program, params, inputs)
    return denoising.decoded(program.model, params[0], rows, finish)[0]


def median_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median time of a call that must not copy anything from the device to the host."""
    jax.block_until_ready(function())
    times = []
    with jax.transfer_guard_device_to_host("disallow"):
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(function())
            times.append(time.perf_counter() - start)
    return float(np.median(times))


def demo() -> tuple[ses_jax.Pipeline, ses_jax.Reward]:
    pipeline = ses_jax.load_pipeline("demo")
    return pipeline, ses_jax.load_reward("clip", source=pipeline.folder / "clip")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
