"""FLUX.1 from prompt to image against diffusers, on tiny random checkpoints in the published layout."""

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import oracle_flux1
import pytest
import toy
from oracle_flux1 import Flux1Sizes
from parity import (
    assert_an_export_gives_the_same_image,
    assert_bfloat16_stays_close,
    assert_rows_are_alone,
    assert_same_images,
    pair,
)

import ses_jax
from ses_jax.engine import generation
from ses_jax.loading import partition
from ses_jax.pipelines import base, flux1, schedule
from ses_jax.pipelines.registry import abstract_pipeline

LONG = "a very detailed painting of " + "many " * 300  # more than 77 and more than 512 tokens
SHORT = 70
SMALL = {"height": 12, "width": 20, "steps": 2}
VARIANTS = {
    # Two of the autoencoder's four levels, so images of a quarter of the side.
    "dev": Flux1Sizes(t5_layers=2, vae_layers=1, vae_widths=(8, 16)),
    "schnell": Flux1Sizes(
        guidance_embeds=False,
        heads=3,
        head_dim=12,
        axes_dims=(4, 4, 4),
        layers=1,
        single_layers=3,
        clip_width=16,
        clip_layers=3,
        t5_width=20,
        t5_layers=2,
        vae_widths=(4, 8, 12, 16),
        vae_layers=1,
        vae_groups=2,
    ),
}


