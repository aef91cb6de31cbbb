"""Random weights of published sizes, made on the device leaf by leaf: speed does not depend on their values."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ses_jax
from ses_jax.models import clip
from ses_jax.pipelines.registry import abstract_pipeline
from ses_jax.rewards import reward as rewards
from ses_jax.rewards import scorers
from ses_jax.rewards.preprocess import Preprocessor

CLIP_H = clip.Config.from_open_clip({})  # ViT-H/14
TOKENS = 64


def random_params(abstract: Any, seed: int = 0) -> Any:
    """Arrays for a tree of shapes: matrices and biases small, everything else about 1."""
    paths, structure = jax.tree.flatten_with_path(abstract)
    leaves = [
        _leaf(np.uint32(1000 * seed + i), leaf.shape, leaf.dtype, path[-1].key in ("kernel", "bias", "embedding"))
        for i, (path, leaf) in enumerate(paths)
    ]
    return jax.tree.unflatten(structure, leaves)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _leaf(seed: jax.Array, shape: tuple[int, ...], dtype: Any, centred: bool) -> jax.Array:
    """Uniform values of deviation 0.02 around 0 or 1: a hash of each element's index (MurmurHash3's finalizer).

    It compiles faster than a generator, which counts for dozens of shapes, and needs no memory beside the result.
    """
    x = jax.lax.iota(jnp.uint32, math.prod(shape)) + seed * np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    x = (x ^ (x >> 16)).astype(jnp.float32) * 2.0**-32 - 0.5
    return ((0.0 if centred else 1.0) + 0.02 * 12**0.5 * x).astype(dtype).reshape(shape)


def clip_h(dtype: Any = jnp.bfloat16) -> scorers.Scorer:
    """CLIP ViT-H/14, the network of three of the rewards."""
    abstract = jax.eval_shape(lambda: clip.init(None, CLIP_H))
    params = random_params(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract))
    return scorers.Scorer(
        name="clip",
        params=params,
        tokenize=lambda prompts: np.zeros((len(prompts), CLIP_H.max_length), np.int32),
        embed_text=lambda params, tokens: clip.embed_text(params, CLIP_H, tokens),
        score=scorers.ImageScore(Preprocessor(), functools.partial(scorers.clip_score, CLIP_H)),
    )


def random_model(model: str) -> tuple[ses_jax.Pipeline, ses_jax.Reward]:
    """A published model and CLIP ViT-H/14 at their published sizes; every prompt has the same length."""
    abstract = abstract_pipeline(model)

    def tokenize(prompts, *, guidance, negative_prompt=None):
        return abstract.blank_tokens(len(prompts), TOKENS, guidance=guidance)

    pipeline = dataclasses.replace(abstract, params=random_params(abstract.params), tokenize=tokenize)
    return pipeline, rewards.Reward((rewards.Part("clip", scorer=clip_h()),))
