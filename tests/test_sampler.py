"""The Euler sampler against a plain loop, against an exactly solvable flow, and its reading of sigmas."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ses_jax.pipelines import sampler, schedule

pytestmark = pytest.mark.quick


def test_equals_a_plain_loop(key):
    noise = jax.random.normal(key, (2, 3, 4, 4))
    sigmas = np.array([1.0, 0.8, 0.3, 0.0], np.float32)

    def velocity(x, sigma):
        return jnp.sin(x) + sigma[:, None, None, None] * x

    expected = np.asarray(noise, np.float64)
    for now, after in itertools.pairwise(sigmas):
        expected = expected + (after - now) * (np.sin(expected) + now * expected)
    np.testing.assert_allclose(sampler.denoise(velocity, noise, sigmas), expected, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4, 17])
def test_straight_flow_lands_on_the_image_whatever_the_steps(key, steps):
    noise, image = jax.random.normal(key, (2, 2, 5))
    out = sampler.denoise(lambda x, sigma: noise - image, noise, np.linspace(1, 0, steps + 1))
    np.testing.assert_allclose(out, image, atol=1e-5)


def test_sees_each_sigma_but_the_last():
    sigmas = jnp.array([1.0, 0.7, 0.2, 0.0])
    out = sampler.denoise(lambda x, sigma: -sigma[:, None], jnp.zeros((3, 1)), sigmas)
    np.testing.assert_allclose(out, np.full((3, 1), 1.0 * 0.3 + 0.7 * 0.5 + 0.2 * 0.2), rtol=1e-6)


def test_latents_stay_float32_under_a_bfloat16_network():
    noise = jnp.full((1, 2), 1.0 + 2**-10)
    out = sampler.denoise(lambda x, sigma: jnp.zeros_like(x, jnp.bfloat16), noise, jnp.array([1.0, 0.5, 0.0]))
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, noise)


@pytest.mark.parametrize(
    ("shift", "steps", "expected"),
    [
        (3.0, 8, [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0]),
        (6.0, 50, [1, 0.99661, 0.993103]),
    ],
)
def test_published_sigmas(shift, steps, expected):
    sigmas = schedule.static_shift_sigmas(schedule.even(steps), shift)
    assert sigmas.shape == (steps + 1,)
    assert sigmas[-1] == 0
    np.testing.assert_allclose(sigmas[: len(expected)], expected, atol=1e-6)
    assert np.all(np.diff(sigmas) < 0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 9, 28])
def test_sigmas_equal_the_reference_scheduler(shift, steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    np.testing.assert_allclose(
        schedule.static_shift_sigmas(schedule.even(steps), shift), scheduler.sigmas.numpy(), atol=1e-6
    )
