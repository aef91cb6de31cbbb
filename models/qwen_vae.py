"""The 8x image autoencoder of Qwen-Image (reference: diffusers `AutoencoderKLQwenImage`).

The published network is a causal one for video. For one frame its 3-D convolutions see zeros in place of the past, so
only the last temporal tap of a kernel touches the image: each is run as the 2-D convolution with that tap, a third of
the work. The kernels keep all their taps in the params. The convolutions over time between frames don't exist here.

Images are `[B, H, W, 3]` in [-1, 1] and latents `[B, C, h, w]` in the autoencoder's own scale; inside, tensors are
channels-last.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ses_jax.models.attention import attention
from ses_jax.models.config import known_fields
from ses_jax.models.convolution import Conv, Upsample, convolved, in_phases, whole
from ses_jax.models.layers import silu, weights_dtype
from ses_jax.models.params import KERNEL, ONES, ZEROS, first_values, param


@dataclasses.dataclass(frozen=True)
class Config:
    """Architecture, field for field as in the published `vae/config.json`.

    Attributes:
      latents_mean, latents_std: by channel, the autoencoder's latents are `latents * std + mean` of the transformer's.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    input_channels: int = 3
    # fmt: off
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )
    # fmt: on

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "Config":
        """Reads a `config.json`; fields that do not shape the network for one image are ignored.

        Raises:
          ValueError: for an option of the reference that this network does not cover.
        """
        if config.get("attn_scales"):
            raise ValueError(f"autoencoder with attn_scales={config['attn_scales']} is not supported; expected none")
        made = cls(**known_fields(cls, config))
        if not len(made.latents_mean) == len(made.latents_std) == made.z_dim:
            raise ValueError(f"autoencoder needs latents_mean and latents_std of z_dim={made.z_dim} numbers each")
        return made

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from the image's own resolution down."""
        return tuple(self.base_dim * mult for mult in self.dim_mult)

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along each side."""
        return 2 ** (len(self.dim_mult) - 1)


def encode(
    params: Any, config: Config, images: Float[Array, "b H W 3"]
) -> tuple[Float[Array, "b c h w"], Float[Array, "b c h w"]]:
    """Posterior of the latents of `images [B, H, W, 3]`: mean and log-variance, each `[B, C, H/8, W/8]`."""
    return QwenVAE(config).apply({"params": params}, images, method="encode")


def decode(params: Any, config: Config, latents: Float[Array, "b c h w"]) -> Float[Array, "b H W 3"]:
    """Images `[B, H, W, 3]`, about [-1, 1] and not clipped, of `latents [B, C, h, w]`."""
    return QwenVAE(config).apply({"params": params}, latents, method="decode")


def init(key: jax.Array | None, config: Config) -> Any:
    """Random params, for training; without a key zeros, for abstract shapes."""
    side = config.downscale
    return first_values(QwenVAE(config), key, jnp.zeros((1, side, side, config.input_channels)))


class QwenVAE(nn.Module):
    """Encoder and decoder with the 1x1 convolutions around the latents."""

    config: Config

    def setup(self):
        c = self.config
        self.encoder = Encoder(c)
        self.quant_conv = CausalConv(2 * c.z_dim, 1)
        self.post_quant_conv = CausalConv(c.z_dim, 1)
        self.decoder = Decoder(c)

    def __call__(self, images):
        mean, _ = self.encode(images)
        return self.decode(mean)

    def encode(self, images):
        moments = self.quant_conv(self.encoder(images.astype(weights_dtype(self))))
        mean, log_variance = jnp.split(jnp.moveaxis(moments, -1, 1), 2, axis=1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents):
        x = jnp.moveaxis(latents, 1, -1).astype(weights_dtype(self))
        return self.decoder(self.post_quant_conv(x))


class Encoder(nn.Module):
    """Image to moments: residual blocks and stride-2 convolutions, numbered through as published."""

    config: Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        x = CausalConv(c.widths[0], name="conv_in")(x)
        number = 0
        for i, channels in enumerate(c.widths):
            for _ in range(c.num_res_blocks):
                x = ResNet(channels, name=f"down_{number}_resnet")(x)
                number += 1
            if i < len(c.widths) - 1:
                # Padded on the right and the bottom only, as the reference does.
                x = Conv(channels, strides=(2, 2), padding=((0, 1), (0, 1)), name=f"down_{number}_downsample")(x)
                number += 1
        x = silu(ChannelNorm(name="norm_out")(MidBlock(name="mid")(x)))
        return CausalConv(2 * c.z_dim, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents to image: the middle block, then residual blocks and upsampling that halves the channels."""

    config: Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        x = CausalConv(c.widths[-1], name="conv_in")(in_phases(x))
        x = MidBlock(name="mid")(x)
        for i, channels in enumerate(reversed(c.widths)):
            for j in range(c.num_res_blocks + 1):
                x = ResNet(channels, name=f"up_{i}_resnet_{j}")(x)
            if i < len(c.widths) - 1:
                x = Upsample(channels // 2, name=f"up_{i}_upsample")(x)
        x = silu(ChannelNorm(name="norm_out")(x))
        return whole(CausalConv(c.input_channels, name="conv_out")(x))


class MidBlock(nn.Module):
    """Residual block, single-head attention over all cells, residual block."""

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        x = ResNet(channels, name="resnet_0")(x)
        x = x + SpatialAttention(name="attention")(x)
        return ResNet(channels, name="resnet_1")(x)


class SpatialAttention(nn.Module):
    """Single-head self-attention over the cells of `x [B, ..., C]`."""

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        qkv = Conv(3 * channels, (1, 1), name="to_qkv")(ChannelNorm(name="norm")(x))
        q, k, v = jnp.split(qkv.reshape(len(x), -1, 1, 3 * channels), 3, axis=-1)
        return Conv(channels, (1, 1), name="proj")(attention(q, k, v).reshape(x.shape))


class ResNet(nn.Module):
    """Two normalised 3x3 convolutions with a skip, 1x1-projected where the width changes."""

    channels: int

    @nn.compact
    def __call__(self, x):
        h = CausalConv(self.channels, name="conv1")(silu(ChannelNorm(name="norm1")(x)))
        h = CausalConv(self.channels, name="conv2")(silu(ChannelNorm(name="norm2")(h)))
        if x.shape[-1] != self.channels:
            x = CausalConv(self.channels, 1, name="conv_shortcut")(x)
        return x + h


class CausalConv(nn.Module):
    """A causal 3-D convolution of a single frame `[B, h, w, C]`, or its phases; keeps the size."""

    features: int
    size: int = 3

    @nn.compact
    def __call__(self, x):
        shape = (self.size, self.size, self.size, x.shape[-1], self.features)  # time, height, width, in, out
        kernel = param(self, "kernel", KERNEL, shape)
        bias = param(self, "bias", ZEROS, (self.features,))
        last = kernel[-1]  # the earlier taps meet the zeros before the first frame
        return convolved(x, last) + bias


class ChannelNorm(nn.Module):
    """The channels of each cell scaled to the norm `sqrt(C)`, then by a learned scale; computed in float32."""

    @nn.compact
    def __call__(self, x):
        scale = param(self, "scale", ONES, (x.shape[-1],)).astype(jnp.float32)
        x32 = x.astype(jnp.float32)
        # The reference's epsilon is a lower bound of the norm, not a summand.
        norm = jnp.maximum(jnp.linalg.norm(x32, axis=-1, keepdims=True), 1e-12)
        return (x32 / norm * x.shape[-1] ** 0.5 * scale).astype(x.dtype)
