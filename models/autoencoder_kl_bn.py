"""AutoencoderKL behind a BatchNorm: 8x latents, packed 2x2 into channels and normalised (`AutoencoderKLFlux2`).

What a diffusion model sees is `[B, 4 * C, h/2, w/2]`, each channel minus its running mean, over its standard deviation.
The network underneath is that of `autoencoder_kl`, with a 1x1 convolution on either side of the latents. Traps: the
statistics belong to the packed channels, so they are undone before unpacking, and the epsilon (1e-4, not the usual
1e-5) is inside the square root.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ses_jax.models import autoencoder_kl

Patch = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Config(autoencoder_kl.Config):
    """Architecture, field for field as in the published `vae/config.json`."""

    latent_channels: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    batch_norm_eps: float = 1e-4
    patch_size: Patch = (2, 2)

    @property
    def packed_channels(self) -> int:
        """Channels of the packed latents."""
        return math.prod(self.patch_size) * self.latent_channels


def decode(params: Any, config: Config, latents: Float[Array, "b c h w"]) -> Float[Array, "b H W 3"]:
    """Images `[B, H, W, 3]`, about [-1, 1] and not clipped, of normalised `latents [B, packed_channels, h, w]`."""
    mean, variance = (params["bn"][name].astype(jnp.float32)[:, None, None] for name in ("mean", "variance"))
    latents = latents * jnp.sqrt(variance + config.batch_norm_eps) + mean
    return autoencoder_kl.decode(_network(params), config, unpack(latents, config.patch_size))


def init(key: jax.Array | None, config: Config) -> Any:
    """Random params, for training; without a key zeros, for abstract shapes."""
    channels = config.packed_channels
    return {**autoencoder_kl.init(key, config), "bn": {"mean": jnp.zeros(channels), "variance": jnp.ones(channels)}}


def pack(latents: Float[Array, "b c h w"], patch: Patch) -> Float[Array, "b d y x"]:
    """`[B, C, h, w]` to `[B, C * ph * pw, h/ph, w/pw]`: a cell's channels are ordered (channel, row, column)."""
    batch, channels, height, width = latents.shape
    rows, columns = patch
    x = latents.reshape(batch, channels, height // rows, rows, width // columns, columns)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, height // rows, width // columns)


def unpack(latents: Float[Array, "b d y x"], patch: Patch) -> Float[Array, "b c h w"]:
    """Inverse of `pack`."""
    batch, _, height, width = latents.shape
    rows, columns = patch
    x = latents.reshape(batch, -1, rows, columns, height, width)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, -1, height * rows, width * columns)


def _network(params: Any) -> Any:
    return {name: leaf for name, leaf in params.items() if name != "bn"}
