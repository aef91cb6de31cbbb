"""The autoencoder against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch

from ses_jax.convert.autoencoder_kl import COMPONENT
from ses_jax.loading import hub
from ses_jax.models import autoencoder_kl

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
SIZES = {
    "default": oracle.ZImageSizes(),
    "quant convs": oracle.ZImageSizes(vae_widths=(8, 8, 16, 24), vae_layers=1, quant_convs=True),
    "three levels, one group": oracle.ZImageSizes(vae_widths=(12, 6, 18), vae_layers=3, vae_groups=1),
    "faint": oracle.ZImageSizes(vae_widths=(4, 8), vae_layers=1, gain=0.03),
}
GRID = (3, 5)
encode = jax.jit(autoencoder_kl.encode, static_argnums=1)
decode = jax.jit(autoencoder_kl.decode, static_argnums=1)


@pytest.fixture(scope="module", params=SIZES)
def networks(request, tmp_path_factory):
    reference = oracle.vae(SIZES[request.param], seed=3)
    folder = tmp_path_factory.mktemp("vae")
    reference.save_pretrained(folder)
    return reference, *hub.load_component(folder, COMPONENT, dtype=jnp.float32)


def test_decode_equals_the_reference(networks):
    reference, config, params = networks
    latents = np.random.default_rng(1).standard_normal((2, 16, *GRID), np.float32)
    with torch.no_grad():
        expected = reference.decode(torch.from_numpy(latents)).sample.permute(0, 2, 3, 1).numpy()
    ours = decode(params, config, latents)
    assert ours.shape == (2, GRID[0] * config.downscale, GRID[1] * config.downscale, 3)
    scale = min(1.0, expected.std())
    np.testing.assert_allclose(ours / scale, expected / scale, **TOLERANCE)


def test_encode_equals_the_reference(networks):
    reference, config, params = networks
    height, width = (config.downscale * side for side in GRID)
    images = np.random.default_rng(2).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    with torch.no_grad():
        expected = reference.encode(torch.from_numpy(images.transpose(0, 3, 1, 2))).latent_dist
    mean, log_variance = encode(params, config, images)
    scale = min(1.0, expected.mean.std().item())
    np.testing.assert_allclose(mean / scale, expected.mean.numpy() / scale, **TOLERANCE)
    np.testing.assert_allclose(log_variance / scale, expected.logvar.numpy() / scale, **TOLERANCE)


def test_config_reads_the_published_fields():
    config = autoencoder_kl.Config.from_json(dict(oracle.vae().config))
    assert (config.scaling_factor, config.shift_factor, config.downscale) == (0.3611, 0.1159, 8)
