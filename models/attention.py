"""Scaled dot-product attention and the two rotary position embeddings in use (interleaved pairs, rotated halves).

The kernel follows the device that a program is for (`target`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from ses_jax.models import splash, target

Angles = jax.Array | np.ndarray

# Scores are held for as many queries at a time as need no more than this.
SCORE_BYTES = 2**28
# The longest heads of cuDNN's kernel from Ampere and from Hopper on.
CUDNN_HEAD_DIMS = {8: 128, 9: 256}


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

    On an NVIDIA GPU half-precision inputs run in cuDNN's fused kernel, on a TPU long sequences in bfloat16 in the
    splash kernel. Elsewhere long sequences take their queries in blocks, so that the scores of 16384 cells or of a
    whole population never exist at once.

    Args:
      key_lengths: int `[B]`, how many leading keys may be seen; cheaper than a mask.
      key_mask: bool `[B, S]`, False where a key must not be seen. A query that sees no key at all gives zeros.
      causal: whether query t sees only keys up to t.

    Returns:
      `[B, T, N * D]`, heads merged.
    """
    if _fits_splash(q, k, causal=causal, masked=key_mask is not None):
        return _splash(q, k, v, key_lengths)
    count, fused = q.shape[1], _fits_cudnn(q)
    if fused and target.is_differentiated():
        # cuDNN has derivatives for even lengths only, and masks have some too, which nobody wants.
        fused = key_mask is None
        q, k, v, key_lengths = _even(q, k, v, key_lengths) if fused else (q, k, v, key_lengths)
    mask = None if key_mask is None else jnp.asarray(key_mask)[:, None, None, :]
    if fused and mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], mask.shape[3]))  # cuDNN wants a row a query
    lengths = None if key_lengths is None else jnp.asarray(key_lengths, jnp.int32)

    how = {"mask": mask, "key_value_seq_lengths": lengths, "is_causal": causal}

    def attend(queries):
        if fused:
            return by_heads(functools.partial(scaled_products, **how, implementation="cudnn"), queries, k, v)
        return scaled_products(queries, k, v, **how, implementation="xla")

    block = _block(q, k)
    out = attend(q) if causal or block >= q.shape[1] or fused else _in_blocks(attend, q, block)
    if key_mask is not None:
        seen = jnp.cumsum(key_mask, axis=1) > 0 if causal else jnp.any(key_mask, axis=1, keepdims=True)
        out = jnp.where(seen[:, :, None, None], out, 0)
    return out[:, :count].reshape(len(out), count, -1)


def scaled_products(q: jax.Array, k: jax.Array, v: jax.Array, *, bias: jax.Array | None = None, **how) -> jax.Array:
    """`jax.nn.dot_product_attention`; XLA has no such products of float16 on a CPU, so there they are float32's."""
    if q.dtype != jnp.float16 or target.device().platform != "cpu":
        return jax.nn.dot_product_attention(q, k, v, bias=bias, **how)
    wide = (None if x is None else x.astype(jnp.float32) for x in (q, k, v, bias))
    q32, k32, v32, bias32 = wide
    return jax.nn.dot_product_attention(q32, k32, v32, bias=bias32, **how).astype(q.dtype)


