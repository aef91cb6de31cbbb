"""CLIP: image and text towers into one space (reference: transformers `CLIPModel`).

The activation comes from the checkpoint's config: `quick_gelu` in OpenAI's models, `gelu` in LAION's ViT-H/14.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ses_jax.models.attention import attention
from ses_jax.models.convolution import Conv
from ses_jax.models.layers import Embed, LayerNorm, in_eights, in_float32, stack, weights_dtype
from ses_jax.models.params import VECTOR, first_values, param
from ses_jax.models.quantized import Dense

# open_clip's "ViT-H-14".
VIT_H = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}
# What transformers takes for the entries that a config leaves out; some of its releases leave out those that are so.
SIZES = {
    "text": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8},
    "vision": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}
QUANTIZED = (r"(vision|text)/layers/.*/kernel",)  # of both towers together; the text tower alone is small


@dataclasses.dataclass(frozen=True)
class Tower:
    """One transformer tower."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    act: str = "quick_gelu"
    norm_eps: float = 1e-5

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "Tower":
        """Reads the `text_config` or `vision_config` of a CLIP `config.json`."""
        act = config.get("hidden_act", "quick_gelu")
        if act not in ACTIVATIONS:
            raise ValueError(f"CLIP activation {act!r} is not supported; known: {', '.join(ACTIVATIONS)}")
        return cls(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            act=act,
            norm_eps=config.get("layer_norm_eps", 1e-5),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text tower by itself."""

    text: Tower
    vocab_size: int = 49408
    max_length: int = 77
    eos_token_id: int = 2

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "TextConfig":
        """Reads the `config.json` of a text tower, or of a whole CLIP for its text tower."""
        text = _tower(config, "text") if "vision_config" in config else SIZES["text"] | dict(config)
        return cls(
            text=Tower.from_json(text),
            vocab_size=text.get("vocab_size", 49408),
            max_length=text.get("max_position_embeddings", 77),
            eos_token_id=text.get("eos_token_id", 49407),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TextConfig):
    """Both towers and the shared space."""

    vision: Tower
    projection_dim: int
    image_size: int = 224
    patch_size: int = 14

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "Config":
        """Reads a CLIP `config.json`.

        Raises:
          ValueError: for another kind of model.
        """
        kind = config.get("model_type", "clip")
        if kind != "clip":
            raise ValueError(f"model type {kind!r} is not supported; expected 'clip'")
        vision = _tower(config, "vision")
        return cls(
            **vars(TextConfig.from_json(_tower(config, "text"))),
            vision=Tower.from_json(vision),
            projection_dim=config.get("projection_dim", 512),
            image_size=vision.get("image_size", 224),
            patch_size=vision.get("patch_size", 32),
        )

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> "Config":
        """Reads an `open_clip_config.json`; without its `model_cfg`, the network is ViT-H/14."""
        model = config.get("model_cfg", VIT_H)
        text, vision = model["text_cfg"], model["vision_cfg"]
        act = "quick_gelu" if model.get("quick_gelu", False) else "gelu"
        return cls(
            text=_open_clip_tower(text, text["heads"], act),
            vision=_open_clip_tower(vision, vision["width"] // vision.get("head_width", 64), act),
            projection_dim=model["embed_dim"],
            vocab_size=text.get("vocab_size", 49408),
            max_length=text.get("context_length", 77),
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
        )


def text_state(params: Any, config: TextConfig, token_ids: Int[Array | np.ndarray, "b l"]) -> Float[Array, "b d"]:
    """Final state at the end token `[B, hidden_size]` of `token_ids [B, L]`; `params` are those of `init_text`.

    Reference: the `pooler_output` of transformers `CLIPTextModel`; no projection follows.
    """
    return TextTower(config).apply({"params": params}, token_ids)


def embed_text(params: Any, config: Config, token_ids: Int[Array, "b l"]) -> Float[Array, "b d"]:
    """L2-normalised embeddings, float32 `[B, projection_dim]`, of `token_ids [B, L]` padded after the end token."""
    return _normalise(CLIP(config).apply({"params": params}, token_ids, method="text_features"))


def embed_image(params: Any, config: Config, pixels: Float[Array, "b size size 3"]) -> Float[Array, "b d"]:
    """L2-normalised embeddings, float32 `[B, projection_dim]`, of standardised `pixels [B, size, size, 3]`."""
    return _normalise(CLIP(config).apply({"params": params}, pixels, method="image_features"))


def logit_scale(params: Any) -> Float[Array, ""]:
    """The learned inverse temperature `exp(logit_scale)`, float32 scalar."""
    return jnp.exp(params["logit_scale"].astype(jnp.float32))


def init(key: jax.Array | None, config: Config) -> Any:
    """Random params, for training; without a key zeros, for abstract shapes."""
    pixels = jnp.zeros((1, config.image_size, config.image_size, 3))
    return first_values(CLIP(config), key, pixels, jnp.zeros((1, config.max_length), jnp.int32))


def init_text(key: jax.Array | None, config: TextConfig) -> Any:
    """Random params of the text tower by itself; without a key zeros."""
    return first_values(TextTower(config), key, jnp.zeros((1, config.max_length), jnp.int32))


class CLIP(nn.Module):
    """Both towers with their projections and the logit scale."""

    config: Config

    def setup(self):
        c = self.config
        self.vision = VisionTower(c)
        self.text = TextTower(c)
        self.visual_projection = Dense(c.projection_dim, use_bias=False)
        self.text_projection = Dense(c.projection_dim, use_bias=False)
        self.logit_scale = param(self, "logit_scale", nn.initializers.constant(2.6592), ())

    def __call__(self, pixels, token_ids):
        return self.image_features(pixels), self.text_features(token_ids)

    def image_features(self, pixels):
        return self.visual_projection(self.vision(pixels))

    def text_features(self, token_ids):
        return self.text_projection(self.text(token_ids))


class VisionTower(nn.Module):
    """Patches and a class token through the tower; the class token's final state."""

    config: Config

    @nn.compact
    def __call__(self, pixels):
        c, tower = self.config, self.config.vision
        patch, pixels = (c.patch_size, c.patch_size), pixels.astype(weights_dtype(self))
        x = Conv(tower.hidden_size, patch, patch, "VALID", use_bias=False, name="patch_embedding")(pixels)
        x = x.reshape(x.shape[0], -1, tower.hidden_size)
        cls = param(self, "class_embedding", VECTOR, (tower.hidden_size,))
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, tower.hidden_size)).astype(x.dtype), x], axis=1)
        x = x + _positions(self, x.shape[1], tower.hidden_size)
        x, lengths = in_eights(_layer_norm(tower, "pre_layrnorm")(x))
        x, _ = stack(EncoderLayer, tower.layers)(tower, causal=False, name="layers")(x, lengths)
        return _layer_norm(tower, "post_layernorm")(x[:, 0])


