"""Pillow's bicubic resize on the device, bit for bit: matrix products, rounded to 8 bits after each pass.

Derivatives are those of what is rounded.

Reference: `src/libImaging/Resample.c` of Pillow (8 bits per channel, a = -0.5). The vertical pass comes first where an
image loses more than twice as many rows as columns, as in Pillow 13; otherwise the horizontal one does. Pillow sums
integers: weights with 22 fractional bits times pixels. A matrix product sums floats, which are exact for integers of 24
bits, so the weights are taken in two halves.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SUPPORT = 2.0
BITS, HALF = 22, 11  # of the weights' fractions, and of their lower half


def quantize(images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Images in [0, 1] to the values 0 .. 255 that an 8-bit file would hold, still as float32."""

    def scaled(images):
        return jnp.clip(images.astype(jnp.float32), 0.0, 1.0) * 255.0

    return _differentiated_as(scaled, lambda images: jnp.round(scaled(images)))(images)


def resize(pixels: Float[Array, "b h w c"], size: tuple[int, int], *, rounded: bool = True) -> Float[Array, "b H W c"]:
    """Bicubic resize of pixel values 0 .. 255 to `size = (height, width)`, antialiased.

    Args:
      rounded: to 8-bit values after each pass, as Pillow does; otherwise values of any range stay floats, as in
        torch's `interpolate(mode="bicubic", antialias=True)`.
    """
    height, width = pixels.shape[1:3]
    passes = [("bhwc,Ww->bhWc", width, size[1]), ("bhwc,Hh->bHwc", height, size[0])]
    if size[0] < height and height - size[0] > 2 * (width - size[1]):
        passes.reverse()
    for product, source, target in passes:
        if source != target:
            one_pass = _integer_pass if rounded else _float_pass
            pixels = one_pass(product, pixels, coefficients(source, target))
    return pixels


def resize_and_crop(
    pixels: Float[Array, "b h w c"], size: int, *, rounded: bool = True, half_to_even: bool = False
) -> Float[Array, "b size size c"]:
    """Resizes the shorter edge to `size`, then cuts the centre square.

    Args:
      rounded: see `resize`.
      half_to_even: where the square begins if the margin is odd: rounded half to even, as torchvision does, or down,
        as CLIP's slow image processor does.
    """
    height, width = pixels.shape[1:3]
    short = min(height, width)
    target = (int(size * height / short), int(size * width / short))
    resized = resize(pixels, target, rounded=rounded)
    top, left = (_margin(edge - size, half_to_even) for edge in target)
    return resized[:, top : top + size, left : left + size]


@functools.cache
def coefficients(source: int, target: int) -> np.ndarray:
    """Weights `[target, source]` of a bicubic resize, rows summing to one."""
    scale = source / target
    stretch = max(scale, 1.0)
    centers = (np.arange(target) + 0.5) * scale
    first = np.floor(np.maximum(centers - SUPPORT * stretch + 0.5, 0))
    last = np.floor(np.minimum(centers + SUPPORT * stretch + 0.5, source))
    at = np.arange(source)
    weights = _cubic((at + 0.5 - centers[:, None]) / stretch)
    weights *= (at >= first[:, None]) & (at < last[:, None])
    return weights / weights.sum(axis=1, keepdims=True)


def _float_pass(product: str, pixels: jax.Array, weights: np.ndarray) -> jax.Array:
    return jnp.einsum(product, pixels, weights.astype(np.float32), precision="highest")


def _integer_pass(product: str, pixels: jax.Array, weights: np.ndarray) -> jax.Array:
    """One pass over integer pixels, rounded to the nearest and clipped as Pillow does; NaN stays NaN.

    What is not a number has no integer, and an image of it would be taken for a black one.
    """
    fixed = np.trunc(weights * 2**BITS + np.copysign(0.5, weights)).astype(np.int64)
    upper = (fixed + 2 ** (HALF - 1)) >> HALF
    halves = (upper, fixed - (upper << HALF))

    def exact(pixels):
        sums = [_float_pass(product, pixels, half) for half in halves]
        high, low = (half.astype(jnp.int32) for half in sums)
        rounded = jnp.clip(((high << HALF) + low + (1 << (BITS - 1))) >> BITS, 0, 255).astype(jnp.float32)
        return jnp.where(jnp.isnan(sums[1]), sums[1], rounded)

    return _differentiated_as(lambda pixels: jnp.clip(_float_pass(product, pixels, weights), 0, 255), exact)(pixels)


def _differentiated_as(smooth: Callable[[Array], Array], exact: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """`exact` with the derivative of `smooth`."""
    function = jax.custom_jvp(exact)
    function.defjvp(lambda primals, tangents: (exact(*primals), jax.jvp(smooth, primals, tangents)[1]))
    return function


def _margin(surplus: int, half_to_even: bool) -> int:
    return round(surplus / 2) if half_to_even else surplus // 2


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel at a = -0.5."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
