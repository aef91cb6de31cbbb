"""Scaled dot-product attention and the two rotary position embeddings in use (interleaved pairs, rotated halves)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

Angles = jax.Array | np.ndarray


def attention(
    q: Float[Array, "b t n d"],
    k: Float[Array, "b s k d"],
    v: Float[Array, "b s k d"],
    *,
    key_mask: Bool[Array, "b s"] | None = None,
    causal: bool = False,
) -> Float[Array, "b t nd"]:
    """Attention of `q [B, T, N, D]` over `k, v [B, S, K, D]`, N a multiple of K; softmax in float32.

    Args:
      key_mask: bool `[B, S]`, False where a key must not be seen.
      causal: whether query t sees only keys up to t.

    Returns:
      `[B, T, N * D]`, heads merged.
    """
    mask = None if key_mask is None else key_mask[:, None, None, :]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)
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
