"""The TPU's kernel, its steps run as ordinary operations: against plain attention, whole and split over meshes."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import Mesh

from ses_jax.models import splash, target

BLOCKS = splash.Blocks(queries=256, keys=256, compute=128)


def arrays(rows, length, heads, dim=128):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((rows, length, heads, dim), np.float32) for _ in range(3)]


def kernel(q, k, v, lengths, mesh=None):
    run = functools.partial(splash.attention, blocks=BLOCKS, mesh=mesh, interpret=True)
    return jax.jit(run)(q, k, v, jnp.asarray(lengths, jnp.int32))


@jax.jit
def plain(q, k, v, lengths):
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=jnp.asarray(lengths))


def mesh_of(data, model):
    return Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))


@pytest.mark.parametrize("length", [256, 300, 520])
def test_rows_of_any_length_see_their_own_keys(length):
    q, k, v = arrays(3, length, 2)
    lengths = [length, 1, length - 130]
    np.testing.assert_allclose(kernel(q, k, v, lengths), plain(q, k, v, lengths), atol=4e-6)


@pytest.mark.parametrize(("data", "model"), [(4, 1), (2, 4), (1, 8)])
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_a_mesh_changes_nothing(data, model, heads):
    """Three heads divide over no axis; a single one leaves both axes to the rows."""
    q, k, v = arrays(4, 200, heads)
    lengths = [200, 64, 129, 7]
    out = kernel(q, k, v, lengths, mesh_of(data, model))
    np.testing.assert_allclose(out, plain(q, k, v, lengths), atol=4e-6)


def test_rows_that_do_not_divide_are_on_every_device():
    q, k, v = arrays(3, 128, 2)
    np.testing.assert_allclose(kernel(q, k, v, [128] * 3, mesh_of(4, 2)), plain(q, k, v, [128] * 3), atol=4e-6)


def test_derivatives_are_those_of_plain_attention():
    """Of rows of different lengths, which a mesh splits."""
    mesh = mesh_of(2, 2)
    q, k, v = arrays(2, 300, 2)
    lengths = jnp.array([300, 140])

    def total(run):
        return lambda q, k, v: jnp.sum(jnp.sin(run(q, k, v, lengths)))

    def differentiated(*args):
        with target.differentiated():
            return splash.attention(*args, blocks=BLOCKS, mesh=mesh, interpret=True)

    found = jax.jit(jax.grad(total(differentiated), (0, 1, 2)))(q, k, v)
    for one, other in zip(found, jax.jit(jax.grad(total(plain), (0, 1, 2)))(q, k, v), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_wide_heads():
    """The autoencoders' one head of 512 channels."""
    q, k, v = arrays(1, 256, 1, dim=512)
    np.testing.assert_allclose(kernel(q, k, v, [256]), plain(q, k, v, [256]), atol=4e-6)


@hypothesis.given(st.integers(1, 20000), st.sampled_from([512, 1024, 2048]), st.sampled_from([128, 256, 512]))
def test_blocks_are_even_and_cover_all(length, most, multiple):
    block = splash.even_block(length, most, multiple)
    count = -(-length // block)
    assert block % multiple == 0
    assert block <= most
    assert (count - 1) * block < length <= count * block
    assert count == -(-length // most)


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5p", "TPU v6 lite", "TPU7x", "TPU v99"])
@pytest.mark.parametrize("head_dim", [128, 256, 512])
def test_blocks_of_every_device_fit_the_kernel(kind, head_dim):
    blocks = splash.blocks_for(kind, head_dim)
    assert blocks.keys % blocks.compute == 0
    assert blocks.compute % splash.LANES == 0
    assert blocks.queries % splash.LANES == 0


@pytest.mark.parametrize(
    ("query", "key", "dtype", "taken"),
    [
        ((2, 4096, 24, 128), (2, 4096, 24, 128), jnp.bfloat16, True),
        ((1, 16384, 1, 512), (1, 16384, 1, 512), jnp.bfloat16, True),
        ((2, 512, 24, 128), (2, 512, 24, 128), jnp.bfloat16, False),
        ((2, 4096, 24, 128), (2, 4096, 8, 128), jnp.bfloat16, False),
        ((2, 4096, 24, 64), (2, 4096, 24, 64), jnp.bfloat16, False),
        ((2, 4096, 24, 128), (2, 4096, 24, 128), jnp.float32, False),
    ],
)
def test_what_the_kernel_takes(query, key, dtype, taken):
    answers = []
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in (query, key)]
    jax.eval_shape(lambda q, k: answers.append(splash.fits(q, k)), *shapes)
    assert answers == [taken]
