"""Z-Image from prompt to image against diffusers, on tiny random checkpoints in the published layout."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
import toy

import ses_jax
from ses_jax import generation
from ses_jax.pipelines import z_image

LONG = "a very detailed painting of " + "many " * 300
VARIANTS = {
    "turbo": oracle.ZImageSizes(),
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


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """The oracle and our pipeline, from the same folder; the second variant with a sharded transformer."""
    sizes = VARIANTS[request.param]
    reference = oracle.z_image_pipeline(sizes, seed=1)
    reference.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("z_image")
    reference.save_pretrained(folder)
    if request.param != "turbo":
        shutil.rmtree(folder / "transformer")
        reference.transformer.save_pretrained(folder / "transformer", max_shard_size="500KB")
        assert (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists()
    return reference, ses_jax.load_pipeline(str(folder))


def render_both(pair, prompts, *, size=(64, 64), steps=3, guidance=0.0, negative=None):
    reference, pipeline = pair
    shape = (len(prompts), *pipeline.noise_shape(*size))
    noise = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    options = dict(guidance) if isinstance(guidance, dict) else {"scale": guidance}
    with torch.no_grad():
        expected = reference(
            prompt=list(prompts),
            negative_prompt=None if negative is None else [negative] * len(prompts),
            guidance_scale=options["scale"],
            cfg_normalization=options.get("normalization", False),
            cfg_truncation=options.get("truncation", 1.0),
            num_inference_steps=steps,
            height=size[0],
            width=size[1],
            latents=torch.tensor(noise),
            output_type="pt",
        ).images.permute(0, 2, 3, 1)
    images = ses_jax.generate(
        pipeline,
        prompts,
        noise=noise,
        steps=steps,
        guidance=guidance,
        negative_prompt=negative,
        height=size[0],
        width=size[1],
    )
    return np.asarray(images), expected.numpy()


def assert_same_images(images, expected):
    difference = np.abs(images - expected)
    assert expected.std() > 0.05
    assert difference.max() <= 1e-4
    assert difference.mean() <= 1e-5


@pytest.mark.parametrize(
    ("prompts", "size", "guidance", "negative"),
    [
        (["a cat"], (64, 64), 0.0, None),
        ([""], (64, 96), 0.0, None),
        (
            ["\u732b \U0001f431 caf\u00e9", "a somewhat longer prompt, of more than thirty-two tokens"],
            (48, 80),
            0.0,
            None,
        ),
        ([LONG], (32, 32), 0.0, None),
        (["a cat"], (96, 64), 4.0, None),
        (["a cat", "two dogs that play in the park next to a lake"], (64, 64), 2.5, "ugly, blurry"),
        (["a cat"], (64, 64), {"scale": 4.0, "normalization": 1.0}, ""),
        (["a cat"], (64, 64), {"scale": 4.0, "truncation": 0.3, "normalization": 0.5}, "dog"),
    ],
    ids=["plain", "empty", "unicode batch", "too long", "guided", "negative batch", "normalized", "truncated"],
)
def test_prompt_to_image(pair, prompts, size, guidance, negative):
    assert_same_images(*render_both(pair, prompts, size=size, guidance=guidance, negative=negative))


def test_every_schedule_length(pair):
    for steps in (1, 8):
        assert_same_images(*render_both(pair, ["a cat"], size=(32, 32), steps=steps))


def test_padding_to_a_larger_bucket_changes_nothing(pair):
    """A short prompt next to a long one runs in the long one's bucket, with the same image as alone."""
    _, pipeline = pair
    noise = np.random.default_rng(0).standard_normal((2, *pipeline.noise_shape(32, 48))).astype(np.float32)
    settings = {"steps": 2, "height": 32, "width": 48}
    alone = ses_jax.generate(pipeline, ["a cat"], noise=noise[:1], **settings)
    together = ses_jax.generate(pipeline, ["a cat", LONG], noise=noise, **settings)
    np.testing.assert_allclose(together[0], alone[0], atol=2e-5)


def test_guidance_of_zero_is_off_and_ignores_no_negative_prompt_silently(pair):
    _, pipeline = pair
    tokens = pipeline.tokenize(["a"], guidance=0.0)
    assert tokens.negative_ids is None
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


def test_defaults_follow_the_scheduler(pair):
    reference, pipeline = pair
    turbo = reference.scheduler.config.shift == 3.0
    assert (pipeline.defaults.steps, pipeline.defaults.guidance) == ((8, 0.0) if turbo else (50, 4.0))
    assert pipeline.size_multiple == 16
    assert pipeline.noise_shape(1024, 512) == (16, 128, 64)


def test_bfloat16_weights_run_and_stay_close(pair):
    _, exact = pair
    rough = ses_jax.load_pipeline(str(exact.folder), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(rough.params)} == {jnp.dtype(jnp.bfloat16)}
    images = [
        np.asarray(ses_jax.generate(p, "a cat", height=32, width=32, steps=2, guidance=0.0)) for p in (exact, rough)
    ]
    assert images[1].dtype == np.float32
    assert np.abs(images[0] - images[1]).mean() < 0.05


def test_a_search_runs_and_its_preview_is_the_generated_one(pair):
    _, pipeline = pair
    seen = []

    def reward(images, prompts):
        seen.append(np.asarray(images))
        return np.asarray(images).mean(axis=(1, 2, 3))

    settings = {"height": 32, "width": 48, "guidance": 0.0}
    result = ses_jax.search(
        "a cat", model=pipeline, reward=reward, budget=7, population=4, elites=2, level=1, preview_steps=2, steps=3,
        progress=False, **settings,
    )  # fmt: skip
    winner = int(np.argmax([row["score"] for row in result.history]))
    again = ses_jax.generate(pipeline, "a cat", noise=result.noise[None], steps=2, **settings)
    np.testing.assert_allclose(again[0], np.concatenate(seen[:2])[winner], atol=1e-4)
    assert result.score >= result.baseline_score


def test_prompts_of_one_token_bucket_share_one_compilation(pair):
    _, pipeline = pair
    prompts = ["a cat", "two dogs", "", LONG]
    buckets = [pipeline.tokenize([prompt]).ids.shape[1] for prompt in prompts]
    assert buckets[0] == buckets[1] == buckets[2] < buckets[3]
    before = generation.generation_step._cache_size()
    ses_jax.search(
        prompts, model=pipeline, reward=toy.brightness(), budget=4, population=2, elites=1, level=1, preview_steps=1,
        steps=1, height=32, width=32, guidance=0.0, progress=False,
    )  # fmt: skip
    assert generation.generation_step._cache_size() - before == 2
