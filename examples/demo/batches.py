"""Batches and pools for the demo's trainings; all are functions of the seed and the step or the shard."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from demo import captions, drawing, scenes
from demo.losses import FAMILY
from demo.sizes import Bucket, Sizes
from demo.tokenizers import PROMPT_LENGTH, tokenize_clip, tokenize_prompts
from ses_jax.models import autoencoder_kl

CAPTIONS = 3  # of a scene in the pool
DROPPED = 0.1  # share of empty prompts, for guidance
ENCODE_BATCH = 50
TURNED = 0.6  # of CLIP's families that have a relation
TIER_SHARES = (0.2, 0.3, 0.5)  # easy, medium, hard


def caption_sample(count: int, seed: int) -> list[str]:
    """Captions for the tokenizers to learn from."""
    rng = np.random.default_rng([seed, 0])
    return [captions.caption(rng, random_scene(rng)) for _ in range(count)]


def random_scene(rng: np.random.Generator) -> scenes.Scene:
    """A scene of any tier, without held-out combinations."""
    return scenes.sample(rng, scenes.TIERS[rng.choice(3, p=TIER_SHARES)])


def picture_batch(step: int, buckets: tuple[Bucket, ...], seed: int) -> np.ndarray:
    """Drawn scenes of one of the buckets, float32 `[B, H, W, 3]` in [-1, 1]."""
    rng = np.random.default_rng([seed, 1, step])
    bucket = buckets[rng.choice(len(buckets), p=[b.share for b in buckets])]
    images = [drawing.picture(rng, random_scene(rng), bucket.height, bucket.width) for _ in range(bucket.batch)]
    return to_signed(np.stack(images))


def to_signed(images: np.ndarray) -> np.ndarray:
    """uint8 to float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1


# ------------------------------------------------------------------------------------------------------- transformer


def make_pool(folder: Path, sizes: Sizes, vae: Any, tokenizer: Any, seed: int) -> None:
    """Draws and encodes the scenes of every bucket, each with several captions, into one npz file a shard."""
    for number, bucket in enumerate(sizes.buckets):
        for path, shard, count in _missing(folder, bucket.name, bucket.pool, sizes.shard):
            rng = np.random.default_rng([seed, 2, number, shard])
            batch = [random_scene(rng) for _ in range(count)]
            size = bucket.height, bucket.width
            layouts = [drawing.layout(rng, s, bucket.width / bucket.height) for s in batch]
            images = np.stack([drawing.draw(s, places, *size) for s, places in zip(batch, layouts, strict=True)])
            latents = [_encode(vae, sizes, to_signed(part)) for part in _parts(images)]
            cell = sizes.vae.downscale
            texts = [captions.caption(rng, s) for s in batch for _ in range(CAPTIONS)]
            ids, lengths = tokenize_prompts(tokenizer, texts)
            _save(
                path,
                latents=np.concatenate(latents).astype(np.float16),
                shapes=np.stack([drawing.covered(s, p, *size, cell) for s, p in zip(batch, layouts, strict=True)]),
                tokens=ids.astype(np.uint16).reshape(count, CAPTIONS, PROMPT_LENGTH),
                lengths=lengths.astype(np.uint8).reshape(count, CAPTIONS),
            )


@functools.partial(jax.jit, static_argnames="sizes")
def _encode(params: Any, sizes: Sizes, images: jax.Array) -> jax.Array:
    return autoencoder_kl.encode(params, sizes.vae, images)[0]


def latent_statistics(folder: Path, bucket: Bucket) -> dict[str, float]:
    """`scaling_factor` and `shift_factor` that give a bucket's latents mean 0 and variance 1."""
    latents = _load(folder, bucket.name)["latents"].astype(np.float32)
    return {"scaling_factor": float(1 / latents.std()), "shift_factor": float(latents.mean())}


