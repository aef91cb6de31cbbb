"""Batches for the demo's trainings; every batch is a function of the seed and the step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scenes
from demo_losses import FAMILY
from demo_models import PROMPT_LENGTH, Sizes, tokenize_clip, tokenize_prompts

from ses_jax.models import autoencoder_kl

CAPTIONS = 4  # captions of a scene
DROPPED = 0.1  # share of empty prompts, for guidance
ENCODE_BATCH = 100


def captions(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng([seed, 0])
    return [scenes.caption(rng, scenes.sample(rng)) for _ in range(count)]


def image_batch(step: int, size: int, seed: int) -> np.ndarray:
    """Drawn scenes, float32 `[B, 64, 64, 3]` in [-1, 1]."""
    rng = np.random.default_rng([seed, 1, step])
    images = np.stack([scenes.draw(scenes.sample(rng)) for _ in range(size)])
    return images.astype(np.float32) / 127.5 - 1


def make_pool(path: Path, sizes: Sizes, vae_params: Any, tokenizer: Any, seed: int) -> None:
    """Draws and encodes the scenes that the transformer trains on, each with several captions, into an npz."""
    rng = np.random.default_rng([seed, 2])
    encode = jax.jit(lambda params, images: autoencoder_kl.encode(params, sizes.vae, images)[0])
    latents, tokens, lengths = [], [], []
    for start in range(0, sizes.pool, ENCODE_BATCH):
        batch = [scenes.sample(rng) for _ in range(min(ENCODE_BATCH, sizes.pool - start))]
        images = np.stack([scenes.draw(s) for s in batch]).astype(np.float32) / 127.5 - 1
        latents.append(np.asarray(encode(vae_params, images), np.float16))
        ids, counts = tokenize_prompts(tokenizer, [scenes.caption(rng, s) for s in batch for _ in range(CAPTIONS)])
        tokens.append(ids.astype(np.uint16).reshape(-1, CAPTIONS, PROMPT_LENGTH))
        lengths.append(counts.astype(np.uint8).reshape(-1, CAPTIONS))
    np.savez(path, latents=np.concatenate(latents), tokens=np.concatenate(tokens), lengths=np.concatenate(lengths))


def latent_statistics(path: Path) -> dict[str, float]:
    """`scaling_factor` and `shift_factor` that give the pool's latents mean 0 and variance 1."""
    latents = np.load(path)["latents"].astype(np.float32)
    return {"scaling_factor": float(1 / latents.std()), "shift_factor": float(latents.mean())}


def pool_batches(path: Path, statistics: dict[str, float], tokenizer: Any, size: int, seed: int) -> Callable:
    """`batch_at(step)` over the pool: scaled latents, tokens and lengths; some prompts are empty."""
    pool = dict(np.load(path))
    empty_tokens, empty_length = tokenize_prompts(tokenizer, [""])

    def batch_at(step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([seed, 3, step])
        index, which = rng.integers(len(pool["latents"]), size=size), rng.integers(CAPTIONS, size=size)
        drop = rng.random(size) < DROPPED
        latents = pool["latents"][index].astype(np.float32) - statistics["shift_factor"]
        return {
            "latents": latents * statistics["scaling_factor"],
            "tokens": np.where(drop[:, None], empty_tokens, pool["tokens"][index, which].astype(np.int32)),
            "lengths": np.where(drop, empty_length, pool["lengths"][index, which].astype(np.int32)),
        }

    return batch_at


def make_families(
    rng: np.random.Generator, tokenizer: Any, count: int, held_out: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Scenes, each with its siblings: images uint8 `[count, FAMILY, 64, 64, 3]` and tokens `[count, FAMILY, L]`."""
    families = [scenes.sample(rng, held_out) for _ in range(count)]
    members = [m for f in families for m in (f, *(scenes.sibling(rng, f) for _ in range(FAMILY - 1)))]
    images = np.stack([scenes.draw(m) for m in members])
    tokens = tokenize_clip(tokenizer, [scenes.caption(rng, m) for m in members])
    return images.reshape(count, FAMILY, *images.shape[1:]), tokens.reshape(count, FAMILY, -1)


def make_rebuilt(path: Path, sizes: Sizes, vae_params: Any, tokenizer: Any, seed: int) -> None:
    """Families as the autoencoder rebuilds them from imperfect latents, into an npz."""
    images, tokens = make_families(np.random.default_rng([seed, 4]), tokenizer, sizes.rebuilt)
    degrade = jax.jit(lambda family, key: _degrade(vae_params, sizes, family, key))
    keys = jax.random.split(jax.random.key(seed), len(images))
    rebuilt = np.stack([np.asarray(degrade(family, key)) for family, key in zip(images, keys, strict=True)])
    np.savez(path, images=rebuilt, tokens=tokens)


def family_batches(path: Path, tokenizer: Any, families: int, seed: int) -> Callable:
    """`batch_at(step)`: images uint8 `[B, 64, 64, 3]` and tokens of whole families, half drawn and half rebuilt."""
    pool = dict(np.load(path))

    def batch_at(step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([seed, 5, step])
        images, tokens = make_families(rng, tokenizer, families // 2)
        index = rng.choice(len(pool["images"]), families - families // 2, replace=False)
        images = np.concatenate([images, pool["images"][index]])
        tokens = np.concatenate([tokens, pool["tokens"][index]])
        return {"images": images.reshape(-1, *images.shape[2:]), "tokens": tokens.reshape(-1, PROMPT_LENGTH)}

    return batch_at


def _degrade(params: Any, sizes: Sizes, images: jax.Array, key: jax.Array) -> jax.Array:
    """Reconstructions, uint8, from latents with noise of a random strength added."""
    mean, _ = autoencoder_kl.encode(params, sizes.vae, images.astype(jnp.float32) / 127.5 - 1)
    level_key, noise_key = jax.random.split(key)
    level = jax.random.uniform(level_key, (len(images), 1, 1, 1), maxval=0.6) * mean.std()
    decoded = autoencoder_kl.decode(params, sizes.vae, mean + level * jax.random.normal(noise_key, mean.shape))
    return jnp.round(jnp.clip(decoded * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)
