"""FLUX.2 from prompt to image against diffusers, on tiny random checkpoints in the published layout."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle_flux2
import pytest
import torch
from adapted import assert_an_adapter_in_eight_bits
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, retrieve_timesteps
from parity import (
    assert_a_search_previews_what_is_generated,
    assert_an_export_gives_the_same_image,
    assert_bfloat16_stays_close,
    assert_rows_are_alone,
    assert_same_images,
    draw,
    pair,
)

import ses_jax
from ses_jax.loading import partition
from ses_jax.loading.tokenizers import load_tokenizer
from ses_jax.models import autoencoder_kl_bn
from ses_jax.pipelines import flux2
from ses_jax.pipelines import registry as pipelines
from ses_jax.searchers import wavelet

TAPS = (1, 2, 3)  # of 4 layers
LONG = "a very detailed painting of " + "many " * 300
KLEIN_SIZES = oracle_flux2.Sizes(
    guidance_embeds=False,
    layers=1,
    single_layers=3,
    axes_dims=(2, 4, 4, 6),
    context=3 * 24,
    text_width=24,
    text_layers=5,
    vae_widths=(4, 8, 12, 16),
    vae_layers=1,
    vae_groups=2,
)
# What is not about the autoencoder has one of two of its four levels, and images of a quarter of the side.
DEV_SIZES = oracle_flux2.Sizes(vae_layers=1, vae_widths=(8, 16))
BASE_SIZES = dataclasses.replace(KLEIN_SIZES, vae_widths=(4, 8))
REFERENCES = {
    "dev": lambda: oracle_flux2.dev_pipeline(DEV_SIZES, seed=1),
    "dev, four levels": lambda: oracle_flux2.dev_pipeline(oracle_flux2.Sizes(vae_layers=1), seed=1),
    "klein": lambda: oracle_flux2.klein_pipeline(KLEIN_SIZES, seed=2),
    "klein base": lambda: oracle_flux2.klein_pipeline(BASE_SIZES, seed=3, distilled=False),
}
SIZE = (16, 8)  # of their images; all tests have the same, and so the same programs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """By kind: the oracle and our pipeline, from the same folder."""

    @functools.cache
    def build(kind):
        return pair(REFERENCES[kind](), tmp_path_factory.mktemp("flux2"))

    return build


def arguments(reference, noise, guidance, negatives):
    """The reference's own arguments; it takes negative prompts only encoded."""
    own = {"guidance_scale": guidance, "latents": noise, "text_encoder_out_layers": TAPS}
    if negatives:
        own["negative_prompt_embeds"] = reference.encode_prompt(negatives, text_encoder_out_layers=TAPS)[0]
    return own


PROMPTS = ["a cat", "", "\u732b \U0001f431 caf\u00e9", LONG, "a [IMG]cat[IMG]"]


@pytest.mark.parametrize("kind", ["dev", "klein base"])
def test_a_batch_of_all_sorts_of_prompts(pairs, kind):
    """Not square; short, empty, unicode, too long, with the token of an image."""
    assert_same_images(pairs(kind), PROMPTS, arguments, size=SIZE)


@pytest.mark.parametrize(
    ("kind", "guidance", "negative"),
    [("dev", 1.0, None), ("dev", 7.5, None), ("klein base", 1.0, None), ("klein base", 2.5, "ugly, blurry")],
)
def test_guidance(pairs, kind, guidance, negative):
    assert_same_images(pairs(kind), ["a cat"], arguments, size=SIZE, guidance=guidance, negative=negative)


@pytest.mark.quick
def test_klein(pairs):
    assert_same_images(pairs("klein"), ["a cat"], arguments, size=(64, 32), steps=7)


@pytest.mark.parametrize(("kind", "steps"), [("dev, four levels", 2), ("klein", 7)])
def test_an_exported_noise_gives_the_same_image_in_diffusers(pairs, tmp_path, kind, steps):
    """Exports are for the published autoencoder alone."""
    assert_an_export_gives_the_same_image(
        pairs(kind), tmp_path, size=(64, 32), steps=steps, text_encoder_out_layers=TAPS
    )


