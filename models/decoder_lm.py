"""Decoder-only language models used as text encoders: token ids to the hidden states of chosen layers.

Qwen3, Qwen2.5 (the text side of Qwen2.5-VL) and Mistral (that of Mistral3), references: transformers `Qwen3Model`,
`Qwen2_5_VLTextModel`, `MistralModel`. Only the layers up to the last wanted hidden state exist here; the head, and the
layers above it, are never loaded. Positions count from the first token of a row, padding included, as there.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from ses_jax.models.attention import attention, rotate_half
from ses_jax.models.layers import Embed, GatedMLP, RMSNorm, stack
from ses_jax.models.params import first_values
from ses_jax.models.quantized import Dense

# Heads and feed-forward widths are split over the model axis of a mesh; leaves of layers are stacked.
PARTITION = (
    (r"embed_tokens/embedding", P(None, "model")),
    (r"layers/self_attn/[qkv]_proj/kernel", P(None, None, "model")),
    (r"layers/self_attn/[qkv]_proj/bias", P(None, "model")),
    (r"layers/self_attn/o_proj/kernel", P(None, "model", None)),
    (r"layers/mlp/w[13]/kernel", P(None, None, "model")),
    (r"layers/mlp/w2/kernel", P(None, "model", None)),
    (r".*/scale", P()),
)
QUANTIZED = (r"layers/.*/kernel",)


@dataclasses.dataclass(frozen=True)
class Config:
    """Architecture of the layers that are run.

    Attributes:
      taps: after how many layers a state is taken, ascending; the last is the number of layers that exist.
      qk_norm: whether each head's queries and keys are normed (Qwen3).
      qkv_bias: whether those projections have biases (Qwen2.5).
      final_norm: whether the last tap goes through the model's final norm.
    """

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    taps: tuple[int, ...] = (35,)
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    norm_eps: float = 1e-6
    rope_theta: float = 1e6
    qk_norm: bool = True
    qkv_bias: bool = False
    final_norm: bool = False

    @classmethod
    def from_json(cls, config: Mapping[str, Any], *, hidden_states: Sequence[int] = (-2,)) -> "Config":
        """Reads a transformers `config.json`; that of a vision-language model for its text side.

        Args:
          config: the file's content.
          hidden_states: which of the reference's `hidden_states` are wanted, ascending: index 0 is the embedding,
            index k the state after k layers, negative ones count from the end; the last is normed.

        Raises:
          ValueError: for a model type or an option that this network does not cover, or a state that is not there.
        """
        text = text_config(config)
        kind = text.get("model_type")
        if kind not in KINDS:
            raise ValueError(f"text encoder of type {kind!r} is not supported; known: {', '.join(KINDS)}")
        if text.get("attention_bias"):
            raise ValueError("text encoder with attention_bias=true is not supported")
        layers = text["num_hidden_layers"]
        taps = tuple(index % (layers + 1) if -layers - 1 <= index <= layers else -1 for index in hidden_states)
        if -1 in taps or list(taps) != sorted(set(taps)):
            raise ValueError(f"hidden states {tuple(hidden_states)} are not those of a text encoder of {layers} layers")
        return cls(
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            taps=taps,
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            norm_eps=text["rms_norm_eps"],
            rope_theta=_rope_theta(text),
            qk_norm=kind == "qwen3",
            qkv_bias=kind.startswith("qwen2"),
            final_norm=taps[-1] == layers,
        )

    @property
    def layers(self) -> int:
        return self.taps[-1]


# Qwen2.5-VL keeps the fields of its text side at the top of the config, or under `text_config` with a type of its own.
KINDS = ("qwen3", "qwen2_5_vl", "qwen2_5_vl_text", "mistral")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a `config.json` that describes the language model."""
    return config.get("text_config") or config


