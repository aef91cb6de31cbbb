"""AutoencoderKL: the 8x image autoencoder of FLUX.1 and Z-Image (reference: diffusers `AutoencoderKL`).

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
from ses_jax.models.convolution import Conv, Upsample, in_phases, whole
from ses_jax.models.layers import GroupNorm, silu, weights_dtype
from ses_jax.models.params import first_values
from ses_jax.models.quantized import Dense


@dataclasses.dataclass(frozen=True)
class Config:
    """Architecture, field for field as in the published `vae/config.json`."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "Config":
        """Reads a `config.json`; fields that do not shape the network are ignored."""
        return cls(**known_fields(cls, config))

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of the decoder's levels, from the image inwards; as the encoder's unless they are given."""
        return self.decoder_block_out_channels or self.block_out_channels


def encode(
    params: Any, config: Config, images: Float[Array, "b H W 3"]
) -> tuple[Float[Array, "b c h w"], Float[Array, "b c h w"]]:
    """Posterior of the latents of `images [B, H, W, 3]`: mean and log-variance, each `[B, C, H/8, W/8]`."""
    return AutoencoderKL(config).apply({"params": params}, images, method="encode")


def decode(params: Any, config: Config, latents: Float[Array, "b c h w"]) -> Float[Array, "b H W 3"]:
    """Images `[B, H, W, 3]`, about [-1, 1] and not clipped, of `latents [B, C, h, w]`."""
    return AutoencoderKL(config).apply({"params": params}, latents, method="decode")


def init(key: jax.Array | None, config: Config) -> Any:
    """Random params, for training; without a key zeros, for abstract shapes."""
    side = config.downscale
    return first_values(AutoencoderKL(config), key, jnp.zeros((1, side, side, config.in_channels)))


class AutoencoderKL(nn.Module):
    """Encoder and decoder with the optional 1x1 convolutions around the latents."""

    config: Config

    def setup(self):
        c = self.config
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        if c.use_quant_conv:
            self.quant_conv = Conv(2 * c.latent_channels, (1, 1))
        if c.use_post_quant_conv:
            self.post_quant_conv = Conv(c.latent_channels, (1, 1))

    def __call__(self, images):
        mean, _ = self.encode(images)
        return self.decode(mean)

    def encode(self, images):
        moments = self.encoder(images.astype(weights_dtype(self)))
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(jnp.moveaxis(moments, -1, 1), 2, axis=1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents):
        x = jnp.moveaxis(latents, 1, -1).astype(weights_dtype(self))
        if self.config.use_post_quant_conv:
            x = self.post_quant_conv(x)
        return self.decoder(x)


class Encoder(nn.Module):
    """Image to moments: residual blocks and stride-2 convolutions, then the middle block."""

    config: Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        x = conv3x3(c.block_out_channels[0], "conv_in")(x)
        for i, channels in enumerate(c.block_out_channels):
            for j in range(c.layers_per_block):
                x = ResNet(channels, c.norm_num_groups, name=f"down_{i}_resnet_{j}")(x)
            if i < len(c.block_out_channels) - 1:
                # Padded on the right and the bottom only, as the reference does.
                x = Conv(channels, strides=(2, 2), padding=((0, 1), (0, 1)), name=f"down_{i}_downsample")(x)
        x = MidBlock(c.norm_num_groups, name="mid")(x)
        x = silu(GroupNorm(c.norm_num_groups, name="norm_out")(x))
        return conv3x3(2 * c.latent_channels, "conv_out")(x)


class Decoder(nn.Module):
    """Latents to image: the middle block, then residual blocks and nearest-neighbour upsampling."""

    config: Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        x = conv3x3(c.decoder_widths[-1], "conv_in")(in_phases(x))
        x = MidBlock(c.norm_num_groups, name="mid")(x)
        for i, channels in enumerate(reversed(c.decoder_widths)):
            for j in range(c.layers_per_block + 1):
                x = ResNet(channels, c.norm_num_groups, name=f"up_{i}_resnet_{j}")(x)
            if i < len(c.decoder_widths) - 1:
                x = Upsample(channels, name=f"up_{i}_upsample")(x)
        x = silu(GroupNorm(c.norm_num_groups, name="norm_out")(x))
        return whole(conv3x3(c.out_channels, "conv_out")(x))


class MidBlock(nn.Module):
    """Residual block, single-head attention over all cells, residual block."""

    groups: int

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        x = ResNet(channels, self.groups, name="resnet_0")(x)
        x = x + SpatialAttention(self.groups, name="attention")(x)
        return ResNet(channels, self.groups, name="resnet_1")(x)


class SpatialAttention(nn.Module):
    """Single-head self-attention over the cells of `x [B, ..., C]`."""

    groups: int

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        h = GroupNorm(self.groups, name="norm")(x).reshape(len(x), -1, channels)
        q, k, v = (Dense(channels, name=name)(h)[:, :, None, :] for name in ("to_q", "to_k", "to_v"))
        return Dense(channels, name="to_out")(attention(q, k, v)).reshape(x.shape)


class ResNet(nn.Module):
    """Two normalised 3x3 convolutions with a skip, 1x1-projected where the width changes."""

    channels: int
    groups: int

    @nn.compact
    def __call__(self, x):
        h = conv3x3(self.channels, "conv1")(silu(GroupNorm(self.groups, name="norm1")(x)))
        h = conv3x3(self.channels, "conv2")(silu(GroupNorm(self.groups, name="norm2")(h)))
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, (1, 1), name="conv_shortcut")(x)
        return x + h


def conv3x3(channels: int, name: str) -> Conv:
    """A 3x3 convolution that keeps the size."""
    return Conv(channels, name=name)
