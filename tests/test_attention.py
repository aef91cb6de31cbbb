"""Attention against a formula written out, whole and in blocks of queries."""

import contextlib
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ses_jax.loading import partition
from ses_jax.models import attention as module
from ses_jax.models import target
from ses_jax.models.attention import attention, by_heads
from ses_jax.models.target import compiled_for

pytestmark = pytest.mark.quick

BATCH, QUERIES, KEYS, HEADS, KEY_HEADS, DIM = 3, 13, 11, 6, 2, 8


def arrays(queries=QUERIES, keys=KEYS):
    rng = np.random.default_rng(0)
    shapes = ((BATCH, queries, HEADS, DIM), (BATCH, keys, KEY_HEADS, DIM), (BATCH, keys, KEY_HEADS, DIM))
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def by_hand(q, k, v, seen):
    """One query, one head at a time; `seen [B, T, S]` says which keys it may look at. None of them gives zeros."""
    out = np.zeros(q.shape, np.float64)
    for b, t, n in np.ndindex(*q.shape[:3]):
        keys = np.flatnonzero(seen[b, t])
        if len(keys):
            head = n // (HEADS // KEY_HEADS)
            scores = k[b, keys, head] @ q[b, t, n] / np.sqrt(DIM)
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, keys, head] / weights.sum()
    return out.reshape(*q.shape[:2], -1)


def mask_of(rows):
    return np.array([[c == "x" for c in row] for row in rows])


LEFT, RIGHT = (
    mask_of(["...xxxxxxxx", "xxxxxxxxxxx", "..........x"]),
    mask_of(["xxxxxxxx...", "x..........", "xxxxxxxxxxx"]),
)


@pytest.mark.parametrize("block", [None, 1, 4, 5])
@pytest.mark.parametrize("lengths", [None, (11, 1, 6)])
def test_equals_the_formula(monkeypatch, block, lengths):
    if block:
        monkeypatch.setattr(module, "SCORE_BYTES", 4 * BATCH * HEADS * KEYS * block)
    q, k, v = arrays()
    seen = np.ones((BATCH, QUERIES, KEYS), bool)
    if lengths:
        seen &= (np.arange(KEYS) < np.array(lengths)[:, None])[:, None, :]
    out = jax.jit(lambda q, k, v: attention(q, k, v, key_lengths=lengths and np.array(lengths)))(q, k, v)
    np.testing.assert_allclose(out, by_hand(q, k, v, seen), atol=2e-6)


@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("causal", [False, True])
def test_masked_keys_are_not_seen_and_a_blind_query_gives_zeros(mask, causal):
    q, k, v = arrays(queries=KEYS)
    seen = np.broadcast_to(mask[:, None, :], (BATCH, KEYS, KEYS)).copy()
    if causal:
        seen &= np.tril(np.ones((KEYS, KEYS), bool))
    out = jax.jit(lambda q, k, v: attention(q, k, v, key_mask=mask, causal=causal))(q, k, v)
    np.testing.assert_allclose(out, by_hand(q, k, v, seen), atol=2e-6)
    assert (~seen.any(axis=2)).any() == (causal and mask is LEFT)


def test_nothing_to_see_at_all_gives_zeros():
    q, k, v = arrays()
    out = attention(*map(jnp.asarray, (q, k, v)), key_mask=np.zeros((BATCH, KEYS), bool))
    np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize("lengths", [None, (11, 1, 6)])
def test_derivatives_of_odd_lengths_are_those_of_the_even_ones_that_cudnn_takes(monkeypatch, lengths):
    """XLA stands for cuDNN, and is given what cuDNN would get; blocks of queries change nothing either."""
    q, k, v = arrays()
    lengths = lengths and np.array(lengths)
    taken, attend = [], jax.nn.dot_product_attention

    def fused(q, k, v, *, implementation, **options):
        taken.append((implementation, q.shape[1], k.shape[1]))
        return attend(q, k, v, implementation="xla", **options)

    def gradients(*, differentiated=True):
        def total(q, k, v):
            with target.differentiated() if differentiated else contextlib.nullcontext():
                return jnp.sin(attention(q, k, v, key_lengths=lengths)).sum()

        return jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)

    expected = gradients(differentiated=False)
    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    monkeypatch.setattr(module, "SCORE_BYTES", 4 * BATCH * HEADS * KEYS * 5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), gradients(), expected)
    monkeypatch.setattr(module, "_fits_cudnn", lambda q: True)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), gradients(), expected)
    assert taken[-1] == ("cudnn", 14, 12)


def test_long_sequences_never_hold_all_scores():
    """16384 cells of one head: whole, their scores would take a gigabyte."""
    shape = jax.ShapeDtypeStruct((1, 16384, 1, 64), jnp.float32)
    compiled = jax.jit(attention).lower(shape, shape, shape).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * module.SCORE_BYTES


