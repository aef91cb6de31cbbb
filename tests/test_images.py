"""What people hand to a reward as images: arrays of floats and bytes, PIL images of any size and mode."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from PIL import Image

import ses_jax
from ses_jax.rewards.images import batches, pairs

SIZES = [(40, 56), (56, 56), (40, 56), (64, 31)]


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    oracle.save_clip(folder, oracle.clip(act="gelu"))
    return ses_jax.load_reward("clip", source=folder)


@pytest.fixture(scope="module")
def pixels():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


def test_bytes_pil_images_and_floats_score_the_same(reward, pixels):
    expected = reward(pixels[1][None].astype(np.float32) / 255, ["a cat"])
    for images in (pixels[1][None], [pixels[1]], [Image.fromarray(pixels[1])], jnp.asarray(pixels[1])[None]):
        np.testing.assert_allclose(reward(images, ["a cat"]), expected, rtol=1e-5)


def test_images_of_mixed_sizes_keep_their_places_and_prompts(reward, pixels):
    prompts = ["a cat", "a dog", "two cats", ""]
    alone = [reward(image[None], [prompt])[0] for image, prompt in zip(pixels, prompts, strict=True)]
    np.testing.assert_allclose(reward(list(map(Image.fromarray, pixels)), prompts), alone, rtol=1e-4)


def test_one_prompt_does_for_many_images(reward, pixels):
    images = list(map(Image.fromarray, pixels))
    expected = reward(images, ["a cat"] * 4)
    np.testing.assert_array_equal(reward(images, "a cat"), expected)
    np.testing.assert_array_equal(reward(images, ["a cat"]), expected)


@pytest.mark.parametrize("images", [[], np.zeros((0, 8, 8, 3), np.float32)])
def test_no_images_give_no_scores(reward, images):
    for prompts in ([], "a cat"):
        assert reward(images, prompts).shape == (0,)
    assert reward.components(images, []).shape == (0, 1)


def test_modes_become_rgb_and_transparency_white():
    color = (200, 30, 90)
    image = Image.new("RGBA", (4, 4), (*color, 0))
    image.putpixel((1, 0), (*color, 255))
    image.putpixel((2, 0), (*color, 128))
    ((_, array),) = batches([image])
    np.testing.assert_array_equal(array[0, 1, 1], [1, 1, 1])
    np.testing.assert_allclose(array[0, 0, 1] * 255, color, atol=1e-3)
    half = np.array(color) * 128 / 255 + 255 * 127 / 255
    np.testing.assert_allclose(array[0, 0, 2] * 255, half, atol=1.01)
    for mode in ("L", "P", "1", "CMYK", "LA"):
        plain = Image.new("RGB", (5, 3), (77, 77, 77)).convert(mode)
        ((places, array),) = batches([plain])
        assert (places.tolist(), array.shape) == ([0], (1, 3, 5, 3))
        np.testing.assert_allclose(array[0] * 255, np.asarray(plain.convert("RGB")), atol=1e-3)
    palette = Image.new("P", (2, 2))
    palette.putpalette([10, 20, 30] * 256)
    palette.info["transparency"] = 0
    np.testing.assert_array_equal(batches([palette])[0][1], np.ones((1, 2, 2, 3)))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_greys_of_16_bits_are_greys(mode):
    values = np.array([[0, 257 * 3 + 100, 257 * 200 - 100], [256 * 128, 65535, 7]], np.uint16)
    image = Image.frombytes(mode, (3, 2), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    for transparent in (False, True):
        image.info |= {"transparency": 7} if transparent else {}
        expected = np.array([[0, 3, 200], [128, 255, 255 if transparent else 0]])
        np.testing.assert_allclose(batches([image])[0][1][0] * 255, np.stack([expected] * 3, -1), atol=1e-4)


def test_greys_of_premultiplied_transparency_are_laid_on_white():
    image = Image.new("LA", (2, 1), (100, 0))
    image.putpixel((1, 0), (100, 128))
    np.testing.assert_allclose(batches([image.convert("La")])[0][1], batches([image])[0][1], atol=1.01 / 255)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full((1, 8, 8, 3), 255.0, np.float32), r"must be floats in \[0, 1\] or uint8; these lie in \[255, 255\]"),
        (np.linspace(-1, 1, 192, dtype=np.float32).reshape(1, 8, 8, 3), r"these lie in \[-1, 1\], rescale them"),
        (np.ones((1, 8, 8, 3), np.int64), "or uint8, got int64"),
        (np.ones((8, 8, 3), np.float32), r"shape \[B, H, W, 3\], got \[8, 8, 3\]"),
        (np.ones((1, 3, 8, 8), np.float32), r"shape \[B, H, W, 3\], got \[1, 3, 8, 8\]"),
        ([np.ones((1, 8, 8, 3), np.float32)], r"shape \[H, W, 3\], got \[1, 8, 8, 3\]"),
        ([Image.new("I", (4, 4))], "mode 'I' may be on any scale; pass"),
        ([Image.new("F", (4, 4))], "mode 'F' may be"),
        (Image.new("RGB", (4, 4)), r"pass \[image\]"),
        ((image for image in ()), "an array, or a list of arrays and PIL images; got <generator"),
        (Path("a.png"), r"or a list of arrays and PIL images; got \w+\('a.png'\)"),
        ("a.png", "or a list of arrays and PIL images; got 'a.png'"),
        (None, "or a list of arrays and PIL images; got None"),
        (["a.png"], "'a.png' is no image; open files with PIL.Image.open"),
        ([None], "None is no image"),
    ],
)
def test_what_is_no_image_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        pairs(images, "a cat")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        *((bad, "prompts must be strings, got") for bad in (5, None, [5], [None], b"a cat", {"a cat": 1})),
        (["a cat", "\ud83d"], r"the prompt '\\ud83d' is not Unicode: surrogates not allowed at character 0"),
        ([], "1 images need as many prompts or a single one, got 0"),
    ],
)
def test_what_is_no_prompt_is_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        pairs(np.zeros((1, 4, 4, 3), np.uint8), prompts)


def test_a_little_overshoot_of_a_resize_passes():
    ((_, array),) = batches(np.array([-0.05, 0.5, 1.05], np.float32).reshape(1, 1, 1, 3))
    np.testing.assert_array_equal(array.ravel(), np.float32([-0.05, 0.5, 1.05]))