def test_a_batch_of_ragged_prompts_equals_single_runs(pairs):
    for kind in ("dev", "klein base"):
        assert_rows_are_alone(pairs(kind)[1], PROMPTS, (0, 3), size=SIZE)


@pytest.mark.parametrize("template", ["file", "literal"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_of_dev(pairs, template, side):
    """The ids that the reference's text encoder gets; padding follows the tokenizer, as there."""
    reference, _ = pairs("dev")
    tokenizer = oracle_flux2.mistral_tokenizer()
    tokenizer.padding_side = side
    seen = []
    encoder = lambda **inputs: seen.append(inputs) or reference.text_encoder(**inputs)  # noqa: E731
    prompts = ["a [IMG] cat", LONG, "<s>\n x"]
    reference._get_mistral_3_small_prompt_embeds(
        encoder, tokenizer, prompts, torch.float32, torch.device("cpu"), hidden_states_layers=TAPS
    )
    if template == "literal":
        tokenizer.chat_template = None
    tokens = flux2.tokenize(flux2.DEV, tokenizer, prompts, guidance=4.0)
    np.testing.assert_array_equal(tokens.positive.ids, seen[0]["input_ids"])
    np.testing.assert_array_equal(tokens.positive.mask, seen[0]["attention_mask"])
    assert tokens.positive.ids.shape == (3, 512)
    assert tokens.positive.mask[0, 0] == (side == "right")


@pytest.mark.parametrize("processor", ["LlamaTokenizerFast", "TokenizersBackend"])
def test_a_processors_folder_gives_its_tokenizer(tmp_path, processor):
    oracle_flux2.mistral_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"processor_class": "PixtralProcessor", "tokenizer_class": processor}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "PixtralProcessor"}))
    loaded = load_tokenizer(tmp_path)
    expected = flux2.tokenize(flux2.DEV, oracle_flux2.mistral_tokenizer(), ["a cat\n\n 7"], guidance=4.0)
    tokens = flux2.tokenize(flux2.DEV, loaded, ["a cat\n\n 7"], guidance=4.0)
    np.testing.assert_array_equal(tokens.positive.ids, expected.positive.ids)
    np.testing.assert_array_equal(tokens.positive.mask, expected.positive.mask)


def sigmas(scheduler, *sizes):
    published = flux2.PUBLISHED[0]
    return flux2.assemble(
        pipelines.Parts(Path("folder"), published.configs, {}, {}, scheduler, published.index)
    ).sigmas(*sizes)


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
@pytest.mark.parametrize("size", [(64, 64), (512, 768), (1024, 1024), (1040, 1056), (1056, 1056), (2048, 1536)])
def test_sigmas_equal_the_references(size, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(**oracle_flux2.SCHEDULER)
    tokens = size[0] // 16 * (size[1] // 16)
    mu = compute_empirical_mu(tokens, steps)
    assert flux2.empirical_mu(tokens, steps) == pytest.approx(mu, rel=1e-12)
    retrieve_timesteps(scheduler, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    ours = sigmas(oracle_flux2.SCHEDULER, steps, *size)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), atol=2e-7)
    assert ours.dtype == np.float32


def test_the_schedule_falls_off_a_cliff_above_4300_tokens():
    below, above = (sigmas(oracle_flux2.SCHEDULER, 4, 16, 16 * tokens) for tokens in (4300, 4301))
    assert below[1] - above[1] > 0.05
    assert flux2.empirical_mu(4300, 200) == pytest.approx(flux2.empirical_mu(4301, 200), abs=1e-3)


def test_a_static_schedule_and_an_unknown_one():
    static = FlowMatchEulerDiscreteScheduler(shift=3.0)
    static.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4))
    np.testing.assert_allclose(sigmas(dict(static.config), 4, 64, 64), static.sigmas.numpy(), atol=2e-7)
    with pytest.raises(ValueError, match="schedules with time_shift_type are not supported"):
        sigmas(oracle_flux2.SCHEDULER | {"time_shift_type": "linear"}, 4, 64, 64)


