"""Z-Image: the single-stream diffusion transformer (reference: diffusers `ZImageTransformer2DModel`).

The caption's tokens are refined once a prompt (`refine_caption`: they depend neither on the noise nor on the time);
`velocity` then runs the image tokens through the noise refiner and both together through the main layers.
Sequences are padded to multiples of 32 with learned pad tokens that every token attends to.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ses_jax.models.config import known_fields
from ses_jax.models.layers import GatedMLP, RMSNorm, TimeEmbedder, channels_last, layer_norm, silu, stack
from ses_jax.models.mmdit import SelfAttention
from ses_jax.models.params import VECTOR, first_values, param
from ses_jax.models.quantized import Dense

SEQUENCE_MULTIPLE = 32
TIME_HIDDEN = 1024
QK_NORM_EPS = 1e-5  # whatever `norm_eps` is

# Heads and feed-forward widths are split over the model axis of a mesh; leaves of blocks are stacked.
PARTITION = (
    (r".*/attention/to_[qkv]/kernel", P(None, None, "model")),
    (r".*/attention/to_out/kernel", P(None, "model", None)),
    (r".*/feed_forward/w[13]/kernel", P(None, None, "model")),
    (r".*/feed_forward/w2/kernel", P(None, "model", None)),
    # Over their inputs, so that their small outputs are summed and every device has them whole; split outputs would
    # spread to the tokens they modulate, which would have to be gathered.
    (r"(layers|noise_refiner)/modulation/kernel", P(None, "model", None)),
    (r"final_layer/modulation/kernel", P("model", None)),
    (r".*/(scale|bias)|.*_pad_token|(x_embedder|cap_embedder|t_embedder/\w+|final_layer/linear)/kernel", P()),
)
# Not what modulates blocks, which is small.
QUANTIZED = (r"(layers|\w+_refiner)/(attention|feed_forward)/\w+/kernel",)
TURNED = (r".*/attention/to_[qkv]/kernel",)


@dataclasses.dataclass(frozen=True)
class Config:
    """Architecture, field for field as in the published `transformer/config.json`."""

    patch_size: int = 2
    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    norm_eps: float = 1e-5
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1536, 512, 512)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "Config":
        """Reads a `config.json`.

        Raises:
          ValueError: for an option of the reference that this network does not cover.
        """
        if config.get("siglip_feat_dim") is not None:
            raise ValueError("Z-Image with image conditioning (siglip_feat_dim) is not supported")
        if not config.get("qk_norm", True):
            raise ValueError("Z-Image with qk_norm=false is not supported")
        if tuple(config.get("all_f_patch_size", (1,))) != (1,) or len(config.get("all_patch_size", (2,))) != 1:
            raise ValueError("Z-Image needs exactly one patch size and all_f_patch_size [1]")
        return cls(**known_fields(cls, config), patch_size=config.get("all_patch_size", (2,))[0])

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        return int(self.dim / 3 * 8)

    @property
    def time_dim(self) -> int:
        """Width of the time embedding that drives the modulation."""
        return min(self.dim, 256)


class Caption(NamedTuple):
    """A batch of refined captions.

    Attributes:
      tokens: `[B, L, dim]`, L a multiple of 32.
      lengths: int `[B]`, each caption's own length rounded up to 32; tokens beyond it are never attended to.
    """

    tokens: Float[Array, "b l dim"]
    lengths: Int[Array, " b"]


def refine_caption(
    params: Any, config: Config, features: Float[Array, "b l features"], lengths: Int[Array | np.ndarray, " b"]
) -> Caption:
    """Refines text features `[B, L, cap_feat_dim]` of which the first `lengths [B]` rows are real; L % 32 == 0."""
    return ZImage(config).apply({"params": params}, features, lengths, method="refine_caption")


def velocity(
    params: Any, config: Config, latents: Float[Array, "b c h w"], sigma: Float[Array, " b"], caption: Caption
) -> Float[Array, "b c h w"]:
    """Velocity `d latents / d sigma` (noise minus image), float32 `[B, C, h, w]`.

    Args:
      latents: `[B, C, h, w]`, h and w multiples of the patch size.
      sigma: `[B]`, the noise level, 1 (noise) to 0 (image).
      caption: refined captions, batch B.
    """
    # The network's time runs from 0 at noise to 1 at the image, and it predicts image minus noise.
    out = ZImage(config).apply({"params": params}, latents, 1.0 - sigma, caption, method="image_velocity")
    return -out.astype(jnp.float32)


def init(key: jax.Array | None, config: Config) -> Any:
    """Random params, for training; without a key zeros, for abstract shapes."""
    side = config.patch_size
    latents = jnp.zeros((1, config.in_channels, side, side))
    features = jnp.zeros((1, SEQUENCE_MULTIPLE, config.cap_feat_dim))
    return first_values(ZImage(config), key, latents, jnp.zeros(1), features, jnp.ones(1, jnp.int32))


class ZImage(nn.Module):
    """The whole transformer; its three stages are separate methods so that captions are refined only once."""

    config: Config

    def setup(self):
        c = self.config
        self.x_embedder = Dense(c.dim)
        self.t_embedder = TimeEmbedder(TIME_HIDDEN, c.time_dim)
        self.cap_norm = RMSNorm(c.norm_eps)
        self.cap_embedder = Dense(c.dim)
        self.x_pad_token = param(self, "x_pad_token", VECTOR, (1, c.dim))
        self.cap_pad_token = param(self, "cap_pad_token", VECTOR, (1, c.dim))
        self.noise_refiner = stack(ModulatedBlock, c.n_refiner_layers)(c)
        self.context_refiner = stack(Block, c.n_refiner_layers)(c)
        self.layers = stack(ModulatedBlock, c.n_layers)(c)
        self.final_layer = FinalLayer(c.patch_size**2 * c.in_channels)

    def __call__(self, latents, time, features, lengths):
        return self.image_velocity(latents, time, self.refine_caption(features, lengths))

    def refine_caption(self, features, lengths):
        c = self.config
        length = features.shape[1]
        x = self.cap_embedder(self.cap_norm(features.astype(self.dtype)))
        x = jnp.where(jnp.arange(length)[:, None] < lengths[:, None, None], x, self.cap_pad_token)
        padded = _round_up(lengths)
        cos, sin = rope(c, _caption_positions(length)[None])
        x, _ = self.context_refiner(x, cos, sin, padded)
        return Caption(x, padded)

    def image_velocity(self, latents, time, caption):
        c = self.config
        batch, _, height, width = latents.shape
        grid = (height // c.patch_size, width // c.patch_size)
        time_embedding = self.t_embedder(time * c.t_scale, self.dtype)

        x = self.x_embedder(patchify(latents.astype(self.dtype), c.patch_size))
        count = x.shape[1]
        pad = jnp.broadcast_to(self.x_pad_token, (batch, -count % SEQUENCE_MULTIPLE, c.dim))
        x = jnp.concatenate([x, pad.astype(x.dtype)], axis=1)
        cos, sin = rope(c, _image_positions(grid, caption.lengths + 1))
        x, _ = self.noise_refiner(x, cos, sin, None, time_embedding)

        length = caption.tokens.shape[1]
        cap_cos, cap_sin = rope(c, jnp.broadcast_to(_caption_positions(length), (batch, length, 3)))
        lengths = x.shape[1] + caption.lengths
        x = jnp.concatenate([x, caption.tokens], axis=1)
        cos, sin = jnp.concatenate([cos, cap_cos], axis=1), jnp.concatenate([sin, cap_sin], axis=1)
        x, _ = self.layers(x, cos, sin, lengths, time_embedding)
        return unpatchify(self.final_layer(x[:, :count], time_embedding), grid, c.patch_size)

    @property
    def dtype(self):
        return self.x_pad_token.dtype


class ModulatedBlock(nn.Module):
    """Sandwich-normed attention and feed-forward, scaled and gated by the time embedding."""

    config: Config

    @nn.compact
    def __call__(self, x, cos, sin, key_lengths, time_embedding):
        c = self.config
        modulation = Dense(4 * c.dim, name="modulation")(time_embedding)[:, None, :]
        scale_attn, gate_attn, scale_ffn, gate_ffn = jnp.split(modulation, 4, axis=-1)

        x = channels_last(x)
        h = RMSNorm(c.norm_eps, name="attention_norm1")(x) * (1 + scale_attn)
        h = RMSNorm(c.norm_eps, name="attention_norm2")(channels_last(self_attention(c)(h, cos, sin, key_lengths)))
        x = x + jnp.tanh(gate_attn) * h

        h = RMSNorm(c.norm_eps, name="ffn_norm1")(x) * (1 + scale_ffn)
        h = RMSNorm(c.norm_eps, name="ffn_norm2")(channels_last(GatedMLP(c.ffn_dim, name="feed_forward")(h)))
        return channels_last(x + jnp.tanh(gate_ffn) * h), None


class Block(nn.Module):
    """Sandwich-normed attention and feed-forward, without modulation."""

    config: Config

    @nn.compact
    def __call__(self, x, cos, sin, key_lengths):
        c = self.config
        h = self_attention(c)(RMSNorm(c.norm_eps, name="attention_norm1")(x), cos, sin, key_lengths)
        x = x + RMSNorm(c.norm_eps, name="attention_norm2")(h)
        h = GatedMLP(c.ffn_dim, name="feed_forward")(RMSNorm(c.norm_eps, name="ffn_norm1")(x))
        return x + RMSNorm(c.norm_eps, name="ffn_norm2")(h), None


class FinalLayer(nn.Module):
    """Scaled LayerNorm and projection to patches."""

    patch_dim: int

    @nn.compact
    def __call__(self, x, time_embedding):
        scale = Dense(x.shape[-1], name="modulation")(silu(time_embedding))
        return Dense(self.patch_dim, name="linear")(layer_norm(x) * (1 + scale[:, None, :]))


def self_attention(config: Config) -> SelfAttention:
    """A block's attention; to be called inside the block."""
    return SelfAttention(config.n_heads, config.head_dim, use_bias=False, eps=QK_NORM_EPS, name="attention")


