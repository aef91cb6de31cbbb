"""FLUX.2: prompt to condition, noise to image (references: diffusers `Flux2Pipeline`, `Flux2KleinPipeline`).

Guidance differs with the kind of checkpoint, and is a number or a mapping with the entry `scale`:

    dev          an input of the network, distilled into it; there is no negative prompt
    klein        none: distilled into few steps
    klein base   classifier-free, `negative + scale * (positive - negative)`; off at a scale of 1 and below

The text is always 512 tokens long, padding included, and the image sees all of them. Options of `load_pipeline`:

    band   "packed", as the reference: the noise is `[128, H/16, W/16]`, the grid that the network sees, whose low band
           keeps the four cells of each 2x2 patch apart: 2048 numbers at 1024 x 1024 and level 4. "unpacked": the noise
           is `[32, H/8, W/8]`, the autoencoder's own grid, by default one level deeper: 512 numbers at level 5.
    timestep_rounding
           "exact" (default) or "reference": whether bfloat16 weights round time and guidance as well, as in the
           reference, see `ses_jax.models.mmdit`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from ses_jax.convert import autoencoder_kl_bn as vae_tables
from ses_jax.convert import flux2 as tables
from ses_jax.models import autoencoder_kl_bn, decoder_lm, flux2
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
    "transformer": tables.COMPONENT,
    "vae": vae_tables.COMPONENT,
    "text_encoder": tables.TEXT_ENCODER,
}
TOKENIZERS = ("tokenizer",)
OPTIONS = ("band", "timestep_rounding")
BANDS = ("packed", "unpacked")
MAX_TOKENS = 512
GUIDANCE_OFF = {"scale": 1.0}
# The line break is the reference's.
SYSTEM_PROMPT = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)


class Tokens(NamedTuple):
    """Token ids `[P, 512]`, with False in the mask at padding."""

    ids: np.ndarray
    mask: np.ndarray


class Kind(NamedTuple):
    """A kind of checkpoint.

    Attributes:
      name: what it is called in messages.
      guidance: "distilled", "none" or "classifier-free".
      defaults: what a search uses where the caller says nothing.
      in_template: `(tokenizer, prompt) -> text`.
    """

    name: str
    guidance: str
    defaults: base.Defaults
    in_template: Callable[[Any, str], str]


def assemble(parts: base.Parts, *, band: str = "packed", timestep_rounding: str = "exact") -> base.Pipeline:
    """The pipeline of a checkpoint; `model_index.json` says of which kind it is."""
    if band not in BANDS:
        raise ValueError(f"band must be one of {', '.join(BANDS)}, not {band!r}")
    kind, configs = _kind(parts), parts.configs
    _check_fit(parts, kind)
    vae, transformer = configs["vae"], dataclasses.replace(configs["transformer"], timestep_rounding=timestep_rounding)
    cell = vae.downscale * vae.patch_size[0]
    pipeline = base.Pipeline(
        family=parts.index["_class_name"],
        folder=parts.folder,
        params=parts.params,
        defaults=base.override(kind.defaults, parts.settings),
        size_multiple=cell,
        tokenize=functools.partial(tokenize, kind, parts.tokenizers.get("tokenizer")),
        encode=functools.partial(encode, configs["text_encoder"]),
        velocity=functools.partial(velocity, transformer),
        decode=functools.partial(decode, vae),
        sigmas=schedule(parts, cell, empirical_mu),
        noise_shape=functools.partial(base.noise_shape, transformer.in_channels, cell),
        blank_tokens=functools.partial(blank_tokens, kind),
        text_params=base.pick("text_encoder"),
        image_params=base.pick("transformer", "vae"),
    )
    return pipeline if band == "packed" else unpacked(pipeline, vae.patch_size)


def unpacked(pipeline: base.Pipeline, patch: tuple[int, int]) -> base.Pipeline:
    """A pipeline whose noise and latents lie on the autoencoder's own grid, with wavelets one level deeper.

    Packing only moves numbers, so the same noise in either order gives the same image.
    """

    def noise_shape(height, width):
        channels, rows, columns = pipeline.noise_shape(height, width)
        return channels // (patch[0] * patch[1]), rows * patch[0], columns * patch[1]

    return dataclasses.replace(
        pipeline,
        defaults=dataclasses.replace(pipeline.defaults, level=pipeline.defaults.level + 1),
        velocity=functools.partial(unpacked_velocity, pipeline.velocity, patch),
        decode=functools.partial(unpacked_decode, pipeline.decode, patch),
        noise_shape=noise_shape,
    )


def unpacked_velocity(
    velocity: Callable[..., Any],
    patch: tuple[int, int],
    params: Any,
    latents: Float[Array, "b c h w"],
    *sigma_and_condition: Any,
) -> Float[Array, "b c h w"]:
    """`velocity`, which takes packed latents, of those on the autoencoder's own grid."""
    packed = velocity(params, autoencoder_kl_bn.pack(latents, patch), *sigma_and_condition)
    return autoencoder_kl_bn.unpack(packed, patch)


