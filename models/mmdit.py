"""What the multimodal diffusion transformers share: two streams of tokens, image and text, that attend to each other.

References: diffusers `FluxAttention`, `AdaLayerNormContinuous`, `FluxPosEmbed`. Joint sequences run image first, text
last: attention does not care, and padding then stands at the end, where kernels take a length instead of a mask.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ses_jax.models.attention import attention, rotate_interleaved
from ses_jax.models.layers import RMSNorm, layer_norm, rounded

NORM_EPS = 1e-6
# How time and guidance are multiplied by 1000: in float32, or in the dtype of the weights as the references do.
ROUNDINGS = ("exact", "reference")

# Of stacked joint blocks: heads and feed-forward widths are split over the model axis of a mesh.
JOINT_PARTITION = (
    (r".*/attention/(to_[qkv]|add_[qkv]_proj)/kernel", P(None, None, "model")),
    (r".*/attention/(to_[qkv]|add_[qkv]_proj)/bias", P(None, "model")),
    (r".*/attention/to_(add_)?out/kernel", P(None, "model", None)),
    (r".*/(image|text)_mlp/linear_1/kernel", P(None, None, "model")),
    (r".*/(image|text)_mlp/linear_1/bias", P(None, "model")),
    (r".*/(image|text)_mlp/linear_2/kernel", P(None, "model", None)),
    # Over its inputs, so that every device has its few outputs whole; split, they would split the tokens' channels.
    (r".*/(image|text)_modulation/linear/kernel", P(None, "model", None)),
    (r".*/(image|text)_(modulation/linear|mlp/linear_2)/bias|.*/attention/(to_(add_)?out/bias|norm_\w+/scale)", P()),
)


class JointBlock(nn.Module):
    """One layer: joint attention, then a GELU feed-forward of each stream; both streams modulated and gated."""

    heads: int
    head_dim: int

    @nn.compact
    def __call__(self, streams, vector, cos, sin, text_lengths=None):
        """Takes and gives `(image [B, S, D], text [B, L, D])`; `vector [B, D]` conditions both."""
        image, text = streams
        dim = image.shape[-1]
        i_shift1, i_scale1, i_gate1, i_shift2, i_scale2, i_gate2 = Modulation(dim, 6, name="image_modulation")(vector)
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = Modulation(dim, 6, name="text_modulation")(vector)

        attention = JointAttention(self.heads, self.head_dim, name="attention")
        image_normed, text_normed = modulate(image, i_shift1, i_scale1), modulate(text, t_shift1, t_scale1)
        image_out, text_out = attention(image_normed, text_normed, cos, sin, text_lengths)
        image, text = image + i_gate1 * image_out, text + t_gate1 * text_out

        image = image + i_gate2 * MLP(name="image_mlp")(modulate(image, i_shift2, i_scale2))
        text = text + t_gate2 * MLP(name="text_mlp")(modulate(text, t_shift2, t_scale2))
        return (image, text), None


class MLP(nn.Module):
    """Feed-forward four times as wide as its input, with the tanh approximation of GELU."""

    @nn.compact
    def __call__(self, x):
        hidden = jax.nn.gelu(nn.Dense(4 * x.shape[-1], name="linear_1")(x), approximate=True)
        return nn.Dense(x.shape[-1], name="linear_2")(hidden)


class JointAttention(nn.Module):
    """Attention over the tokens of both streams, each with its own projections and norms of queries and keys."""

    heads: int
    head_dim: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, image, text, cos, sin, text_lengths=None):
        """Outputs for image `[B, S, D]` and text `[B, L, D]`; `cos, sin [B or 1, S + L, head_dim / 2]`."""
        count = image.shape[1]
        joint = (self._project(image, "to", ""), self._project(text, "add", "_added"))
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(*joint, strict=True))
        lengths = None if text_lengths is None else count + text_lengths
        out = attention(rotate_interleaved(q, cos, sin), rotate_interleaved(k, cos, sin), v, key_lengths=lengths)
        image_out = nn.Dense(image.shape[-1], use_bias=self.use_bias, name="to_out")(out[:, :count])
        return image_out, nn.Dense(text.shape[-1], use_bias=self.use_bias, name="to_add_out")(out[:, count:])

    def _project(self, x, prefix, infix):
        """Queries, keys and values, each `[B, S, N, D]`; the first two are normed."""
        suffix = "_proj" if infix else ""
        split = (*x.shape[:2], self.heads, self.head_dim)
        q, k, v = (
            nn.Dense(self.heads * self.head_dim, use_bias=self.use_bias, name=f"{prefix}_{n}{suffix}")(x).reshape(split)
            for n in "qkv"
        )
        return RMSNorm(NORM_EPS, name=f"norm{infix}_q")(q), RMSNorm(NORM_EPS, name=f"norm{infix}_k")(k), v


class Modulation(nn.Module):
    """`count` vectors `[B, 1, dim]` from a conditioning vector `[B, D]`, through SiLU and one linear layer."""

    dim: int
    count: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, vector):
        out = nn.Dense(self.count * self.dim, use_bias=self.use_bias, name="linear")(jax.nn.silu(vector))
        return jnp.split(out[:, None, :], self.count, axis=-1)


class ModulatedOutput(nn.Module):
    """The last layers of a transformer: modulated LayerNorm (scale first, then shift) and the projection to patches."""

    patch_dim: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, vector):
        scale, shift = Modulation(x.shape[-1], 2, self.use_bias, name="norm_out")(vector)
        return nn.Dense(self.patch_dim, use_bias=self.use_bias, name="proj_out")(modulate(x, shift, scale))


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """LayerNorm without affine parameters, then `x * (1 + scale) + shift`."""
    return layer_norm(x, NORM_EPS) * (1 + scale) + shift


def thousandfold(
    sigma: Float[Array, " b"], guidance: Float[Array, " b"], dtype: Any
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Time and guidance times 1000, in float32, rounded on the way as the references' pipelines do in `dtype`."""
    time = rounded(1000 * pipeline_time(sigma, dtype), dtype)
    return time, rounded(1000 * rounded(guidance, dtype), dtype)


