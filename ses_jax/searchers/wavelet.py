"""The low band of a noise tensor: split it off, search it, merge it back.

`split` is the 2-D discrete wavelet transform over the last two axes, with PyWavelets' symmetric padding: `low` is the
approximation band of the deepest level, `high` everything else. `merge(low, high)` is its inverse, for any new `low`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import jaxwt
import numpy as np
import pywt
from jaxtyping import Array, Float

HAAR = ("db1", "haar", "bior1.1", "rbio1.1")


def split(
    noise: Float[Array | np.ndarray, "... h w"], *, wavelet: str = "db1", level: int = 4
) -> tuple[Float[Array, "... a b"], Any]:
    """Splits noise into its low band and the rest.

    Args:
      noise: `[..., h, w]`.
      wavelet: a discrete wavelet's name in PyWavelets.
      level: how many times the low band is split again, at least 1.

    Returns:
      `(low, high)`: `low [..., a, b]` equals `pywt.wavedec2(noise, wavelet, "symmetric", level)[0]`; `high` is a pytree
      that only `merge` reads.

    Raises:
      ValueError: for an unknown wavelet, or a level deeper than the noise allows.
    """
    check(wavelet, level, noise.shape[-2:])
    noise = jnp.asarray(noise)
    if _is_block_mean(wavelet, level, noise.shape[-2:]):
        low = 2**level * _block_mean(noise, 2**level)
        return low, noise - _repeat(low, 2**level) / 2**level
    lead = noise.shape[:-2]
    flat = noise.reshape(-1, *noise.shape[-2:])
    bands = jax.tree.map(
        lambda band: band.reshape(*lead, *band.shape[-2:]),
        jaxwt.wavedec2(flat, wavelet, mode="symmetric", level=level),
    )
    return bands[0], tuple(bands[1:])


def merge(
    low: Float[Array | np.ndarray, "... a b"], high: Any, *, wavelet: str = "db1", shape: tuple[int, int]
) -> Float[Array, "... h w"]:
    """Noise `[..., h, w]` with the low band `low` and the high bands of a `split`; `shape` is its `(h, w)`.

    Leading axes of `low` and `high` broadcast, so that one set of high bands serves a whole population of low bands.
    """
    low = jnp.asarray(low)
    if isinstance(high, jax.Array | np.ndarray):
        factor = shape[-1] // low.shape[-1]
        return high + _repeat(low, factor) / factor
    lead = low.shape[:-2]
    bands = jax.tree.map(
        lambda band: jnp.broadcast_to(band, (*lead, *band.shape[-2:])).reshape(-1, *band.shape[-2:]), [low, *high]
    )
    noise = jaxwt.waverec2(bands, wavelet)
    # Odd sizes were padded by one on the way down.
    return noise[..., : shape[-2], : shape[-1]].reshape(*lead, *shape)


def half(noise: Float[Array | np.ndarray, "... h w"]) -> Float[Array, "... h/2 w/2"]:
    """Noise of half the height and width with the same low bands: the first Haar approximation of `[..., h, w]`.

    Each number is the sum of a block of 2 x 2 divided by 2. So Gaussian noise stays Gaussian noise, and the Haar band
    at level L - 1 of the half is that at level L of the whole. `h` and `w` must be even.
    """
    return 2 * _block_mean(jnp.asarray(noise), 2)


def check(wavelet: str, level: int, shape: tuple[int, int]) -> None:
    """Raises ValueError for an unknown wavelet, or a level deeper than a grid of `shape` allows."""
    if wavelet not in pywt.wavelist(kind="discrete"):
        raise ValueError(f"unknown wavelet {wavelet!r}; known: {', '.join(pywt.wavelist(kind='discrete'))}")
    deepest = pywt.dwtn_max_level(shape, wavelet)
    if not 1 <= level <= deepest:
        raise ValueError(
            f"level={level} does not fit a latent of {shape[0]} x {shape[1]} with wavelet {wavelet!r}: "
            f"choose a level from 1 to {deepest}, or a larger image"
        )


def _is_block_mean(wavelet: str, level: int, shape: tuple[int, int]) -> bool:
    """Haar on a divisible grid: no coefficient crosses a block of 2**level cells, so the low band is its mean."""
    return wavelet in HAAR and all(size % 2**level == 0 for size in shape)


def _block_mean(x: jax.Array, size: int) -> jax.Array:
    height, width = x.shape[-2:]
    return x.reshape(*x.shape[:-2], height // size, size, width // size, size).mean(axis=(-3, -1))


def _repeat(x: jax.Array, size: int) -> jax.Array:
    return x.repeat(size, axis=-2).repeat(size, axis=-1)