def unpacked_decode(
    decode: Callable[..., Any], patch: tuple[int, int], params: Any, latents: Float[Array, "b c h w"]
) -> Float[Array, "b H W 3"]:
    """`decode`, which takes packed latents, of those on the autoencoder's own grid."""
    return decode(params, autoencoder_kl_bn.pack(latents, patch))


def tokenize(
    kind: Kind,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    guidance: base.Guidance,
    negative_prompt: str | Sequence[str] | None = None,
) -> Guided:
    """Token ids of `P` prompts in their template; the negative prompts (default: empty) only if they have an effect.

    Raises:
      ValueError: for guidance or a negative prompt that has no effect.
    """
    options = options_of(guidance, GUIDANCE_OFF, kind.name)
    _check_guidance(kind, options, negative_prompt)
    on = _two_branches(kind, options)
    negatives = negative_prompts(negative_prompt, len(prompts), on=on, remedy="guidance > 1")
    texts = [kind.in_template(tokenizer, prompt) for prompt in [*prompts, *negatives]]
    encoded = tokenizer(texts, add_special_tokens=False, padding="max_length", truncation=True, max_length=MAX_TOKENS)
    ids, mask = np.array(encoded["input_ids"], np.int32), np.array(encoded["attention_mask"], bool)
    return guided(Tokens(ids, mask), len(prompts), options)


def blank_tokens(kind: Kind, count: int, length: int, *, guidance: base.Guidance) -> Guided:
    """Tokens of `count` prompts of `length` token ids, without a tokenizer."""
    options = options_of(guidance, GUIDANCE_OFF, kind.name)
    rows = 2 * count if _two_branches(kind, options) else count
    mask = np.broadcast_to(np.arange(MAX_TOKENS) < length, (rows, MAX_TOKENS))
    return guided(Tokens(np.zeros((rows, MAX_TOKENS), np.int32), mask), count, options)


def encode(config: decoder_lm.Config, params: Any, tokens: Guided) -> Guided:
    """Text features `[P, 512, D]` of three depths side by side; rows of padding are features like any other."""
    features = functools.partial(decoder_lm.hidden_state, params["text_encoder"], config)
    return each_branch(lambda tokens: features(tokens.ids, tokens.mask), tokens)


def velocity(
    config: flux2.Config,
    params: Any,
    latents: Float[Array, "b c h w"],
    sigma: Float[Array, " b"],
    condition: Guided,
) -> Float[Array, "b c h w"]:
    """Guided velocity `[B, C, h, w]`; the positive and the negative branch run as one batch."""

    def run(text, latents, sigma, scale):
        return flux2.velocity(params["transformer"], config, latents, sigma, text, scale)

    scale = condition.guidance["scale"]
    return classifier_free(*both_branches(run, condition, latents, sigma, scale), scale)


def decode(config: autoencoder_kl_bn.Config, params: Any, latents: Float[Array, "b c h w"]) -> Float[Array, "b H W 3"]:
    """Images `[B, H, W, 3]` in [0, 1]."""
    return base.to_images(autoencoder_kl_bn.decode(params["vae"], config, latents))


