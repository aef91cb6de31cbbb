"""Convolutions of images `[B, H, W, C]`, each in the form that the device takes best.

A TPU's compiler has no good form for a single large image, the one that it should decode at a time, for several take
far more memory: it cuts the image into strips, to fill its vectors with, lays them out anew around every convolution,
and takes minutes over it. There, an image is convolved along its columns alone. Each cell's neighbours within its row
stand beside it, as channels, and rows of cells fill the vectors, as a batch would.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from ses_jax.models import target
from ses_jax.models.params import KERNEL, ZEROS, param

IMAGES = ("NHWC", "HWIO", "NHWC")
# Of one image, whose columns are convolved: what is its width here is the batch of a convolution along one axis.
COLUMNS = ("WNC", "WIO", "WNC")


class Conv(nn.Module):
    """A convolution of `x [B, H, W, C]`, in the dtype that it and the weights share; by default it keeps the size.

    Attributes:
      features: channels of the output.
      kernel_size, strides: along height and width.
      padding: "SAME", "VALID", or cells before and after, along height and width.
      use_bias: whether there is one.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: str | tuple[tuple[int, int], ...] = "SAME"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = param(self, "kernel", KERNEL, (*self.kernel_size, x.shape[-1], self.features))
        bias = param(self, "bias", ZEROS, (self.features,)) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=None)
        if self.strides == (1, 1) and self.padding == "SAME":
            y = convolved(x, kernel)
        else:
            y = jax.lax.conv_general_dilated(x, kernel, self.strides, self.padding, dimension_numbers=IMAGES)
        return y if bias is None else y + bias


class Upsample(nn.Module):
    """Doubles height and width of `x [B, H, W, C]` by repeating cells, then a 3x3 convolution.

    On a TPU both are one convolution of the cells with zeros between them: the repetition alone would take twice as
    long as it. The zeros would cost other devices four times the products.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = param(self, "kernel", KERNEL, (3, 3, x.shape[-1], self.features))
        bias = param(self, "bias", ZEROS, (self.features,))
        if takes_columns(x):
            return upsampled_by_columns(x, kernel) + bias
        if target.device().platform == "tpu":
            return upsampled_as_one(x, kernel) + bias
        return convolved(x.repeat(2, axis=1).repeat(2, axis=2), kernel) + bias


def takes_columns(x: jax.Array) -> bool:
    """Whether the columns of `x [B, H, W, C]` are convolved: on TPUs, where each has one image of them."""
    mesh = target.mesh()
    return len(x) == (1 if mesh is None else mesh.size) and target.device().platform == "tpu"


def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x [B, H, W, C]` convolved with `kernel [h, w, C, features]`; it keeps its size."""
    if takes_columns(x):
        return convolved_by_columns(x, kernel)
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=IMAGES)


def convolved_by_columns(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """As `convolved`, along the height."""
    height, width, channels, features = kernel.shape
    kernel = kernel.reshape(height, width * channels, features)
    convolve = functools.partial(jax.lax.conv_general_dilated, window_strides=(1,), dimension_numbers=COLUMNS)
    return jax.vmap(lambda image: convolve(beside(image, width), kernel, padding="SAME"))(x)


def upsampled_by_columns(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """What `kernel [3, 3, C, features]` makes of repeated cells, along the height, where zeros stand between them."""
    _, height, width, channels = x.shape
    wide = _of_zeros_between(kernel.astype(jnp.float32), 0).astype(kernel.dtype).reshape(4, 3 * channels, -1)

    def of_one(image):
        repeated = jnp.concatenate([image, image], axis=-1).reshape(height, 2 * width, channels)
        zeros = {"padding": [(2, 2)], "lhs_dilation": (2,)}
        return jax.lax.conv_general_dilated(beside(repeated, 3), wide, (1,), dimension_numbers=COLUMNS, **zeros)

    return jax.vmap(of_one)(x)


def upsampled_as_one(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """What `kernel [3, 3, C, features]` makes of repeated cells, by one of 4x4 of the cells with zeros between them."""
    wide = _of_zeros_between(_of_zeros_between(kernel.astype(jnp.float32), 0), 1)
    return jax.lax.conv_general_dilated(
        x, wide.astype(kernel.dtype), (1, 1), [(2, 2)] * 2, lhs_dilation=(2, 2), dimension_numbers=IMAGES
    )


def beside(x: jax.Array, width: int) -> jax.Array:
    """The cells of `x [H, W, C]` with their neighbours within their row as channels, `[H, W, width * C]`."""
    before = (width - 1) // 2
    padded = jnp.pad(x, ((0, 0), (before, width - 1 - before), (0, 0)))
    return jnp.concatenate([padded[:, i : i + x.shape[1]] for i in range(width)], axis=-1)


def _of_zeros_between(kernel: jax.Array, axis: int) -> jax.Array:
    """For cells with zeros between them, the kernel of repeated ones: along an axis, its own and its neighbour's."""
    before, after = ([(0, 0)] * axis + [pad] + [(0, 0)] * (3 - axis) for pad in ((0, 1), (1, 0)))
    return jnp.pad(kernel, before) + jnp.pad(kernel, after)
