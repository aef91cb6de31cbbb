"""Convolutions in the forms that TPUs and GPUs take best, against sums of products and the plain form."""

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
from ses_jax.models import autoencoder_kl, convolution, layers, qwen_vae, target

TPU = types.SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")
GPU = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")


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


def phases_of(x, phases):
    """By hand: `[B, H, W, C]` to `[B, H, P, W / P, C]`."""
    return jnp.stack([x[:, :, place::phases] for place in range(phases)], axis=2)


@pytest.mark.parametrize("phases", [1, 2, 3])
def test_phases_make_a_whole(phases):
    (x,) = drawn(0, (2, 3, 5 * phases, 2))
    np.testing.assert_array_equal(convolution.whole(phases_of(x, phases)), x)
    np.testing.assert_array_equal(convolution.whole(x), x)


@pytest.mark.parametrize(("count", "height", "columns"), [(1, 1, 1), (1, 3, 2), (2, 5, 4)])
@pytest.mark.parametrize(("phases", "sides"), [(1, (3, 3)), (2, (3, 3)), (4, (1, 1)), (2, (2, 4)), (3, (5, 1))])
def test_phases_are_convolved_as_images_are(count, height, columns, phases, sides):
    x, kernel = drawn(sum(sides), (count, height, columns * phases, 3), (*sides, 3, 5))
    expected = by_hand(x, kernel)
    np.testing.assert_allclose(jax.jit(convolution.convolved)(x, kernel), expected, atol=1e-5)
    ours = jax.jit(convolution.convolved)(phases_of(x, phases), kernel)
    np.testing.assert_allclose(ours, phases_of(expected, phases), atol=1e-5)


def test_neighbours_may_be_more_than_the_phases(key):
    x = jax.random.normal(key, (1, 2, 12, 3))
    for phases in (1, 2, 3):
        padded = jnp.pad(x, ((0, 0), (0, 0), (12, 12), (0, 0)))
        expected = [padded[:, :, 12 + place :: phases][:, :, : 12 // phases] for place in range(-5, phases + 4)]
        ours = convolution.with_neighbours(phases_of(x, phases), 5, 4)
        np.testing.assert_array_equal(ours, jnp.stack(expected, axis=2))


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 4), (1, 6, 10)])
def test_upsampling_repeats_cells_and_convolves_them(shape):
    x, kernel = drawn(len(shape), (*shape, 3), (3, 3, 3, 4))
    expected = by_hand(np.repeat(np.repeat(x, 2, axis=1), 2, axis=2), kernel)
    np.testing.assert_allclose(jax.jit(convolution.upsampled_as_one)(x, kernel), expected, atol=1e-5)
    for phases in (1, 2):
        ours = jax.jit(convolution.upsampled_as_one)(phases_of(x, phases), kernel)
        np.testing.assert_allclose(ours, phases_of(expected, 2 * phases), atol=1e-5)
    bias = jnp.arange(4.0)
    layer = convolution.Upsample(4)
    ours = jax.jit(lambda x: layer.apply({"params": {"kernel": kernel, "bias": bias}}, x))(x)
    np.testing.assert_allclose(ours, expected + bias, atol=1e-5)


def test_a_gpu_upsamples_by_the_derivative_of_a_convolution():
    """XLA takes it for one where the kernel is turned round; else it writes zeros between all cells."""
    layer = convolution.Upsample(4)
    x, kernel = drawn(0, (1, 3, 5, 2), (3, 3, 2, 4))

    def upsampled(x, kernel):
        with target.compiled_for(GPU):
            return layer.apply({"params": {"kernel": kernel, "bias": jnp.zeros(4)}}, x)

    equations = jax.make_jaxpr(upsampled)(x, kernel).jaxpr.eqns
    (one,) = (e for e in equations if e.primitive.name == "conv_general_dilated")
    (turned,) = (e for e in equations if one.invars[1] in e.outvars)
    assert one.params["lhs_dilation"] == (2, 2)
    assert turned.primitive.name == "rev"


@pytest.mark.parametrize("phases", [1, 2])
def test_norms_are_those_of_the_whole_image(key, phases):
    x = jax.random.normal(key, (2, 3, 8, 6)) + 1
    for norm in (layers.GroupNorm(3), qwen_vae.ChannelNorm()):
        params = norm.init(key, x)
        expected = phases_of(norm.apply(params, x), phases)
        np.testing.assert_allclose(norm.apply(params, phases_of(x, phases)), expected, atol=1e-5)


def test_each_tpu_takes_its_one_image_in_phases(monkeypatch):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))

    def in_phases(place):
        with target.compiled_for(place):
            return [convolution.in_phases(jnp.zeros((count, 5, 6, 3))).shape for count in (1, 2, 4)]

    as_they_are = [(count, 5, 6, 3) for count in (1, 2, 4)]
    assert in_phases(None) == in_phases(mesh) == as_they_are
    assert in_phases(TPU) == [(1, 5, 1, 6, 3), *as_they_are[1:]]
    monkeypatch.setattr(target, "device", lambda: TPU)
    assert in_phases(mesh) == [*as_they_are[:2], (4, 5, 1, 6, 3)]


@pytest.mark.parametrize(
    ("reference", "component", "module"),
    [(oracle.vae, KL, autoencoder_kl), (oracle_qwen_image.vae, QWEN, qwen_vae)],
    ids=["AutoencoderKL", "Qwen"],
)
@pytest.mark.parametrize("device", [TPU, GPU], ids=["tpu", "gpu"])
def test_decoders_are_the_same_in_every_form(tmp_path, reference, component, module, device):
    """The plain form is compared with diffusers elsewhere."""
    reference(seed=3).save_pretrained(tmp_path)
    ours = network.load(tmp_path, component)
    latents = np.random.default_rng(1).standard_normal((1, 16, 3, 5)).astype(np.float32)

    def decode(latents):
        return module.decode(ours.params, ours.config, latents)

    def decode_as_there(latents):
        with target.compiled_for(device):
            return decode(latents)

    found = convolutions(jax.make_jaxpr(decode_as_there)(latents).jaxpr)
    batches = [each.invars[0].aval.shape[each.params["dimension_numbers"].lhs_spec[0]] for each in found]
    if device is TPU:
        assert batches.count(1) <= 1  # at most that of the latents, before they are taken apart
        assert set(batches) - {1} == {latents.shape[-1]}
    else:
        assert set(batches) == {1}
    np.testing.assert_allclose(jax.jit(decode_as_there)(latents), jax.jit(decode)(latents), atol=2e-5, rtol=2e-5)

    def slope(function):
        return jax.jit(jax.grad(lambda latents: jnp.mean(jnp.square(function(latents)))))(latents)

    expected = slope(decode)
    np.testing.assert_allclose(slope(decode_as_there), expected, atol=1e-5 * jnp.abs(expected).max())
