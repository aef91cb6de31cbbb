"""FLUX.1-dev and FLUX.1-schnell: prompt to condition, noise to image (reference: diffusers `FluxPipeline`).

CLIP reads the first 77 tokens of a prompt as one vector, T5 a fixed number of tokens one by one. Guidance takes a
number, or a mapping of

    scale     the number itself: the guidance that dev was distilled with, an input of the network; schnell has none
    true_cfg  classifier-free guidance, `negative + true_cfg * (positive - negative)`: twice the work, and off unless
              it is greater than 1 and a negative prompt is given ("" is one)

Options of `load_pipeline`:

    max_tokens         T5's tokens, at most 512; default 512, schnell 256
    timestep_rounding  "exact" (default) or "reference": whether bfloat16 weights round time and guidance as well, as in
                       the reference, see `ses_jax.models.mmdit`. Exact, so that a schedule means the same for weights
                       of any dtype; "reference" comes closer to images that diffusers made in bfloat16.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from ses_jax.convert import autoencoder_kl as vae_tables
from ses_jax.convert import clip as clip_tables
from ses_jax.convert import flux1 as transformer_tables
from ses_jax.convert import t5 as t5_tables
from ses_jax.models import autoencoder_kl, clip, flux1, t5
from ses_jax.pipelines import base
from ses_jax.pipelines.guidance import (
    Guided,
    both_branches,
    classifier_free,
    each_branch,
    guided,
    negative_prompts,
    options_of,
)
from ses_jax.pipelines.schedule import schedule

COMPONENTS = {
    "transformer": transformer_tables.COMPONENT,
    "vae": vae_tables.COMPONENT,
    "text_encoder": clip_tables.TEXT_COMPONENT,
    "text_encoder_2": t5_tables.COMPONENT,
}
TOKENIZERS = ("tokenizer", "tokenizer_2")
OPTIONS = ("max_tokens", "timestep_rounding")
MAX_TOKENS = 512
SCHNELL_TOKENS = 256
DEV = base.Defaults(steps=28, guidance=3.5)
SCHNELL = base.Defaults(steps=4, preview_steps=4, guidance=0.0)
GUIDANCE = {"scale": 3.5, "true_cfg": 1.0}

CONFIGS = {
    "vae": autoencoder_kl.Config(),
    "text_encoder": clip.TextConfig(text=clip.Tower(768, 3072, 12, 12)),
    "text_encoder_2": t5.Config(),
}
VERIFIED = (
    "names and shapes of every published tensor, in both layouts; prompt to image against diffusers on tiny random "
    "checkpoints; not run with the published weights"
)
PUBLISHED = (
    base.Published(
        "black-forest-labs/FLUX.1-dev",
        "11.9 B parameters, 28 steps, guidance 3.5",
        VERIFIED,
        {"transformer": flux1.Config(guidance_embeds=True), **CONFIGS},
        {"use_dynamic_shifting": True},
    ),
    base.Published(
        "black-forest-labs/FLUX.1-schnell",
        "11.9 B parameters, 4 steps, no guidance",
        VERIFIED,
        {"transformer": flux1.Config(guidance_embeds=False), **CONFIGS},
        {"use_dynamic_shifting": False, "shift": 1.0},
    ),
)


class Tokens(NamedTuple):
    """Token ids of both text encoders: CLIP's `[P, 77]` and T5's `[P, max_tokens]`."""

    clip: np.ndarray
    t5: np.ndarray


def assemble(parts: base.Parts, *, max_tokens: int | None = None, timestep_rounding: str = "exact") -> base.Pipeline:
    """The pipeline of a checkpoint; a transformer without an embedding of guidance is schnell's."""
    config = dataclasses.replace(parts.configs["transformer"], timestep_rounding=timestep_rounding)
    vae, text = parts.configs["vae"], parts.configs["text_encoder"]
    distilled = config.guidance_embeds
    lengths = (text.max_length, _token_count(max_tokens, MAX_TOKENS if distilled else SCHNELL_TOKENS))
    usual = GUIDANCE if distilled else GUIDANCE | {"scale": 0.0}
    tokenizers = tuple(parts.tokenizers.get(name) for name in TOKENIZERS)
    cell = vae.downscale * flux1.PATCH
    return base.Pipeline(
        family="FluxPipeline",
        folder=parts.folder,
        params=parts.params,
        defaults=base.override(DEV if distilled else SCHNELL, parts.settings),
        size_multiple=cell,
        tokenize=functools.partial(tokenize, tokenizers, lengths, usual),
        encode=functools.partial(encode, text, parts.configs["text_encoder_2"]),
        velocity=functools.partial(velocity, config),
        decode=functools.partial(decode, vae),
        sigmas=schedule(parts, cell),
        noise_shape=functools.partial(base.noise_shape, config.latent_channels, vae.downscale),
        blank_tokens=functools.partial(blank_tokens, lengths, usual),
        text_params=base.pick("text_encoder", "text_encoder_2"),
        image_params=base.pick("transformer", "vae"),
    )


