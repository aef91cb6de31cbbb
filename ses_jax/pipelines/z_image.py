"""Z-Image and Z-Image-Turbo: prompt to condition, noise to image (reference: diffusers `ZImagePipeline`).

Guidance follows the reference's convention, `positive + scale * (positive - negative)`: 0 is off, and a scale of 4 here
is what other programs call 5. It takes a number, or a mapping of

    scale          the number itself
    normalization  k > 0: the guided velocity's norm is at most k times that of the positive one; 0 is off
    truncation     guidance is dropped once 1 - sigma exceeds it; 1 is never
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ses_jax.convert import autoencoder_kl as vae_tables
from ses_jax.convert import decoder_lm as text_tables
from ses_jax.convert import z_image as transformer_tables
from ses_jax.models import autoencoder_kl, decoder_lm, z_image
from ses_jax.pipelines import base
from ses_jax.pipelines.guidance import (
    Guided,
    both_branches,
    each_branch,
    guided,
    negative_prompts,
    options_of,
)
from ses_jax.pipelines.schedule import schedule

COMPONENTS = {
    "transformer": transformer_tables.COMPONENT,
    "vae": vae_tables.COMPONENT,
    "text_encoder": text_tables.component(-2),
}
TOKENIZERS = ("tokenizer",)
OPTIONS: tuple[str, ...] = ()
MAX_TOKENS = 512
TURBO = base.Defaults(steps=8, preview_steps=8, guidance=0.0)
BASE = base.Defaults(steps=50, guidance=4.0)
GUIDANCE_OFF = {"scale": 0.0, "normalization": 0.0, "truncation": 1.0}
# The part of the transformer that refines captions (a pad token of its image side tells the dtype).
CAPTION_PARAMS = ("cap_norm", "cap_embedder", "cap_pad_token", "x_pad_token", "context_refiner")

CONFIGS = {
    "transformer": z_image.Config(),
    "vae": autoencoder_kl.Config(),
    "text_encoder": decoder_lm.Config(),
}
VERIFIED = (
    "names and shapes of every published tensor; prompt to image against diffusers on tiny random checkpoints; "
    "not run with the published weights"
)
PUBLISHED = (
    base.Published("demo", "128 x 128 px, trained by examples/train_demo.py, shipped in the package", "run for real"),
    base.Published(
        "Tongyi-MAI/Z-Image-Turbo", "6.2 B parameters, 8 steps, guidance 0", VERIFIED, CONFIGS, {"shift": 3.0}
    ),
    base.Published("Tongyi-MAI/Z-Image", "6.2 B parameters, 50 steps, guidance 4", VERIFIED, CONFIGS, {"shift": 6.0}),
)


def assemble(parts: base.Parts) -> base.Pipeline:
    """The pipeline of a checkpoint; a static shift of 3 tells Turbo from the base model."""
    configs, scheduler = parts.configs, parts.scheduler
    turbo = not scheduler.get("use_dynamic_shifting") and scheduler.get("shift") == 3.0
    cell = configs["vae"].downscale * configs["transformer"].patch_size
    return base.Pipeline(
        family="ZImagePipeline",
        folder=parts.folder,
        params=parts.params,
        defaults=base.override(TURBO if turbo else BASE, parts.settings),
        size_multiple=cell,
        tokenize=functools.partial(tokenize, parts.tokenizers.get("tokenizer")),
        encode=functools.partial(encode, configs["text_encoder"], configs["transformer"]),
        velocity=functools.partial(velocity, configs["transformer"]),
        decode=functools.partial(decode, configs["vae"]),
        sigmas=schedule(parts, cell),
        noise_shape=functools.partial(base.noise_shape, configs["transformer"].in_channels, configs["vae"].downscale),
        blank_tokens=blank_tokens,
        text_params=text_params,
        image_params=base.pick("transformer", "vae"),
    )


def text_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """What `encode` uses: the text encoder, and the transformer's caption refiner."""
    refiner = {name: params["transformer"][name] for name in CAPTION_PARAMS}
    return {"text_encoder": params["text_encoder"], "transformer": refiner}


def tokenize(
    tokenizer: Callable[..., Any],
    prompts: Sequence[str],
    *,
    guidance: base.Guidance = 0.0,
    negative_prompt: str | Sequence[str] | None = None,
) -> Guided:
    """Token ids of `P` prompts in the chat template; the negative prompts (default: empty) only if guidance is on."""
    options = options_of(guidance, GUIDANCE_OFF, "Z-Image")
    on = options["scale"] > 0
    negatives = negative_prompts(negative_prompt, len(prompts), on=on, remedy="guidance > 0")
    texts = [_in_template(tokenizer, prompt) for prompt in [*prompts, *negatives]]
    token_ids = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return guided(base.pad_to_bucket(token_ids, tokenizer.pad_token_id), len(prompts), options)


def blank_tokens(count: int, length: int, *, guidance: base.Guidance = 0.0) -> Guided:
    """Tokens of `count` prompts of `length` token ids, without a tokenizer."""
    options = options_of(guidance, GUIDANCE_OFF, "Z-Image")
    rows = 2 * count if options["scale"] > 0 else count
    return guided(base.pad_to_bucket([[0] * length] * rows, 0), count, options)


def encode(text_config: decoder_lm.Config, config: z_image.Config, params: Any, tokens: Guided) -> Guided:
    """Text features through the caption refiner, once a prompt: a `z_image.Caption` for each branch."""

    def caption(tokens):
        features = decoder_lm.hidden_state(params["text_encoder"], text_config, tokens.ids)
        return z_image.refine_caption(params["transformer"], config, features, tokens.lengths)

    return each_branch(caption, tokens)


def velocity(
    config: z_image.Config,
    params: Any,
    latents: Float[Array, "b c h w"],
    sigma: Float[Array, " b"],
    condition: Guided,
) -> Float[Array, "b c h w"]:
    """Guided velocity `[B, C, h, w]`; the positive and the negative branch run as one batch."""

    def run(caption, latents, sigma):
        return z_image.velocity(params["transformer"], config, latents, sigma, caption)

    positive, negative = both_branches(run, condition, latents, sigma)
    return positive if negative is None else guide(positive, negative, sigma, condition.guidance)


def guide(
    positive: Float[Array, "b c h w"],
    negative: Float[Array, "b c h w"],
    sigma: Float[Array, " b"],
    guidance: Mapping[str, Array],
) -> Float[Array, "b c h w"]:
    """Classifier-free guidance of velocities `[B, C, h, w]` with the options of the module docstring, each `[B]`."""
    on = 1.0 - sigma <= guidance["truncation"]
    scale = jnp.where(on, guidance["scale"], 0.0)[:, None, None, None]
    guided = positive + scale * (positive - negative)
    limit = guidance["normalization"] * _norm(positive)
    norm = _norm(guided)
    shrink = jnp.where(on & (guidance["normalization"] > 0) & (norm > limit), limit / norm, 1.0)
    return guided * shrink[:, None, None, None]


def decode(config: autoencoder_kl.Config, params: Any, latents: Float[Array, "b c h w"]) -> Float[Array, "b H W 3"]:
    """Images `[B, H, W, 3]` in [0, 1]."""
    scaled = latents / config.scaling_factor + config.shift_factor
    return base.to_images(autoencoder_kl.decode(params["vae"], config, scaled))


def _in_template(tokenizer: Any, prompt: str) -> str:
    message = {"role": "user", "content": prompt}
    return base.in_chat_template(tokenizer, [message], add_generation_prompt=True, enable_thinking=True)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2, 3)))
