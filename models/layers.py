"""Building blocks that every network shares: norms, activations, feed-forward, time embedding, stacking of blocks.

Tokens and cells have the dtype of the weights; norms, activations, embeddings of time and rotary positions compute in
float32.
"""

import threading
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from ses_jax.models import target
from ses_jax.models.params import EMBEDDING, ONES, ZEROS, param
from ses_jax.models.quantized import Dense, dtype_of

_MAKING = threading.Lock()  # Flax takes fields out of a class's bases while it makes one, and threads trace networks


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale, computed in float32."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = param(self, "scale", ONES, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (normed * scale.astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis with a learned scale and bias, in float32."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = (param(self, name, of, (x.shape[-1],)) for name, of in (("scale", ONES), ("bias", ZEROS)))
        x32 = x.astype(jnp.float32)
        centered = x32 - x32.mean(-1, keepdims=True)
        factor = jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + self.eps) * scale.astype(jnp.float32)
        return (centered * factor + bias.astype(jnp.float32)).astype(x.dtype)


class GroupNorm(nn.Module):
    """Normalises each group of channels of `x [B, ..., C]` over all cells, with a learned scale and bias, in float32.

    Means over the cells come first, channel by channel, of values and squares in one go, and those few numbers are
    grouped: splitting the channels of whole images into groups breaks up the axis that devices read in one go.
    """

    groups: int
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale = param(self, "scale", ONES, (channels,)).astype(jnp.float32)
        bias = param(self, "bias", ZEROS, (channels,)).astype(jnp.float32)

        def grouped(values):
            of_groups = values.reshape(*values.shape[:-1], self.groups, -1).mean(-1)
            return jnp.repeat(of_groups, channels // self.groups, axis=-1)

        x32, cells = x.astype(jnp.float32), range(1, x.ndim - 1)
        mean, square = x32.mean(cells, keepdims=True), jnp.square(x32).mean(cells, keepdims=True)
        center = grouped(mean)
        # Within channels and between them; rounding may put what is within below 0.
        variance = grouped(jnp.maximum(square - jnp.square(mean), 0) + jnp.square(mean - center))
        factor = scale * jax.lax.rsqrt(variance + self.eps)
        return ((x32 - center) * factor + bias).astype(x.dtype)


def silu(x: jax.Array) -> jax.Array:
    """`x * sigmoid(x)`, computed in float32."""
    return in_float32(jax.nn.silu, x)


def in_float32(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`function(x)` rounded once, as the references' kernels do: JAX's functions round each of their operations.

    Not for GELU's approximation after a product: cuBLAS knows that as JAX writes it, and computes it with the product.
    """
    return function(x.astype(jnp.float32)).astype(x.dtype)


class GatedMLP(nn.Module):
    """Gated feed-forward, `w2(act(w1 x) * w3 x)`, without biases; SwiGLU unless told otherwise.

    Attributes:
      hidden_dim: of what lies between.
      act: activation.
      wide: of `w2`, see `Dense`.
    """

    hidden_dim: int
    act: Callable[[jax.Array], jax.Array] = silu
    wide: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = Dense(self.hidden_dim, use_bias=False, name="w1")(x)
        value = Dense(self.hidden_dim, use_bias=False, name="w3")(x)
        hidden = computed_once(self.act(gate) * value)
        return Dense(x.shape[-1], use_bias=False, wide=self.wide, name="w2")(hidden)


def computed_once(x: jax.Array) -> jax.Array:
    """`x`, on a TPU computed before the product that takes it: as part of the product, every tile would do it again."""
    return jax.lax.optimization_barrier(x) if target.device().platform == "tpu" else x


def channels_last(x: jax.Array) -> jax.Array:
    """`x`, on a TPU with its last axis innermost in memory.

    Left to itself its compiler may lay tokens out the other way round, as it finds them between latents and patches,
    and copy weights to go with them: those of all layers, before the first step, which take half as much memory again.
    """
    if target.device().platform != "tpu":
        return x

    def local(x):
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    mesh = target.mesh()
    if mesh is None or mesh.size == 1:
        return local(x)
    rows = mesh.axis_names[0]
    if len(x) % mesh.shape[rows]:
        return x
    # Each device its own rows: the compiler would gather all of them for what it cannot split.
    return jax.shard_map(local, mesh=mesh, in_specs=P(rows), out_specs=P(rows), check_vma=False)(x)


class TimeEmbedder(nn.Module):
    """Timesteps `[B]` (0 to 1000) to vectors `[B, dim]`: sinusoid, linear, SiLU, linear; none after the second."""

    hidden_dim: int
    dim: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, timestep: jax.Array, dtype: Any) -> jax.Array:
        x = timestep_embedding(timestep).astype(dtype)
        x = silu(Dense(self.hidden_dim, use_bias=self.use_bias, name="linear_1")(x))
        return Dense(self.dim, use_bias=self.use_bias, name="linear_2")(x)


class Embed(nn.Module):
    """Rows of a learned table `[num_embeddings, features]`, by their numbers."""

    num_embeddings: int
    features: int

    @nn.compact
    def __call__(self, ids: jax.typing.ArrayLike) -> jax.Array:
        return jnp.take(param(self, "embedding", EMBEDDING, (self.num_embeddings, self.features)), ids, axis=0)


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """LayerNorm over the last axis without affine parameters, computed in float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype)


def timestep_embedding(timestep: jax.Array, dim: int = 256, max_period: float = 10000.0) -> jax.Array:
    """Sinusoidal embedding `[cos | sin]` of timesteps `[B]` (0 to 1000) as float32 `[B, dim]`."""
    half = dim // 2
    # Steps of up to 1000 magnify the last bit of a frequency, so round where the reference does: the exponent, then
    # the result. Constants also keep it the same on every device.
    exponents = np.float32(-np.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = timestep.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` as float32 with the precision of `dtype`; compilers may skip a conversion there and back, but not this."""
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x.astype(jnp.float32), kind.nexp, kind.nmant)


def weights_dtype(module: nn.Module) -> Any:
    """The dtype of a module's weights that are not in eight bits (float32 while they are being created)."""
    return dtype_of(module.variables.get("params", {}))


def stack(block: type[nn.Module], length: int) -> type[nn.Module]:
    """`length` copies of `block` run by one scan; their params carry a leading axis `[length, ...]`.

    `block.__call__(x, *shared)` returns `(x, output)`; `shared` is the same for every copy. Where derivatives are
    taken, what a copy computes is not kept for them: it is computed once more from its input.
    """
    with _MAKING:
        return nn.scan(
            nn.remat(block, prevent_cse=False) if target.is_differentiated() else block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=length,
            check_constancy_invariants=False,  # would trace the block once more
        )


def in_eights(tokens: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Tokens `[B, S, d]`, filled up to a multiple of eight where that is quicker, and how many of each row count.

    None is all of them.
    """
    surplus = -tokens.shape[1] % 8
    if not surplus or not takes_eights(tokens):
        return tokens, None
    return jnp.pad(tokens, ((0, 0), (0, surplus), (0, 0))), jnp.full(len(tokens), tokens.shape[1], jnp.int32)


def takes_eights(tokens: jax.Array) -> bool:
    """Whether XLA would fill up the rows of every single product, and cut them off again.

    It does for NVIDIA's GPUs in half precision.
    """
    return tokens.dtype.itemsize == 2 and target.capability(target.device()) is not None
