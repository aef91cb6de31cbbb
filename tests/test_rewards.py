"""CLIP-type rewards against transformers' own scorer, and the ways to combine and replace them."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

import ses_jax
from ses_jax import rewards
from ses_jax.rewards import Preprocessor

PROMPTS = ["a cat", "", "\u732b on a caf\u00e9 table \U0001f431", "many words " * 30]


@pytest.fixture(scope="module", params=["gelu", "quick_gelu"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    oracle.save_clip(folder, oracle.clip(act=request.param, seed=2))
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward(folder):
    return ses_jax.load_reward("clip", source=folder)


def images_of(sizes):
    """Smooth random images in [0, 1], one a size."""
    rng = np.random.default_rng(0)
    for height, width in sizes:
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
        yield np.asarray(coarse.resize((width, height), Image.BICUBIC), np.float32) / 255


def original_scores(folder, images, prompts):
    """The scorer as its authors publish it: slow processor, torch model, exp(logit_scale) * cosine of each pair."""
    model, tokenizer = CLIPModel.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    pictures = [Image.fromarray(np.round(image * 255).astype(np.uint8)) for image in images]
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt")
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], **pixels)
    return out.logits_per_image.diagonal().numpy()


@pytest.mark.parametrize("size", [(64, 64), (56, 56), (100, 75), (80, 133), (201, 200)])
def test_equals_the_original_scorer(folder, reward, size):
    images = list(images_of([size] * 4))
    expected = original_scores(folder, images, PROMPTS)
    scores = reward(jnp.asarray(np.stack(images)), PROMPTS)
    np.testing.assert_allclose(scores, expected, rtol=1e-3)
    np.testing.assert_array_equal(np.argsort(scores), np.argsort(expected))


def test_scores_follow_their_images_and_prompts(reward):
    # Of the network's own size: a resize may round a pixel the other way in another batch.
    images = np.stack(list(images_of([(56, 56)] * 4)))
    scores = reward(images, PROMPTS)
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(reward(images[order], [PROMPTS[i] for i in order]), scores[order], rtol=1e-5)
    for i in range(4):
        np.testing.assert_allclose(reward(images[i : i + 1], PROMPTS[i : i + 1]), scores[i : i + 1], rtol=1e-5)
    assert len(set(scores.tolist())) == 4


def test_a_mixture_is_the_weighted_sum(folder, reward):
    images = np.stack(list(images_of([(64, 64)] * 4)))
    mixture = rewards.weighted_sum([(reward, 2.0), (reward, -0.5)])
    np.testing.assert_allclose(mixture(images, PROMPTS), 1.5 * reward(images, PROMPTS), rtol=1e-5)
    assert mixture.score is not None

    def red(images, prompts):
        return np.asarray(images)[..., 0].mean(axis=(1, 2))

    mixed = rewards.weighted_sum([(reward, 1.0), (ses_jax.load_reward(red), 3.0)])
    expected = reward(images, PROMPTS) + 3 * images[..., 0].mean(axis=(1, 2))
    np.testing.assert_allclose(mixed(images, PROMPTS), expected, rtol=1e-5)
    assert mixed.host is not None


def test_score_is_differentiable_and_stays_on_the_device(reward):
    images = jnp.asarray(np.stack(list(images_of([(64, 64)]))))
    text = rewards.embed(reward.embed_text, reward.params, reward.tokenize(["a cat"]))
    compiled = jax.jit(reward.score).lower(reward.params, images, text).as_text()
    assert "callback" not in compiled


def test_image_count_must_match_prompt_count(reward):
    with pytest.raises(ValueError, match="2 images need as many prompts, got 1"):
        reward(jnp.zeros((2, 64, 64, 3)), ["a"])


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match="unknown reward 'aesthetics'; known: clip, pick"):
        ses_jax.load_reward("aesthetics")
    with pytest.raises(ValueError, match="unknown reward 'aesthetics'"):
        rewards.check({"clip": 1.0, "aesthetics": 2.0})
    with pytest.raises(ValueError, match="source names the weights of one reward"):
        ses_jax.load_reward({"clip": 1.0}, source="x")


def test_preprocessor_reads_its_file(tmp_path):
    assert Preprocessor.from_folder(tmp_path, 64).size == 64
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]
    )
    processor.save_pretrained(tmp_path)
    assert Preprocessor.from_folder(tmp_path, 32).mean == (0.1, 0.2, 0.3)
    with pytest.raises(ValueError, match="the network needs 64 for both"):
        Preprocessor.from_folder(tmp_path, 64)


def test_preprocessing_equals_the_slow_processor(folder):
    (image,) = images_of([(90, 61)])
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    expected = processor(Image.fromarray(np.round(image * 255).astype(np.uint8)), return_tensors="np")["pixel_values"]
    got = Preprocessor.from_folder(folder, 56)(jnp.asarray(image)[None])
    step = 1 / 255 / 0.26
    difference = np.abs(np.asarray(got) - expected.transpose(0, 2, 3, 1))
    assert difference.max() < 1.1 * step
    assert (difference > 1e-5).mean() < 1e-3
