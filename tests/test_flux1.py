"""FLUX.1's transformer against diffusers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle_flux1
import pytest
import torch
from diffusers import FluxPipeline
from oracle_flux1 import Flux1Sizes
from parity import assert_close_in_float16, in_float16

from ses_jax.convert.flux1 import COMPONENT
from ses_jax.loading import hub
from ses_jax.models import flux1

TOLERANCE = {"atol": 5e-5, "rtol": 5e-5}
SIZES = {
    "dev": Flux1Sizes(),
    "schnell": Flux1Sizes(guidance_embeds=False, layers=1, single_layers=3),
    "wide": Flux1Sizes(heads=3, head_dim=24, axes_dims=(8, 8, 8), layers=1, single_layers=1, t5_width=20),
    "deep": Flux1Sizes(heads=2, head_dim=8, axes_dims=(2, 2, 4), layers=4, single_layers=5, clip_width=16),
    "faint": Flux1Sizes(gain=0.05, layers=1, single_layers=1),
    "faint matrices": Flux1Sizes(matrix_gain=0.02, layers=1, single_layers=1),
}
# Latent height and width, text tokens, sigmas.
SQUARE = ((16, 16), 40, (0.9, 0.3))
WIDE = ((4, 22), 7, (1.0, 0.0, 0.5))
TALL = ((14, 6), 1, (0.77,))
CASES = {
    **{f"dev, {name}": ("dev", case) for name, case in {"square": SQUARE, "wide": WIDE, "tall": TALL}.items()},
    "schnell, square": ("schnell", SQUARE),
    **{name: (name, WIDE) for name in SIZES if name not in ("dev", "schnell")},
}
run = jax.jit(flux1.velocity, static_argnums=1)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """By name: the reference, and ours loaded from what the reference saved."""

    @functools.cache
    def build(name):
        reference = oracle_flux1.flux1(SIZES[name], seed=len(name))
        folder = tmp_path_factory.mktemp("transformer")
        reference.save_pretrained(folder)
        return reference, *hub.load_component(folder, COMPONENT, dtype=jnp.float32)

    return build


def draw(config, size, length, batch, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (config.latent_channels, *size), (length, config.joint_attention_dim), (config.pooled_projection_dim,)
    latents, features, pooled = (rng.standard_normal((batch, *shape)).astype(np.float32) for shape in shapes)
    return latents, flux1.Prompt(features, pooled), np.linspace(1.0, 3.5, batch).astype(np.float32)


def reference_velocity(reference, latents, sigmas, prompt, guidance):
    """The reference packs and numbers tokens in its pipeline."""
    batch, channels, height, width = latents.shape
    ids = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32)
    latents, features, pooled, times = (
        torch.from_numpy(x).to(reference.dtype) for x in (latents, prompt.features, prompt.pooled, sigmas)
    )
    with torch.no_grad():
        out = reference(
            hidden_states=FluxPipeline._pack_latents(latents, batch, channels, height, width),
            encoder_hidden_states=features,
            pooled_projections=pooled,
            timestep=times,
            guidance=torch.from_numpy(guidance) if reference.config.guidance_embeds else None,
            img_ids=ids,
            txt_ids=torch.zeros(prompt.features.shape[1], 3),
            return_dict=False,
        )[0]
    return FluxPipeline._unpack_latents(out, height * 8, width * 8, 8).numpy()


@pytest.mark.parametrize("case", CASES)
def test_velocity_equals_the_reference(networks, case):
    name, (size, length, sigmas) = CASES[case]
    reference, config, params = networks(name)
    latents, prompt, guidance = draw(config, size, length, len(sigmas))
    expected = reference_velocity(reference, latents, np.float32(sigmas), prompt, guidance)
    scale = min(1.0, expected.std())
    ours = run(params, config, latents, np.float32(sigmas), prompt, guidance)
    np.testing.assert_allclose(ours / scale, expected / scale, **TOLERANCE)


@pytest.fixture
def small(networks):
    return networks("deep")


def test_a_batch_equals_its_members(small):
    _, config, params = small
    size, length, sigmas = WIDE
    latents, prompt, guidance = draw(config, size, length, 3)
    sigmas = np.float32(sigmas)
    together = run(params, config, latents, sigmas, prompt, guidance)
    for i in range(3):
        alone = jax.tree.map(lambda x: x[i : i + 1], (latents, sigmas, prompt, guidance))  # noqa: B023 (used at once)
        np.testing.assert_allclose(run(params, config, *alone)[0], together[i], atol=2e-5)


def test_guidance_matters_only_where_it_is_embedded(networks):
    size, length, sigmas = SQUARE
    for name, matters in {"dev": True, "schnell": False}.items():
        _, config, params = networks(name)
        latents, prompt, guidance = draw(config, size, length, len(sigmas))
        low, high = (run(params, config, latents, np.float32(sigmas), prompt, guidance + more) for more in (0, 2))
        difference = high - low
        assert (np.abs(difference).max() > 1e-3) == matters


def test_bfloat16_stays_close(small):
    _, config, params = small
    size, length, sigmas = WIDE
    latents, prompt, guidance = draw(config, size, length, len(sigmas))
    arguments = (latents, np.float32(sigmas), prompt, guidance)
    exact = run(params, config, *arguments)
    rounded = run(jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), params), config, *arguments)
    assert rounded.dtype == np.float32
    assert np.linalg.norm(rounded - exact) < 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize("stream", ["text", "joint"])
def test_what_float16_cannot_hold_is_cut_off(tmp_path, stream):
    reference = oracle_flux1.flux1(Flux1Sizes(layers=1, single_layers=1), seed=1)
    text, joint = reference.transformer_blocks[0].ff_context.net[2], reference.single_transformer_blocks[0].proj_out
    sides = in_float16(reference, tmp_path, COMPONENT, {"text": text, "joint": joint}[stream])
    reference, config, params = sides
    (latents, prompt, guidance), sigmas = draw(config, (4, 6), 9, 2), np.float32([0.75, 0.25])
    ours = run(params, config, latents, sigmas, prompt, guidance)
    assert_close_in_float16(ours, reference_velocity(reference, latents, sigmas, prompt, guidance))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"patch_size": 2}, "patch_size=2"),
        ({"in_channels": 128, "out_channels": 64}, "out_channels"),
        ({"in_channels": 6}, "in_channels=6"),
        ({"attention_head_dim": 64}, r"axes_dims_rope=\(16, 56, 56\) must sum to attention_head_dim=64"),
    ],
)
def test_unsupported_options_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        flux1.Config.from_json(change)
