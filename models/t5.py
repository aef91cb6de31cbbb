"""T5's encoder: token ids to a state for each token (reference: transformers `T5EncoderModel`).

Scores are not scaled; a bias learned per head and distance, one for all layers, is added to them. There is no mask:
padding attends and is attended to, so that the length a prompt is padded to is part of what it means.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ses_jax.models.attention import scaled_products
from ses_jax.models.config import known_fields
from ses_jax.models.layers import Embed, GatedMLP, RMSNorm, stack
from ses_jax.models.params import first_values
from ses_jax.models.quantized import Dense

# Heads and feed-forward widths are split over the model axis of a mesh; leaves of blocks are stacked.
PARTITION = (
    (r"(embed_tokens|relative_attention_bias)/embedding", P(None, "model")),
    (r"blocks/attention/[qkv]/kernel", P(None, None, "model")),
    (r"blocks/attention/o/kernel", P(None, "model", None)),
    (r"blocks/feed_forward/w[13]/kernel", P(None, None, "model")),
    (r"blocks/feed_forward/w2/kernel", P(None, "model", None)),
    (r".*/scale", P()),
)
QUANTIZED = (r"blocks/.*/kernel",)


@dataclasses.dataclass(frozen=True)
class Config:
    """Architecture, field for field as in the published `config.json`."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "Config":
        """Reads a transformers `config.json`.

        Raises:
          ValueError: for a model type or a feed-forward that this network does not cover.
        """
        if config.get("model_type") != "t5":
            raise ValueError(f"text encoder of type {config.get('model_type')!r} is not supported; expected 't5'")
        feed_forward = config.get("feed_forward_proj", "relu")
        if feed_forward != "gated-gelu":
            raise ValueError(f"T5 with feed_forward_proj={feed_forward!r} is not supported; expected 'gated-gelu'")
        return cls(**known_fields(cls, config))


def encode(params: Any, config: Config, token_ids: Int[Array | np.ndarray, "b l"]) -> Float[Array, "b l d"]:
    """States `[B, L, d_model]` after the final norm of `token_ids [B, L]`, all of which are attended to."""
    return T5Encoder(config).apply({"params": params}, token_ids)


def init(key: jax.Array | None, config: Config) -> Any:
    """Random params, for training; without a key zeros, for abstract shapes."""
    return first_values(T5Encoder(config), key, jnp.zeros((1, 1), jnp.int32))


class T5Encoder(nn.Module):
    """Embedding, stacked blocks that share one bias of the scores, final norm."""

    config: Config

    @nn.compact
    def __call__(self, token_ids):
        c = self.config
        x = Embed(c.vocab_size, c.d_model, name="embed_tokens")(token_ids)
        dtype = x.dtype
        x = x.astype(jnp.float32) if dtype == jnp.float16 else x  # which could not hold what large models add up
        buckets = Embed(c.relative_attention_num_buckets, c.num_heads, name="relative_attention_bias")
        bias = jnp.moveaxis(buckets(relative_buckets(c, token_ids.shape[1])), -1, 0)[None]
        x, _ = stack(EncoderBlock, c.num_layers)(c, name="blocks")(x, bias)
        return RMSNorm(c.layer_norm_epsilon, name="final_layer_norm")(x).astype(dtype)


class EncoderBlock(nn.Module):
    """Pre-norm attention and gated GELU feed-forward, without biases."""

    config: Config

    @nn.compact
    def __call__(self, x, bias):
        c = self.config
        h = RMSNorm(c.layer_norm_epsilon, name="attention_norm")(x).astype(bias.dtype)
        x = x + SelfAttention(c, name="attention")(h, bias)
        h = RMSNorm(c.layer_norm_epsilon, name="ffn_norm")(x).astype(bias.dtype)
        return x + GatedMLP(c.d_ff, act=jax.nn.gelu, wide=True, name="feed_forward")(h), None


class SelfAttention(nn.Module):
    """Multi-head attention of unscaled scores plus `bias [1, heads, L, L]`."""

    config: Config

    @nn.compact
    def __call__(self, x, bias):
        c = self.config
        split = (*x.shape[:2], c.num_heads, c.d_kv)
        q, k, v = (Dense(c.num_heads * c.d_kv, use_bias=False, name=name)(x).reshape(split) for name in ("q", "k", "v"))
        out = scaled_products(q, k, v, bias=bias, scale=1.0)
        return Dense(c.d_model, use_bias=False, name="o")(out.reshape(*x.shape[:2], -1))


def relative_buckets(config: Config, length: int) -> np.ndarray:
    """Bucket `[length, length]` of each query's (row) distance to each key: exact near by, logarithmic further off."""
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offset)
    # In float32, as the reference: the distances where one bucket ends are where rounding would show.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(config.relative_attention_max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + ratio.astype(np.int64), half - 1)
    return np.where(offset > 0, half, 0) + np.where(distance < exact, distance, far)
