"""Qwen-Image's autoencoder against diffusers, which runs it as the 3-D network that it is published as."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle_qwen_image as oracle
import pytest
import torch

from ses_jax.convert import files
from ses_jax.convert.qwen_vae import COMPONENT
from ses_jax.loading import network
from ses_jax.models import qwen_vae

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
SIZES = {
    "default": oracle.Sizes(),
    "three levels": oracle.Sizes(vae_width=12, vae_mult=(1, 3, 2), vae_blocks=1),
    "one block, faint": oracle.Sizes(vae_width=4, vae_mult=(1, 2), vae_blocks=1, gain=0.03),
}
GRID = (3, 5)
encode = jax.jit(qwen_vae.encode, static_argnums=1)
decode = jax.jit(qwen_vae.decode, static_argnums=1)


@pytest.fixture(scope="module", params=SIZES)
def networks(request, tmp_path_factory):
    reference = oracle.vae(SIZES[request.param], seed=3)
    folder = tmp_path_factory.mktemp("vae")
    reference.save_pretrained(folder)
    return reference, network.load(folder, COMPONENT), folder


def test_decode_equals_the_video_decoder_on_one_frame(networks):
    reference, ours, _ = networks
    latents = np.random.default_rng(1).standard_normal((2, 16, *GRID), np.float32)
    with torch.no_grad():
        frame = torch.from_numpy(latents)[:, :, None]
        clipped = reference.decode(frame).sample[:, :, 0].permute(0, 2, 3, 1).numpy()
        reference.clear_cache()
        x = reference.post_quant_conv(frame)
        video = reference.decoder(x, feat_cache=reference._feat_map, feat_idx=reference._conv_idx)
        expected = video[:, :, 0].permute(0, 2, 3, 1).numpy()
    images = decode(ours.params, ours.config, latents)
    assert images.shape == (2, GRID[0] * ours.config.downscale, GRID[1] * ours.config.downscale, 3)
    scale = min(1.0, expected.std())
    np.testing.assert_allclose(images / scale, expected / scale, **TOLERANCE)
    np.testing.assert_allclose(np.clip(images, -1, 1), clipped, **TOLERANCE)


def test_encode_equals_the_video_encoder_on_one_frame(networks):
    reference, ours, _ = networks
    height, width = (ours.config.downscale * side for side in GRID)
    images = np.random.default_rng(2).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    with torch.no_grad():
        expected = reference.encode(torch.from_numpy(images.transpose(0, 3, 1, 2))[:, :, None]).latent_dist
    mean, log_variance = encode(ours.params, ours.config, images)
    scale = min(1.0, expected.mean.std().item())
    np.testing.assert_allclose(mean / scale, expected.mean[:, :, 0].numpy() / scale, **TOLERANCE)
    np.testing.assert_allclose(log_variance / scale, expected.logvar[:, :, 0].numpy() / scale, **TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_keeps_every_tap_and_what_is_between_the_frames(networks, tmp_path, dtype):
    """Published -> converted -> published, bit for bit, the taps that an image never meets among them."""
    _, _, folder = networks

    def tensors(path):
        weights = files.open_weights(path, COMPONENT.stem)
        return {name: np.asarray(weights.read(name)) for name in weights.headers}

    published = {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in tensors(folder).items()}
    (tmp_path / "published").mkdir()
    files.write_json(tmp_path / "published" / "config.json", files.read_json(folder / "config.json"))
    files.write_weights(tmp_path / "published", COMPONENT.stem, published.items())
    network.save_converted(tmp_path / "converted", network.load(tmp_path / "published", COMPONENT))
    network.save_published(tmp_path / "back", COMPONENT, network.load(tmp_path / "converted", COMPONENT))
    back = tensors(tmp_path / "back")
    assert back.keys() == published.keys()
    for name, tensor in published.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert back[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("loudness", [1.0, 1e-11, 1e-13, 0.0])
def test_channel_norm_has_a_lower_bound_for_its_divisor(loudness):
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageRMS_norm

    x = np.float32(loudness) * np.random.default_rng(0).standard_normal((2, 3, 4, 6), np.float32)
    reference = QwenImageRMS_norm(6)
    with torch.no_grad():
        reference.gamma.copy_(torch.arange(6.0).reshape(6, 1, 1) - 2)
        expected = reference(torch.from_numpy(x.transpose(0, 3, 1, 2))).permute(0, 2, 3, 1).numpy()
    scale = {"params": {"scale": jnp.arange(6.0) - 2}}
    np.testing.assert_allclose(qwen_vae.ChannelNorm().apply(scale, x), expected, rtol=1e-5, atol=1e-7)


def test_bfloat16_stays_close(networks):
    _, ours, _ = networks
    latents = np.random.default_rng(4).standard_normal((1, 16, 4, 4), np.float32)
    half = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), ours.params)
    exact, rounded = (np.asarray(decode(p, ours.config, latents), np.float32) for p in (ours.params, half))
    assert np.linalg.norm(rounded - exact) < 0.05 * np.linalg.norm(exact)


def test_config_reads_the_published_fields():
    reference = oracle.vae()
    config = qwen_vae.Config.from_json(dict(reference.config))
    assert config == qwen_vae.Config(base_dim=8)
    assert qwen_vae.Config.from_json({"base_dim": 8}) == config
    assert config.downscale == 8


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"attn_scales": [1.0]}, r"attn_scales=\[1.0\]"), ({"z_dim": 4}, r"latents_std of z_dim=4"),
     ({"latents_std": [1.0]}, r"latents_mean and latents_std of z_dim=16")],
)  # fmt: skip
def test_unsupported_options_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        qwen_vae.Config.from_json(change)