class TextTower(nn.Module):
    """Causal tower; the state at the end token."""

    config: TextConfig

    @nn.compact
    def __call__(self, token_ids):
        c, tower = self.config, self.config.text
        x = Embed(c.vocab_size, tower.hidden_size, name="token_embedding")(token_ids)
        x = x + _positions(self, c.max_length, tower.hidden_size)[: token_ids.shape[1]]
        x, _ = stack(EncoderLayer, tower.layers)(tower, causal=True, name="layers")(x, None)
        x = _layer_norm(tower, "final_layer_norm")(x)
        # Published configs say eos_token_id 2 for a vocabulary whose end token is the largest id.
        end = token_ids if c.eos_token_id == 2 else token_ids == c.eos_token_id
        return x[jnp.arange(x.shape[0]), jnp.argmax(end, axis=-1)]


class EncoderLayer(nn.Module):
    """Pre-norm attention, to the first `lengths` tokens of each row, and feed-forward."""

    tower: Tower
    causal: bool

    @nn.compact
    def __call__(self, x, lengths):
        t = self.tower
        h = _layer_norm(t, "layer_norm1")(x)
        split = (*x.shape[:2], t.heads, t.hidden_size // t.heads)
        q, k, v = (Dense(t.hidden_size, name=name)(h).reshape(split) for name in ("q_proj", "k_proj", "v_proj"))
        h = attention(q, k, v, causal=self.causal, key_lengths=lengths)
        x = x + Dense(t.hidden_size, bias_apart=True, name="out_proj")(h)
        h = Dense(t.intermediate_size, bias_apart=True, name="fc1")(_layer_norm(t, "layer_norm2")(x))
        return x + Dense(t.hidden_size, bias_apart=True, name="fc2")(ACTIVATIONS[t.act](h)), None


def quick_gelu(x: jax.Array) -> jax.Array:
    """`x * sigmoid(1.702 x)`, OpenAI's approximation."""
    return in_float32(lambda x: x * jax.nn.sigmoid(1.702 * x), x)


def gelu(x: jax.Array) -> jax.Array:
    """The exact Gaussian error linear unit."""
    return in_float32(functools.partial(jax.nn.gelu, approximate=False), x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}


def _tower(config: Mapping[str, Any], tower: str) -> dict[str, Any]:
    """What a CLIP's config says of a tower, defaults included: older ones say it twice, and then the other counts."""
    older = config.get(f"{tower}_config_dict")
    return SIZES[tower] | ((config.get(f"{tower}_config") or {}) if older is None else older)


def _open_clip_tower(config: Mapping[str, Any], heads: int, act: str) -> Tower:
    width = config["width"]
    return Tower(width, int(width * config.get("mlp_ratio", 4)), config["layers"], heads, act)


def _positions(module: nn.Module, length: int, dim: int) -> jax.Array:
    return param(module, "position_embedding", VECTOR, (length, dim))


def _layer_norm(tower: Tower, name: str) -> LayerNorm:
    return LayerNorm(tower.norm_eps, name=name)


def _normalise(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
