"""Scaled dot-product attention and the two rotary position embeddings in use (interleaved pairs, rotated halves).

The kernel follows the devices that a program is for. They can't be seen while it is traced, so whoever compiles for
others than the default one traces inside `compiled_for`.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Angles = jax.Array | np.ndarray

# Scores are held for as many queries at a time as need no more than this.
SCORE_BYTES = 2**28
CUDNN_HEAD_DIM = 128

_TARGET: contextvars.ContextVar[Any] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiled_for(device: Any) -> Iterator[None]:
    """What is traced inside is for programs that run on such a device, real or of a topology; None is the default one.

    To be entered inside a jitted function, with a device that follows from its static arguments: what a cached
    compilation holds then follows from them too.
    """
    token = _TARGET.set(device)
    try:
        yield
    finally:
        _TARGET.reset(token)


def attention(
    q: Float[Array, "b t n d"],
    k: Float[Array, "b s k d"],
    v: Float[Array, "b s k d"],
    *,
    key_lengths: Int[Array | np.ndarray, " b"] | None = None,
    key_mask: Bool[Array | np.ndarray, "b s"] | None = None,
    causal: bool = False,
) -> Float[Array, "b t nd"]:
    """Attention of `q [B, T, N, D]` over `k, v [B, S, K, D]`, N a multiple of K; softmax in float32.

    On an NVIDIA GPU half-precision inputs run in cuDNN's fused kernel. Elsewhere long sequences take their queries in
    blocks, so that the scores of 16384 cells or of a whole population never exist at once.

    Args:
      key_lengths: int `[B]`, how many leading keys may be seen; cheaper than a mask.
      key_mask: bool `[B, S]`, False where a key must not be seen. A query that sees no key at all gives zeros.
      causal: whether query t sees only keys up to t.

    Returns:
      `[B, T, N * D]`, heads merged.
    """
    fused = _fits_cudnn(q)
    mask = None if key_mask is None else jnp.asarray(key_mask)[:, None, None, :]
    if fused and mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], mask.shape[3]))  # cuDNN wants a row a query
    lengths = None if key_lengths is None else jnp.asarray(key_lengths, jnp.int32)

    def attend(queries):
        return jax.nn.dot_product_attention(
            queries,
            k,
            v,
            mask=mask,
            key_value_seq_lengths=lengths,
            is_causal=causal,
            implementation="cudnn" if fused else "xla",
        )

    block = _block(q, k)
    out = attend(q) if causal or block >= q.shape[1] or fused else _in_blocks(attend, q, block)
    if key_mask is not None:
        seen = jnp.cumsum(key_mask, axis=1) > 0 if causal else jnp.any(key_mask, axis=1, keepdims=True)
        out = jnp.where(seen[:, :, None, None], out, 0)
    return out.reshape(*out.shape[:2], -1)


def rotate_interleaved(x: Float[Array, "b s n d"], cos: Angles, sin: Angles) -> Float[Array, "b s n d"]:
    """Rotates channel pairs (2i, 2i+1) of `x [B, S, N, D]` by angles given as `cos, sin [B or 1, S, D/2]`."""
    x32 = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = x32[..., 0], x32[..., 1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def rotate_half(x: Float[Array, "b s n d"], cos: Angles, sin: Angles) -> Float[Array, "b s n d"]:
    """Rotates channel pairs (i, i + D/2) of `x [B, S, N, D]` by angles given as `cos, sin [S, D/2]`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _block(q: jax.Array, k: jax.Array) -> int:
    """How many queries' scores fit into the limit."""
    batch, _, heads, _ = q.shape
    return max(1, SCORE_BYTES // (4 * batch * heads * k.shape[1]))


def _in_blocks(attend, q: jax.Array, block: int) -> jax.Array:
    """`attend` over even blocks of queries, one after the other."""
    batch, length, heads, dim = q.shape
    count = -(-length // block)
    block = -(-length // count)
    padded = jnp.pad(q, ((0, 0), (0, count * block - length), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(batch, count, block, heads, dim), 1, 0)
    out = jnp.moveaxis(jax.lax.map(attend, blocks), 0, 1)
    return out.reshape(batch, count * block, heads, -1)[:, :length]


def _fits_cudnn(q: jax.Array) -> bool:
    """Whether cuDNN has a fused kernel for these queries on the device that the program is for."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] > CUDNN_HEAD_DIM or q.shape[-1] % 8:
        return False
    # AMD's devices are "gpu" too, with capabilities such as "gfx942"; Ampere is the first generation with the kernel.
    device = _target()
    capability = getattr(device, "compute_capability", "").split(".")
    return device.platform in ("gpu", "cuda") and all(map(str.isdecimal, capability)) and int(capability[0]) >= 8


def _target() -> Any:
    """The device that was said, or JAX's default one, which may be said by its platform's name."""
    device = _TARGET.get() or jax.config.jax_default_device
    return device if hasattr(device, "platform") else jax.devices(device)[0]
