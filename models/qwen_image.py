"""Qwen-Image: the multimodal diffusion transformer (reference: diffusers `QwenImageTransformer2DModel`).

Image and text tokens are two streams through 60 blocks that are joined in attention. The position of an image token
counts from the grid's centre; text goes on along the diagonal from where the grid's longer half ends, so that
positions depend on the size of the image and not on the length of the text.
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

from ses_jax.models import mmdit
from ses_jax.models.config import known_fields
from ses_jax.models.layers import RMSNorm, TimeEmbedder, stack, weights_dtype
from ses_jax.models.mmdit import JointBlock, ModulatedOutput, axes_rope, grid_positions, pack, pipeline_time, unpack
from ses_jax.models.params import first_values
from ses_jax.models.quantized import Dense

ROPE_THETA = 10000.0
PARTITION = (
    *mmdit.PARTITION,
    (r"(img_in|txt_in)/(kernel|bias)|txt_norm/scale", P()),
)
QUANTIZED = mmdit.QUANTIZED
TURNED = mmdit.TURNED
UNSUPPORTED = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(mmdit.Config):
    """Architecture, field for field as in the published `transformer/config.json`."""

    patch_size: int = 2
    in_channels: int = 64
    out_channels: int = 16
    num_layers: int = 60
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "Config":
        """Reads a `config.json`.

        Raises:
          ValueError: for an option of the reference that this network does not cover, or sizes that contradict.
        """
        for option in UNSUPPORTED:
            if config.get(option):
                raise ValueError(f"Qwen-Image with {option}=true is not supported; use the text-to-image checkpoint")
        known = known_fields(cls, config, skip=["timestep_rounding"])
        if config.get("out_channels", cls.out_channels) is None:
            known["out_channels"] = known.get("in_channels", cls.in_channels)
        made = cls(**known)
        if made.in_channels != made.patch_size**2 * made.out_channels:
            raise ValueError(
                f"Qwen-Image with in_channels={made.in_channels} and out_channels={made.out_channels} is not "
                f"supported; a text-to-image model has out_channels x {made.patch_size}**2 input channels"
            )
        return made


class Text(NamedTuple):
    """A batch of encoded prompts.

    Attributes:
      features: `[B, L, joint_attention_dim]`, the text encoder's states.
      lengths: int `[B]`, how many leading rows are real; the others are never attended to.
    """

    features: Float[Array, "b l features"]
    lengths: Int[Array, " b"]


def velocity(
    params: Any, config: Config, latents: Float[Array, "b c h w"], sigma: Float[Array, " b"], text: Text
) -> Float[Array, "b c h w"]:
    """Velocity `d latents / d sigma` (noise minus image), float32 `[B, C, h, w]`.

    Args:
      latents: `[B, C, h, w]`, h and w multiples of the patch size.
      sigma: `[B]`, the noise level, 1 (noise) to 0 (image).
      text: encoded prompts, batch B.
    """
    return QwenImage(config).apply({"params": params}, latents, sigma, text).astype(jnp.float32)


def init(key: jax.Array | None, config: Config) -> Any:
    """Random params, for training; without a key zeros, for abstract shapes."""
    latents = jnp.zeros((1, config.out_channels, config.patch_size, config.patch_size))
    text = Text(jnp.zeros((1, 1, config.joint_attention_dim)), jnp.ones(1, jnp.int32))
    return first_values(QwenImage(config), key, latents, jnp.zeros(1), text)


class QwenImage(nn.Module):
    """The whole transformer."""

    config: Config

    def setup(self):
        c = self.config
        self.time_embedder = TimeEmbedder(c.dim, c.dim)
        self.img_in = Dense(c.dim)
        self.txt_norm = RMSNorm(1e-6)
        self.txt_in = Dense(c.dim)
        self.blocks = stack(JointBlock, c.num_layers)(c.num_attention_heads, c.attention_head_dim)
        self.output = ModulatedOutput(c.patch_size**2 * c.out_channels)

    def __call__(self, latents, sigma, text):
        c, dtype = self.config, weights_dtype(self)
        grid = (latents.shape[2] // c.patch_size, latents.shape[3] // c.patch_size)
        cos, sin = rope(c, grid, text.features.shape[1])
        vector = self.time_embedder(1000 * pipeline_time(sigma, c.timestep_rounding, dtype), dtype)
        image = self.img_in(pack(latents.astype(dtype), c.patch_size))
        words = self.txt_in(self.txt_norm(text.features.astype(dtype)))
        (image, _), _ = self.blocks((image, words), vector, cos, sin, text.lengths)
        return unpack(self.output(image, vector), grid, c.patch_size)


def rope(config: Config, grid: tuple[int, int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, each `[1, S + length, head_dim / 2]`, of the tokens of a grid and of the text after it."""
    rows, columns = grid
    row, column = grid_positions(grid)
    image = np.stack([np.zeros_like(row), row - (rows - rows // 2), column - (columns - columns // 2)], axis=-1)
    text = max(rows // 2, columns // 2) + np.arange(length)
    positions = np.concatenate([image, np.stack([text] * 3, axis=-1)])
    return axes_rope(config.axes_dims_rope, ROPE_THETA, positions, dtype=np.float32)
