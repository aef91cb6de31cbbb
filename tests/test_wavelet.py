"""split and merge against PyWavelets, on even, odd and non-divisible grids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pywt
from hypothesis import given, settings
from hypothesis import strategies as st

from ses_jax.searchers import wavelet

pytestmark = pytest.mark.quick

WAVELETS = ["db1", "db2", "sym4", "bior2.2"]
GRIDS = [(64, 64), (45, 52), (63, 33), (90, 160)]


def split(noise, **options):
    """Compiled as a whole, and anew each time."""
    return jax.jit(functools.partial(wavelet.split, **options))(noise)


def merge(low, high, **options):
    return jax.jit(functools.partial(wavelet.merge, **options))(low, high)


def reference_split(noise, name, level):
    return pywt.wavedec2(noise, name, mode="symmetric", level=level, axes=(-2, -1))


def reference_merge(low, bands, name, shape):
    return pywt.waverec2([low, *bands], name, mode="symmetric", axes=(-2, -1))[..., : shape[0], : shape[1]]


@pytest.mark.parametrize("name", WAVELETS)
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_pywavelets(name, grid):
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((3, *grid)).astype(np.float32)
    for level in {1, pywt.dwtn_max_level(grid, name)}:
        low, high = split(noise, wavelet=name, level=level)
        bands = reference_split(noise, name, level)
        np.testing.assert_allclose(low, bands[0], atol=2e-5)

        lows = rng.standard_normal((4, *low.shape)).astype(np.float32)
        merged = merge(lows, high, wavelet=name, shape=grid)
        expected = np.stack([reference_merge(x, bands[1:], name, grid) for x in lows])
        np.testing.assert_allclose(merged, expected, atol=2e-5)


@given(
    name=st.sampled_from(WAVELETS),
    height=st.integers(16, 40),
    width=st.integers(16, 40),
    lead=st.sampled_from([(), (1,), (2, 3)]),
)
@settings(max_examples=10, deadline=None)
def test_merge_inverts_split(name, height, width, lead):
    @jax.jit
    def there_and_back(noise):
        low, high = wavelet.split(noise, wavelet=name, level=1)
        assert low.shape[:-2] == lead
        return wavelet.merge(low, high, wavelet=name, shape=(height, width))

    noise = np.random.default_rng(height * 100 + width).standard_normal((*lead, height, width)).astype(np.float32)
    np.testing.assert_allclose(there_and_back(noise), noise, atol=1e-5)


@pytest.mark.parametrize("level", [1, 2, 4])
def test_haar_low_band_is_scaled_block_mean(level):
    noise = jax.random.normal(jax.random.key(1), (2, 32, 48))
    low, _ = split(noise, level=level)
    size = 2**level
    means = np.asarray(noise).reshape(2, 32 // size, size, 48 // size, size).mean(axis=(2, 4))
    np.testing.assert_allclose(low, size * means, atol=1e-5)


def test_fast_haar_equals_the_general_path(monkeypatch):
    noise = jax.random.normal(jax.random.key(2), (4, 32, 32))
    new = jax.random.normal(jax.random.key(3), (5, 4, 2, 2))
    fast_low, fast_high = split(noise, level=4)
    fast = merge(new, fast_high, shape=(32, 32))
    monkeypatch.setattr(wavelet, "HAAR", ())
    low, high = split(noise, level=4)
    assert isinstance(high, tuple)
    np.testing.assert_allclose(fast_low, low, atol=1e-5)
    np.testing.assert_allclose(fast, merge(new, high, shape=(32, 32)), atol=1e-5)


def test_merge_changes_nothing_but_the_low_band():
    noise = jax.random.normal(jax.random.key(4), (2, 64, 64))
    low, high = split(noise, level=3)
    merged = np.asarray(merge(jnp.zeros_like(low), high, shape=(64, 64)))
    before, after = reference_split(np.asarray(noise), "db1", 3), reference_split(merged, "db1", 3)
    np.testing.assert_allclose(after[0], 0, atol=1e-5)
    for old, new in zip(before[1:], after[1:], strict=True):
        np.testing.assert_allclose(np.stack(new), np.stack(old), atol=1e-5)


def test_low_band_of_white_noise_is_white():
    low, _ = split(jax.random.normal(jax.random.key(5), (64, 128, 128)), level=4)
    assert low.shape == (64, 8, 8)
    assert abs(float(low.std()) - 1) < 0.05


def test_jits_and_keeps_gradients_exact():
    noise = jax.random.normal(jax.random.key(6), (1, 16, 16))
    low, high = wavelet.split(noise, level=2)
    gradient = jax.jit(jax.grad(lambda x: wavelet.merge(x, high, shape=(16, 16)).sum()))(low)
    np.testing.assert_allclose(gradient, 16 / 4, atol=1e-5)


def test_unknown_wavelet_is_named():
    with pytest.raises(ValueError, match="unknown wavelet 'db99'"):
        wavelet.split(jnp.zeros((1, 32, 32)), wavelet="db99")


@pytest.mark.parametrize(("name", "level"), [("db1", 6), ("sym4", 3), ("db1", 0)])
def test_level_that_does_not_fit_names_the_deepest(name, level):
    deepest = pywt.dwtn_max_level((32, 32), name)
    with pytest.raises(ValueError, match=f"choose a level from 1 to {deepest}"):
        wavelet.split(jnp.zeros((1, 32, 32)), wavelet=name, level=level)


@pytest.mark.parametrize(("name", "level"), [("db1", 2), ("db2", 1)])
def test_numpy_arrays_come_back_too(name, level):
    noise = np.random.default_rng(0).standard_normal((2, 16, 24)).astype(np.float32)
    low, high = wavelet.split(noise, wavelet=name, level=level)
    merged = wavelet.merge(np.asarray(low), jax.tree.map(np.asarray, high), wavelet=name, shape=(16, 24))
    np.testing.assert_allclose(merged, noise, atol=1e-5)