def by_heads(attend: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attend(q, k, v)` on the mesh that the program is for, whose last axis splits heads.

    JAX can't split cuDNN's kernel unevenly. Heads that do not divide are filled up with zeros; where keys are shared by
    heads, each device takes all of them. Nor can it where queries are spread otherwise than keys, which are another
    source's where there are more or fewer of them: a text's, say, that looks at an image. Then rows are spread over all
    devices.
    """
    mesh, (count, shared) = target.mesh(), (q.shape[2], k.shape[2])
    if mesh is None or mesh.size == 1:
        return attend(q, k, v)
    if q.shape[1] != k.shape[1]:
        alike = NamedSharding(mesh, PartitionSpec(mesh.axis_names if len(q) % mesh.size == 0 else None))
        return attend(*(jax.lax.with_sharding_constraint(x, alike) for x in (q, k, v)))
    first, last = mesh.axis_names
    size = mesh.shape[last]
    if count % size == shared % size == 0:
        return attend(q, k, v)
    rows = first if len(q) % mesh.shape[first] == 0 else None
    split = NamedSharding(mesh, PartitionSpec(rows, None, last) if count == shared else PartitionSpec(rows))
    extra = -count % size if count == shared else 0

    def placed(x):
        return jax.lax.with_sharding_constraint(jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0))), split)

    out = attend(*map(placed, (q, k, v)))
    return jax.lax.with_sharding_constraint(out, split)[:, :, :count]


def rotate_interleaved(x: Float[Array, "b s n d"], cos: Angles, sin: Angles) -> Float[Array, "b s n d"]:
    """Rotates channel pairs (2i, 2i+1) of `x [B, S, N, D]` by angles given as `cos, sin [B or 1, S, D/2]`.

    Devices differ in how they best come by the other channel of each pair, see `rotate_by_product` and
    `rotate_by_swapping`; a CPU takes the pairs apart.
    """
    platform = target.device().platform
    if platform != "cpu":
        return (rotate_by_product if platform == "tpu" else rotate_by_swapping)(x, cos, sin)
    x32 = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = x32[..., 0], x32[..., 1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def rotate_by_swapping(x: jax.Array, cos: Angles, sin: Angles) -> jax.Array:
    """`rotate_interleaved` on a GPU, where pairs that are stacked are written as every other number, at half the speed.

    What came before is finished first: norms would be computed once more for the swapped pairs.
    """
    x = jax.lax.optimization_barrier(x)
    others = x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
    cos = jnp.repeat(cos, 2, axis=-1)[:, :, None, :]
    sin = jnp.stack([-sin, sin], axis=-1).reshape(cos.shape)
    return (x.astype(jnp.float32) * cos + others.astype(jnp.float32) * sin).astype(x.dtype)


def rotate_by_product(x: jax.Array, cos: Angles, sin: Angles) -> jax.Array:
    """`rotate_interleaved` on a TPU: `x cos + other(x) sin`, the other being (-odd, even).

    That comes from a product with a permutation, exact and nearly free there: taking neighbours apart makes the
    compiler turn whole tensors over, several times.
    """
    pairs = np.arange(x.shape[-1]).reshape(-1, 2)
    other = np.zeros(2 * x.shape[-1:], np.float32)
    other[pairs[:, 1], pairs[:, 0]], other[pairs[:, 0], pairs[:, 1]] = -1, 1
    others = jnp.einsum(
        "bsnd,de->bsne",
        x,
        jnp.asarray(other, x.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    cos, sin = (jnp.repeat(angles, 2, axis=-1)[:, :, None, :] for angles in (cos, sin))
    return (x.astype(jnp.float32) * cos + others * sin).astype(x.dtype)


def rotate_half(x: Float[Array, "b s n d"], cos: Angles, sin: Angles) -> Float[Array, "b s n d"]:
    """Rotates channel pairs (i, i + D/2) of `x [B, S, N, D]` by angles given as `cos, sin [S, D/2]`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _even(q: jax.Array, k: jax.Array, v: jax.Array, lengths: Any) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """Queries and keys of even lengths, and how many keys may be seen; None is all."""
    if k.shape[1] % 2 and lengths is None:
        lengths = jnp.full(len(k), k.shape[1], jnp.int32)
    return *(jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v)), lengths


def _block(q: jax.Array, k: jax.Array) -> int:
    """How many queries' scores fit into the limit."""
    batch, _, heads, _ = q.shape
    return max(1, SCORE_BYTES // (4 * batch * heads * k.shape[1]))


def _in_blocks(attend, q: jax.Array, block: int) -> jax.Array:
    """`attend` over even blocks of queries, one after the other."""
    batch, length, heads, dim = q.shape
    count = -(-length // block)
    block = -(-length // count)
    if target.is_differentiated():  # which would keep all scores
        attend = jax.checkpoint(attend)
    padded = jnp.pad(q, ((0, 0), (0, count * block - length), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(batch, count, block, heads, dim), 1, 0)
    out = jnp.moveaxis(jax.lax.map(attend, blocks), 0, 1)
    return out.reshape(batch, count * block, heads, -1)[:, :length]


def _fits_splash(q: jax.Array, k: jax.Array, *, causal: bool, masked: bool) -> bool:
    """Whether the splash kernel takes these queries and keys and the program is for a TPU."""
    return not causal and not masked and splash.fits(q, k) and target.device().platform == "tpu"


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, key_lengths: Any) -> jax.Array:
    lengths = jnp.full(len(k), k.shape[1]) if key_lengths is None else jnp.asarray(key_lengths)
    blocks = splash.blocks_for(target.device().device_kind, q.shape[3])
    out = splash.attention(q, k, v, lengths.astype(jnp.int32), blocks=blocks, mesh=target.mesh())
    return out.reshape(*out.shape[:2], -1)


def _fits_cudnn(q: jax.Array) -> bool:
    """Whether cuDNN has a fused kernel for these queries on the device that the program is for."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] % 8:
        return False
    capability = target.capability(target.device())
    longest = max((dim for first, dim in CUDNN_HEAD_DIMS.items() if (capability or 0) >= first), default=0)
    return q.shape[-1] <= longest