def tokenize(
    tokenizers: Sequence[Callable[..., Any]],
    lengths: tuple[int, int],
    usual: Mapping[str, float],
    prompts: Sequence[str],
    *,
    guidance: base.Guidance | None = None,
    negative_prompt: str | Sequence[str] | None = None,
) -> Guided:
    """Token ids of `P` prompts, and of their negative prompts where both they and `true_cfg` ask for it.

    Args:
      tokenizers: CLIP's and T5's.
      lengths: of their token ids; longer prompts are cut, shorter ones padded.
      usual: guidance where the caller says nothing.
      prompts: `P` of them.
      guidance: a number or options, see the module docstring; None is `usual`.
      negative_prompt: one for all, or one each.

    Raises:
      ValueError: for guidance that has no effect, or a negative prompt that has none.
    """
    options = _options(guidance, usual)
    on = negative_prompt is not None and options["true_cfg"] > 1
    negatives = negative_prompts(negative_prompt, len(prompts), on=on, remedy="guidance={'true_cfg': s}, s > 1")
    rows = (
        tokenizer([*prompts, *negatives], padding="max_length", max_length=length, truncation=True)["input_ids"]
        for tokenizer, length in zip(tokenizers, lengths, strict=True)
    )
    return guided(Tokens(*(np.array(ids, np.int32) for ids in rows)), len(prompts), options)


def blank_tokens(
    lengths: tuple[int, int],
    usual: Mapping[str, float],
    count: int,
    length: int,
    *,
    guidance: base.Guidance | None = None,
) -> Guided:
    """Tokens of `count` prompts without a tokenizer; they are of fixed length, whatever `length` says."""
    options = _options(guidance, usual)
    rows = 2 * count if options["true_cfg"] > 1 else count
    return guided(Tokens(*(np.zeros((rows, size), np.int32) for size in lengths)), count, options)


def encode(clip_config: clip.TextConfig, t5_config: t5.Config, params: Any, tokens: Guided) -> Guided:
    """Both text encoders, once a prompt: a `flux1.Prompt` for each branch."""

    def prompt(tokens):
        features = t5.encode(params["text_encoder_2"], t5_config, tokens.t5)
        return flux1.Prompt(features, clip.text_state(params["text_encoder"], clip_config, tokens.clip))

    return each_branch(prompt, tokens)


def velocity(
    config: flux1.Config,
    params: Any,
    latents: Float[Array, "b c h w"],
    sigma: Float[Array, " b"],
    condition: Guided,
) -> Float[Array, "b c h w"]:
    """Guided velocity `[B, C, h, w]`; the positive and the negative branch run as one batch."""

    def run(prompt, latents, sigma, scale):
        return flux1.velocity(params["transformer"], config, latents, sigma, prompt, scale)

    options = condition.guidance
    return classifier_free(*both_branches(run, condition, latents, sigma, options["scale"]), options["true_cfg"])


def decode(config: autoencoder_kl.Config, params: Any, latents: Float[Array, "b c h w"]) -> Float[Array, "b H W 3"]:
    """Images `[B, H, W, 3]` in [0, 1]."""
    scaled = latents / config.scaling_factor + config.shift_factor
    return base.to_images(autoencoder_kl.decode(params["vae"], config, scaled))


def _token_count(wanted: int | None, default: int) -> int:
    if wanted is None:
        return default
    if not 1 <= wanted <= MAX_TOKENS:
        raise ValueError(f"max_tokens={wanted} is not between 1 and {MAX_TOKENS}")
    return wanted


def _options(guidance: base.Guidance | None, usual: Mapping[str, float]) -> dict[str, float]:
    options = options_of({} if guidance is None else guidance, usual, "FLUX.1")
    if not usual["scale"] and options["scale"]:
        raise ValueError(f"guidance {options['scale']} has no effect: FLUX.1-schnell has no such input; pass 0")
    return options
