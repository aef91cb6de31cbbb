"""What the multimodal diffusion transformers share: two streams of tokens, image and text, that attend to each other.

References: diffusers `FluxAttention`, `AdaLayerNormContinuous`, `FluxPosEmbed`. Joint sequences run image first, text
last: attention does not care, and padding then stands at the end, where kernels take a length instead of a mask.

The references' pipelines hand the time over in the dtype of the weights, and some of the networks multiply time and
guidance by 1000 in it: in bfloat16, time 988.4 becomes 988 and a guidance of 3.5 becomes 3.504.
`Config.timestep_rounding` chooses: "exact" keeps both in float32, so that they mean the same whatever the weights are
stored in; "reference" rounds as the references do. With float32 weights the two agree.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ses_jax.models import target
from ses_jax.models.attention import Angles, attention, rotate_interleaved
from ses_jax.models.layers import RMSNorm, TimeEmbedder, channels_last, layer_norm, rounded, silu
from ses_jax.models.quantized import Dense

NORM_EPS = 1e-6
ROUNDINGS = ("exact", "reference")

# Heads and feed-forward widths of stacked blocks are split over the model axis of a mesh.
PARTITION = (
    (r".*/attention/(to_[qkv]|add_[qkv]_proj)/kernel", P(None, None, "model")),
    (r".*/attention/(to_[qkv]|add_[qkv]_proj)/bias", P(None, "model")),
    (r".*/attention/to_(add_)?out/kernel", P(None, "model", None)),
    (r".*/(image|text)_mlp/linear_1/kernel", P(None, None, "model")),
    (r".*/(image|text)_mlp/linear_1/bias", P(None, "model")),
    (r".*/(image|text)_mlp/linear_2/kernel", P(None, "model", None)),
    # Over their inputs, so that every device has their few outputs whole; split, they would split the tokens' channels.
    # Those inside blocks are stacked.
    (r"\w*blocks/\w*modulation/linear/kernel", P(None, "model", None)),
    (r"(\w*modulation|output/norm_out)/linear/kernel", P("model", None)),
    (r".*(modulation|norm_out)/linear/bias|.*_mlp/linear_2/bias|.*/attention/(to_(add_)?out/bias|norm_\w+/scale)", P()),
    (r"(condition/\w+|\w+_embedder)/linear_\d/(kernel|bias)|(\w+_embedder|output/proj_out)/(kernel|bias)", P()),
)

# What may lie in eight bits: the linear layers of blocks, those that modulate them among them (a third of FLUX.1 and
# Qwen-Image). All that stands before, beside and after the blocks is small.
QUANTIZED = (r"\w*blocks/.*/kernel",)

# Those whose outputs are split into heads, see `loading.formats`.
TURNED = (r".*/attention/(to_[qkv]|add_[qkv]_proj)/kernel",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fields that every family of these transformers has, as in the published `transformer/config.json`.

    Attributes:
      timestep_rounding: "exact" or "reference", see the module docstring; no part of the published file.
    """

    attention_head_dim: int = 128
    num_attention_heads: int
    axes_dims_rope: tuple[int, ...]
    timestep_rounding: str = "exact"

    def __post_init__(self):
        if self.timestep_rounding not in ROUNDINGS:
            raise ValueError(f"timestep_rounding={self.timestep_rounding!r} is none of {', '.join(ROUNDINGS)}")
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope={self.axes_dims_rope} must sum to attention_head_dim={self.attention_head_dim}"
            )

    @property
    def dim(self) -> int:
        """Width of the tokens."""
        return self.num_attention_heads * self.attention_head_dim


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

        image = added(image, i_gate2 * MLP(name="image_mlp")(modulate(image, i_shift2, i_scale2)))
        text = added(text, t_gate2 * MLP(name="text_mlp")(modulate(text, t_shift2, t_scale2)))
        return (image, text), None


class MLP(nn.Module):
    """Feed-forward four times as wide as its input, with the tanh approximation of GELU."""

    @nn.compact
    def __call__(self, x):
        hidden = jax.nn.gelu(Dense(4 * x.shape[-1], name="linear_1")(x), approximate=True)
        return Dense(x.shape[-1], bias_apart=True, name="linear_2")(hidden)


class JointAttention(nn.Module):
    """Attention over the tokens of both streams, each with its own projections and norms of queries and keys."""

    heads: int
    head_dim: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, image, text, cos, sin, text_lengths=None):
        """Outputs for image `[B, S, D]` and text `[B, L, D]`; `cos, sin [B or 1, S + L, head_dim / 2]`."""
        count = image.shape[1]
        *both, values = zip(self._project(image, "to", ""), self._project(text, "add", "_added"), strict=True)
        q, k = (joined_and_rotated(*pair, cos, sin) for pair in both)
        lengths = None if text_lengths is None else count + text_lengths
        out = _of_heads(attention(q, k, jnp.concatenate(values, axis=1), key_lengths=lengths), self.heads)
        outputs = zip(("to_out", "to_add_out"), (image, text), (out[:, :count], out[:, count:]), strict=True)
        how = {"use_bias": self.use_bias, "bias_apart": True, "of_heads": True}
        return tuple(Dense(x.shape[-1], name=name, **how)(h) for name, x, h in outputs)

    def _project(self, x, prefix, infix):
        """Queries, keys and values, each `[B, S, N, D]`; the first two are normed."""
        suffix = "_proj" if infix else ""
        names = {n: f"{prefix}_{n}{suffix}" for n in "qkv"}
        width = self.heads * self.head_dim
        q, k, v = (
            Dense(width, self.use_bias, bias_apart=n != "v", heads=self.heads, name=name)(x)
            for n, name in names.items()
        )
        return RMSNorm(NORM_EPS, name=f"norm{infix}_q")(q), RMSNorm(NORM_EPS, name=f"norm{infix}_k")(k), v


