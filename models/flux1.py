"""FLUX.1: the double- and single-stream diffusion transformer (reference: diffusers `FluxTransformer2DModel`).

Time, distilled guidance and the pooled prompt make one vector that modulates every block. The prompt's tokens all sit
at position 0 of the rotary embedding and none is masked, padding included.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ses_jax.models import mmdit
from ses_jax.models.config import known_fields
from ses_jax.models.layers import silu, stack, weights_dtype
from ses_jax.models.mmdit import (
    ConditionEmbedder,
    JointBlock,
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

PATCH = 2
MLP_RATIO = 4
ROPE_THETA = 10000.0

PARTITION = (
    *mmdit.PARTITION,
    (r"single_blocks/mlp_in/kernel", P(None, None, "model")),
    (r"single_blocks/mlp_in/bias", P(None, "model")),
    (r"single_blocks/mlp_out/kernel", P(None, "model", None)),
)
QUANTIZED = mmdit.QUANTIZED
TURNED = mmdit.TURNED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(mmdit.Config):
    """Architecture, field for field as in the published `transformer/config.json`."""

    in_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "Config":
        """Reads a `config.json`.

        Raises:
          ValueError: for an option of the reference that this network does not cover.
        """
        channels = config.get("in_channels", 64)
        if config.get("patch_size", 1) != 1:
            raise ValueError(f"FLUX.1 with patch_size={config['patch_size']} is not supported; expected 1")
        if config.get("out_channels") not in (None, channels):
            raise ValueError("FLUX.1 with out_channels other than in_channels (a control model) is not supported")
        if channels % PATCH**2:
            raise ValueError(f"FLUX.1 with in_channels={channels} is not supported; expected a multiple of {PATCH**2}")
        return cls(**known_fields(cls, config, skip=["timestep_rounding"]))

    @property
    def latent_channels(self) -> int:
        return self.in_channels // PATCH**2


class Prompt(NamedTuple):
    """A batch of encoded prompts.

    Attributes:
      features: `[B, L, joint_attention_dim]`, of every token.
      pooled: `[B, pooled_projection_dim]`, of the whole prompt.
    """

    features: Float[Array, "b l features"]
    pooled: Float[Array, "b pooled"]


def velocity(
    params: Any,
    config: Config,
    latents: Float[Array, "b c h w"],
    sigma: Float[Array, " b"],
    prompt: Prompt,
    guidance: Float[Array, " b"],
) -> Float[Array, "b c h w"]:
    """Velocity `d latents / d sigma` (noise minus image), float32 `[B, C, h, w]`.

    Args:
      latents: `[B, C, h, w]`, h and w even.
      sigma: `[B]`, the noise level, 1 (noise) to 0 (image).
      prompt: encoded prompts, batch B.
      guidance: `[B]`, the distilled guidance; without effect in a network that has no embedding for it.
    """
    return Flux1(config).apply({"params": params}, latents, sigma, prompt, guidance).astype(jnp.float32)


def init(key: jax.Array | None, config: Config) -> Any:
    """Random params, for training; without a key zeros, for abstract shapes."""
    latents = jnp.zeros((1, config.latent_channels, PATCH, PATCH))
    prompt = Prompt(jnp.zeros((1, 1, config.joint_attention_dim)), jnp.zeros((1, config.pooled_projection_dim)))
    return first_values(Flux1(config), key, latents, jnp.zeros(1), prompt, jnp.zeros(1))


class Flux1(nn.Module):
    """The whole transformer."""

    config: Config

    @nn.compact
    def __call__(self, latents, sigma, prompt, guidance):
        c, dtype = self.config, weights_dtype(self)
        grid = tuple(size // PATCH for size in latents.shape[2:])
        vector = ConditionEmbedder(c, c.guidance_embeds, name="condition")(sigma, guidance, dtype)
        vector = vector + VectorEmbedder(c.dim, name="pooled_embedder")(prompt.pooled.astype(dtype))
        image = Dense(c.dim, name="x_embedder")(pack(latents.astype(dtype), PATCH))
        text = Dense(c.dim, name="context_embedder")(prompt.features.astype(dtype))
        cos, sin = axes_rope(c.axes_dims_rope, ROPE_THETA, positions(grid, text.shape[1]))

        double = stack(JointBlock, c.num_layers)(c.num_attention_heads, c.attention_head_dim, name="double_blocks")
        (image, text), _ = double((image, text), vector, cos, sin)
        joint = jnp.concatenate([image, text], axis=1)
        joint, _ = stack(SingleBlock, c.num_single_layers)(c, name="single_blocks")(joint, vector, cos, sin)
        return unpack(ModulatedOutput(c.in_channels, name="output")(joint[:, : image.shape[1]], vector), grid, PATCH)


class VectorEmbedder(nn.Module):
    """Linear, SiLU, linear."""

    dim: int

    @nn.compact
    def __call__(self, x):
        return Dense(self.dim, name="linear_2")(silu(Dense(self.dim, name="linear_1")(x)))


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side over the joint sequence.

    The reference joins their outputs for one last projection; here each has its own part of it, so that nothing is
    copied, and that a mesh can split both.
    """

    config: Config

    @nn.compact
    def __call__(self, x, vector, cos, sin):
        c = self.config
        shift, scale, gate = Modulation(c.dim, 3, name="modulation")(vector)
        h = modulate(x, shift, scale)
        hidden = jax.nn.gelu(Dense(MLP_RATIO * c.dim, name="mlp_in")(h), approximate=True)
        mlp = Dense(c.dim, use_bias=False, wide=True, name="mlp_out")(hidden)
        attend = SelfAttention(c.num_attention_heads, c.attention_head_dim, wide=True, name="attention")
        return added(x, gate * (attend(h, cos, sin) + mlp).astype(x.dtype)), None


def positions(grid: tuple[int, int], text_length: int) -> np.ndarray:
    """Integer positions `[S + L, 3]`: of image tokens (0, row, column), of the text tokens after them (0, 0, 0)."""
    rows, columns = grid_positions(grid)
    image = np.stack([np.zeros_like(rows), rows, columns], axis=-1)
    return np.concatenate([image, np.zeros((text_length, 3), image.dtype)])