def hidden_state(
    params: Any,
    config: Config,
    token_ids: Int[Array | np.ndarray, "b l"],
    key_mask: Bool[Array | np.ndarray, "b l"] | None = None,
) -> Float[Array, "b l d"]:
    """States `[B, L, len(taps) * hidden_size]` of `token_ids [B, L]`, those of several taps side by side.

    Args:
      params: from `init` or a checkpoint.
      config: the architecture.
      token_ids: padded on either side.
      key_mask: bool `[B, L]`, False at padding. Without it padding is seen like any token: harmless on the right, since
        attention is causal, where the rows of padding are not used. With it a row of padding on the right sees the
        real tokens alone, and one on the left sees nothing: its attention gives zeros, as torch's fused kernels do.
    """
    return DecoderLM(config).apply({"params": params}, token_ids, key_mask)


def init(key: jax.Array | None, config: Config) -> Any:
    """Random params, for training; without a key zeros, for abstract shapes."""
    return first_values(DecoderLM(config), key, jnp.zeros((1, 1), jnp.int32))


class DecoderLM(nn.Module):
    """Embedding and stacked decoder layers, without a head."""

    config: Config

    @nn.compact
    def __call__(self, token_ids, key_mask=None):
        c = self.config
        embedded = Embed(c.vocab_size, c.hidden_size, name="embed_tokens")(token_ids)
        cos, sin = rope(c, token_ids.shape[1])
        last, states = stack(DecoderLayer, c.layers)(c, name="layers")(embedded, cos, sin, key_mask)
        if c.final_norm:
            last = RMSNorm(c.norm_eps, name="norm")(last)
        earlier = (embedded if tap == 0 else states[tap - 1] for tap in c.taps[:-1])
        return jnp.concatenate([*earlier, last], axis=-1)


class DecoderLayer(nn.Module):
    """Pre-norm causal attention and SwiGLU feed-forward; the state is an output too where there are several taps."""

    config: Config

    @nn.compact
    def __call__(self, x, cos, sin, key_mask):
        c = self.config
        h = RMSNorm(c.norm_eps, name="input_layernorm")(x)
        x = x + CausalAttention(c, name="self_attn")(h, cos, sin, key_mask)
        h = RMSNorm(c.norm_eps, name="post_attention_layernorm")(x)
        x = x + GatedMLP(c.intermediate_size, name="mlp")(h)
        return x, x if len(c.taps) > 1 else None


class CausalAttention(nn.Module):
    """Grouped-query attention."""

    config: Config

    @nn.compact
    def __call__(self, x, cos, sin, key_mask):
        c = self.config

        def project(name, heads):
            out = Dense(heads * c.head_dim, use_bias=c.qkv_bias, name=name)(x)
            return out.reshape(*x.shape[:2], heads, c.head_dim)

        q, k = project("q_proj", c.heads), project("k_proj", c.kv_heads)
        if c.qk_norm:
            q, k = RMSNorm(c.norm_eps, name="q_norm")(q), RMSNorm(c.norm_eps, name="k_norm")(k)
        q, k = rotate_half(q, cos, sin), rotate_half(k, cos, sin)
        out = attention(q, k, project("v_proj", c.kv_heads), key_mask=key_mask, causal=True)
        return Dense(c.hidden_size, use_bias=False, name="o_proj")(out)


def rope(config: Config, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines `[length, head_dim / 2]` of the rotary embedding at positions 0 .. length - 1."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    inverse = (1.0 / np.float32(config.rope_theta) ** exponent).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * inverse
    return np.cos(angles), np.sin(angles)


def _rope_theta(text: Mapping[str, Any]) -> float:
    """The base of the rotary embedding, wherever the release of transformers that saved the config puts it.

    Raises:
      ValueError: for a scaled embedding. Multimodal sections ("mrope") are plain positions where there is only text.
    """
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ValueError(f"text encoder with rope type {kind!r} is not supported")
    return float(text.get("rope_theta") or rope["rope_theta"])
