"""Fused attention on TPUs: JAX's splash kernel under a mesh, for rows of different lengths.

The kernel works on blocks of queries and keys whose scores never leave the chip's vector memory. Compilers cannot split
it, so on a mesh it runs inside `shard_map`: rows over the first axis, heads over the last.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ses_jax.models import target

# The kernel's rows of memory hold as many numbers.
LANES = 128
# Shorter sequences gain nothing.
SHORTEST = 1024


class Blocks(NamedTuple):
    """At most so many queries and keys at a time; keys are multiplied `compute` at a time, which divides `keys`.

    `head_dim` is the longest head that the chip's vector memory holds so many of.
    """

    queries: int
    keys: int
    compute: int
    head_dim: int = LANES


# By the start of a device's kind: the fastest of those that jax-ml's tokamax measured on the chip at 4,096 tokens, with
# heads of 128.
BLOCKS = {
    "TPU v5p": Blocks(1024, 2048, 256),
    "TPU v5": Blocks(1024, 2048, 256),
    "TPU v6": Blocks(2048, 2048, 512, 256),
    "TPU7x": Blocks(1024, 2048, 512, 256),
}
DEFAULT_BLOCKS = Blocks(1024, 1024, 512)
# At most so many queries and keys at a time for derivatives.
BACKWARD = 512


def fits(q: jax.Array, k: jax.Array) -> bool:
    """Whether the kernel takes queries `[B, T, N, D]` and keys `[B, S, K, D]`, and is worth it."""
    same_heads = q.shape[2] == k.shape[2]
    return q.dtype == jnp.bfloat16 and same_heads and q.shape[3] % LANES == 0 and k.shape[1] >= SHORTEST


def blocks_for(device_kind: str, head_dim: int = LANES) -> Blocks:
    """The blocks of a kind of device, as `jax.Device.device_kind` names it.

    They are smaller for the one head of 512 in the middle of autoencoders.
    """
    blocks = next((blocks for kind, blocks in BLOCKS.items() if device_kind.startswith(kind)), DEFAULT_BLOCKS)
    shrink = -(-head_dim // blocks.head_dim)
    return blocks._replace(queries=blocks.queries // shrink, keys=max(blocks.keys // shrink, blocks.compute))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    blocks: Blocks,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of `q [B, T, N, D]` over the first `lengths [B]` of `k, v [B, S, N, D]`; softmax in float32.

    Args:
      blocks: of the device.
      mesh: of two axes, over which rows and heads are split as far as they divide; None is one device. Heads that do
        not divide are filled up with zeros; a single head leaves both axes to the rows.
      interpret: runs the kernel's steps as ordinary operations, on any device.

    Returns:
      `[B, T, N, D]`.
    """
    # The kernel does not scale. In float32, as the rounding before it may then be left out.
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)

    def local(q, k, v, lengths):
        return _local(q, k, v, lengths, blocks, interpret)

    if mesh is None or mesh.size == 1:
        return local(q, k, v, lengths)
    rows, heads = _axes(mesh, *q.shape[::2][:2])
    count = q.shape[2]
    extra = 0 if heads is None else -count % mesh.shape[heads]
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0))) for x in (q, k, v))
    split = PartitionSpec(rows, None, heads)
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(split, split, split, PartitionSpec(rows)), out_specs=split, check_vma=False
    )
    return mapped(q, k, v, lengths)[:, :, :count]


def _axes(mesh: Mesh, rows: int, heads: int) -> tuple[tuple[str, ...] | None, str | None]:
    """The axes that rows and heads are split over."""
    first, last = mesh.axis_names
    if heads == 1:
        return next((axes for axes in ((first, last), (first,)) if rows % _size(mesh, axes) == 0), None), None
    return (first,) if rows % mesh.shape[first] == 0 else None, last


def _size(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return int(np.prod([mesh.shape[axis] for axis in axes]))


def _local(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, blocks: Blocks, interpret: bool) -> jax.Array:
    """Attention of the rows and heads of one device."""
    # Here, as importing them takes everybody a quarter of a second, and few need them.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    queries, keys = q.shape[1], k.shape[1]
    block_q, block_kv = even_block(queries, blocks.queries, LANES), even_block(keys, blocks.keys, blocks.compute)
    q = _filled(q, block_q)
    k, v = _filled(k, block_kv), _filled(v, block_kv)
    mask = masks.MultiHeadMask([masks.FullMask((q.shape[1], k.shape[1]))] * q.shape[2])
    sizes = kernels.BlockSizes(block_q, block_kv, blocks.compute, **backward_blocks(block_q, block_kv))
    kernel = kernels.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    seen = jnp.arange(k.shape[1]) < lengths[:, None]
    segments = kernels.SegmentIds(q=jnp.ones(q.shape[:2], jnp.int32), kv=seen.astype(jnp.int32))
    out = _at_default_precision(jax.vmap(kernel))(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), segments)
    return jnp.swapaxes(out, 1, 2)[:, :queries]


def _at_default_precision(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A kernel whose products, and those of its derivatives, are as exact as they are without a word about it.

    Products of bfloat16 are exact in float32; a compiler that is asked for more, as users may, refuses them.
    """
    default = functools.partial(jax.default_matmul_precision, "default")

    def forward(*args):
        with default():
            return jax.vjp(kernel, *args)

    def backward(derivative, change):
        with default():
            return derivative(change)

    @jax.custom_vjp
    def exact(*args):
        with default():
            return kernel(*args)

    exact.defvjp(forward, backward)
    return exact


def backward_blocks(queries: int, keys: int) -> dict[str, int]:
    """The blocks of the kernel's derivatives, which hold more at a time; none where no derivatives are taken."""
    if not target.is_differentiated():
        return {}
    queries, keys = math.gcd(queries, BACKWARD), math.gcd(keys, BACKWARD)
    return {
        "block_q_dkv": queries,
        "block_kv_dkv": keys,
        "block_kv_dkv_compute": keys,
        "block_q_dq": queries,
        "block_kv_dq": keys,
    }


def even_block(length: int, most: int, multiple: int) -> int:
    """The length of the fewest even blocks of at most `most` that cover `length`, a multiple of `multiple`."""
    count = -(-length // most)
    return -(-length // (count * multiple)) * multiple


def _filled(x: jax.Array, block: int) -> jax.Array:
    """`x [B, T, N, D]` with zeros up to whole blocks."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))
