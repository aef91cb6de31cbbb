"""What the multimodal diffusion transformers share: how time and guidance reach their sinusoids, how streams join."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ses_jax.models import flux1, flux2, mmdit, qwen_image, target

pytestmark = pytest.mark.quick

SCHEDULE = np.linspace(1, 0, 57)[:-1].astype(np.float32)


def reference_time(dtype):
    """What the references' networks get: the scheduler's float32 in the dtype of the latents, as a fraction."""
    return (torch.tensor(SCHEDULE) * 1000).to(getattr(torch, dtype)) / 1000


def rounded(function, x, dtype, rounding="reference"):
    return jax.jit(functools.partial(function, rounding=rounding, dtype=jnp.dtype(dtype)))(x)


# Compilers may divide by a product; in bfloat16 that makes no difference.
EXACTNESS = {"bfloat16": 0, "float16": 1e-3, "float32": 2e-7}


@pytest.mark.parametrize("dtype", EXACTNESS)
def test_reference_rounding_of_time_is_the_references(dtype):
    expected = reference_time(dtype)
    handed = rounded(mmdit.pipeline_time, SCHEDULE, dtype)
    np.testing.assert_allclose(handed, expected.float().numpy(), rtol=EXACTNESS[dtype])
    multiplied = rounded(mmdit.thousandfold, handed, dtype)
    np.testing.assert_allclose(multiplied, (1000 * expected).float().numpy(), rtol=EXACTNESS[dtype])


@pytest.mark.parametrize("dtype", EXACTNESS)
def test_reference_rounding_of_guidance_is_the_references(dtype):
    guidance = np.float32([3.5, 1.7, 30.0])
    expected = (torch.tensor(guidance).to(getattr(torch, dtype)) * 1000).float().numpy()
    np.testing.assert_array_equal(rounded(mmdit.thousandfold, guidance, dtype), expected)


@pytest.mark.parametrize("dtype", EXACTNESS)
def test_exact_time_is_one_product_in_float32(dtype):
    time = rounded(mmdit.pipeline_time, SCHEDULE, dtype, "exact")
    np.testing.assert_array_equal(rounded(mmdit.thousandfold, time, dtype, "exact"), np.float32(1000) * SCHEDULE)


@pytest.mark.parametrize(("rounding", "seen"), [("exact", (988.4, 1700.0)), ("reference", (988.0, 1704.0))])
def test_bfloat16_weights_see_the_time_and_guidance_that_are_asked_for(rounding, seen, key):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (16,)}

    def embedder(rounding):
        return mmdit.ConditionEmbedder(mmdit.Config(**sizes, timestep_rounding=rounding), guided=True)

    ones, dtype = jnp.ones(1), jnp.bfloat16
    params = jax.jit(lambda: embedder("exact").init(key, ones, ones, dtype))()
    half = jax.tree.map(lambda x: x.astype(dtype), params)

    @functools.partial(jax.jit, static_argnums=0)
    def embed(rounding, time, guidance):
        return embedder(rounding).apply(half, time / 1000, guidance / 1000, dtype).astype(jnp.float32)

    def run(rounding, *values):
        return embed(rounding, *(np.float32([value]) for value in values))

    asked = run(rounding, 988.4, 1700.0)
    other = (1976.4 - seen[0], 3404.0 - seen[1])
    error, contrast = (np.linalg.norm(asked - run("exact", *values)) for values in (seen, other))
    assert error < 0.02 * contrast


@pytest.mark.parametrize("family", [flux1, flux2, qwen_image])
def test_an_unknown_rounding_is_refused_and_no_file_sets_one(family):
    with pytest.raises(ValueError, match="timestep_rounding='half' is none of exact, reference"):
        family.Config(timestep_rounding="half")
    assert family.Config.from_json({"timestep_rounding": "reference"}) == family.Config()


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("rows", [1, 2])  # of angles: those of all, or each its own
def test_streams_are_joined_and_rotated(platform, rows, key):
    image, text, angles = (
        jax.random.normal(at, shape)
        for at, shape in zip(jax.random.split(key, 3), [(2, 5, 3, 8), (2, 4, 3, 8), (rows, 9, 4)], strict=True)
    )
    device = types.SimpleNamespace(platform=platform, device_kind=platform)

    @jax.jit
    def ours(image, text):
        with target.compiled_for(device):
            return mmdit.joined_and_rotated(image, text, jnp.cos(angles), jnp.sin(angles))

    tokens = np.concatenate([image, text], axis=1).astype(np.float64)
    pairs = tokens[..., ::2] + 1j * tokens[..., 1::2]
    turned = pairs * np.exp(1j * np.asarray(angles, np.float64))[:, :, None]
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(tokens.shape)
    np.testing.assert_allclose(ours(image, text), expected, atol=1e-5)
