"""Z-Image from prompt to image against diffusers, on tiny random checkpoints in the published layout."""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toy
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift
from parity import (
    assert_a_search_previews_what_is_generated,
    assert_an_export_gives_the_same_image,
    assert_bfloat16_stays_close,
    assert_rows_are_alone,
    assert_same_images,
    pair,
    with_quick,
)

import ses_jax
from ses_jax.engine import generation, tasks
from ses_jax.pipelines import base, z_image
from ses_jax.searchers import wavelet

LONG = "a very detailed painting of " + "many " * 300
VARIANTS = {
    # Two of the autoencoder's four levels, so images of a quarter of the side.
    "turbo": oracle.ZImageSizes(vae_layers=1, vae_widths=(8, 16)),
    "base, other widths": oracle.ZImageSizes(
        shift=6.0,
        dim=72,
        heads=6,
        axes_dims=(4, 4, 4),
        layers=3,
        refiner_layers=1,
        text_width=40,
        text_layers=3,
        text_heads=6,
        text_kv_heads=1,
        text_head_dim=8,
        vae_widths=(4, 8, 12, 16),
        vae_layers=1,
        vae_groups=2,
    ),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """By variant: the oracle and our pipeline, from the same folder; the second with a sharded transformer."""

    @functools.cache
    def build(name):
        reference = oracle.z_image_pipeline(VARIANTS[name], seed=1)
        return pair(reference, tmp_path_factory.mktemp("z_image"), shard_size=None if name == "turbo" else "500KB")

    return build


@pytest.fixture
def pipeline(pairs):
    return pairs("turbo")[1]


def arguments(reference, noise, guidance, negatives):
    """The reference's own arguments."""
    options = dict(guidance) if isinstance(guidance, dict) else {"scale": guidance}
    return {
        "guidance_scale": options["scale"],
        "cfg_normalization": options.get("normalization", False),
        "cfg_truncation": options.get("truncation", 1.0),
        "negative_prompt": negatives,
        "latents": noise,
    }


UNICODE = ("\u732b \U0001f431 caf\u00e9", "a somewhat longer prompt, of more than thirty-two tokens")
TRUNCATED = {"scale": 4.0, "truncation": 0.3, "normalization": 0.5}
# Variant, prompts, size, guidance, negative prompt, steps.
CASES = {
    "plain": ("turbo", ["a cat"], (12, 20), 0.0, None, 8),
    "empty": ("turbo", [""], (12, 20), 0.0, None, 8),
    "one step": ("turbo", ["a cat"], (8, 8), 0.0, None, 1),
    "too long": ("turbo", [LONG], (8, 8), 0.0, None, 3),
    "negative batch": ("turbo", ["a cat", "two dogs that play in the park"], (8, 12), 2.5, "ugly, blurry", 3),
    "unicode batch": ("base, other widths", UNICODE, (64, 96), 0.0, None, 3),
    "guided": ("base, other widths", ["a cat"], (96, 64), 4.0, None, 3),
    "normalized": ("base, other widths", ["a cat"], (96, 64), {"scale": 4.0, "normalization": 1.0}, "", 3),
    "truncated": ("base, other widths", ["a cat"], (96, 64), TRUNCATED, "dog", 3),
}


@pytest.mark.parametrize("case", with_quick(CASES, "one step"))
def test_prompt_to_image(pairs, case):
    name, prompts, size, guidance, negative, steps = CASES[case]
    settings = {"size": size, "guidance": guidance, "negative": negative, "steps": steps}
    assert_same_images(pairs(name), prompts, arguments, **settings)


def test_an_exported_noise_gives_the_same_image_in_diffusers(pairs, tmp_path):
    guidance = TRUNCATED | {"normalization": 0.9}
    settings = {"size": (96, 64), "steps": 3, "guidance": guidance, "negative": "dog"}
    assert_an_export_gives_the_same_image(pairs("base, other widths"), tmp_path, **settings)


def test_padding_to_a_larger_bucket_changes_nothing(pipeline):
    """A short prompt next to a long one runs in the long one's bucket, with the same image as alone."""
    assert_rows_are_alone(pipeline, ["a cat", LONG], (0,), size=(8, 12))


def test_guidance_of_zero_is_off_and_ignores_no_negative_prompt_silently(pipeline):
    tokens = pipeline.tokenize(["a"], guidance=0.0)
    assert tokens.negative is None
    with pytest.raises(ValueError, match="negative_prompt has no effect without guidance"):
        pipeline.tokenize(["a"], guidance=0.0, negative_prompt="b")
    with pytest.raises(ValueError, match=r"unknown guidance options \['rescale'\]"):
        pipeline.tokenize(["a"], guidance={"rescale": 1.0})


@pytest.mark.parametrize("sigma", [0.9, 0.2])
def test_guide_formula(sigma):
    rng = np.random.default_rng(0)
    positive, negative = rng.standard_normal((2, 3, 4, 5, 5)).astype(np.float32)
    options = {"scale": [4.0, 4.0, 0.5], "normalization": [0.0, 1.0, 0.7], "truncation": [1.0, 0.5, 0.5]}
    guided = z_image.guide(
        jnp.asarray(positive),
        jnp.asarray(negative),
        jnp.full(3, sigma),
        {name: jnp.array(values) for name, values in options.items()},
    )
    for i in range(3):
        expected = positive[i].astype(np.float64)
        if 1 - sigma <= options["truncation"][i]:
            expected = expected + options["scale"][i] * (expected - negative[i])
            limit = options["normalization"][i] * np.linalg.norm(positive[i])
            if options["normalization"][i] and np.linalg.norm(expected) > limit:
                expected *= limit / np.linalg.norm(expected)
        np.testing.assert_allclose(guided[i], expected, rtol=1e-5, atol=1e-5)


def test_defaults_follow_the_scheduler(pairs):
    for name, expected in (("turbo", (8, 0.0)), ("base, other widths", (50, 4.0))):
        _, pipeline = pairs(name)
        assert (pipeline.defaults.steps, pipeline.defaults.guidance) == expected
    assert pipeline.size_multiple == 16
    assert pipeline.noise_shape(1024, 512) == (16, 128, 64)


def test_a_dynamic_schedule():
    """As the reference has it where the checkpoint asks for one; none of the published does."""
    parts = base.Parts(Path("folder"), dict(z_image.CONFIGS), {}, {}, {"use_dynamic_shifting": True, "shift": 3.0})
    pipeline = z_image.assemble(parts)
    assert pipeline.defaults.steps == 50
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4), mu=calculate_shift(48 * 64))
    np.testing.assert_allclose(pipeline.sigmas(4, 768, 1024), scheduler.sigmas.numpy(), rtol=3e-7)


