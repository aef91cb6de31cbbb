"""Random weights of published sizes, made on the device leaf by leaf: speed does not depend on their values."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ses_jax import scorers
from ses_jax.models import clip
from ses_jax.preprocess import Preprocessor

CLIP_H = clip.Config(
    text=clip.Tower(1024, 4096, 24, 16, "gelu"), vision=clip.Tower(1280, 5120, 32, 16, "gelu"), projection_dim=1024
)


def random_params(abstract: Any, seed: int = 0) -> Any:
    """Arrays for a tree of shapes: matrices and biases small, everything else about 1."""
    paths, structure = jax.tree.flatten_with_path(abstract)
    # The device's own generator: fast, and needs no memory beside the result.
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(paths))
    leaves = [
        _random_leaf(key, leaf.shape, leaf.dtype, 0.0 if path[-1].key in ("kernel", "bias", "embedding") else 1.0)
        for key, (path, leaf) in zip(keys, paths, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_leaf(key: jax.Array, shape: tuple[int, ...], dtype: Any, mean: float) -> jax.Array:
    return (mean + 0.02 * jax.random.normal(key, shape, dtype)).astype(dtype)


def clip_h(dtype: Any = jnp.bfloat16) -> scorers.Scorer:
    """CLIP ViT-H/14, the network of three of the rewards."""
    abstract = jax.eval_shape(lambda: clip.init(jax.random.key(0), CLIP_H))
    params = random_params(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract))
    return scorers.Scorer(
        name="clip",
        params=params,
        tokenize=lambda prompts: np.zeros((len(prompts), CLIP_H.max_length), np.int32),
        embed_text=lambda params, tokens: clip.embed_text(params, CLIP_H, tokens),
        score=functools.partial(scorers.clip_score, CLIP_H, Preprocessor()),
    )
