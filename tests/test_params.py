"""Parameters of networks: Flax's values and errors, without its tracing."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ses_jax.models import autoencoder_kl, clip, convolution, layers, params, score_head
from ses_jax.models.quantized import Dense

TOWER = clip.Tower(8, 16, layers=2, heads=2)
NETWORKS = [
    (clip, clip.Config(text=TOWER, vision=TOWER, projection_dim=4, image_size=8, patch_size=4, vocab_size=12)),
    (autoencoder_kl, autoencoder_kl.Config(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)),
    (score_head, score_head.Config(input_size=6)),
]
OURS_AND_FLAX = [
    (Dense(4), nn.Dense(4), (2, 3)),
    (convolution.Conv(4), nn.Conv(4, (3, 3)), (2, 5, 6, 3)),
    (convolution.Conv(4, (2, 2), (2, 2), "VALID"), nn.Conv(4, (2, 2), 2, "VALID"), (2, 6, 6, 3)),
    (convolution.Conv(4, use_bias=False), nn.Conv(4, (3, 3), use_bias=False), (2, 4, 4, 3)),
    (
        convolution.Conv(4, strides=(2, 2), padding=((0, 1), (0, 1))),
        nn.Conv(4, (3, 3), 2, ((0, 1), (0, 1))),
        (1, 6, 8, 3),
    ),
    (layers.LayerNorm(1e-5), nn.LayerNorm(1e-5, use_fast_variance=False), (2, 3, 8)),
]


def _assert_same(ours, expected):
    """But for the rounding of what is compiled together."""
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("ours", "flax_layer", "shape"), OURS_AND_FLAX, ids=lambda x: type(x).__name__)
def test_layers_are_those_of_flax(ours, flax_layer, shape, dtype, key):
    x = (3 + 2 * jax.random.normal(key, shape)).astype(dtype)
    variables = flax_layer.init(key, x)
    jax.tree.map(_assert_same, ours.init(key, x), variables)
    variables = jax.tree.map(lambda leaf: (leaf + 0.1).astype(dtype), variables)
    found, expected = ours.apply(variables, x), flax_layer.apply(variables, x)
    assert found.dtype == expected.dtype
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 2e-2, "atol": 2e-2}
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), **close)


def test_rows_of_a_table_are_those_of_flax(key):
    ids = np.array([[0, 4], [2, 2]])
    variables = nn.Embed(5, 3).init(key, ids)
    jax.tree.map(_assert_same, layers.Embed(5, 3).init(key, ids), variables)
    np.testing.assert_array_equal(layers.Embed(5, 3).apply(variables, ids), nn.Embed(5, 3).apply(variables, ids))


@pytest.mark.parametrize(("network", "config"), NETWORKS, ids=lambda x: getattr(x, "__name__", ""))
def test_without_a_key_the_shapes_are_the_same(network, config, key):
    random, zeros = (jax.eval_shape(lambda k=k: network.init(k, config)) for k in (key, None))
    assert jax.tree.structure(random) == jax.tree.structure(zeros)
    assert jax.tree.leaves(random) == jax.tree.leaves(zeros)


class Two(nn.Module):
    """Two layers of the same shape."""

    initializer: params.Initializer

    @nn.compact
    def __call__(self, x):
        return x @ params.param(self, "a", self.initializer, (3, 3)) @ params.param(self, "b", self.initializer, [3, 3])


def test_an_initializer_is_traced_once_a_shape(key):
    traced = []

    def normal(key, shape, dtype=jnp.float32):
        traced.append(shape)
        return jax.random.normal(key, shape, dtype)

    network, x = Two(params.once_a_shape(normal)), jnp.ones((1, 3))
    variables = network.init(key, x)
    assert traced == [(3, 3)]
    assert not np.array_equal(variables["params"]["a"], variables["params"]["b"])
    network.apply(variables, x)
    jax.jit(network.apply)(variables, x)
    params.first_values(network, None, x)
    assert traced == [(3, 3)]


def test_values_that_do_not_fit_or_are_not_there_are_named(key):
    network, x = Two(params.KERNEL), jnp.ones((1, 3))
    values = network.init(key, x)["params"]
    with pytest.raises(flax.errors.ScopeParamShapeError, match=r'"b".*\(3, 3\).*\(4, 3\)'):
        network.apply({"params": values | {"b": jnp.ones((4, 3))}}, x)
    with pytest.raises(flax.errors.FlaxError, match='"a"'):
        network.apply({"params": {"b": values["b"]}}, x)
