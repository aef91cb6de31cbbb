"""Convolutions of images `[B, H, W, C]`, in the form that the device takes best.

A TPU's vectors hold cells along the last axes, where shifting by one costs as much as the products, and its compiler
has no good form for a single large image, which is what it should decode at a time: several take far more memory. It
cuts the image into strips, and lays it out anew where its width does not suit them, and wherever it grows.

So decoders there keep the columns of an image by phase, `[B, H, P, W / P, C]`: column `j` of phase `p` is column
`j * P + p` of the image. Neighbours within a row are neighbours along P, where a shift costs nothing but at the first
phase and the last; columns fill the vectors, as a batch would. An image starts as one phase, and when it doubles its
phases do: to repeat each of its columns is to repeat each phase.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from ses_jax.models import target
from ses_jax.models.params import KERNEL, ZEROS, param

IMAGES = ("NHWC", "HWIO", "NHWC")
# Of one image in phases: along H and P it is convolved, its columns are what a batch is elsewhere.
PHASES = ("HWNC", "HWIO", "HWNC")


class Conv(nn.Module):
    """A convolution of `x [B, H, W, C]`, in the dtype that it and the weights share; by default it keeps the size.

    One that keeps the size takes phases too.

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
    """Doubles height and width of `x [B, H, W, C]`, or of its phases, by repeating cells, then a 3x3 convolution.

    On accelerators both are one convolution of the cells with zeros between them, see `upsampled_as_one`. A CPU would
    multiply by the zeros, which are four times the products.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = param(self, "kernel", KERNEL, (3, 3, x.shape[-1], self.features))
        bias = param(self, "bias", ZEROS, (self.features,))
        if target.device().platform == "cpu":
            return convolved(x.repeat(2, axis=1).repeat(2, axis=2), kernel) + bias
        return upsampled_as_one(x, kernel) + bias


def in_phases(x: jax.Array) -> jax.Array:
    """`x [B, H, W, C]` as one phase, `[B, H, 1, W, C]`, on TPUs where each has one image of them; else as it is."""
    mesh = target.mesh()
    alone = len(x) == (1 if mesh is None else mesh.size)
    return x[:, :, None] if alone and target.device().platform == "tpu" else x


def whole(x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` of phases; of images as they are."""
    if x.ndim == 4:
        return x
    images, height, phases, columns, channels = x.shape
    return jnp.swapaxes(x, 2, 3).reshape(images, height, phases * columns, channels)


def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x [B, H, W, C]`, or its phases, convolved with `kernel [h, w, C, features]`; it keeps its size."""
    if x.ndim == 4:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=IMAGES)
    rows, columns = (((side - 1) // 2, side // 2) for side in kernel.shape[:2])
    return _of_phases(with_neighbours(x, *columns), kernel, rows)


def upsampled_as_one(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """What `kernel [3, 3, C, features]` makes of repeated cells, by one of 4x4 of the cells with zeros between them.

    On a TPU the repetition alone would take twice as long. On a GPU this is the derivative of a convolution with stride
    2, whose kernels take four products a cell instead of nine. XLA knows it by the kernel's being turned round, or
    it would write the zeros.
    """
    wide = jax.lax.rev(kernel, (0, 1)).astype(jnp.float32)
    for axis in (0, 1):
        before, after = ([(0, 0)] * axis + [pad] + [(0, 0)] * (3 - axis) for pad in ((0, 1), (1, 0)))
        wide = jnp.pad(wide, before) + jnp.pad(wide, after)
    wide = jax.lax.rev(wide.astype(kernel.dtype), (0, 1))
    if x.ndim == 5:
        return _of_phases(with_neighbours(x, 1, 1), wide, (2, 2), (2, 2))
    return jax.lax.conv_general_dilated(x, wide, (1, 1), [(2, 2)] * 2, lhs_dilation=(2, 2), dimension_numbers=IMAGES)


def with_neighbours(x: jax.Array, before: int, after: int) -> jax.Array:
    """Phases `[B, H, P, w, C]` with so many before the first and after the last: those of the next columns."""
    first = [_phase(x, place) for place in range(-before, 0)]
    last = [_phase(x, x.shape[2] + place) for place in range(after)]
    return jnp.concatenate([*first, x, *last], axis=2)


def _phase(x: jax.Array, place: int) -> jax.Array:
    """The phase at any place, `[B, H, 1, w, C]`: beyond the last one come the first one's next columns, then zeros."""
    columns, phase = divmod(place, x.shape[2])
    pads = [(0, 0)] * 3 + [(max(-columns, 0), max(columns, 0)), (0, 0)]
    start = max(columns, 0)
    return jnp.pad(x[:, :, phase : phase + 1], pads)[:, :, :, start : start + x.shape[3]]


def _of_phases(x: jax.Array, kernel: jax.Array, rows: tuple[int, int], dilation: tuple[int, int] = (1, 1)) -> jax.Array:
    """Phases and their neighbours convolved, with so many rows of zeros before and after, and zeros between cells."""
    options = {"padding": [rows, (0, 0)], "lhs_dilation": dilation, "dimension_numbers": PHASES}
    return jax.vmap(lambda image: jax.lax.conv_general_dilated(image, kernel, (1, 1), **options))(x)
