"""FLUX.2's transformer against diffusers."""

import functools
import inspect

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import oracle_flux2
import pytest
import torch
from diffusers import Flux2Pipeline
from parity import assert_close_in_float16, in_float16

from ses_jax.convert.flux2 import COMPONENT
from ses_jax.loading import hub
from ses_jax.models import flux2

TOLERANCE = {"atol": 5e-5, "rtol": 5e-5}
SIZES = {
    "dev": oracle_flux2.Sizes(),
    "klein": oracle_flux2.Sizes(guidance_embeds=False, layers=1, single_layers=4, context=30, axes_dims=(6, 2, 4, 8)),
    "deep": oracle_flux2.Sizes(layers=3, single_layers=1, heads=3, mlp_ratio=2.5, axes_dims=(2, 6, 6, 2)),
    "faint": oracle_flux2.Sizes(layers=1, single_layers=1, gain=0.05),
    "faint matrices": oracle_flux2.Sizes(layers=1, single_layers=1, matrix_gain=0.02),
    "faint queries": oracle_flux2.Sizes(layers=1, single_layers=1, query_gain=1e-3),
}
# Latent height and width, text length, sigmas.
CASES = {
    "square": ("dev", ((4, 4), 24, (0.9, 0.3))),
    "tall": ("dev", ((7, 2), 40, (1.0, 0.5, 0.0))),
    "klein": ("klein", ((3, 5), 16, (0.77,))),
    "deep": ("deep", ((2, 6), 9, (0.6, 0.2))),
    "faint": ("faint", ((3, 4), 8, (0.8, 0.1))),
    "faint matrices": ("faint matrices", ((3, 4), 8, (0.8, 0.1))),
    "faint queries": ("faint queries", ((3, 4), 8, (0.8, 0.1))),
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """By name: the reference, and ours loaded from what the reference saved."""

    @functools.cache
    def build(name):
        reference = oracle_flux2.transformer(SIZES[name], seed=len(name))
        folder = tmp_path_factory.mktemp("transformer")
        reference.save_pretrained(folder)
        return reference, *hub.load_component(folder, COMPONENT, dtype=jnp.float32)

    return build


def draw(config, grid, length, sigmas, seed=0):
    rng = np.random.default_rng(seed)
    count = len(sigmas)
    latents = rng.standard_normal((count, config.in_channels, *grid), np.float32)
    text = rng.standard_normal((count, length, config.joint_attention_dim), np.float32)
    guidance = rng.uniform(1, 6, count).astype(np.float32) if config.guidance_embeds else None
    return latents, np.float32(sigmas), text, guidance


def reference_velocity(reference, latents, sigma, text, guidance):
    latents, text, sigma = (torch.from_numpy(x).to(reference.dtype) for x in (latents, text, sigma))
    with torch.no_grad():
        out = reference(
            hidden_states=Flux2Pipeline._pack_latents(latents),
            encoder_hidden_states=text,
            timestep=sigma,
            guidance=None if guidance is None else torch.from_numpy(guidance),
            img_ids=Flux2Pipeline._prepare_latent_ids(latents),
            txt_ids=Flux2Pipeline._prepare_text_ids(text),
            return_dict=False,
        )[0]
    return out.transpose(1, 2).reshape(latents.shape).numpy()


@functools.partial(jax.jit, static_argnums=1)
def run(params, config, latents, sigma, text, guidance):
    return flux2.velocity(params, config, latents, sigma, text, guidance)


@pytest.mark.parametrize("case", CASES)
def test_velocity_equals_the_reference(networks, case):
    name, shapes = CASES[case]
    reference, config, params = networks(name)
    inputs = draw(config, *shapes)
    expected = reference_velocity(reference, *inputs)
    scale = min(1.0, expected.std())
    np.testing.assert_allclose(run(params, config, *inputs) / scale, expected / scale, **TOLERANCE)


def test_a_batch_equals_its_members(networks):
    _, config, params = networks("deep")
    inputs = draw(config, *CASES["deep"][1])
    together = run(params, config, *inputs)
    for i in (0, 1):
        alone = run(params, config, *(x[i : i + 1] for x in inputs))
        np.testing.assert_allclose(together[i : i + 1], alone, atol=2e-5)


def test_every_input_counts(networks):
    _, config, params = networks("dev")
    inputs = draw(config, (4, 4), 24, (0.9, 0.3))
    out = run(params, config, *inputs)
    for i in range(4):
        changed = list(inputs)
        changed[i] = inputs[i] * np.float32(0.9)
        assert np.abs(run(params, config, *changed) - out).max() > 1e-3


def test_positions_are_the_references():
    latents, text = torch.zeros(1, 128, 3, 5), torch.zeros(1, 7, 4)
    ids = [Flux2Pipeline._prepare_latent_ids(latents), Flux2Pipeline._prepare_text_ids(text)]
    np.testing.assert_array_equal(flux2.positions((3, 5), 7), torch.cat(ids, dim=1)[0].numpy())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"patch_size": 2}, "patch_size=2"),
        ({"eps": 1e-5}, "eps=1e-05"),
        ({"timestep_guidance_channels": 128}, "timestep_guidance_channels=128"),
        ({"out_channels": 64}, "out_channels"),
        ({"axes_dims_rope": [16, 16, 16, 16]}, "must sum to attention_head_dim=128"),
    ],
)
def test_unsupported_options_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        flux2.Config.from_json(change)


