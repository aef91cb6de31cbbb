"""Convolutions in the form that TPUs take best, against sums of products and the plain form."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_qwen_image
import pytest
from jax.sharding import Mesh
from jaxprs import convolutions

from ses_jax.convert.autoencoder_kl import COMPONENT as KL
from ses_jax.convert.qwen_vae import COMPONENT as QWEN
from ses_jax.loading import network
from ses_jax.models import autoencoder_kl, convolution, qwen_vae, target

TPU = types.SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")
SHAPES = [(1, 1, 1), (1, 3, 1), (2, 1, 4), (1, 5, 8), (3, 6, 5)]


def drawn(seed, *shapes):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]


def by_hand(x, kernel):
    """A convolution of float64s as sums of products: every cell meets the kernel around it, and zeros outside."""
    x, kernel = (np.asarray(values, np.float64) for values in (x, kernel))
    (height, width), sides = x.shape[1:3], kernel.shape[:2]
    before = [(side - 1) // 2 for side in sides]
    pads = [(first, side - 1 - first) for first, side in zip(before, sides, strict=True)]
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    out = 0
    for i in range(sides[0]):
        for j in range(sides[1]):
            out = out + padded[:, i : i + height, j : j + width] @ kernel[i, j]
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sides", [(3, 3), (1, 1), (2, 4), (5, 1)])
def test_columns_are_convolved_as_images_are(shape, sides):
    x, kernel = drawn(sum(sides), (*shape, 3), (*sides, 3, 5))
    expected = by_hand(x, kernel)
    for form in (convolution.convolved, convolution.convolved_by_columns):
        np.testing.assert_allclose(jax.jit(form)(x, kernel), expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_upsampling_repeats_cells_and_convolves_them(shape):
    x, kernel = drawn(len(shape), (*shape, 3), (3, 3, 3, 4))
    expected = by_hand(np.repeat(np.repeat(x, 2, axis=1), 2, axis=2), kernel)
    for form in (convolution.upsampled_by_columns, convolution.upsampled_as_one):
        np.testing.assert_allclose(jax.jit(form)(x, kernel), expected, atol=1e-5)
    bias = jnp.arange(4.0)
    layer = convolution.Upsample(4)
    ours = jax.jit(lambda x: layer.apply({"params": {"kernel": kernel, "bias": bias}}, x))(x)
    np.testing.assert_allclose(ours, expected + bias, atol=1e-5)


def axes_convolved(function, x, place):
    """Of each convolution that a function is made of on a device or a mesh: along how many axes it goes."""

    def placed(x):
        with target.compiled_for(place):
            return function(x)

    found = convolutions(jax.make_jaxpr(placed)(x).jaxpr)
    return [len(each.params["window_strides"]) for each in found]


@pytest.mark.parametrize("layer", [convolution.Conv(4), convolution.Upsample(4), qwen_vae.CausalConv(4)])
def test_tpus_convolve_columns_where_each_has_one_image(key, layer):
    def axes(count, place):
        x = jax.ShapeDtypeStruct((count, 5, 6, 3), jnp.float32)
        params = jax.eval_shape(layer.init, key, x)
        shapes = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
        return axes_convolved(lambda x: layer.apply(shapes, x), x, place)

    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    assert axes(1, TPU) == [1]
    assert axes(4, TPU) == axes(1, None) == axes(4, mesh) == [2]


def test_on_a_mesh_of_tpus_it_is_one_image_for_each(key, monkeypatch):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    monkeypatch.setattr(target, "device", lambda: TPU)
    x, kernel = jax.random.normal(key, (4, 5, 6, 3)), jnp.ones((3, 3, 3, 4))
    found = {count: axes_convolved(lambda x: convolution.convolved(x, kernel), x[:count], mesh) for count in (1, 2, 4)}
    assert found == {1: [2], 2: [2], 4: [1]}


@pytest.mark.parametrize(
    ("reference", "component", "module"),
    [(oracle.vae, KL, autoencoder_kl), (oracle_qwen_image.vae, QWEN, qwen_vae)],
    ids=["AutoencoderKL", "Qwen"],
)
def test_decoders_are_the_same_in_either_form(tmp_path, reference, component, module):
    """The plain form is compared with diffusers elsewhere."""
    reference(seed=3).save_pretrained(tmp_path)
    ours = network.load(tmp_path, component)
    latents = np.random.default_rng(1).standard_normal((1, 16, 3, 5)).astype(np.float32)

    def decode(latents):
        return module.decode(ours.params, ours.config, latents)

    def decode_as_on_a_tpu(latents):
        with target.compiled_for(TPU):
            return decode(latents)

    axes = axes_convolved(decode, latents, TPU)
    assert set(axes) == {1}
    np.testing.assert_allclose(jax.jit(decode_as_on_a_tpu)(latents), jax.jit(decode)(latents), atol=2e-5, rtol=2e-5)