def pool_batches(folder: Path, sizes: Sizes, statistics: dict[str, float], tokenizer: Any, seed: int) -> Callable:
    """`batch_at(step)` over one bucket of the pool: scaled latents, the shapes in them, tokens and lengths.

    Some prompts are empty.
    """
    pools = [_load(folder, b.name) for b in sizes.buckets]
    empty_tokens, empty_length = tokenize_prompts(tokenizer, [""])

    def batch_at(step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([seed, 3, step])
        which = rng.choice(len(pools), p=[b.share for b in sizes.buckets])
        pool, size = pools[which], sizes.buckets[which].batch
        index, wording = rng.integers(len(pool["latents"]), size=size), rng.integers(CAPTIONS, size=size)
        drop = rng.random(size) < DROPPED
        latents = pool["latents"][index].astype(np.float32) - statistics["shift_factor"]
        return {
            "latents": latents * statistics["scaling_factor"],
            "shapes": pool["shapes"][index].astype(np.int32),
            "tokens": np.where(drop[:, None], empty_tokens, pool["tokens"][index, wording].astype(np.int32)),
            "lengths": np.where(drop, empty_length, pool["lengths"][index, wording].astype(np.int32)),
        }

    return batch_at


# -------------------------------------------------------------------------------------------------------------- CLIP


def family(
    rng: np.random.Generator, scene: scenes.Scene, shares: Mapping[str, float] = scenes.EDITS
) -> list[scenes.Scene]:
    """A scene and its siblings, by the shares of their edits."""
    return [scene, *(scenes.sibling(rng, scene, shares) for _ in range(FAMILY - 1))]


def taught_family(rng: np.random.Generator) -> list[scenes.Scene]:
    """A scene and its siblings, or a scene in all its relations: what those are is learnt from nothing less."""
    scene = random_scene(rng)
    if scene.relation and rng.random() < TURNED:
        return [dataclasses.replace(scene, relation=str(r)) for r in rng.permutation(list(scenes.DIRECTIONS))]
    return family(rng, scene, scenes.TAUGHT_EDITS)


def make_families(rng: np.random.Generator, tokenizer: Any, count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Scenes with their siblings: images uint8 `[count, FAMILY, side, side, 3]` and tokens `[count, FAMILY, L]`."""
    members = [m for _ in range(count) for m in taught_family(rng)]
    images = np.stack([_any_resolution(rng, m, side) for m in members])
    tokens = tokenize_clip(tokenizer, [captions.caption(rng, m) for m in members])
    return images.reshape(count, FAMILY, *images.shape[1:]), tokens.reshape(count, FAMILY, -1)


def _any_resolution(rng: np.random.Generator, scene: scenes.Scene, side: int) -> np.ndarray:
    """A square picture drawn at half, three quarters or all of `side` and resized to it, as rewards do."""
    drawn = int(side * rng.choice([0.5, 0.75, 1], p=[0.2, 0.2, 0.6]))
    image = drawing.picture(rng, scene, drawn, drawn)
    return image if drawn == side else np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def make_rebuilt(folder: Path, sizes: Sizes, vae: Any, tokenizer: Any, seed: int) -> None:
    """Families as the autoencoder rebuilds them from imperfect latents, into one npz file a shard."""
    for path, shard, count in _missing(folder, "families", sizes.rebuilt, sizes.shard):
        rng, key = np.random.default_rng([seed, 4, shard]), jax.random.fold_in(jax.random.key(seed), shard)
        images, tokens = make_families(rng, tokenizer, count, sizes.reward.image_size)
        keys = jax.random.split(key, count)
        _save(
            path,
            images=np.stack([_degrade(vae, sizes, f, k) for f, k in zip(images, keys, strict=True)]),
            tokens=tokens,
        )


def family_batches(folder: Path, sizes: Sizes, tokenizer: Any, seed: int) -> Callable:
    """`batch_at(step)`: images uint8 `[B, S, S, 3]` and tokens of whole families, most drawn, the others rebuilt."""
    pool, drawn = _load(folder, "families"), sizes.families * 3 // 4

    def batch_at(step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([seed, 5, step])
        images, tokens = make_families(rng, tokenizer, drawn, sizes.reward.image_size)
        index = rng.choice(len(pool["images"]), sizes.families - drawn, replace=False)
        images = np.concatenate([images, pool["images"][index]])
        tokens = np.concatenate([tokens, pool["tokens"][index]])
        return {"images": images.reshape(-1, *images.shape[2:]), "tokens": tokens.reshape(-1, PROMPT_LENGTH)}

    return batch_at


@functools.partial(jax.jit, static_argnames="sizes")
def _degrade(params: Any, sizes: Sizes, images: jax.Array, key: jax.Array) -> jax.Array:
    """Reconstructions, uint8, from latents with noise of a random strength added."""
    mean, _ = autoencoder_kl.encode(params, sizes.vae, images.astype(jnp.float32) / 127.5 - 1)
    level_key, noise_key = jax.random.split(key)
    level = jax.random.uniform(level_key, (len(images), 1, 1, 1), maxval=0.5) * mean.std()
    decoded = autoencoder_kl.decode(params, sizes.vae, mean + level * jax.random.normal(noise_key, mean.shape))
    return jnp.round(jnp.clip(decoded * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)


# ------------------------------------------------------------------------------------------------------------ shards


def _missing(folder: Path, name: str, total: int, size: int) -> Iterator[tuple[Path, int, int]]:
    """Path, number and length of every shard that is not there yet."""
    for shard, start in enumerate(range(0, total, size)):
        path = folder / f"{name}-{shard:03d}.npz"
        if not path.exists():
            yield path, shard, min(size, total - start)


def _save(path: Path, **arrays: np.ndarray) -> None:
    """Writes under a temporary name first: a shard that exists is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **arrays)
    os.replace(partial, path)


def _load(folder: Path, name: str) -> dict[str, np.ndarray]:
    """All shards of a name as one."""
    shards = [dict(np.load(path)) for path in sorted(folder.glob(f"{name}-[0-9]*[0-9].npz"))]
    return {key: np.concatenate([s[key] for s in shards]) for key in shards[0]}


def _parts(images: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(images), ENCODE_BATCH):
        yield images[start : start + ENCODE_BATCH]