def empirical_mu(tokens: int, steps: int) -> float:
    """Shift of the schedule for so many image tokens and steps (reference: `compute_empirical_mu`).

    Two lines fitted at 10 and at 200 steps, and a line through them for other numbers of steps. Above 4300 tokens the
    number of steps no longer counts, so that the shift falls off a cliff there: 2.31 to 1.19 for 4 steps.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * steps + at_200 - 200.0 * slope


def _kind(parts: base.Parts) -> Kind:
    if parts.index["_class_name"] == "Flux2Pipeline":
        return DEV
    return KLEIN if parts.index.get("is_distilled") else KLEIN_BASE


def _check_fit(parts: base.Parts, kind: Kind) -> None:
    transformer, text, vae = (parts.configs[name] for name in ("transformer", "text_encoder", "vae"))
    features = len(text.taps) * text.hidden_size
    if features != transformer.joint_attention_dim:
        raise ValueError(
            f"{parts.folder}: the text encoder gives features of width {features}, "
            f"the transformer takes {transformer.joint_attention_dim}"
        )
    if vae.packed_channels != transformer.in_channels:
        raise ValueError(
            f"{parts.folder}: the autoencoder has {vae.packed_channels} channels, "
            f"the transformer {transformer.in_channels}"
        )
    if transformer.guidance_embeds != (kind.guidance == "distilled"):
        raise ValueError(
            f"{parts.folder}: {kind.name} with guidance_embeds={transformer.guidance_embeds} is not supported"
        )


def _two_branches(kind: Kind, options: Mapping[str, float]) -> bool:
    return kind.guidance == "classifier-free" and options["scale"] > 1


def _check_guidance(kind: Kind, options: Mapping[str, float], negative_prompt: str | Sequence[str] | None) -> None:
    if kind.guidance == "none" and options["scale"] > 1:
        raise ValueError(f"{kind.name} has no guidance; leave guidance out")
    if negative_prompt and kind.guidance != "classifier-free":
        raise ValueError(f"{kind.name} has no negative prompt; leave negative_prompt out")


def _in_mistral_template(tokenizer: Any, prompt: str) -> str:
    """The conversation as text; without the token of an image, which the prompt must not contain."""
    prompt = prompt.replace("[IMG]", "")
    if not tokenizer.chat_template:
        return f"<s>[SYSTEM_PROMPT]{SYSTEM_PROMPT}[/SYSTEM_PROMPT][INST]{prompt}[/INST]"
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("system", SYSTEM_PROMPT), ("user", prompt))
    ]
    return base.in_chat_template(tokenizer, messages, add_generation_prompt=False)


def _in_qwen_template(tokenizer: Any, prompt: str) -> str:
    message = {"role": "user", "content": prompt}
    return base.in_chat_template(tokenizer, [message], add_generation_prompt=True, enable_thinking=False)


DEV = Kind("FLUX.2-dev", "distilled", base.Defaults(steps=50, guidance=4.0), _in_mistral_template)
KLEIN = Kind("FLUX.2-klein", "none", base.Defaults(steps=4, preview_steps=4, guidance=1.0), _in_qwen_template)
KLEIN_BASE = Kind("FLUX.2-klein-base", "classifier-free", base.Defaults(steps=50, guidance=4.0), _in_qwen_template)

VERIFIED = (
    "names and shapes of every published tensor; prompt to image against diffusers on tiny random checkpoints; "
    "not run with the published weights"
)
MISTRAL = decoder_lm.Config(
    vocab_size=131072,
    hidden_size=5120,
    intermediate_size=32768,
    taps=(10, 20, 30),
    norm_eps=1e-5,
    rope_theta=1e9,
    qk_norm=False,
)
QWEN3_4B = decoder_lm.Config(taps=(9, 18, 27))
QWEN3_8B = decoder_lm.Config(hidden_size=4096, intermediate_size=12288, taps=(9, 18, 27))
KLEIN_4B = flux2.Config(
    num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
)
KLEIN_9B = flux2.Config(num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288, guidance_embeds=False)


def _published(source: str, facts: str, transformer: flux2.Config, text: decoder_lm.Config, **index: Any):
    configs = {"transformer": transformer, "vae": autoencoder_kl_bn.Config(), "text_encoder": text}
    return base.Published(
        f"black-forest-labs/{source}", facts, VERIFIED, configs, {"use_dynamic_shifting": True}, index
    )


_KLEIN = {"_class_name": "Flux2KleinPipeline"}
PUBLISHED = (
    _published(
        "FLUX.2-dev", "32.2 B parameters, 50 steps, guidance 4", flux2.Config(), MISTRAL, _class_name="Flux2Pipeline"
    ),
    _published("FLUX.2-klein-4B", "3.9 B parameters, 4 steps", KLEIN_4B, QWEN3_4B, **_KLEIN, is_distilled=True),
    _published("FLUX.2-klein-9B", "9.1 B parameters, 4 steps", KLEIN_9B, QWEN3_8B, **_KLEIN, is_distilled=True),
    _published("FLUX.2-klein-base-4B", "3.9 B parameters, 50 steps, guidance 4", KLEIN_4B, QWEN3_4B, **_KLEIN),
    _published("FLUX.2-klein-base-9B", "9.1 B parameters, 50 steps, guidance 4", KLEIN_9B, QWEN3_8B, **_KLEIN),
)
