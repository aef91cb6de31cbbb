"""How much of a generation goes into decoding and scoring, and that no image leaves the device for it.

`python benchmarks/reward_share.py` runs on the demo. With `--model z-image-turbo --height 1024 --width 1024` it runs
Z-Image-Turbo and CLIP ViT-H/14 at their real sizes, on random bfloat16 weights made on the device, which takes a GPU or
TPU of about 40 GB. Generations run under a guard that refuses transfers from the device to the host.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import common
import jax
import jax.numpy as jnp
import numpy as np
import tyro

import ses_jax
from ses_jax import engine, generation, rewards, sampler, scorers
from ses_jax.models import autoencoder_kl, clip, decoder_lm, z_image
from ses_jax.pipelines import base, schedule
from ses_jax.pipelines import z_image as family
from ses_jax.preprocess import Preprocessor

CLIP_H = clip.Config(
    text=clip.Tower(1024, 4096, 24, 16, "gelu"), vision=clip.Tower(1280, 5120, 32, 16, "gelu"), projection_dim=1024
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Times the parts of one generation.

    Attributes:
      model: the demo, or a published model's size with random weights.
      height, width: of the images; None is the model's default.
      population: candidates.
      chunk: candidates at a time; None is all.
      repeats: timed runs; the median counts.
    """

    model: Literal["demo", "z-image-turbo"] = "demo"
    height: int | None = None
    width: int | None = None
    population: int = 10
    chunk: int | None = None
    repeats: int = 5


def main(args: Arguments) -> None:
    pipeline, reward = demo() if args.model == "demo" else random_z_image()
    config = ses_jax.SearchConfig(
        budget=args.population,
        population=args.population,
        elites=min(5, args.population - 1),
        height=args.height,
        width=args.width,
        chunk=args.chunk,
    ).resolve(pipeline)
    prompt = "a red circle left of a blue square"
    program = engine._program(pipeline, reward, config, prompt)
    shape = pipeline.noise_shape(config.height, config.width)
    inputs = engine._inputs(pipeline, reward, config, prompt, (jax.random.key(0), jnp.zeros(shape)))
    state = generation.init(program, inputs.low.shape, elites=config.elites, generations=1)
    params = pipeline.params, rewards.device_params(reward)
    noise = jax.random.normal(jax.random.key(1), (args.population, *shape))

    @jax.jit
    def denoise(params, inputs, noise):
        def run(rows):
            condition = generation.repeat_rows(inputs.condition, len(rows))
            return sampler.denoise(
                lambda x, sigma: pipeline.velocity(params[0], x, sigma, condition), rows, inputs.sigmas
            )

        return generation.in_chunks(run, noise, program.chunk)

    @jax.jit
    def decode_and_score(params, inputs, latents):
        def run(rows):
            images = pipeline.decode(params[0], rows)
            return program.score(params[1], images, generation.repeat_rows(inputs.text, len(rows)))

        return generation.in_chunks(run, latents, program.chunk)

    index = jax.device_put(np.int32(0))
    whole = functools.partial(generation.generation_step, program, params, inputs, index, state)
    seconds = {
        "generation": median_seconds(whole, args.repeats),
        "denoise": median_seconds(functools.partial(denoise, params, inputs, noise), args.repeats),
        "decode and reward": median_seconds(functools.partial(decode_and_score, params, inputs, noise), args.repeats),
    }
    share = seconds["decode and reward"] / (seconds["denoise"] + seconds["decode and reward"])
    _, scored = whole()
    result_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(scored))
    image_bytes = args.population * config.height * config.width * 3 * 4
    print(*(f"{name} {value:.4f} s" for name, value in seconds.items()), sep=", ")
    print(
        f"decode and reward take {share:.1%}; {result_bytes} bytes go to the host, the images are {image_bytes} bytes"
    )
    result = {"arguments": dataclasses.asdict(args), "config": config.as_json(), "seconds": seconds, "share": share}
    name = f"reward_share_{args.model}_{jax.default_backend()}"
    print(common.save(name, result | {"bytes_to_host": result_bytes, "bytes_of_images": image_bytes}))


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


def random_z_image() -> tuple[ses_jax.Pipeline, ses_jax.Reward]:
    """Z-Image-Turbo and CLIP ViT-H/14 at their published sizes, with random bfloat16 weights."""
    networks = {
        "transformer": (z_image, z_image.Config()),
        "vae": (autoencoder_kl, autoencoder_kl.Config()),
        "clip": (clip, CLIP_H),
    }
    params = {name: random_params(module, config, i) for i, (name, (module, config)) in enumerate(networks.items())}
    vae, dit, text = autoencoder_kl.Config(), z_image.Config(), decoder_lm.Config()
    tokens = 64

    def encode(params, features):  # random text features: the language model is not part of a generation
        return family.Condition(
            z_image.refine_caption(params["transformer"], dit, features, jnp.full(1, tokens)), None, {}
        )

    pipeline = base.Pipeline(
        family="ZImagePipeline",
        folder=Path("random"),
        params={name: params[name] for name in ("transformer", "vae")},
        defaults=family.TURBO,
        size_multiple=16,
        tokenize=lambda prompts, **options: np.ones((1, tokens, text.hidden_size), np.float32),
        encode=encode,
        velocity=functools.partial(family.velocity, dit),
        decode=functools.partial(family.decode, vae),
        sigmas=lambda steps, height, width: schedule.static_shift_sigmas(steps, 3.0),
        noise_shape=functools.partial(family.noise_shape, dit, vae),
    )
    scorer = scorers.Scorer(
        name="clip",
        params=params["clip"],
        tokenize=lambda prompts: np.zeros((len(prompts), 77), np.int32),
        embed_text=lambda params, tokens: clip.embed_text(params, CLIP_H, tokens),
        score=functools.partial(scorers.clip_score, CLIP_H, Preprocessor()),
    )
    return pipeline, rewards.Reward((rewards.Part("clip", scorer=scorer),))


def random_params(module: Any, config: Any, seed: int) -> Any:
    """Weights of a network's shapes, made on the device leaf by leaf."""
    abstract = jax.eval_shape(functools.partial(module.init, config=config), jax.random.key(0))
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(abstract)))
    make = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    leaves = [make(key, leaf.shape) for key, leaf in zip(keys, jax.tree.leaves(abstract), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