def patchify(latents: Float[Array, "b c h w"], patch: int) -> Float[Array, "b s d"]:
    """`[B, C, h, w]` to row-major tokens `[B, h/p * w/p, p * p * C]`, channel innermost."""
    batch, channels, height, width = latents.shape
    x = latents.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.transpose(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(tokens: Float[Array, "b s d"], grid: tuple[int, int], patch: int) -> Float[Array, "b c h w"]:
    """Inverse of `patchify` for a grid of `(h/p, w/p)` tokens."""
    rows, columns = grid
    x = tokens.reshape(tokens.shape[0], rows, columns, patch, patch, -1)
    return x.transpose(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], -1, rows * patch, columns * patch)


def rope(config: Config, positions: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, each `[B, S, head_dim / 2]`, at integer positions `[B, S, 3]` (caption, row, column)."""
    cos, sin = [], []
    for axis, (dim, length) in enumerate(zip(config.axes_dims, config.axes_lens, strict=True)):
        # Angles in float64, rounded once, as the reference builds its table.
        frequencies = 1.0 / config.rope_theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
        angles = np.outer(np.arange(length), frequencies).astype(np.float32)
        cos.append(jnp.asarray(np.cos(angles))[positions[..., axis]])
        sin.append(jnp.asarray(np.sin(angles))[positions[..., axis]])
    return jnp.concatenate(cos, axis=-1), jnp.concatenate(sin, axis=-1)


def _caption_positions(length: int) -> np.ndarray:
    """`[length, 3]`: captions count along the first axis, from 1."""
    positions = np.zeros((length, 3), np.int32)
    positions[:, 0] = np.arange(1, length + 1)
    return positions


def _image_positions(grid: tuple[int, int], start: jax.Array) -> jax.Array:
    """`[B, S, 3]`: image tokens sit at `start [B]` of the first axis; pad tokens sit at the origin."""
    rows, columns = np.indices(grid).reshape(2, -1).astype(np.int32)
    first = jnp.broadcast_to(start[:, None], (start.shape[0], rows.size))
    image = jnp.stack([first, *(jnp.broadcast_to(p, first.shape) for p in (rows, columns))], axis=-1)
    return jnp.pad(image, ((0, 0), (0, -rows.size % SEQUENCE_MULTIPLE), (0, 0)))


def _round_up(lengths: jax.Array) -> jax.Array:
    return -(-lengths // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE
