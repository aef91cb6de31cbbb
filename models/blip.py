"""BLIP's image-grounded text encoder: a ViT, and a BERT that attends to its patches in every layer.

Reference: `BLIP_Pretrain` in THUDM/ImageReward (from salesforce/BLIP). The ViT's blocks are those of CLIP's towers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ses_jax.models.attention import attention
from ses_jax.models.clip import EncoderLayer, Tower, gelu
from ses_jax.models.convolution import Conv
from ses_jax.models.layers import Embed, LayerNorm, in_eights, stack
from ses_jax.models.params import VECTOR, first_values, param
from ses_jax.models.quantized import Dense

# `med_config.json` says nothing of the ViT: it is the large one, in patches of 16.
VIT_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
}
QUANTIZED = (r".*layers/.*/kernel",)


class Tokens(NamedTuple):
    """A prompt for BERT: ids `[B, L]`, and False where they are padding."""

    ids: Int[Array, "b l"]
    mask: Bool[Array, "b l"]


@dataclasses.dataclass(frozen=True)
class Bert:
    """The text encoder."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    layers: int = 12
    heads: int = 12
    norm_eps: float = 1e-12
    vocab_size: int = 30524
    max_length: int = 512


@dataclasses.dataclass(frozen=True)
class Config:
    """Both towers."""

    text: Bert
    vision: Tower
    image_size: int = 224
    patch_size: int = 16

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "Config":
        """Reads a `med_config.json`; `vision_config`, which published ones lack, may describe another ViT."""
        act = config.get("hidden_act", "gelu")
        if act != "gelu":
            raise ValueError(f"BLIP activation {act!r} is not supported; known: gelu")
        vision = VIT_LARGE | dict(config.get("vision_config", {}))
        return cls(
            text=Bert(
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                layers=config["num_hidden_layers"],
                heads=config["num_attention_heads"],
                norm_eps=config.get("layer_norm_eps", 1e-12),
                vocab_size=config["vocab_size"],
                max_length=config["max_position_embeddings"],
            ),
            vision=Tower.from_json(vision | {"hidden_act": "gelu", "layer_norm_eps": 1e-6}),
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
        )


def encode(params: Any, config: Config, pixels: Float[Array, "b size size 3"], tokens: Tokens) -> Float[Array, "b d"]:
    """The first token's final state, float32 `[B, hidden_size]`, of a text that looks at an image.

    Args:
      pixels: standardised, `[B, size, size, 3]`.
      tokens: of one prompt for all images, or of one an image.
    """
    ids, mask = (jnp.broadcast_to(x, (pixels.shape[0], x.shape[-1])) for x in tokens)
    return BLIP(config).apply({"params": params}, pixels, ids, mask)[:, 0].astype(jnp.float32)


def embed_image(params: Any, config: Config, pixels: Float[Array, "b size size 3"]) -> Float[Array, "b n d"]:
    """The ViT's normed states of the class token and all patches, `[B, 1 + patches, hidden_size]`."""
    return BLIP(config).apply({"params": params}, pixels, method="image_states")


def init(key: jax.Array | None, config: Config) -> Any:
    """Random params, for tests; without a key zeros, for abstract shapes."""
    pixels = jnp.zeros((1, config.image_size, config.image_size, 3))
    return first_values(BLIP(config), key, pixels, jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8), bool))


class BLIP(nn.Module):
    """States of a text that looks at an image."""

    config: Config

    def setup(self):
        self.vision = VisionTower(self.config)
        self.text = TextEncoder(self.config.text)

    def __call__(self, pixels, ids, mask):
        return self.text(ids, mask, self.vision(pixels))

    def image_states(self, pixels):
        return self.vision(pixels)


class VisionTower(nn.Module):
    """Patches and a class token through pre-norm blocks; all of their states, normed."""

    config: Config

    @nn.compact
    def __call__(self, pixels):
        c, tower = self.config, self.config.vision
        patch = (c.patch_size, c.patch_size)
        cls = param(self, "class_embedding", VECTOR, (tower.hidden_size,))
        pixels = pixels.astype(cls.dtype)
        x = Conv(tower.hidden_size, patch, patch, "VALID", name="patch_embedding")(pixels)
        x = x.reshape(x.shape[0], -1, tower.hidden_size)
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, tower.hidden_size)), x], axis=1)
        x = x + param(self, "position_embedding", VECTOR, x.shape[1:])
        padded, lengths = in_eights(x)
        padded, _ = stack(EncoderLayer, tower.layers)(tower, causal=False, name="layers")(padded, lengths)
        return LayerNorm(tower.norm_eps, name="norm")(padded[:, : x.shape[1]])


class TextEncoder(nn.Module):
    """BERT, looking at an image."""

    bert: Bert

    @nn.compact
    def __call__(self, ids, mask, image):
        t = self.bert
        x = Embed(t.vocab_size, t.hidden_size, name="word_embedding")(ids)
        positions = param(self, "position_embedding", VECTOR, (t.max_length, t.hidden_size))
        x = LayerNorm(t.norm_eps, name="embedding_norm")(x + positions[: ids.shape[1]])
        x, _ = stack(TextLayer, t.layers)(t, name="layers")(x, mask, image)
        return x


class TextLayer(nn.Module):
    """Attention to the text, to the image, and feed-forward, each normed after its residual."""

    bert: Bert

    @nn.compact
    def __call__(self, x, mask, image):
        t = self.bert
        x = LayerNorm(t.norm_eps, name="self_norm")(x + Attention(t.heads, name="self")(x, x, mask))
        x = LayerNorm(t.norm_eps, name="cross_norm")(x + Attention(t.heads, name="cross")(x, image, None))
        h = Dense(t.hidden_size, name="output")(gelu(Dense(t.intermediate_size, name="intermediate")(x)))
        return LayerNorm(t.norm_eps, name="output_norm")(x + h), None


class Attention(nn.Module):
    """Multi-head attention of `x` to `context`."""

    heads: int

    @nn.compact
    def __call__(self, x, context, mask):
        dim = x.shape[-1]
        q, k, v = (
            Dense(dim, name=name)(source).reshape(*source.shape[:2], self.heads, dim // self.heads)
            for name, source in (("q_proj", x), ("k_proj", context), ("v_proj", context))
        )
        return Dense(dim, name="out_proj")(attention(q, k, v, key_mask=mask))
