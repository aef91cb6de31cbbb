"""The packaged demo checkpoint: small, in the published layout, the same in diffusers, better for being searched."""

import runpy

import lora_files
import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from PIL import Image
from transformers import CLIPModel

import ses_jax
from ses_jax.engine.result import export_noise
from ses_jax.loading import hub

PROMPTS = [
    "a red circle on a white background",
    "a large blue square on a gray background",
    "a green circle left of a red star on a white background",
    "two striped yellow triangles above a blue cross on a cyan background",
]


SMALL = {"height": 64, "width": 64}


@pytest.fixture(scope="module")
def pipeline():
    return ses_jax.load_pipeline("demo")


@pytest.fixture(scope="module")
def reference():
    loaded = ZImagePipeline.from_pretrained(hub.DEMO, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_is_small_and_in_the_published_layout():
    names = {str(path.relative_to(hub.DEMO)) for path in hub.DEMO.rglob("*") if path.is_file()}
    assert sum((hub.DEMO / name).stat().st_size for name in names) <= 16 * 2**20
    assert {"model_index.json", "README.md", "scheduler/scheduler_config.json"} <= names
    assert {"clip/config.json", "held_out_clip/config.json"} <= names
    assert {"transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"} <= names
    assert {"vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"} <= names


def test_images_equal_diffusers(pipeline, reference, tmp_path):
    """Trained weights reach larger activations than random ones; the bounds are the same, also by an export.

    At half the size, which the model knows too.
    """
    defaults = pipeline.defaults
    noise = np.random.default_rng(0).standard_normal((2, *pipeline.noise_shape(64, 64))).astype(np.float32)
    with torch.no_grad():
        expected = reference(
            prompt=PROMPTS[:2],
            guidance_scale=defaults.guidance,
            num_inference_steps=defaults.steps,
            height=64,
            width=64,
            latents=torch.tensor(noise),
            output_type="pt",
        ).images.permute(0, 2, 3, 1)
    images = np.asarray(ses_jax.generate(pipeline, PROMPTS[:2], noise=noise, height=64, width=64))
    config = {"family": pipeline.family, "model": "demo", "steps": defaults.steps, "guidance": defaults.guidance}
    summary = {"prompt": PROMPTS[1], "config": config | {"height": 64, "width": 64}}
    export_noise(noise[1], summary, "diffusers", tmp_path)
    with torch.no_grad():
        exported = runpy.run_path(str(tmp_path / "generate.py"))["render"](reference, output_type="np")
    for difference in (np.abs(images - expected.numpy()), np.abs(images[1] - exported)):
        assert difference.max() <= 1e-4
        assert difference.mean() <= 1e-5


def test_an_export_takes_its_adapters_along(pipeline, reference, tmp_path):
    """Two of them, a file and a folder, at strengths of their own."""
    shapes = {
        f"layers.{i}.attention.to_{n}": reference.transformer.layers[i].attention.to_q.weight.shape
        for i in (0, 1)
        for n in "qk"
    }
    (tmp_path / "folder").mkdir()
    lora_files.write(tmp_path / "one.safetensors", lora_files.low_rank(shapes), "transformer.")
    lora_files.write(
        tmp_path / "folder" / "pytorch_lora_weights.safetensors", lora_files.low_rank(shapes, 1), "transformer."
    )
    adapters = {str(tmp_path / "one.safetensors"): 0.6, str(tmp_path / "folder"): -0.4}
    changed = ses_jax.load_pipeline("demo", lora=adapters)
    noise = np.random.default_rng(0).standard_normal((2, *pipeline.noise_shape(64, 64))).astype(np.float32)
    image = np.asarray(ses_jax.generate(changed, PROMPTS[:2], height=64, width=64, noise=noise))[1]
    settings = {"height": 64, "width": 64, "steps": changed.defaults.steps, "guidance": changed.defaults.guidance}
    config = settings | {"family": changed.family, "model": "demo", **changed.changes}
    export_noise(noise[1], {"prompt": PROMPTS[1], "config": config}, "diffusers", tmp_path / "out")
    script = runpy.run_path(str(tmp_path / "out" / "generate.py"))
    assert script["CHANGES"] == {}
    with torch.no_grad():
        plain = script["render"](reference, output_type="np")
        exported = script["render"](script["adapted"](reference), output_type="np")
    reference.unload_lora_weights()
    assert np.abs(exported - plain).max() > 0.01
    assert np.abs(image - exported).max() <= 1e-4


@pytest.mark.parametrize("name", ["clip", "held_out_clip"])
def test_its_rewards_load_in_transformers(name):
    model = CLIPModel.from_pretrained(hub.DEMO / name)
    assert model.config.vision_config.image_size == 128


def test_prompts_fit_the_smallest_token_bucket(pipeline):
    tokens = pipeline.tokenize(PROMPTS)
    assert tokens.positive.ids.shape[1] == 32


def test_colours_follow_the_prompt(pipeline):
    """Means over several noises: red is redder than blue, a white background lighter than gray."""
    prompts = [f"a large {color} circle on a {background} background" for color, background in
               [("red", "white"), ("blue", "white"), ("red", "gray")]]  # fmt: skip
    means = [np.asarray(ses_jax.generate(pipeline, [p] * 4, **SMALL, steps=4)).mean(axis=(0, 1, 2)) for p in prompts]
    assert means[0][0] - means[0][2] > means[1][0] - means[1][2] + 0.1
    assert means[0].mean() > means[2].mean() + 0.1


def test_search_raises_the_reward(pipeline):
    """By far more than scores differ between devices."""
    settings = SMALL | {"budget": 12, "population": 6, "elites": 3, "steps": 4, "preview_steps": 4}
    results = ses_jax.search(PROMPTS[2:], model=pipeline, **settings, progress=False)
    for result in results:
        assert result.score == max(row["score"] for row in result.history)
        assert result.score > result.baseline_score + 0.1
    assert isinstance(results[0].image, Image.Image)