def test_bfloat16_weights_run_and_stay_close(pipeline):
    assert_bfloat16_stays_close(pipeline, (8, 12))


def test_a_search_runs_and_its_preview_is_the_generated_one(pipeline):
    assert_a_search_previews_what_is_generated(pipeline, size=(8, 12), level=1)


def test_a_look_at_half_the_size_is_an_image_of_that_size(pipeline):
    """Of the same candidate: here the base noise, which goes on alone."""
    size = {"height": 16, "width": 8}
    result = ses_jax.search(
        "a cat", model=pipeline, reward=toy.brightness(), budget=2, population=2, elites=1, level=1, preview_steps=2,
        steps=1, fidelity="half:0.5", progress=False, **size,
    )  # fmt: skip
    noise = tasks.base_noise(tasks.prompt_keys(0, 0)[0], pipeline.noise_shape(16, 8))
    image = ses_jax.generate(pipeline, "a cat", noise=wavelet.half(noise)[None], height=8, width=4, steps=2)
    np.testing.assert_allclose(result.history[0]["looks"], [image.mean()], atol=1e-5)
    assert [row["score"] is None for row in result.history] == [False, True]
    assert 0.25 < result.cost.search.nfe / (2 * 2) - 0.5 < 1  # text is not halved


def test_prompts_of_one_token_bucket_share_one_compilation(pipeline, fresh_programs):
    prompts = ["a cat", "two dogs", "", UNICODE[1]]
    buckets = [pipeline.tokenize([prompt]).positive.ids.shape[1] for prompt in prompts]
    assert buckets[0] == buckets[1] == buckets[2] < buckets[3]
    settings = {"budget": 4, "population": 2, "elites": 1, "level": 1, "preview_steps": 1, "height": 8, "width": 8}
    config = ses_jax.SearchConfig(**settings).resolve(pipeline)
    before = generation.generation_step.cache_size()
    for prompt in prompts:
        task = tasks.prepare(pipeline, toy.brightness(), config, [prompt], [0])
        generation.generation_step(task.program, task.params, task.inputs, np.int32(0), tasks.initial_state(task))
    assert generation.generation_step.cache_size() - before == 2