def _of_heads(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], heads, -1)


def joined_and_rotated(image: jax.Array, text: jax.Array, cos: Angles, sin: Angles) -> jax.Array:
    """Queries or keys of both streams, `[B, S, N, D]` and `[B, L, N, D]`, as those of one sequence `[B, S + L, N, D]`.

    Rotated one by one, they are joined in the same pass. A TPU's compiler joins them as it norms them.
    """
    if target.device().platform == "tpu":
        return rotate_interleaved(jnp.concatenate([image, text], axis=1), cos, sin)
    count = image.shape[1]
    angles = (cos[:, :count], sin[:, :count]), (cos[:, count:], sin[:, count:])
    return jnp.concatenate([rotate_interleaved(x, *at) for x, at in zip((image, text), angles, strict=True)], axis=1)


class SelfAttention(nn.Module):
    """Attention within one sequence; queries and keys are normed per head, then rotated.

    Attributes:
      heads, head_dim: how many, and how wide each.
      use_bias: of all projections.
      eps: of the norms.
      wide: of the last projection, see `Dense`.
    """

    heads: int
    head_dim: int
    use_bias: bool = True
    eps: float = NORM_EPS
    wide: bool = False

    @nn.compact
    def __call__(self, x, cos, sin, key_lengths=None):
        """Takes and gives `[B, S, D]`; `cos, sin [B or 1, S, head_dim / 2]`."""
        width = self.heads * self.head_dim
        q, k, v = (Dense(width, self.use_bias, bias_apart=n != "v", heads=self.heads, name=f"to_{n}")(x) for n in "qkv")
        q = rotate_interleaved(RMSNorm(self.eps, name="norm_q")(q), cos, sin)
        k = rotate_interleaved(RMSNorm(self.eps, name="norm_k")(k), cos, sin)
        out = _of_heads(attention(q, k, v, key_lengths=key_lengths), self.heads)
        return Dense(x.shape[-1], self.use_bias, wide=self.wide, of_heads=True, name="to_out")(out)


class ConditionEmbedder(nn.Module):
    """Time and, where it is distilled, guidance, as one vector `[B, dim]`.

    Attributes:
      config: says how both are rounded.
      guided: whether guidance has an embedding.
      use_bias: whether the linear layers have one.
    """

    config: Config
    guided: bool
    use_bias: bool = True

    @nn.compact
    def __call__(self, sigma, guidance, dtype):
        dim, rounding = self.config.dim, self.config.timestep_rounding

        def embed(name, x):
            return TimeEmbedder(dim, dim, self.use_bias, name=name)(thousandfold(x, rounding, dtype), dtype)

        vector = embed("timestep_embedder", pipeline_time(sigma, rounding, dtype))
        return vector + embed("guidance_embedder", guidance) if self.guided else vector


class Modulation(nn.Module):
    """`count` vectors `[B, 1, dim]` from a conditioning vector `[B, D]`, through SiLU and one linear layer."""

    dim: int
    count: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, vector):
        out = Dense(self.count * self.dim, self.use_bias, bias_apart=True, name="linear")(silu(vector))
        return jnp.split(out[:, None, :], self.count, axis=-1)


class ModulatedOutput(nn.Module):
    """The last layers of a transformer: modulated LayerNorm (scale first, then shift) and the projection to patches."""

    patch_dim: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, vector):
        scale, shift = Modulation(x.shape[-1], 2, self.use_bias, name="norm_out")(vector)
        return Dense(self.patch_dim, use_bias=self.use_bias, name="proj_out")(modulate(x, shift, scale))


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """LayerNorm without affine parameters, then `x * (1 + scale) + shift`."""
    return layer_norm(channels_last(x), NORM_EPS) * (1 + scale) + shift


def added(x: jax.Array, update: jax.Array) -> jax.Array:
    """`x + update`; float16 stays finite, as in the references."""
    if x.dtype != jnp.float16:
        return channels_last(x + update)
    largest = jnp.finfo(x.dtype).max
    return jnp.clip(x + update, -largest, largest)


def thousandfold(x: Float[Array, " b"], rounding: str, dtype: Any) -> Float[Array, " b"]:
    """`1000 x [B]` in float32; with rounding "reference" factor and product are rounded to `dtype`."""
    return 1000 * x if rounding == "exact" else rounded(1000 * rounded(x, dtype), dtype)


def pipeline_time(sigma: Float[Array, " b"], rounding: str, dtype: Any) -> Float[Array, " b"]:
    """Noise levels `[B]`, 1 to 0, as a pipeline hands them to its network.

    With rounding "reference" as the references' pipelines do: as times up to 1000 and back, in `dtype`.
    """
    sigma = sigma.astype(jnp.float32)
    return sigma if rounding == "exact" else rounded(rounded(1000 * sigma, dtype) / 1000, dtype)


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
