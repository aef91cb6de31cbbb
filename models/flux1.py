"""FLUX.1: the double- and single-stream diffusion transformer (reference: diffusers `FluxTransformer2DModel`).

Time, distilled guidance and the pooled prompt make one vector that modulates every block. The prompt's tokens all sit
at position 0 of the rotary embedding and none is masked, padding included.

The reference multiplies time and guidance by 1000 in the dtype of the weights: in bfloat16, time 988.4 becomes 988 and
a guidance of 3.5 becomes 3.504. `Config.timestep_rounding` chooses: "exact" keeps both in float32, so that they mean
the same whatever the weights are stored in; "reference" rounds as the reference does. With float32 weights the two
agree.
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

from ses_jax.models.attention import attention, rotate_interleaved
from ses_jax.models.layers import RMSNorm, TimeEmbedder, stack
from ses_jax.models.mmdit import (
    JOINT_PARTITION,
    NORM_EPS,
    ROUNDINGS,
    JointBlock,
    ModulatedOutput,
    Modulation,
    axes_rope,
    grid_positions,
    modulate,
    pack,
    thousandfold,
    unpack,
)

PATCH = 2
MLP_RATIO = 4
ROPE_THETA = 10000.0

# Heads and feed-forward widths are split over the model axis of a mesh; leaves of blocks are stacked.
PARTITION = (
    *JOINT_PARTITION,
    (r"single_blocks/mlp_in/kernel", P(None, None, "model")),
    (r"single_blocks/mlp_in/bias", P(None, "model")),
    (r"single_blocks/mlp_out/kernel", P(None, "model", None)),
    (r"single_blocks/modulation/linear/kernel", P(None, "model", None)),
    (r"single_blocks/modulation/linear/bias", P()),
    (r"(x_embedder|context_embedder|condition/\w+/linear_\d|output/(norm_out/linear|proj_out))/(kernel|bias)", P()),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Architecture, field for field as in the published `transformer/config.json`.

    Attributes:
      timestep_rounding: "exact" or "reference", see the module docstring; no part of the published file.
    """

    in_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    timestep_rounding: str = "exact"

    def __post_init__(self):
        if self.timestep_rounding not in ROUNDINGS:
            raise ValueError(f"timestep_rounding={self.timestep_rounding!r} is none of {', '.join(ROUNDINGS)}")

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
        fields = {field.name for field in dataclasses.fields(cls)} - {"timestep_rounding"}
        made = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in fields})
        if sum(made.axes_dims_rope) != made.attention_head_dim:
            raise ValueError(f"FLUX.1's axes_dims_rope must sum to attention_head_dim, {made.attention_head_dim}")
        return made

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

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


def init(key: jax.Array, config: Config) -> Any:
    """Random params, for training and for abstract shapes."""
    latents = jnp.zeros((1, config.latent_channels, PATCH, PATCH))
    prompt = Prompt(jnp.zeros((1, 1, config.joint_attention_dim)), jnp.zeros((1, config.pooled_projection_dim)))
    return Flux1(config).init(key, latents, jnp.zeros(1), prompt, jnp.zeros(1))["params"]


class Flux1(nn.Module):
    """The whole transformer."""

    config: Config

    @nn.compact
    def __call__(self, latents, sigma, prompt, guidance):
        c, dtype = self.config, self.dtype
        grid = tuple(size // PATCH for size in latents.shape[2:])
        vector = ConditionEmbedder(c, name="condition")(sigma, guidance, prompt.pooled.astype(dtype))
        image = nn.Dense(c.dim, name="x_embedder")(pack(latents.astype(dtype), PATCH))
        text = nn.Dense(c.dim, name="context_embedder")(prompt.features.astype(dtype))
        cos, sin = axes_rope(c.axes_dims_rope, ROPE_THETA, positions(grid, text.shape[1]))

        double = stack(JointBlock, c.num_layers)(c.num_attention_heads, c.attention_head_dim, name="double_blocks")
        (image, text), _ = double((image, text), vector, cos, sin)
        joint = jnp.concatenate([image, text], axis=1)
        joint, _ = stack(SingleBlock, c.num_single_layers)(c, name="single_blocks")(joint, vector, cos, sin)
        return unpack(ModulatedOutput(c.in_channels, name="output")(joint[:, : image.shape[1]], vector), grid, PATCH)

    @property
    def dtype(self):
        """The dtype of the weights (float32 while they are being created)."""
        params = self.variables.get("params", {})
        return next(iter(jax.tree.leaves(params)), jnp.zeros(())).dtype


class ConditionEmbedder(nn.Module):
    """Time, guidance and the pooled prompt, as one vector `[B, dim]`."""

    config: Config

    @nn.compact
    def __call__(self, sigma, guidance, pooled):
        c, dtype = self.config, pooled.dtype
        time, guidance = thousandfold(sigma, guidance, dtype if c.timestep_rounding == "reference" else jnp.float32)
        vector = TimeEmbedder(c.dim, c.dim, name="timestep_embedder")(time, dtype)
        if c.guidance_embeds:
            vector = vector + TimeEmbedder(c.dim, c.dim, name="guidance_embedder")(guidance, dtype)
        return vector + VectorEmbedder(c.dim, name="text_embedder")(pooled)


class VectorEmbedder(nn.Module):
    """Linear, SiLU, linear."""

    dim: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.dim, name="linear_2")(jax.nn.silu(nn.Dense(self.dim, name="linear_1")(x)))


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
        hidden = jax.nn.gelu(nn.Dense(MLP_RATIO * c.dim, name="mlp_in")(h), approximate=True)
        mlp = nn.Dense(c.dim, use_bias=False, name="mlp_out")(hidden)
        return x + gate * (SelfAttention(c, name="attention")(h, cos, sin) + mlp), None


class SelfAttention(nn.Module):
    """Multi-head attention; queries and keys are normed per head, then rotated."""

    config: Config

    @nn.compact
    def __call__(self, x, cos, sin):
        c = self.config
        split = (*x.shape[:2], c.num_attention_heads, c.attention_head_dim)
        q, k, v = (nn.Dense(c.dim, name=f"to_{name}")(x).reshape(split) for name in "qkv")
        q = rotate_interleaved(RMSNorm(NORM_EPS, name="norm_q")(q), cos, sin)
        k = rotate_interleaved(RMSNorm(NORM_EPS, name="norm_k")(k), cos, sin)
        return nn.Dense(c.dim, name="to_out")(attention(q, k, v))


def positions(grid: tuple[int, int], text_length: int) -> np.ndarray:
    """Integer positions `[S + L, 3]`: of image tokens (0, row, column), of the text tokens after them (0, 0, 0)."""
    rows, columns = grid_positions(grid)
    image = np.stack([np.zeros_like(rows), rows, columns], axis=-1)
    return np.concatenate([image, np.zeros((text_length, 3), image.dtype)])
