"""Qwen-Image: prompt to condition, noise to image (reference: diffusers `QwenImagePipeline`).

Guidance is true classifier-free guidance in the usual convention, `negative + scale * (positive - negative)`, with the
length of every token's velocity brought back to that of the positive one. A scale of 1 or less turns it off, and with
it the negative branch; the default negative prompt is " ", as the model's users have it. It takes a number, or a
mapping of

    scale    the number itself
    rescale  1: each token's guided velocity is as long as the positive one; 0: guidance alone

Native sizes are 1328 x 1328, 1664 x 928, 1472 x 1104, 1584 x 1056 and their transposes.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ses_jax.convert import decoder_lm as text_tables
from ses_jax.convert import qwen_image as transformer_tables
from ses_jax.convert import qwen_vae as vae_tables
from ses_jax.models import decoder_lm, mmdit, qwen_image, qwen_vae
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
    "text_encoder": text_tables.component(-1),
}
TOKENIZERS = ("tokenizer",)
OPTIONS = ("timestep_rounding",)
DEFAULTS = base.Defaults(height=1328, width=1328, steps=50, guidance=4.0)
GUIDANCE_OFF = {"scale": 1.0, "rescale": 1.0}
NEGATIVE_PROMPT = " "
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
# The template's first tokens are encoded with the prompt and then dropped.
DROPPED_TOKENS = 34
MAX_TOKENS = 512

CONFIGS = {
    "transformer": qwen_image.Config(),
    "vae": qwen_vae.Config(),
    "text_encoder": decoder_lm.Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        taps=(28,),
        heads=28,
        kv_heads=4,
        head_dim=128,
        qk_norm=False,
        qkv_bias=True,
        final_norm=True,
    ),
}
SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
PUBLISHED = (
    base.Published(
        "Qwen/Qwen-Image",
        "20.4 B parameters, 1328 x 1328 px, 50 steps, guidance 4",
        "names and shapes of every published tensor; prompt to image against diffusers on tiny random checkpoints; "
        "not run with the published weights",
        CONFIGS,
        SCHEDULER,
    ),
)


def assemble(parts: base.Parts, *, timestep_rounding: str = "exact") -> base.Pipeline:
    """The pipeline of a checkpoint; see `models.mmdit` for `timestep_rounding`."""
    transformer = dataclasses.replace(parts.configs["transformer"], timestep_rounding=timestep_rounding)
    text_encoder, vae = parts.configs["text_encoder"], parts.configs["vae"]
    multiple = vae.downscale * transformer.patch_size
    return base.Pipeline(
        family="QwenImagePipeline",
        folder=parts.folder,
        params=parts.params,
        defaults=base.override(DEFAULTS, parts.settings),
        size_multiple=multiple,
        tokenize=functools.partial(tokenize, parts.tokenizers.get("tokenizer")),
        encode=functools.partial(encode, text_encoder),
        velocity=functools.partial(velocity, transformer),
        decode=functools.partial(decode, vae),
        sigmas=schedule(parts, multiple),
        noise_shape=functools.partial(base.noise_shape, transformer.out_channels, vae.downscale),
        blank_tokens=blank_tokens,
        text_params=base.pick("text_encoder"),
        image_params=base.pick("transformer", "vae"),
    )


def tokenize(
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    guidance: base.Guidance = 4.0,
    negative_prompt: str | Sequence[str] | None = None,
) -> Guided:
    """Token ids of `P` prompts in the template; the negative prompts (default: " ") only if guidance is on."""
    options = options_of(guidance, GUIDANCE_OFF, "Qwen-Image")
    on = options["scale"] > 1
    negatives = negative_prompts(negative_prompt, len(prompts), on=on, remedy="guidance > 1", default=NEGATIVE_PROMPT)
    texts = [TEMPLATE.format(prompt) for prompt in [*prompts, *negatives]]
    token_ids = tokenizer(texts, truncation=True, max_length=DROPPED_TOKENS + MAX_TOKENS)["input_ids"]
    return guided(_padded(token_ids, tokenizer.pad_token_id), len(prompts), options)


def blank_tokens(count: int, length: int, *, guidance: base.Guidance = 4.0) -> Guided:
    """Tokens of `count` prompts of `length` token ids, without a tokenizer."""
    options = options_of(guidance, GUIDANCE_OFF, "Qwen-Image")
    rows = 2 * count if options["scale"] > 1 else count
    return guided(_padded([[0] * (DROPPED_TOKENS + length)] * rows, 0), count, options)


def encode(config: decoder_lm.Config, params: Any, tokens: Guided) -> Guided:
    """Last states of the text encoder, once a prompt: a `qwen_image.Text` for each branch."""

    def text(tokens):
        features = decoder_lm.hidden_state(params["text_encoder"], config, tokens.ids)
        return qwen_image.Text(features[:, DROPPED_TOKENS:], jnp.asarray(tokens.lengths))

    return each_branch(text, tokens)


def velocity(
    config: qwen_image.Config,
    params: Any,
    latents: Float[Array, "b c h w"],
    sigma: Float[Array, " b"],
    condition: Guided,
) -> Float[Array, "b c h w"]:
    """Guided velocity `[B, C, h, w]`; the positive and the negative branch run as one batch."""

    def run(text, latents, sigma):
        return qwen_image.velocity(params["transformer"], config, latents, sigma, text)

    positive, negative = both_branches(run, condition, latents, sigma)
    return positive if negative is None else guide(positive, negative, condition.guidance, config.patch_size)


def guide(
    positive: Float[Array, "b c h w"],
    negative: Float[Array, "b c h w"],
    guidance: Mapping[str, Array],
    patch: int = 2,
) -> Float[Array, "b c h w"]:
    """Classifier-free guidance of velocities `[B, C, h, w]` with the options of the module docstring, each `[B]`.

    A token is `patch x patch` cells with all their channels.
    """
    tokens = mmdit.pack(classifier_free(positive, negative, guidance["scale"]), patch)
    length, wanted = (jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (tokens, mmdit.pack(positive, patch)))
    rescaled = (guidance["rescale"][:, None, None] > 0) & (length > 0)
    grid = (positive.shape[2] // patch, positive.shape[3] // patch)
    return mmdit.unpack(tokens * jnp.where(rescaled, wanted / length, 1.0), grid, patch)


def decode(config: qwen_vae.Config, params: Any, latents: Float[Array, "b c h w"]) -> Float[Array, "b H W 3"]:
    """Images `[B, H, W, 3]` in [0, 1]."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (config.latents_mean, config.latents_std))
    return base.to_images(qwen_vae.decode(params["vae"], config, latents * std + mean))


def _padded(token_ids: Sequence[Sequence[int]], pad_id: int) -> base.Tokens:
    """Token ids `[B, 34 + L]`, L a bucket; lengths `[B]` count what follows the tokens that are dropped."""
    kept, lengths = base.pad_to_bucket([ids[DROPPED_TOKENS:] for ids in token_ids], pad_id)
    dropped = np.array([ids[:DROPPED_TOKENS] for ids in token_ids], np.int32)
    return base.Tokens(np.concatenate([dropped, kept], axis=1), lengths)
