"""Decoder-only language model used as a text encoder: token ids to the hidden state of a late layer.

Qwen3 (reference: transformers `Qwen3Model`). Only the layers up to the wanted hidden state exist here; the head, the
final norm and the layers above it are never loaded.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ses_jax.models.attention import attention, rotate_half
from ses_jax.models.layers import GatedMLP, RMSNorm, stack


@dataclasses.dataclass(frozen=True)
class Config:
    """Architecture of the layers that are run."""

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    layers: int = 35
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    norm_eps: float = 1e-6
    rope_theta: float = 1e6

    @classmethod
    def from_json(cls, config: Mapping[str, Any], *, hidden_state: int = -2) -> "Config":
        """Reads a transformers `config.json`.

        Args:
          config: the file's content.
          hidden_state: which of the reference's `hidden_states` is wanted: index 0 is the embedding, index k the
            state after k layers, negative ones count from the end.

        Raises:
          ValueError: for a model type or an option that this network does not cover.
        """
        if config.get("model_type") != "qwen3":
            raise ValueError(f"text encoder of type {config.get('model_type')!r} is not supported; expected 'qwen3'")
        if config.get("attention_bias"):
            raise ValueError("text encoder with attention_bias=true is not supported")
        layers = config["num_hidden_layers"]
        wanted = hidden_state % (layers + 1)
        if wanted == layers:
            raise ValueError("the last hidden state is normalised and not supported; choose an earlier one")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            layers=wanted,
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=float(config.get("rope_theta") or rope["rope_theta"]),
        )


def hidden_state(params: Any, config: Config, token_ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
    """Hidden state `[B, L, hidden_size]` of right-padded `token_ids [B, L]` after `config.layers` layers.

    Attention is causal, so real tokens never see the padding to their right and need no mask; rows of padding
    carry no meaning.
    """
    return DecoderLM(config).apply({"params": params}, token_ids)


def init(key: jax.Array, config: Config) -> Any:
    """Random params, for training and for abstract shapes."""
    return DecoderLM(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


class DecoderLM(nn.Module):
    """Embedding and stacked decoder layers, without a head."""

    config: Config

    @nn.compact
    def __call__(self, token_ids):
        c = self.config
        x = nn.Embed(c.vocab_size, c.hidden_size, name="embed_tokens")(token_ids)
        cos, sin = rope(c, token_ids.shape[1])
        x, _ = stack(DecoderLayer, c.layers)(c, name="layers")(x, cos, sin)
        return x


class DecoderLayer(nn.Module):
    """Pre-norm causal attention and SwiGLU feed-forward."""

    config: Config

    @nn.compact
    def __call__(self, x, cos, sin):
        c = self.config
        x = x + CausalAttention(c, name="self_attn")(RMSNorm(c.norm_eps, name="input_layernorm")(x), cos, sin)
        h = RMSNorm(c.norm_eps, name="post_attention_layernorm")(x)
        return x + GatedMLP(c.intermediate_size, name="mlp")(h), None


class CausalAttention(nn.Module):
    """Grouped-query attention with a norm over each head of the queries and keys."""

    config: Config

    @nn.compact
    def __call__(self, x, cos, sin):
        c = self.config

        def project(name, heads):
            return nn.Dense(heads * c.head_dim, use_bias=False, name=name)(x).reshape(*x.shape[:2], heads, c.head_dim)

        q = rotate_half(RMSNorm(c.norm_eps, name="q_norm")(project("q_proj", c.heads)), cos, sin)
        k = rotate_half(RMSNorm(c.norm_eps, name="k_norm")(project("k_proj", c.kv_heads)), cos, sin)
        out = attention(q, k, project("v_proj", c.kv_heads), causal=True)
        return nn.Dense(c.hidden_size, use_bias=False, name="o_proj")(out)


def rope(config: Config, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines `[length, head_dim / 2]` of the rotary embedding at positions 0 .. length - 1."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    inverse = (1.0 / np.float32(config.rope_theta) ** exponent).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * inverse
    return np.cos(angles), np.sin(angles)
