"""FLUX.2: the dual- then single-stream diffusion transformer (reference: diffusers `Flux2Transformer2DModel`).

Traps: the modulation is global, computed once a step and shared by all blocks of a kind; no linear layer has a bias;
positions have four axes, the text along the last one with its padding counted, the image along the second and third;
padded text rows are attended to, so the text always comes at its full length.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ses_jax.models import mmdit
from ses_jax.models.config import known_fields
from ses_jax.models.layers import GatedMLP, stack, weights_dtype
from ses_jax.models.mmdit import (
    NORM_EPS,
    ConditionEmbedder,
    JointAttention,
    ModulatedOutput,
    Modulation,
    SelfAttention,
    added,
    axes_rope,
    grid_positions,
    modulate,
    pack,
    unpack,
)
from ses_jax.models.params import first_values
from ses_jax.models.quantized import Dense

PARTITION = (
    *mmdit.PARTITION,
    (r".*mlp/w[13]/kernel", P(None, None, "model")),
    (r".*mlp/w2/kernel", P(None, "model", None)),
)
QUANTIZED = mmdit.QUANTIZED
TURNED = mmdit.TURNED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(mmdit.Config):
    """Architecture, field for field as in the published `transformer/config.json`."""

    in_channels: int = 128
    num_layers: int = 8
    num_single_layers: int = 48
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000.0
    guidance_embeds: bool = True

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "Config":
        """Reads a `config.json`.

        Raises:
          ValueError: for an option of the reference that this network does not cover.
        """
        fixed = {"patch_size": 1, "timestep_guidance_channels": 256, "eps": NORM_EPS}
        for name, value in fixed.items():
            if config.get(name, value) != value:
                raise ValueError(f"FLUX.2 with {name}={config[name]} is not supported; expected {value}")
        values = known_fields(cls, config, skip=["timestep_rounding"])
        values |= {name: float(values[name]) for name in ("mlp_ratio", "rope_theta") if name in values}
        known = cls(**values)
        if config.get("out_channels") not in (None, known.in_channels):
            raise ValueError("FLUX.2 with out_channels other than in_channels is not supported")
        return known

    @property
    def mlp_dim(self) -> int:
        """Width inside a feed-forward."""
        return int(self.dim * self.mlp_ratio)


def velocity(
    params: Any,
    config: Config,
    latents: Float[Array, "b c h w"],
    sigma: Float[Array, " b"],
    text: Float[Array, "b l features"],
    guidance: Float[Array, " b"] | None = None,
) -> Float[Array, "b c h w"]:
    """Velocity `d latents / d sigma` (noise minus image), float32 `[B, C, h, w]`.

    Args:
      latents: `[B, C, h, w]`, the autoencoder's packed and normalised cells; each is one token.
      sigma: `[B]`, the noise level, 1 (noise) to 0 (image).
      text: features `[B, L, joint_attention_dim]`, padding included.
      guidance: `[B]`, the distilled guidance scale; only where `config.guidance_embeds`.
    """
    return Flux2(config).apply({"params": params}, latents, sigma, text, guidance).astype(jnp.float32)


def init(key: jax.Array | None, config: Config) -> Any:
    """Random params, for training; without a key zeros, for abstract shapes."""
    latents, text = jnp.zeros((1, config.in_channels, 1, 1)), jnp.zeros((1, 1, config.joint_attention_dim))
    return first_values(Flux2(config), key, latents, jnp.zeros(1), text, jnp.zeros(1))


class Flux2(nn.Module):
    """The whole transformer."""

    config: Config

    @nn.compact
    def __call__(self, latents, sigma, text, guidance):
        c, dtype = self.config, weights_dtype(self)
        grid, length = latents.shape[2:], text.shape[1]
        embed_image, embed_text = (Dense(c.dim, use_bias=False, name=f"{n}_embedder") for n in ("x", "context"))
        image, text = embed_image(pack(latents.astype(dtype), 1)), embed_text(text.astype(dtype))
        vector = ConditionEmbedder(c, c.guidance_embeds, use_bias=False, name="condition")(sigma, guidance, dtype)
        cos, sin = axes_rope(c.axes_dims_rope, c.rope_theta, positions(grid, length))

        modulations = (
            Modulation(c.dim, 6, use_bias=False, name="image_modulation")(vector),
            Modulation(c.dim, 6, use_bias=False, name="text_modulation")(vector),
        )
        (image, text), _ = stack(DualBlock, c.num_layers)(c, name="dual_blocks")((image, text), modulations, cos, sin)
        x, modulation = jnp.concatenate([image, text], axis=1), Modulation(c.dim, 3, use_bias=False, name="modulation")
        x, _ = stack(SingleBlock, c.num_single_layers)(c, name="single_blocks")(x, modulation(vector), cos, sin)
        out = ModulatedOutput(c.in_channels, use_bias=False, name="output")(x[:, : image.shape[1]], vector)
        return unpack(out, grid, 1)


class DualBlock(nn.Module):
    """Both streams attend to each other and then run through a feed-forward of their own."""

    config: Config

    @nn.compact
    def __call__(self, streams, modulations, cos, sin):
        c = self.config
        attend = JointAttention(c.num_attention_heads, c.attention_head_dim, use_bias=False, name="attention")
        normed = (modulate(x, shift, scale) for x, (shift, scale, *_) in zip(streams, modulations, strict=True))
        attended = attend(*normed, cos, sin)
        out = []
        for x, h, (_, _, gate, shift, scale, gate_mlp), name in zip(
            streams, attended, modulations, ("image_mlp", "text_mlp"), strict=True
        ):
            x = x + gate * h
            out.append(added(x, gate_mlp * GatedMLP(c.mlp_dim, name=name)(modulate(x, shift, scale))))
        return tuple(out), None


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side on one sequence, of the same input and added to the same output.

    Published as one layer in and one out; here in parts, so that a mesh can split heads and feed-forward alike.
    """

    config: Config

    @nn.compact
    def __call__(self, x, modulation, cos, sin):
        c = self.config
        shift, scale, gate = modulation
        h = modulate(x, shift, scale)
        attend = SelfAttention(c.num_attention_heads, c.attention_head_dim, use_bias=False, wide=True, name="attention")
        out = attend(h, cos, sin) + GatedMLP(c.mlp_dim, wide=True, name="mlp")(h)
        return added(x, gate * out.astype(x.dtype)), None


def positions(grid: tuple[int, int], length: int) -> np.ndarray:
    """Positions `[S + L, 4]`, the image's rows and columns on the middle axes, then the text's along the last."""
    rows, columns = grid_positions(grid)
    out = np.zeros((rows.size + length, 4), np.int64)
    out[: rows.size, 1], out[: rows.size, 2] = rows, columns
    out[rows.size :, 3] = np.arange(length)
    return out
