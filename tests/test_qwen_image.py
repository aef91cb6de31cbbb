"""Qwen-Image's transformer against diffusers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle_qwen_image as oracle
import pytest
import torch
from parity import assert_close_in_float16, in_float16

from ses_jax.convert.qwen_image import COMPONENT
from ses_jax.loading import network
from ses_jax.models import qwen_image

TOLERANCE = {"atol": 5e-5, "rtol": 5e-5}
SIZES = {
    "default": oracle.Sizes(),
    "wide": oracle.Sizes(layers=1, heads=3, axes_dims=(8, 12, 12), text_width=48),
    "deep": oracle.Sizes(layers=5, heads=2, axes_dims=(2, 4, 6), text_width=16),
    "faint": oracle.Sizes(gain=0.05, layers=1),
    "faint matrices": oracle.Sizes(matrix_gain=0.02, layers=1),
}
# Latent height and width, prompt lengths, sigmas: square and not, odd grids, one prompt and ragged batches.
RAGGED = ((10, 6), (9, 1, 5), (1.0, 0.02, 0.5037))
CASES = {
    "square": ("default", ((16, 16), (64, 64), (0.9, 0.3))),
    "one": ("default", ((4, 22), (50,), (0.77,))),
    "ragged": ("default", RAGGED),
    **{name: (name, RAGGED) for name in SIZES if name != "default"},
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """By name: the reference, and ours loaded from what the reference saved."""

    @functools.cache
    def build(name):
        reference = oracle.transformer(SIZES[name], seed=len(name))
        folder = tmp_path_factory.mktemp("transformer")
        reference.save_pretrained(folder)
        loaded = network.load(folder, COMPONENT)
        return reference, loaded.config, loaded.params

    return build


def draw(config, size, lengths, seed=0):
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((len(lengths), config.out_channels, *size), np.float32)
    features = [rng.standard_normal((length, config.joint_attention_dim), np.float32) for length in lengths]
    return latents, features


def pad(features, length, fill=0.0):
    padded = np.full((len(features), length, features[0].shape[1]), fill, np.float32)
    for row, feature in zip(padded, features, strict=True):
        row[: len(feature)] = feature
    return padded


def reference_velocity(reference, latents, sigmas, features):
    """As the reference's pipeline calls it, which packs latents and masks only ragged batches."""
    batch, channels, height, width = latents.shape
    longest = max(map(len, features))
    mask = np.arange(longest) < np.array([len(feature) for feature in features])[:, None]
    latents, text = (torch.from_numpy(x).to(reference.dtype) for x in (latents, pad(features, longest)))
    pipeline = oracle.QwenImagePipeline
    with torch.no_grad():
        out = reference(
            hidden_states=pipeline._pack_latents(latents, batch, channels, height, width),
            encoder_hidden_states=text,
            encoder_hidden_states_mask=None if mask.all() else torch.from_numpy(mask),
            timestep=torch.tensor(sigmas).to(text.dtype),
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
    return pipeline._unpack_latents(out, 8 * height, 8 * width, 8)[:, :, 0].numpy()


def our_velocity(params, config, latents, sigmas, features, *, extra=0, fill=0.0):
    lengths = np.array([len(feature) for feature in features], np.int32)
    text = qwen_image.Text(pad(features, lengths.max() + extra, fill), lengths)
    return np.asarray(run(params, config, latents, sigmas, jax.tree.map(jnp.asarray, text)))


run = jax.jit(qwen_image.velocity, static_argnums=1)


@pytest.mark.parametrize("case", CASES)
def test_velocity_equals_the_reference(networks, case):
    name, (size, lengths, sigmas) = CASES[case]
    reference, config, params = networks(name)
    latents, features = draw(config, size, lengths)
    sigmas = np.float32(sigmas)
    expected = reference_velocity(reference, latents, sigmas, features)
    ours = our_velocity(params, config, latents, sigmas, features)
    scale = min(1.0, expected.std())
    np.testing.assert_allclose(ours / scale, expected / scale, **TOLERANCE)


@pytest.fixture
def small(networks):
    return networks("deep")


def test_longer_buckets_and_their_content_do_not_matter(small):
    _, config, params = small
    size, lengths, sigmas = RAGGED
    latents, features = draw(config, size, lengths)
    expected = our_velocity(params, config, latents, np.float32(sigmas), features)
    longer = our_velocity(params, config, latents, np.float32(sigmas), features, extra=20, fill=3.0)
    np.testing.assert_allclose(longer, expected, atol=2e-5)


def test_a_batch_equals_its_members(small):
    _, config, params = small
    size, lengths, sigmas = RAGGED
    latents, features = draw(config, size, lengths)
    sigmas = np.float32(sigmas)
    together = our_velocity(params, config, latents, sigmas, features)
    for i, length in enumerate(lengths):
        one = slice(i, i + 1)
        padding = max(lengths) - length
        alone = our_velocity(params, config, latents[one], sigmas[one], features[one], extra=padding)
        np.testing.assert_allclose(together[one], alone, atol=2e-5)


@pytest.mark.parametrize("loudness", [1.0, 0.001])  # faint features bring the epsilon of their norm to light
def test_loudness_of_the_text(small, loudness):
    reference, config, params = small
    latents, features = draw(config, RAGGED[0], (9,))
    features = [np.float32(loudness) * feature for feature in features]
    expected = reference_velocity(reference, latents, np.float32([0.5]), features)
    ours = our_velocity(params, config, latents, np.float32([0.5]), features)
    np.testing.assert_allclose(ours, expected, **TOLERANCE)


@pytest.mark.parametrize("grid", [(83, 83), (104, 58), (58, 104), (7, 4), (1, 1)])
def test_positions_equal_the_reference_at_published_sizes(grid):
    """Odd sides put the extra row before the centre; text starts where the longer half ends, on all axes."""
    config = qwen_image.Config()
    reference = oracle.transformer().pos_embed.__class__(10000, list(config.axes_dims_rope), scale_rope=True)
    image, text = reference([(1, *grid)], device=torch.device("cpu"), max_txt_seq_len=512)
    expected = torch.cat([image, text]).numpy()
    cos, sin = qwen_image.rope(config, grid, 512)
    np.testing.assert_allclose(cos[0], expected.real, atol=5e-6)
    np.testing.assert_allclose(sin[0], expected.imag, atol=5e-6)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"guidance_embeds": True}, "guidance_embeds=true"),
        ({"zero_cond_t": True}, "zero_cond_t=true"),
        ({"use_additional_t_cond": True}, "use_additional_t_cond=true"),
        ({"use_layer3d_rope": True}, "use_layer3d_rope=true"),
        ({"out_channels": None}, "in_channels=64 and out_channels=64"),
        ({"in_channels": 128}, "in_channels=128"),
        ({"axes_dims_rope": [16, 56, 48]}, "must sum to attention_head_dim=128"),
    ],
)
def test_unsupported_options_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        qwen_image.Config.from_json(change)


def test_bfloat16_stays_close(small):
    _, config, params = small
    size, lengths, sigmas = RAGGED
    latents, features = draw(config, size, lengths)
    sigmas = np.float32(sigmas)
    exact = our_velocity(params, config, latents, sigmas, features)
    half = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), params)
    rounded = our_velocity(half, config, latents, sigmas, features)
    assert rounded.dtype == np.float32
    assert np.linalg.norm(rounded - exact) < 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize("stream", ["img_mlp", "txt_mlp"])
def test_what_float16_cannot_hold_is_cut_off(tmp_path, stream):
    reference = oracle.transformer(oracle.Sizes(layers=2), seed=1)
    layer = getattr(reference.transformer_blocks[0], stream).net[2]
    reference, config, params = in_float16(reference, tmp_path, COMPONENT, layer)
    size, lengths, _ = RAGGED
    (latents, features), sigmas = draw(config, size, lengths), np.float32([1.0, 0.25, 0.5])
    ours = our_velocity(params, config, latents, sigmas, features)
    assert_close_in_float16(ours, reference_velocity(reference, latents, sigmas, features))
