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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ses_jax.convert import decoder_lm as text_tables
from ses_jax.convert import qwen_image as transformer_tables
from ses_jax.convert import qwen_vae as vae_tables
from ses_jax.models import decoder_lm, mmdit, qwen_image, qwen_vae
from ses_jax.pipelines import base

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


class Condition(NamedTuple):
    """Encoded prompts, and the guidance of each, `[P]`."""

    positive: qwen_image.Text
    negative: qwen_image.Text | None
    guidance: dict[str, jax.Array]


def assemble(parts: base.Parts, *, timestep_rounding: str = "exact") -> base.Pipeline:
    """The pipeline of a checkpoint; see `models.qwen_image` for `timestep_rounding`."""
    transformer = dataclasses.replace(parts.configs["transformer"], timestep_rounding=timestep_rounding)
    text_encoder, vae = parts.configs["text_encoder"], parts.configs["vae"]
    multiple = vae.downscale * transformer.patch_size
    _check_scheduler(parts)
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
        sigmas=functools.partial(sigmas, parts.scheduler, multiple),
        noise_shape=functools.partial(noise_shape, transformer, vae),
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
) -> base.GuidedTokens:
    """Token ids of `P` prompts in the template; the negative prompts (default: " ") only if guidance is on."""
    options = base.guidance_options(guidance, GUIDANCE_OFF, "Qwen-Image")
    if options["scale"] <= 1 and negative_prompt:
        raise ValueError("negative_prompt has no effect without guidance; pass guidance > 1")
    on = options["scale"] > 1
    negatives = base.negative_prompts(negative_prompt, len(prompts), NEGATIVE_PROMPT) if on else []
    texts = [TEMPLATE.format(prompt) for prompt in [*prompts, *negatives]]
    token_ids = tokenizer(texts, truncation=True, max_length=DROPPED_TOKENS + MAX_TOKENS)["input_ids"]
    return base.guided_tokens(*_padded(token_ids, tokenizer.pad_token_id), len(prompts), options)


def blank_tokens(count: int, length: int, *, guidance: base.Guidance = 4.0) -> base.GuidedTokens:
    """Tokens of `count` prompts of `length` token ids, without a tokenizer."""
    options = base.guidance_options(guidance, GUIDANCE_OFF, "Qwen-Image")
    rows = 2 * count if options["scale"] > 1 else count
    return base.guided_tokens(*_padded([[0] * (DROPPED_TOKENS + length)] * rows, 0), count, options)


def encode(config: decoder_lm.Config, params: Any, tokens: base.GuidedTokens) -> Condition:
    """Last states of the text encoder, once a prompt."""

    def text(ids, lengths):
        features = decoder_lm.hidden_state(params["text_encoder"], config, ids)
        return qwen_image.Text(features[:, DROPPED_TOKENS:], jnp.asarray(lengths))

    negative = None if tokens.negative_ids is None else text(tokens.negative_ids, tokens.negative_lengths)
    return Condition(text(tokens.ids, tokens.lengths), negative, tokens.guidance)


def velocity(
    config: qwen_image.Config,
    params: Any,
    latents: Float[Array, "b c h w"],
    sigma: Float[Array, " b"],
    condition: Condition,
) -> Float[Array, "b c h w"]:
    """Guided velocity `[B, C, h, w]`; the positive and the negative branch run as one batch."""
    run = functools.partial(qwen_image.velocity, params["transformer"], config)
    if condition.negative is None:
        return run(latents, sigma, condition.positive)
    out = run(*base.both((latents, sigma, condition.positive), (latents, sigma, condition.negative)))
    return guide(*jnp.split(out, 2), condition.guidance, config.patch_size)


def guide(
    positive: Float[Array, "b c h w"],
    negative: Float[Array, "b c h w"],
    guidance: Mapping[str, Array],
    patch: int = 2,
) -> Float[Array, "b c h w"]:
    """Classifier-free guidance of velocities `[B, C, h, w]` with the options of the module docstring, each `[B]`.

    A token is `patch x patch` cells with all their channels.
    """
    scale, rescale = (guidance[name][:, None, None] for name in ("scale", "rescale"))
    pos, neg = mmdit.pack(positive, patch), mmdit.pack(negative, patch)
    guided = neg + scale * (pos - neg)
    length, wanted = (jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (guided, pos))
    ratio = jnp.where((rescale > 0) & (length > 0), wanted / length, 1.0)
    return mmdit.unpack(guided * ratio, (positive.shape[2] // patch, positive.shape[3] // patch), patch)


def decode(config: qwen_vae.Config, params: Any, latents: Float[Array, "b c h w"]) -> Float[Array, "b H W 3"]:
    """Images `[B, H, W, 3]` in [0, 1]."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (config.latents_mean, config.latents_std))
    return base.to_images(qwen_vae.decode(params["vae"], config, latents * std + mean))


def sigmas(scheduler: Mapping[str, Any], multiple: int, steps: int, height: int, width: int) -> np.ndarray:
    """Sigmas `[steps + 1]`, float32, for an image of `height x width` pixels, one token per `multiple` squared."""
    mu = base.linear_mu((height // multiple) * (width // multiple), scheduler)
    return base.dynamic_shift_sigmas(steps, mu, terminal=scheduler.get("shift_terminal"))


def noise_shape(config: qwen_image.Config, vae: qwen_vae.Config, height: int, width: int) -> tuple[int, int, int]:
    """Shape `(C, h, w)` of the noise of an image of `height x width` pixels."""
    return config.out_channels, height // vae.downscale, width // vae.downscale


def _padded(token_ids: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids `[B, 34 + L]`, L a bucket; lengths `[B]` count what follows the tokens that are dropped."""
    kept, lengths = base.pad_to_bucket([ids[DROPPED_TOKENS:] for ids in token_ids], pad_id)
    dropped = np.array([ids[:DROPPED_TOKENS] for ids in token_ids], np.int32)
    return np.concatenate([dropped, kept], axis=1), lengths


def _check_scheduler(parts: base.Parts) -> None:
    if not parts.scheduler.get("use_dynamic_shifting"):
        raise ValueError(f"{parts.folder}: Qwen-Image with use_dynamic_shifting=false is not supported")
    kind = parts.scheduler.get("time_shift_type", "exponential")
    if kind != "exponential":
        raise ValueError(f"{parts.folder}: Qwen-Image with time_shift_type={kind!r} is not supported")
