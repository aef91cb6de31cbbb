"""Z-Image's transformer against diffusers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch

from ses_jax.convert.z_image import COMPONENT
from ses_jax.loading import hub
from ses_jax.models import z_image

TOLERANCE = {"atol": 5e-5, "rtol": 5e-5}
SIZES = {
    "default": oracle.ZImageSizes(),
    "wide": oracle.ZImageSizes(dim=96, heads=4, axes_dims=(8, 8, 8), layers=1, refiner_layers=1, text_width=48),
    "deep": oracle.ZImageSizes(dim=24, heads=2, axes_dims=(4, 4, 4), layers=5, refiner_layers=3, text_width=16),
    "wider than its time embedding": oracle.ZImageSizes(dim=264, heads=11, axes_dims=(8, 8, 8), layers=1),
    "faint": oracle.ZImageSizes(gain=0.05, layers=1, refiner_layers=1),
    "faint matrices": oracle.ZImageSizes(matrix_gain=0.02, layers=1, refiner_layers=1),
}
# Latent height and width, caption lengths, sigmas: with and without image pads and caption pads; one and several.
NO_PADS = ((16, 16), (64, 32), (0.9, 0.3))  # 64 image tokens
PADS = ((12, 10), (7, 32, 33), (1.0, 0.0, 0.5))  # 30 image tokens and 2 pads; not square
ONE = ((4, 22), (50,), (0.77,))  # 22 image tokens and 10 pads
CASES = {
    "no pads": ("default", NO_PADS),
    "pads": ("default", PADS),
    "one": ("default", ONE),
    **{name: (name, PADS) for name in SIZES if name != "default"},
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """By name: the reference, and ours loaded from what the reference saved."""

    @functools.cache
    def build(name):
        reference = oracle.z_image(SIZES[name], seed=len(name))
        folder = tmp_path_factory.mktemp("transformer")
        reference.save_pretrained(folder)
        return reference, *hub.load_component(folder, COMPONENT, dtype=jnp.float32)

    return build


def draw(config, size, lengths, seed=0):
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((len(lengths), config.in_channels, *size), np.float32)
    features = [rng.standard_normal((length, config.cap_feat_dim), np.float32) for length in lengths]
    return latents, features


def reference_velocity(reference, latents, sigmas, features):
    with torch.no_grad():
        images = [torch.from_numpy(image)[:, None] for image in latents]
        captions = [torch.from_numpy(caption) for caption in features]
        outputs = reference(images, torch.tensor(1.0 - sigmas), captions, return_dict=False)[0]
    return -torch.stack(outputs)[:, :, 0].numpy()


def pad(features, length, fill=0.0):
    padded = np.full((len(features), length, features[0].shape[1]), fill, np.float32)
    for row, caption in zip(padded, features, strict=True):
        row[: len(caption)] = caption
    return padded


def our_velocity(params, config, latents, sigmas, features, *, extra=0, fill=0.0):
    lengths = np.array([len(caption) for caption in features], np.int32)
    padded = pad(features, -(-lengths.max() // 32) * 32 + extra, fill)

    return np.asarray(run(params, config, latents, sigmas, padded, lengths))


@functools.partial(jax.jit, static_argnums=1)
def run(params, config, latents, sigmas, features, lengths):
    return z_image.velocity(params, config, latents, sigmas, z_image.refine_caption(params, config, features, lengths))


@pytest.mark.parametrize("case", CASES)
def test_velocity_equals_the_reference(networks, case):
    name, (size, lengths, sigmas) = CASES[case]
    reference, config, params = networks(name)
    latents, features = draw(config, size, lengths)
    sigmas = np.float32(sigmas)
    expected = reference_velocity(reference, latents, sigmas, features)
    scale = min(1.0, expected.std())
    ours = our_velocity(params, config, latents, sigmas, features)
    np.testing.assert_allclose(ours / scale, expected / scale, **TOLERANCE)


@pytest.fixture
def small(networks):
    return networks("deep")


def test_longer_buckets_and_their_content_do_not_matter(small):
    _, config, params = small
    size, lengths, sigmas = PADS
    latents, features = draw(config, size, lengths)
    expected = our_velocity(params, config, latents, np.float32(sigmas), features)
    longer = our_velocity(params, config, latents, np.float32(sigmas), features, extra=64, fill=3.0)
    np.testing.assert_allclose(longer, expected, atol=2e-5)


def test_a_batch_equals_its_members(small):
    _, config, params = small
    size, lengths, sigmas = PADS
    latents, features = draw(config, size, lengths)
    sigmas = np.float32(sigmas)
    together = our_velocity(params, config, latents, sigmas, features)
    for i, length in enumerate(lengths):
        one = slice(i, i + 1)
        padding = 0 if length > 32 else 32  # to the bucket of the longest
        alone = our_velocity(params, config, latents[one], sigmas[one], features[one], extra=padding)
        np.testing.assert_allclose(together[one], alone, atol=2e-5)


refine = jax.jit(z_image.refine_caption, static_argnums=1)


@pytest.mark.parametrize("loudness", [1.0, 0.003])  # faint features bring the epsilon of their norm to light
def test_caption_refiner_equals_the_reference(small, loudness):
    """The reference refines inside its forward, so its own parts are called here one after the other."""
    reference, config, params = small
    _, features = draw(config, (4, 4), (9, 33))
    features = [np.float32(loudness) * feature for feature in features]
    caption = refine(params, config, pad(features, 64), np.int32([9, 33]))
    np.testing.assert_array_equal(caption.lengths, [32, 64])
    for i, feature in enumerate(features):
        padded = -(-len(feature) // 32) * 32
        with torch.no_grad():
            x = reference.cap_embedder(torch.from_numpy(pad([feature], padded)))
            x[0, len(feature) :] = reference.cap_pad_token
            positions = torch.zeros(padded, 3, dtype=torch.int32)
            positions[:, 0] = torch.arange(1, padded + 1)
            rotary = reference.rope_embedder(positions)[None]
            for layer in reference.context_refiner:
                x = layer(x, torch.ones(1, padded, dtype=torch.bool), rotary)
        np.testing.assert_allclose(caption.tokens[i, :padded], x[0].numpy(), **TOLERANCE)


def test_patchify_inverts():
    x = jnp.arange(2 * 3 * 8 * 4.0).reshape(2, 3, 8, 4)
    tokens = z_image.patchify(x, 2)
    assert tokens.shape == (2, 8, 12)
    np.testing.assert_array_equal(tokens[0, 1, :3], x[0, :, 0, 2])  # second patch of the first row; channel innermost
    np.testing.assert_array_equal(z_image.unpatchify(tokens, (4, 2), 2), x)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"siglip_feat_dim": 8}, "siglip_feat_dim"),
        ({"qk_norm": False}, "qk_norm=false"),
        ({"all_patch_size": [2, 4]}, "exactly one patch size"),
        ({"all_f_patch_size": [2]}, "all_f_patch_size"),
    ],
)
def test_unsupported_options_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        z_image.Config.from_json(change)


def test_bfloat16_stays_close(small):
    _, config, params = small
    size, lengths, sigmas = PADS
    latents, features = draw(config, size, lengths)
    sigmas = np.float32(sigmas)
    exact = our_velocity(params, config, latents, sigmas, features)
    half = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), params)
    rounded = our_velocity(half, config, latents, sigmas, features)
    assert rounded.dtype == np.float32
    assert np.linalg.norm(rounded - exact) < 0.05 * np.linalg.norm(exact)
