"""Parity of whole pipelines: the same noise through the reference and through ours, from one checkpoint folder."""

import runpy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import ses_jax
from ses_jax.engine.result import export_noise
from ses_jax.loading import hub


def pair(reference, folder, *, shard_size=None):
    """The reference and our pipeline of what it saves; with a `shard_size` the transformer lies in several files."""
    reference.set_progress_bar_config(disable=True)
    reference.save_pretrained(folder)
    if shard_size:
        shutil.rmtree(folder / "transformer")
        reference.transformer.save_pretrained(folder / "transformer", max_shard_size=shard_size)
        assert (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists()
    return reference, ses_jax.load_pipeline(str(folder))


def with_quick(cases, name):
    """The names of the cases for `parametrize`, the one of that name among the quick tests."""
    return [pytest.param(case, marks=pytest.mark.quick if case == name else ()) for case in cases]


def draw(pipeline, count, size, seed=5):
    return np.random.default_rng(seed).standard_normal((count, *pipeline.noise_shape(*size)), np.float32)


def assert_same_images(pair, prompts, arguments, *, size=(32, 32), steps=2, guidance=None, negative=None):
    """Ours are the reference's.

    Args:
      pair: the reference and our pipeline.
      prompts: of one batch.
      arguments: `(reference, noise, guidance, negatives) -> the family's own arguments of the reference`.
      size: height and width.
      steps: of the schedule.
      guidance: number or options; None is our default.
      negative: the negative prompt; None is none.
    """
    reference, pipeline = pair
    noise = draw(pipeline, len(prompts), size)
    guidance = pipeline.defaults.guidance if guidance is None else guidance
    negatives = None if negative is None else [negative] * len(prompts)
    settings = {"height": size[0], "width": size[1]}
    with torch.no_grad():
        expected = reference(
            prompt=list(prompts),
            num_inference_steps=steps,
            output_type="pt",
            **settings,
            **arguments(reference, torch.from_numpy(noise), guidance, negatives),
        ).images.permute(0, 2, 3, 1)
    images = ses_jax.generate(
        pipeline, prompts, noise=noise, steps=steps, guidance=guidance, negative_prompt=negative, **settings
    )
    difference = np.abs(np.asarray(images) - expected.numpy())
    assert expected.std() > 0.05
    assert difference.max() <= 1e-4
    assert difference.mean() <= 1e-5


def assert_an_export_gives_the_same_image(pair, folder, *, size, steps, guidance=None, negative=None, **more):
    """The script of an exported noise makes our image in the reference; `more` are arguments that tiny models need."""
    reference, pipeline = pair
    noise = draw(pipeline, 1, size)
    guidance = pipeline.defaults.guidance if guidance is None else guidance
    config = {"height": size[0], "width": size[1], "steps": steps, "guidance": guidance, "negative_prompt": negative}
    image = np.asarray(ses_jax.generate(pipeline, "a cat", noise=noise, **config)[0])
    facts = {"family": pipeline.family, "model": pipeline.source, "load": dict(pipeline.options)}
    export_noise(noise[0], {"prompt": "a cat", "config": config | facts}, "diffusers", folder)
    script = runpy.run_path(str(folder / "generate.py"))
    assert script["MODEL"] == str(pipeline.folder)
    with torch.no_grad():
        expected = script["render"](reference, output_type="np", **more)
    difference = np.abs(image - expected)
    assert expected.std() > 0.05
    assert difference.max() <= 1e-4
    assert difference.mean() <= 1e-5


def assert_rows_are_alone(pipeline, prompts, rows, *, size, **settings):
    """Those rows of a batch are the images that their prompts make alone."""
    noise = draw(pipeline, len(prompts), size, seed=0)
    settings = {"steps": 2, "height": size[0], "width": size[1]} | settings
    together = ses_jax.generate(pipeline, prompts, noise=noise, **settings)
    for i in rows:
        alone = ses_jax.generate(pipeline, prompts[i : i + 1], noise=noise[i : i + 1], **settings)
        np.testing.assert_allclose(together[i], alone[0], atol=2e-5)


def assert_bfloat16_stays_close(pipeline, size, **options):
    """An image of the same checkpoint in bfloat16 is close to that of float32."""
    settings = {"height": size[0], "width": size[1], "steps": 2}
    expected = ses_jax.generate(pipeline, "a cat", **settings)
    rough = ses_jax.load_pipeline(str(pipeline.folder), dtype=jnp.bfloat16, **options)
    assert {leaf.dtype for leaf in jax.tree.leaves(rough.params)} == {jnp.dtype(jnp.bfloat16)}
    image = np.asarray(ses_jax.generate(rough, "a cat", **settings))
    assert image.dtype == np.float32
    assert np.isfinite(image).all()
    assert np.abs(image - expected).mean() < 0.05


def assert_a_search_previews_what_is_generated(pipeline, *, size, **settings):
    """The reward sees the images that `generate` makes of the same noise, and the best of them wins."""
    seen = []

    def reward(images, prompts):
        seen.append(np.asarray(images))
        return np.asarray(images).mean(axis=(1, 2, 3))

    settings = {"height": size[0], "width": size[1]} | settings
    result = ses_jax.search(
        "a cat", model=pipeline, reward=reward, budget=7, population=4, elites=2, preview_steps=2, steps=2,
        progress=False, **settings,
    )  # fmt: skip
    winner = int(np.argmax([row["score"] for row in result.history]))
    settings.pop("level")
    again = ses_jax.generate(pipeline, "a cat", noise=result.noise[None], steps=2, **settings)
    np.testing.assert_allclose(again[0], np.concatenate(seen[:2])[winner], atol=1e-4)
    assert result.score >= result.baseline_score
    assert result.noise.shape == pipeline.noise_shape(*size)
    return result


def in_float16(reference, folder, component, layer, largest=8e3):
    """Both sides in float16, a layer's weights so large that what it adds to a stream is more than that holds."""
    with torch.no_grad():
        layer.weight *= largest / layer.weight.abs().max()
    reference.save_pretrained(folder)
    return reference.half(), *hub.load_component(folder, component, dtype=jnp.float16)


def assert_close_in_float16(ours, expected):
    assert np.isfinite(expected).all()
    expected = expected.astype(np.float32)
    assert np.linalg.norm(ours - expected) < 0.02 * np.linalg.norm(expected)
