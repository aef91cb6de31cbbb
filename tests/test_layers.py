"""Norms and activations against formulas in float64."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ses_jax.models import clip, layers, quantized, target

pytestmark = pytest.mark.quick


def by_groups(x, groups, eps):
    """Each group of channels of each image, one after the other."""
    out = np.zeros(x.shape)
    for image in range(len(x)):
        for channels in np.split(np.arange(x.shape[-1]), groups):
            part = np.asarray(x[image][..., channels], np.float64)
            out[image][..., channels] = (part - part.mean()) / np.sqrt(part.var() + eps)
    return out


@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (1, 1, 1, 6), (2, 3, 2, 4, 6)])
@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("away", [0.0, 10.0])
def test_group_norm(shape, groups, away, key):
    """With channels up to sixty deviations from zero and from each other, too; the epsilon is large enough to count."""
    x = jax.random.normal(key, shape) + away * jnp.arange(1, 7)
    norm = layers.GroupNorm(groups, eps=0.01)
    scale, bias = jnp.arange(1.0, 7.0), jnp.arange(6.0)
    ours = jax.jit(norm.apply)({"params": {"scale": scale, "bias": bias}}, x)
    expected = by_groups(x, groups, 0.01) * np.asarray(scale) + np.asarray(bias)
    np.testing.assert_allclose(ours, expected, atol=1e-2 if away else 2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_group_norm_of_one_value_everywhere(dtype):
    """Rounding makes its variance no less than zero."""
    x = jnp.full((1, 64, 48, 8), 1000.1, dtype)
    norm = layers.GroupNorm(2)
    ours = norm.apply({"params": {"scale": jnp.ones(8, dtype), "bias": jnp.full(8, 0.5, dtype)}}, x)
    assert ours.dtype == dtype
    assert bool(jnp.isfinite(ours).all())


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {
    layers.silu: lambda x: x * sigmoid(x),
    clip.quick_gelu: lambda x: x * sigmoid(1.702 * x),
    clip.gelu: lambda x: x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2,
}


@pytest.mark.parametrize("ours", ACTIVATIONS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_activations_are_rounded_once(ours, dtype, key):
    """Half of a last place from the exact value, and what float32 adds."""
    x = (3 * jax.random.normal(key, (2000,))).astype(dtype)
    exact = ACTIVATIONS[ours](np.asarray(x, np.float64))
    off = np.abs(np.asarray(ours(x), np.float64) - exact)
    assert (off <= 0.501 * float(jnp.finfo(dtype).eps) * np.abs(exact) + 1e-6).all()
    assert ours(x).dtype == dtype


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_of_heads(platform, bias, key):
    """Summed over heads and what is in each, or over all at once: the same product."""
    x, kernel, added = (jax.random.normal(key, shape) for shape in [(2, 5, 3, 4), (12, 7), (7,)])
    device = types.SimpleNamespace(platform=platform, device_kind=platform)
    layer = quantized.Dense(7, use_bias=bias, of_heads=True)

    @jax.jit
    def ours(x):
        with target.compiled_for(device):
            return layer.apply({"params": {"kernel": kernel} | ({"bias": added} if bias else {})}, x)

    expected = np.asarray(x, np.float64).reshape(2, 5, 12) @ np.asarray(kernel) + (np.asarray(added) if bias else 0)
    np.testing.assert_allclose(ours(x), expected, atol=1e-5)
    operands = "2x5x3x4xf32>, tensor<3x4x7xf32" if platform == "tpu" else "2x5x12xf32>, tensor<12x7xf32"
    assert operands in ours.lower(x).as_text()
