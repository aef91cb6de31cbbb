"""Evaluations during the demo's trainings, on fixed scenes.

Each function here returns a probe, `probe(params) -> {name: share}`, whose programs are compiled only once.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from demo import batches, captions, drawing, judge, scenes
from demo.export import SHIFT
from demo.losses import CLIP_MEAN, CLIP_STD
from demo.sizes import Sizes
from demo.tokenizers import tokenize_clip, tokenize_prompts
from ses_jax.models import autoencoder_kl, clip, decoder_lm, z_image

STEPS = 12  # of denoising
GUIDANCE = 1.0
RANKED_TIERS = ("medium", "hard")

Probe = Callable[[Any], dict[str, float]]


def rebuilder(sizes: Sizes) -> Probe:
    """Probe of an autoencoder: hard scenes that are all right after it, at every size it is trained on."""
    wanted = scenes.evaluation_scenes(sizes.probe, "hard")

    def probe(params: Any) -> dict[str, float]:
        shares = {}
        for bucket in sizes.pictures:
            rng = np.random.default_rng(0)
            drawn = np.stack([drawing.picture(rng, s, bucket.height, bucket.width) for s in wanted])
            parts = np.split(batches.to_signed(drawn), range(bucket.batch, len(drawn), bucket.batch))
            shares[bucket.name] = _correct(np.concatenate([_rebuilt(params, sizes, part) for part in parts]), wanted)
        return shares

    return probe


def ranker(sizes: Sizes, tokenizer: Any) -> Probe:
    """Probe of a CLIP: a caption's own picture above those of siblings, in pairs and first of all."""
    cases = {tier: _ranking_cases(sizes, tokenizer, tier) for tier in RANKED_TIERS}

    def probe(params: Any) -> dict[str, float]:
        shares = {}
        for tier, (images, tokens) in cases.items():
            values = np.asarray(_similarities(params, sizes, images, tokens))  # [scene, member], the scene itself first
            shares[f"{tier} pairs"] = float(np.mean(values[:, :1] > values[:, 1:]))
            shares[f"{tier} first"] = float(np.mean(values.argmax(1) == 0))
        return shares

    return probe


def sampler(vae: Any, sizes: Sizes, statistics: dict[str, float], tokenizer: Any) -> Probe:
    """Probe of a transformer: pictures that are all right, and checks passed, by tier, one noise a prompt."""
    bucket = sizes.buckets[0]
    empty = tokenize_prompts(tokenizer, [""] * sizes.probe)

    @jax.jit
    def generate(params, tokens, lengths, key):
        latents = sample(params, sizes, (tokens, lengths), empty, bucket.height, bucket.width, key)
        return _decode(vae, sizes, latents / statistics["scaling_factor"] + statistics["shift_factor"])

    def probe(params: Any) -> dict[str, float]:
        shares = {}
        for tier in scenes.TIERS:
            wanted, rng = scenes.evaluation_scenes(sizes.probe, tier), np.random.default_rng(0)
            prompts = tokenize_prompts(tokenizer, [captions.caption(rng, s) for s in wanted])
            images = np.asarray(generate(params, *prompts, jax.random.key(0)))
            shares[tier] = _correct(images, wanted)
            shares[f"{tier} checks"] = _fraction(images, wanted)
        return shares

    return probe


def sample(params: Any, sizes: Sizes, prompt: Any, empty: Any, height: int, width: int, key: jax.Array) -> jax.Array:
    """Latents `[B, C, h, w]`, mean 0 and variance 1, by Euler steps with guidance from noise of `key`.

    Args:
      params: of the text encoder and the transformer.
      prompt: tokens `[B, L]` and lengths `[B]`.
      empty: those of empty prompts.
      height: in pixels, as `width`.
    """
    tokens, lengths = (jnp.concatenate(both) for both in zip(prompt, empty, strict=True))
    features = decoder_lm.hidden_state(params["text_encoder"], sizes.text, tokens)
    caption = z_image.refine_caption(params["transformer"], sizes.dit, features, lengths)
    time = jnp.linspace(1, 0, STEPS + 1)
    sigmas = SHIFT * time / (1 + (SHIFT - 1) * time)

    def step(latents, sigma):
        now, later = sigma
        both = jnp.concatenate([latents, latents])
        velocity = z_image.velocity(params["transformer"], sizes.dit, both, jnp.full(len(both), now), caption)
        conditional, unconditional = jnp.split(velocity, 2)
        guided = conditional + GUIDANCE * (conditional - unconditional)
        return latents + (later - now) * guided, None

    side = sizes.vae.downscale
    noise = jax.random.normal(key, (len(tokens) // 2, sizes.vae.latent_channels, height // side, width // side))
    return jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))[0]


@functools.partial(jax.jit, static_argnames="sizes")
def _rebuilt(params: Any, sizes: Sizes, images: np.ndarray) -> jax.Array:
    return _decode(params, sizes, autoencoder_kl.encode(params, sizes.vae, images)[0])


def _decode(vae: Any, sizes: Sizes, latents: jax.Array) -> jax.Array:
    """Images in [0, 1]."""
    return jnp.clip(autoencoder_kl.decode(vae, sizes.vae, latents) / 2 + 0.5, 0, 1)


def _correct(images: np.ndarray, wanted: list[scenes.Scene]) -> float:
    return float(np.mean([judge.verify(i, s).correct for i, s in zip(images, wanted, strict=True)]))


def _fraction(images: np.ndarray, wanted: list[scenes.Scene]) -> float:
    return float(np.mean([judge.verify(i, s).fraction for i, s in zip(images, wanted, strict=True)]))


def _ranking_cases(sizes: Sizes, tokenizer: Any, tier: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 `[scenes, FAMILY, S, S, 3]` of scenes and their siblings, and tokens of the scenes' captions."""
    rng, side = np.random.default_rng(0), sizes.reward.image_size
    wanted = scenes.evaluation_scenes(2 * sizes.probe, tier)
    images = [[drawing.picture(rng, m, side, side) for m in batches.family(rng, s)] for s in wanted]
    return np.array(images), tokenize_clip(tokenizer, [captions.caption(rng, s) for s in wanted])


@functools.partial(jax.jit, static_argnames="sizes")
def _similarities(params: Any, sizes: Sizes, images: jax.Array, tokens: jax.Array) -> jax.Array:
    count, members = images.shape[:2]
    pixels = (images.reshape(-1, *images.shape[2:]).astype(jnp.float32) / 255 - CLIP_MEAN) / CLIP_STD
    embedded = clip.embed_image(params, sizes.reward, pixels).reshape(count, members, -1)
    return jnp.einsum("smd,sd->sm", embedded, clip.embed_text(params, sizes.reward, tokens))