@pytest.mark.parametrize("kind", ["dev", "klein base"])
def test_both_bands_make_the_same_image_of_the_same_numbers(pairs, kind):
    _, packed = pairs(kind)
    unpacked = ses_jax.load_pipeline(str(packed.folder), band="unpacked")
    assert unpacked.noise_shape(*SIZE) == (32, 8, 4)
    assert (packed.defaults.level, unpacked.defaults.level) == (4, 5)
    noise = draw(packed, 1, SIZE)
    settings = {"steps": 2, "height": SIZE[0], "width": SIZE[1]}
    expected = ses_jax.generate(packed, "a cat", noise=noise, **settings)
    rearranged = np.asarray(autoencoder_kl_bn.unpack(jnp.asarray(noise), (2, 2)))
    np.testing.assert_allclose(ses_jax.generate(unpacked, "a cat", noise=rearranged, **settings), expected, atol=2e-6)
    assert (
        np.abs(ses_jax.generate(unpacked, "a cat", noise=noise.reshape(rearranged.shape), **settings) - expected).max()
        > 0.01
    )


@pytest.mark.parametrize(("band", "dimension"), [("packed", 2048), ("unpacked", 512)])
def test_dimension_of_the_search_at_a_megapixel(band, dimension):
    pipeline = pipelines.abstract_pipeline("black-forest-labs/FLUX.2-dev", band=band)
    noise = jax.ShapeDtypeStruct(pipeline.noise_shape(1024, 1024), jnp.float32)
    low, _ = jax.eval_shape(lambda x: wavelet.split(x, level=pipeline.defaults.level), noise)
    assert low.size == dimension


def test_defaults_of_the_kinds(pairs):
    facts = {kind: pairs(kind)[1].defaults for kind in ("dev", "klein", "klein base")}
    assert {kind: (d.steps, d.preview_steps, d.guidance) for kind, d in facts.items()} == {
        "dev": (50, 10, 4.0),
        "klein": (4, 4, 1.0),
        "klein base": (50, 10, 4.0),
    }
    assert pairs("dev")[1].family == "Flux2Pipeline"
    _, pipeline = pairs("klein")
    assert (pipeline.family, pipeline.size_multiple) == ("Flux2KleinPipeline", 16)
    assert pipeline.noise_shape(1024, 512) == (128, 64, 32)


@pytest.mark.parametrize(
    ("kind", "guidance", "negative", "complaint"),
    [
        ("dev", 4.0, "ugly", "FLUX.2-dev has no negative prompt"),
        ("klein", 1.0, "ugly", "FLUX.2-klein has no negative prompt"),
        ("klein", 4.0, None, "FLUX.2-klein has no guidance"),
        ("klein base", 1.0, "ugly", "no effect without guidance"),
        (
            "klein base",
            {"rescale": 1.0},
            None,
            r"unknown guidance options \['rescale'\]; FLUX.2-klein-base takes scale",
        ),
    ],
)
def test_what_has_no_effect_is_refused(pairs, kind, guidance, negative, complaint):
    with pytest.raises(ValueError, match=complaint):
        pairs(kind)[1].tokenize(["a"], guidance=guidance, negative_prompt=negative)


def test_parts_that_do_not_fit_are_refused(pairs):
    _, pipeline = pairs("klein")
    with pytest.raises(ValueError, match=r"band must be one of packed, unpacked, not 'low'"):
        ses_jax.load_pipeline(str(pipeline.folder), band="low")
    published = flux2.PUBLISHED[1]
    for name, change, complaint in (
        ("transformer", {"joint_attention_dim": 12288}, "features of width 7680, the transformer takes 12288"),
        ("transformer", {"in_channels": 64}, "has 128 channels, the transformer 64"),
        ("transformer", {"guidance_embeds": True}, "FLUX.2-klein with guidance_embeds=True"),
    ):
        configs = published.configs | {name: dataclasses.replace(published.configs[name], **change)}
        with pytest.raises(ValueError, match=complaint):
            flux2.assemble(pipelines.Parts(pipeline.folder, configs, {}, {}, published.scheduler, published.index))


