"""The device resize against Pillow itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ses_jax.rewards import resample

pytestmark = pytest.mark.quick


def pillow(pixels, size):
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.BICUBIC))


def pink_noise(height, width, seed):
    """An image with a natural spectrum: power falls with frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    spectrum = np.fft.fft2(rng.standard_normal((height, width, 3)), axes=(0, 1)) / (frequency[..., None] + 1 / width)
    image = np.fft.ifft2(spectrum, axes=(0, 1)).real
    image = (image - image.min()) / (image.max() - image.min())
    return np.round(image * 255).astype(np.uint8)


def white_noise(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@functools.partial(jax.jit, static_argnums=1)
def resized(pixels, size):
    return resample.resize(pixels.astype(jnp.float32)[None], size)[0]


@pytest.mark.parametrize("make", [pink_noise, white_noise])
@pytest.mark.parametrize("source", [(512, 512), (1024, 768), (64, 64), (301, 224), (100, 450), (2400, 31)])
def test_equals_pillow(make, source):
    pixels = make(*source, seed=1)
    size = (224, 160)
    np.testing.assert_array_equal(resized(pixels, size), pillow(pixels, size))


@given(st.integers(8, 90), st.floats(0.3, 3.0), st.integers(8, 90))
@settings(max_examples=15, deadline=None)
def test_equals_pillow_at_any_size(height, aspect, short):
    pixels = white_noise(height, max(8, round(height * aspect)), seed=height)
    scale = short / min(pixels.shape[:2])
    size = (int(pixels.shape[0] * scale), int(pixels.shape[1] * scale))
    np.testing.assert_array_equal(resized(pixels, size), pillow(pixels, size))


@pytest.mark.parametrize(
    "target", [(31, 40), (32, 16), (32, 17), (31, 16), (63, 31), (62, 31), (65, 32), (64, 48), (63, 48)]
)
def test_passes_come_in_pillows_order(target):
    """From 64 x 32, on both sides of where the order changes; on white noise it makes up to 20 steps."""
    pixels = white_noise(64, 32, seed=5)
    np.testing.assert_array_equal(resized(pixels, target), pillow(pixels, target))


def test_same_size_is_untouched():
    pixels = jnp.asarray(white_noise(32, 40, seed=0), jnp.float32)[None]
    np.testing.assert_array_equal(resample.resize(pixels, (32, 40)), pixels)


@pytest.mark.parametrize("source", [(64, 64), (120, 75), (75, 121), (333, 334)])
def test_resize_and_crop_equals_the_slow_clip_processor(source):
    from transformers import CLIPImageProcessorPil

    pixels = pink_noise(*source, seed=3)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_rescale=False, do_normalize=False
    )
    expected = np.asarray(processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
    got = resample.resize_and_crop(jnp.asarray(pixels, jnp.float32)[None], 56)[0]
    np.testing.assert_array_equal(got, expected)


def test_quantize_gives_the_values_of_an_8_bit_file():
    images = jnp.array([-0.2, 0.0, 0.5, 0.4999 / 255, 0.5001 / 255, 1.0, 7.0]).reshape(1, 1, 7, 1)
    np.testing.assert_array_equal(resample.quantize(images).ravel(), [0, 0, 128, 0, 1, 255, 255])


def test_derivatives_are_those_of_what_is_rounded():
    """Rounding and Pillow's integers are passed by; what is cut off has none."""
    images = np.random.default_rng(0).uniform(0.2, 0.8, (1, 12, 10, 3)).astype(np.float32)
    images[0, 0, 0] = (-0.5, 0.5, 1.5)
    slope = np.random.default_rng(1).standard_normal((1, 6, 5, 3)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(images, rounded):
        small = lambda x: resample.resize(resample.quantize(x), (6, 5), rounded=rounded)  # noqa: E731
        return jax.grad(lambda x: jnp.sum(small(x) * slope))(images)

    rows, columns = resample.coefficients(12, 6), resample.coefficients(10, 5)
    expected = 255 * np.einsum("hH,bhwc,wW->bHWc", rows, slope, columns)
    expected[0, 0, 0, [0, 2]] = 0
    for rounded in (True, False):
        np.testing.assert_allclose(gradient(images, rounded), expected, atol=1e-3)


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (5, 5)])
def test_what_is_no_number_stays_none(size):
    pixels = jnp.full((2, 10, 10, 3), 128.0).at[1, 4, 4, 1].set(jnp.nan)
    plain, broken = resample.resize(pixels, size)
    assert jnp.isfinite(plain).all()
    assert jnp.isnan(broken[..., 1]).any()
    assert jnp.isfinite(broken[..., 0]).all()