def test_defaults_are_those_of_dev():
    arguments = inspect.signature(oracle_flux2.Flux2Transformer2DModel.__init__).parameters.values()
    published = {a.name: a.default for a in arguments if a.default is not inspect.Parameter.empty}
    assert published["num_single_layers"] == 48
    assert flux2.Config.from_json(published) == flux2.Config()


def test_bfloat16_stays_close(networks):
    _, config, params = networks("deep")
    inputs = draw(config, *CASES["deep"][1])
    half = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), params)
    exact, rounded = run(params, config, *inputs), run(half, config, *inputs)
    assert rounded.dtype == jnp.float32
    assert np.linalg.norm(rounded - exact) < 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize("stream", ["text", "joint"])
def test_what_float16_cannot_hold_is_cut_off(tmp_path, stream):
    reference = oracle_flux2.transformer(oracle_flux2.Sizes(layers=1, single_layers=1), seed=1)
    text = reference.transformer_blocks[0].ff_context.linear_out
    layer = {"text": text, "joint": reference.single_transformer_blocks[0].attn.to_out}[stream]
    reference, config, params = in_float16(reference, tmp_path, COMPONENT, layer)
    *inputs, guidance = draw(config, (3, 4), 8, (0.75, 0.25))
    inputs.append(guidance.round())  # times a thousand it is not rounded
    assert_close_in_float16(run(params, config, *inputs), reference_velocity(reference, *inputs))


def test_a_megapixel_in_bfloat16_multiplies_bfloat16_only():
    """Nothing in the blocks silently promotes: traced at the size of dev, all products take bfloat16."""
    config = flux2.Config()
    params = jax.eval_shape(lambda: flux2.init(None, config))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 32_223_281_152
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 128, 64, 64), (2,), (2, 512, 15360), (2,))]
    inputs[2] = jax.ShapeDtypeStruct(inputs[2].shape, jnp.bfloat16)
    traced = jax.make_jaxpr(lambda p, *rest: flux2.velocity(p, config, *rest))(half, *inputs)
    assert [(out.shape, out.dtype) for out in traced.out_avals] == [((2, 128, 64, 64), jnp.float32)]
    products = jaxprs.products(traced.jaxpr)
    assert len(products) > 20
    for equation in products:
        assert all(operand.aval.dtype == jnp.bfloat16 for operand in equation.invars), equation