def build(name, tmp_path_factory):
    return pair(oracle_flux1.flux1_pipeline(VARIANTS[name], seed=1), tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    return build("dev", tmp_path_factory)


@pytest.fixture(scope="module")
def short(dev):
    """dev with few tokens of T5, where their number is not the point."""
    reference, pipeline = dev
    return reference, ses_jax.load_pipeline(str(pipeline.folder), max_tokens=SHORT)


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    return build("schnell", tmp_path_factory)


def arguments(max_tokens):
    """The reference's own arguments."""

    def of(reference, noise, guidance, negatives):
        options = dict(guidance) if isinstance(guidance, dict) else {"scale": guidance}
        return {
            "guidance_scale": options.get("scale", 3.5),
            "true_cfg_scale": options.get("true_cfg", 1.0),
            "negative_prompt": negatives,
            "latents": reference._pack_latents(noise, *noise.shape),
            "max_sequence_length": max_tokens,
        }

    return of


RAGGED = ["\u732b \U0001f431 caf\u00e9", "a somewhat longer prompt, of more than thirty-two tokens", ""]


def test_dev_from_prompt_to_image(dev):
    assert_same_images(dev, ["a cat", LONG], arguments(512), size=(16, 16))


@pytest.mark.parametrize(
    ("prompts", "size", "guidance", "negative"),
    [
        (RAGGED, (12, 20), 2.0, None),
        (["a cat", LONG], (12, 8), {"scale": 2.0, "true_cfg": 2.5}, "ugly, blurry"),
    ],
    ids=["ragged batch of unicode", "true cfg"],
)
def test_dev_with_few_tokens(short, prompts, size, guidance, negative):
    assert_same_images(short, prompts, arguments(SHORT), size=size, guidance=guidance, negative=negative)


@pytest.mark.parametrize(
    ("prompts", "size", "steps", "guidance", "negative"),
    [
        pytest.param([*RAGGED, LONG], (48, 80), 4, None, None, id="ragged batch"),
        pytest.param(["a cat"], (32, 64), 1, {"true_cfg": 2.0}, "", id="true cfg", marks=pytest.mark.quick),
    ],
)
def test_schnell_from_prompt_to_image(schnell, prompts, size, steps, guidance, negative):
    options = {"size": size, "steps": steps, "guidance": guidance, "negative": negative}
    assert_same_images(schnell, prompts, arguments(256), **options)


def test_an_exported_noise_gives_the_same_image_in_diffusers(schnell, tmp_path):
    guidance = {"true_cfg": 2.0}
    assert_an_export_gives_the_same_image(schnell, tmp_path, size=(32, 64), steps=1, guidance=guidance, negative="")


@pytest.mark.parametrize("wrong", [0, 513])
def test_max_tokens_are_limited(dev, wrong):
    with pytest.raises(ValueError, match=f"max_tokens={wrong} is not between 1 and 512"):
        ses_jax.load_pipeline(str(dev[1].folder), max_tokens=wrong)


def test_rows_of_a_batch_are_the_images_of_their_prompts(short):
    assert_rows_are_alone(short[1], RAGGED, (0, 1), size=(12, 20))


def test_tokens(dev, schnell):
    _, pipeline = dev
    tokens = pipeline.tokenize(["a cat", LONG])
    assert (tokens.positive.clip.shape, tokens.positive.t5.shape) == ((2, 77), (2, 512))
    assert tokens.negative is None
    np.testing.assert_array_equal(tokens.guidance["scale"], [3.5, 3.5])
    assert schnell[1].tokenize(["a"]).positive.t5.shape == (1, 256)
    # On only if both are there; the empty negative prompt counts.
    assert pipeline.tokenize(["a"], guidance={"true_cfg": 4.0}).negative is None
    assert pipeline.tokenize(["a"], guidance=3.5, negative_prompt="").negative is None
    assert pipeline.tokenize(["a"], guidance={"true_cfg": 1.0}, negative_prompt="").negative is None
    np.testing.assert_array_equal(
        pipeline.tokenize(["a"], guidance={"true_cfg": 1.5}, negative_prompt="").negative.t5,
        pipeline.tokenize([""]).positive.t5,
    )


def test_what_has_no_effect_is_refused(dev, schnell):
    with pytest.raises(ValueError, match=r"no effect without guidance; pass guidance=\{'true_cfg': s\}"):
        dev[1].tokenize(["a"], guidance=3.5, negative_prompt="b")
    with pytest.raises(ValueError, match=r"unknown guidance options \['rescale'\]; FLUX.1 takes scale, true_cfg"):
        dev[1].tokenize(["a"], guidance={"rescale": 1.0})
    with pytest.raises(ValueError, match=r"guidance 3.5 has no effect: FLUX.1-schnell has no such input; pass 0"):
        schnell[1].tokenize(["a"], guidance=3.5)
    with pytest.raises(ValueError, match=r"unknown options \['steps'\]; this family takes: max_tokens, timestep_round"):
        ses_jax.load_pipeline(str(dev[1].folder), steps=3)
    with pytest.raises(ValueError, match="timestep_rounding='half' is none of exact, reference"):
        ses_jax.load_pipeline(str(dev[1].folder), timestep_rounding="half")


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
@pytest.mark.parametrize("size", [(1024, 1024), (512, 512), (832, 1216), (2048, 1536), (16, 16)])
def test_sigmas_equal_the_references(dev, schnell, steps, size):
    for reference, pipeline in (dev, schnell):
        scheduler = oracle_flux1.scheduler(reference.transformer.config.guidance_embeds)
        mu = 0.5 + (size[0] * size[1] // 256 - 256) * (1.15 - 0.5) / (4096 - 256)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        sides = [side * pipeline.size_multiple // 16 for side in size]  # as many tokens
        np.testing.assert_allclose(pipeline.sigmas(steps, *sides), scheduler.sigmas.numpy(), rtol=3e-7)


def test_the_schedule_is_the_checkpoints(dev):
    _, pipeline = dev
    parts = base.Parts(pipeline.folder, dict.fromkeys(flux1.COMPONENTS), {}, {}, {})
    for scheduler, expected in (
        ({"use_dynamic_shifting": True, "base_shift": 0.2, "max_shift": 2.0}, oracle_sigmas(0.2 + 3840 / 3840 * 1.8)),
        ({"use_dynamic_shifting": True, "max_image_seq_len": 8192}, oracle_sigmas(0.5 + 0.65 * 3840 / 7936)),
        ({"shift": 3.0}, 3 * np.linspace(1, 0, 8) / (1 + 2 * np.linspace(1, 0, 8))),
    ):
        np.testing.assert_allclose(schedule.sigmas(scheduler, 16, 7, 1024, 1024), expected, rtol=1e-6, atol=1e-7)
    for wrong in ("use_karras_sigmas", "use_beta_sigmas", "time_shift_type"):
        with pytest.raises(ValueError, match=f"schedules with {wrong} are not supported"):
            schedule.schedule(parts._replace(scheduler={wrong: "linear"}), 16)


def oracle_sigmas(mu):
    sigmas = np.linspace(1, 0, 8)[:-1]
    return np.append(np.exp(mu) / (np.exp(mu) + 1 / sigmas - 1), 0)


def test_defaults_follow_the_transformer(dev, schnell):
    assert (dev[1].defaults.steps, dev[1].defaults.guidance) == (28, 3.5)
    assert (schnell[1].defaults.steps, schnell[1].defaults.preview_steps, schnell[1].defaults.guidance) == (4, 4, 0.0)
    assert schnell[1].size_multiple == 16
    assert schnell[1].noise_shape(1024, 512) == (16, 128, 64)


def test_encode_and_velocity_use_only_their_own_params(dev):
    """So that either half of the weights may be away from the device."""
    _, pipeline = dev
    text, image = pipeline.text_params(pipeline.params), pipeline.image_params(pipeline.params)
    assert sorted([*text, *image]) == sorted(pipeline.params)
    tokens = pipeline.tokenize(["a"], guidance={"true_cfg": 2.0}, negative_prompt="")
    condition = jax.eval_shape(pipeline.encode, text, tokens)
    latents = jnp.zeros((1, *pipeline.noise_shape(32, 32)))
    assert jax.eval_shape(pipeline.velocity, image, latents, jnp.ones(1), condition).shape == latents.shape
    assert jax.eval_shape(pipeline.decode, image, latents).shape == (1, 32, 32, 3)


def test_bfloat16_weights_run_and_stay_close(short):
    assert_bfloat16_stays_close(short[1], (12, 20), max_tokens=SHORT)


def test_the_rounding_of_time_is_an_option(dev):
    """Its arithmetic is the transformer's, and proved there."""
    for rounding in ("exact", "reference"):
        pipeline = ses_jax.load_pipeline(str(dev[1].folder), timestep_rounding=rounding)
        assert pipeline.velocity.args[0].timestep_rounding == rounding


def test_a_search_runs(short, fresh_programs):
    """Three prompts, the shortest and the longest; one program serves all."""
    _, pipeline = short
    settings = {"guidance": {"true_cfg": 2.0}, "negative_prompt": "a dog", **SMALL}
    before = generation.generation_step.cache_size()
    results = ses_jax.search(
        ["a cat", "", LONG], model=pipeline, reward=toy.brightness(), budget=5,
        population=4, elites=2, level=1, preview_steps=2, progress=False, **settings,
    )  # fmt: skip
    for result in results:
        scores = [row["score"] for row in result.history]
        assert len(scores) == 5
        assert result.score == max(scores) > min(scores)
        assert result.image.size == (20, 12)
    # Five candidates in generations of four: the last generation is a program of its own at most.
    assert generation.generation_step.cache_size() - before <= 2
    again = ses_jax.generate(pipeline, LONG, noise=results[2].noise[None], **settings)
    np.testing.assert_allclose(np.asarray(results[2].image) / 255, again[0], atol=0.5 / 255 + 1e-4)


def test_the_text_encoders_may_leave_the_device(short):
    _, pipeline = short
    away = ses_jax.load_pipeline(str(pipeline.folder), max_tokens=SHORT, offload_text_encoder=True)
    images = [ses_jax.generate(p, "a cat", **SMALL) for p in (pipeline, away)]
    np.testing.assert_array_equal(*images)


def test_a_mesh_changes_no_image(short):
    _, pipeline = short
    mesh = partition.parse_mesh("data=2,model=2", jax.devices()[:4])
    split = ses_jax.load_pipeline(str(pipeline.folder), max_tokens=SHORT, mesh=mesh)
    kernel = split.params["transformer"]["single_blocks"]["mlp_in"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 2
    images = [ses_jax.generate(p, "a cat", **SMALL) for p in (pipeline, split)]
    np.testing.assert_allclose(*images, atol=2e-5)


PUBLISHED = {"black-forest-labs/FLUX.1-dev": 512, "black-forest-labs/FLUX.1-schnell": 256}


@pytest.mark.parametrize("source", PUBLISHED)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "true cfg"])
def test_published_sizes_trace(source, guided):
    """The whole pipeline at 1024 x 1024, without allocating a weight, and with every product in bfloat16."""
    pipeline = abstract_pipeline(source)
    batch = 2
    tokens = pipeline.blank_tokens(batch, 20, guidance={"true_cfg": 4.0} if guided else None)
    condition = jax.eval_shape(pipeline.encode, pipeline.text_params(pipeline.params), tokens)
    assert condition.positive.features.shape == (batch, PUBLISHED[source], 4096)
    assert condition.positive.pooled.shape == (batch, 768)
    assert (condition.negative is not None) == guided
    latents = jax.ShapeDtypeStruct((batch, *pipeline.noise_shape(1024, 1024)), jnp.float32)
    assert latents.shape == (batch, 16, 128, 128)
    params, sigma = pipeline.image_params(pipeline.params), jax.ShapeDtypeStruct((batch,), jnp.float32)
    traced, out = jax.make_jaxpr(pipeline.velocity, return_shape=True)(params, latents, sigma, condition)
    assert (out.shape, out.dtype) == (latents.shape, latents.dtype)
    images = jax.eval_shape(pipeline.decode, params, latents)
    assert (images.shape, images.dtype) == ((batch, 1024, 1024, 3), jnp.float32)
    products = jaxprs.products(traced.jaxpr)
    assert len(products) > 20
    assert all(operand.aval.dtype == jnp.bfloat16 for equation in products for operand in equation.invars)


def test_published_sizes_are_those_of_the_headers():
    sizes = {source: abstract_pipeline(source).params for source in PUBLISHED}
    counts = [sum(leaf.size for leaf in jax.tree.leaves(params["transformer"])) for params in sizes.values()]
    assert counts == [11_901_408_320, 11_891_178_560]
    for params in sizes.values():
        assert sum(leaf.size for leaf in jax.tree.leaves(params["text_encoder"])) == 123_060_480
        assert sum(leaf.size for leaf in jax.tree.leaves(params["text_encoder_2"])) == 4_762_310_656
        assert sum(leaf.size for leaf in jax.tree.leaves(params["vae"])) == 83_819_683
