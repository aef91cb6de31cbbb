"""The autoencoder with BatchNorm statistics against diffusers, as its pipelines use it."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle_flux2
import pytest
import torch
from diffusers import Flux2Pipeline

from ses_jax.convert.autoencoder_kl_bn import COMPONENT
from ses_jax.loading import hub
from ses_jax.models import autoencoder_kl, autoencoder_kl_bn

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
SIZES = {
    "default": oracle_flux2.Sizes(),
    "small decoder": oracle_flux2.Sizes(vae_widths=(8, 8, 16, 24), decoder_widths=(4, 8, 12, 8), vae_layers=1),
    "faint": oracle_flux2.Sizes(vae_widths=(4, 8), vae_layers=1, gain=0.03),
}
encode = jax.jit(autoencoder_kl.encode, static_argnums=1)
decode = jax.jit(autoencoder_kl_bn.decode, static_argnums=1)


@pytest.fixture(scope="module", params=SIZES)
def networks(request, tmp_path_factory):
    reference = oracle_flux2.vae(SIZES[request.param], seed=3)
    folder = tmp_path_factory.mktemp("vae")
    reference.save_pretrained(folder)
    return reference, *hub.load_component(folder, COMPONENT, dtype=jnp.float32)


def reference_decode(reference, latents):
    """The end of the pipeline's call, which denormalises and unpacks before it decodes."""
    mean = reference.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(reference.bn.running_var.view(1, -1, 1, 1) + reference.config.batch_norm_eps)
    with torch.no_grad():
        unpacked = Flux2Pipeline._unpatchify_latents(torch.from_numpy(latents) * std + mean)
        return reference.decode(unpacked).sample.permute(0, 2, 3, 1).numpy()


def test_decode_equals_the_reference(networks):
    reference, config, params = networks
    grid = (3, 2)
    latents = np.random.default_rng(1).standard_normal((2, 128, *grid), np.float32)
    expected = reference_decode(reference, latents)
    ours = decode(params, config, latents)
    assert ours.shape == (2, grid[0] * 2 * config.downscale, grid[1] * 2 * config.downscale, 3)
    scale = min(1.0, expected.std())
    np.testing.assert_allclose(ours / scale, expected / scale, **TOLERANCE)


def test_encode_equals_the_reference(networks):
    reference, config, params = networks
    images = np.random.default_rng(2).uniform(-1, 1, (2, 6 * config.downscale, 4 * config.downscale, 3))
    images = images.astype(np.float32)
    with torch.no_grad():
        expected = reference.encode(torch.from_numpy(images.transpose(0, 3, 1, 2))).latent_dist
    network = {name: leaf for name, leaf in params.items() if name != "bn"}
    mean, log_variance = encode(network, config, images)
    scale = min(1.0, expected.mean.std().item())
    np.testing.assert_allclose(mean / scale, expected.mean.numpy() / scale, **TOLERANCE)
    np.testing.assert_allclose(log_variance / scale, expected.logvar.numpy() / scale, **TOLERANCE)


def test_packing_is_the_references():
    latents = np.random.default_rng(0).standard_normal((2, 32, 6, 4), np.float32)
    packed = autoencoder_kl_bn.pack(jnp.asarray(latents), (2, 2))
    np.testing.assert_array_equal(packed, Flux2Pipeline._patchify_latents(torch.from_numpy(latents)).numpy())
    np.testing.assert_array_equal(autoencoder_kl_bn.unpack(packed, (2, 2)), latents)


def test_defaults_are_the_published_config():
    config = autoencoder_kl_bn.Config.from_json({"_class_name": "AutoencoderKLFlux2"})
    assert config == autoencoder_kl_bn.Config.from_json(dict(oracle_flux2.AutoencoderKLFlux2().config))
    assert (config.packed_channels, config.downscale, config.batch_norm_eps) == (128, 8, 1e-4)


def test_a_megapixel_decodes_abstractly():
    config = autoencoder_kl_bn.Config()
    params = jax.eval_shape(lambda: autoencoder_kl_bn.init(None, config))
    latents = jax.ShapeDtypeStruct((1, 128, 64, 64), jnp.float32)
    assert jax.eval_shape(lambda p, x: autoencoder_kl_bn.decode(p, config, x), params, latents).shape == (
        1,
        1024,
        1024,
        3,
    )