def pipeline_time(sigma: Float[Array, " b"], dtype: Any) -> Float[Array, " b"]:
    """Noise levels `[B]` as the references' pipelines hand them over: as times up to 1000 and back, in `dtype`."""
    return rounded(rounded(1000 * sigma.astype(jnp.float32), dtype) / 1000, dtype)


def axes_rope(
    axes_dims: Sequence[int], theta: float, positions: Int[np.ndarray, "s axes"], *, dtype: Any = np.float64
) -> tuple[Float[np.ndarray, "1 s half"], Float[np.ndarray, "1 s half"]]:
    """Cosines and sines, float32 `[1, S, sum(axes_dims) / 2]`, of a rotary embedding with several axes.

    Args:
      axes_dims: channels of each axis.
      theta: base of the frequencies.
      positions: integers `[S, axes]`.
      dtype: in which angles are computed; the references differ.
    """
    # The frequencies are rounded before the product, as the references do.
    frequencies = [1 / dtype(theta) ** (np.arange(0, dim, 2).astype(dtype) / dtype(dim)) for dim in axes_dims]
    angles = [positions[:, axis, None].astype(dtype) * f for axis, f in enumerate(frequencies)]
    joined = np.concatenate(angles, axis=-1)[None]
    return np.cos(joined).astype(np.float32), np.sin(joined).astype(np.float32)


def pack(latents: Float[Array, "b c h w"], patch: int = 2) -> Float[Array, "b s d"]:
    """`[B, C, h, w]` to row-major tokens `[B, h/p * w/p, C * p * p]`, channel outermost."""
    batch, channels, height, width = latents.shape
    x = latents.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def unpack(tokens: Float[Array, "b s d"], grid: tuple[int, int], patch: int = 2) -> Float[Array, "b c h w"]:
    """Inverse of `pack` for a grid of `(h/p, w/p)` tokens."""
    rows, columns = grid
    x = tokens.reshape(tokens.shape[0], rows, columns, -1, patch, patch)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, rows * patch, columns * patch)


def grid_positions(grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Row and column, each int `[S]`, of the tokens of a grid in row-major order."""
    rows, columns = np.indices(grid).reshape(2, -1)
    return rows, columns