@pytest.mark.parametrize("kind", ["dev", "klein base"])
def test_params_are_used_where_they_are_said_to_be(pairs, kind):
    _, pipeline = pairs(kind)
    tokens = pipeline.tokenize(["a cat"], guidance=4.0)
    text, image = pipeline.text_params(pipeline.params), pipeline.image_params(pipeline.params)
    assert (set(text), set(image)) == ({"text_encoder"}, {"transformer", "vae"})
    condition = jax.eval_shape(pipeline.encode, text, tokens)
    latents = jax.ShapeDtypeStruct((1, *pipeline.noise_shape(32, 32)), jnp.float32)
    velocity = jax.eval_shape(pipeline.velocity, image, latents, jax.ShapeDtypeStruct((1,), jnp.float32), condition)
    assert velocity == latents
    assert jax.eval_shape(pipeline.decode, image, latents).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("published", flux2.PUBLISHED, ids=lambda published: published.source)
def test_published_sizes_trace_at_a_megapixel(published):
    pipeline = pipelines.abstract_pipeline(published.source)
    tokens = pipeline.blank_tokens(2, 40, guidance=pipeline.defaults.guidance)
    assert tokens.positive.mask.sum(axis=1).tolist() == [40, 40]
    condition = jax.eval_shape(pipeline.encode, pipeline.text_params(pipeline.params), tokens)
    assert condition.positive.shape == (2, 512, published.configs["transformer"].joint_attention_dim)
    assert (condition.negative is not None) == ("base" in published.source)
    image = pipeline.image_params(pipeline.params)
    latents = jax.ShapeDtypeStruct((2, 128, 64, 64), jnp.float32)
    sigma = jax.ShapeDtypeStruct((2,), jnp.float32)
    assert jax.eval_shape(pipeline.velocity, image, latents, sigma, condition) == latents
    images = jax.eval_shape(pipeline.decode, image, latents)
    assert (images.shape, images.dtype) == ((2, 1024, 1024, 3), jnp.float32)
    assert len(pipeline.sigmas(pipeline.defaults.steps, 1024, 1024)) == pipeline.defaults.steps + 1


def test_bfloat16_weights_run_and_stay_close(pairs):
    assert_bfloat16_stays_close(pairs("dev")[1], SIZE, timestep_rounding="reference")


def test_an_adapter_in_eight_bits(pairs, tmp_path):
    assert_an_adapter_in_eight_bits(pairs("klein base")[1].folder, tmp_path)


def test_a_search_runs_and_its_preview_is_the_generated_one(pairs):
    pipeline = ses_jax.load_pipeline(str(pairs("klein base")[1].folder), band="unpacked")
    assert_a_search_previews_what_is_generated(pipeline, size=(8, 16), level=1, guidance=2.0, negative_prompt="ugly")


def test_a_mesh_changes_no_image_and_only_sums(pairs):
    """Heads and feed-forwards in two halves: their outputs are added up, and no tokens change places."""
    _, alone = pairs("dev")
    mesh = partition.parse_mesh("data=2,model=2", jax.devices()[:4])
    meshed = ses_jax.load_pipeline(str(alone.folder), mesh=mesh)
    noise = draw(alone, len(PROMPTS), SIZE)
    settings = {"noise": noise, "steps": 2, "height": SIZE[0], "width": SIZE[1]}
    expected, images = (np.asarray(ses_jax.generate(p, PROMPTS, **settings)) for p in (alone, meshed))
    np.testing.assert_allclose(images, expected, atol=2e-5)
    condition = jax.eval_shape(meshed.encode, meshed.params, meshed.tokenize(PROMPTS, guidance=4.0))
    inputs = jax.ShapeDtypeStruct(noise.shape, jnp.float32), jax.ShapeDtypeStruct(noise.shape[:1], jnp.float32)
    program = jax.jit(meshed.velocity).lower(meshed.params, *inputs, condition).compile().as_text()
    assert "all-reduce" in program
    assert not any(name in program for name in ("all-to-all", "all-gather", "collective-permute"))