@pytest.mark.parametrize(
    ("backend", "capability", "dtype", "dim", "fits"),
    [
        ("gpu", "9.0", jnp.bfloat16, 128, True),
        ("gpu", "8.0", jnp.float16, 64, True),
        ("gpu", "10.0", jnp.bfloat16, 64, True),
        ("gpu", "7.5", jnp.bfloat16, 64, False),
        ("gpu", "gfx942", jnp.bfloat16, 64, False),
        ("gpu", "9.0", jnp.float32, 64, False),
        ("gpu", "9.0", jnp.bfloat16, 256, True),
        ("gpu", "8.9", jnp.bfloat16, 256, False),
        ("gpu", "9.0", jnp.bfloat16, 512, False),
        ("gpu", "9.0", jnp.bfloat16, 12, False),
        ("cpu", "", jnp.bfloat16, 64, False),
        ("tpu", "", jnp.bfloat16, 128, False),
    ],
)
def test_the_fused_kernel_is_taken_where_there_is_one(backend, capability, dtype, dim, fits):
    with compiled_for(types.SimpleNamespace(platform=backend, compute_capability=capability)):
        assert module._fits_cudnn(jnp.zeros((1, 2, 1, dim), dtype)) == fits
    assert not module._fits_cudnn(jnp.zeros((1, 2, 1, dim), dtype))


def test_the_default_device_counts_where_none_is_said():
    with jax.default_device("cpu"):
        assert target.device().platform == "cpu"
    with jax.default_device(jax.devices()[3]):
        assert target.device() == jax.devices()[3]
    with compiled_for(None):
        assert target.device() == jax.devices()[0]


@pytest.mark.parametrize(("platform", "by"), [("tpu", "dot_general"), ("gpu", " rev[")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_devices_rotate_pairs_each_in_its_way_that_changes_nothing(platform, by, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 5, 3, DIM)), dtype)
    angles = rng.uniform(0, 9, (2, 5, DIM // 2)).astype(np.float32)

    def rotated(platform):
        with compiled_for(types.SimpleNamespace(platform=platform)):
            return module.rotate_interleaved(x, np.cos(angles), np.sin(angles))

    np.testing.assert_array_equal(rotated(platform), rotated("cpu"))
    turned = jax.lax.complex(*np.split(np.float32(x).reshape(2, 5, 3, -1, 2), 2, axis=-1))[..., 0]
    turned = turned * np.exp(1j * angles)[:, :, None]
    by_hand = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    np.testing.assert_allclose(np.float32(rotated(platform)), by_hand, atol=1e-6 if dtype == "float32" else 0.02)
    programs = {name: str(jax.make_jaxpr(functools.partial(rotated, name))()) for name in (platform, "cpu")}
    assert by in programs[platform]
    assert by not in programs["cpu"]


def test_a_gpu_s_rotation_has_derivatives_and_maps_over_rows():
    rng = np.random.default_rng(1)
    x, weights = (jnp.asarray(rng.standard_normal((2, 3, 5, 2, DIM)), jnp.float32) for _ in range(2))
    angles = rng.uniform(0, 9, (1, 5, DIM // 2)).astype(np.float32)

    def total(platform):
        def of(x):
            with compiled_for(types.SimpleNamespace(platform=platform)):
                rotated = jax.vmap(lambda row: module.rotate_interleaved(row, np.cos(angles), np.sin(angles)))(x)
            return (weights * jnp.sin(rotated)).sum()

        return of

    np.testing.assert_allclose(jax.grad(total("gpu"))(x), jax.grad(total("cpu"))(x), atol=1e-6)


@pytest.mark.parametrize(("heads", "shared"), [(6, 6), (8, 8), (8, 4), (6, 2), (8, 2)])
@pytest.mark.parametrize("rows", [2, 3])
def test_heads_that_do_not_divide_over_a_mesh(rows, heads, shared):
    mesh, seen = partition.parse_mesh("data=2,model=4"), []
    rng = np.random.default_rng(heads)
    q, k, v = (rng.standard_normal((rows, 9, n, 8)).astype(np.float32) for n in (heads, shared, shared))

    def attend(q, k, v):
        seen.append((q.shape[2], k.shape[2]))
        return jax.nn.dot_product_attention(q, k, v)

    @jax.jit
    def spread(q, k, v):
        with target.compiled_for(mesh):
            return by_heads(attend, q, k, v)

    np.testing.assert_allclose(spread(q, k, v), jax.nn.dot_product_attention(q, k, v), atol=1e-5)
    assert seen == [(8, 8) if (heads, shared) == (6, 6) else (heads, shared)]


@pytest.mark.parametrize(("rows", "spread"), [(8, True), (3, False)])
def test_queries_of_other_tokens_lie_where_their_keys_do(rows, spread):
    """cuDNN's kernel is split for inputs that are spread alike."""
    mesh, found = partition.parse_mesh("data=2,model=4"), []
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((rows, length, 4, 8)).astype(np.float32) for length in (5, 8, 8))
    by_rows, by_tokens = (
        NamedSharding(mesh, spec) for spec in (P(mesh.axis_names if spread else None), P(None, "data"))
    )

    def attend(*args):
        for x in args:
            jax.debug.inspect_array_sharding(x, callback=found.append)
        return jax.nn.dot_product_attention(*args)

    @jax.jit
    def looked(q, k, v):
        with target.compiled_for(mesh):
            return by_heads(attend, q, *(jax.lax.with_sharding_constraint(x, by_tokens) for x in (k, v)))

    np.testing.assert_allclose(looked(q, k, v), jax.nn.dot_product_attention(q, k, v), atol=1e-5)
    assert len(found) == 3
    assert all(sharding.is_equivalent_to(by_rows, 4) for sharding in found)
