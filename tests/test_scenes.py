"""The demo's scenes: what is sampled, drawn and said agrees, and the judge tells right images from wrong ones."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import scenes

seeds = st.integers(0, 2**32 - 1)


def sample_many(count: int, seed: int = 0, held_out: bool = False) -> list[scenes.Scene]:
    rng = np.random.default_rng(seed)
    return [scenes.sample(rng, held_out) for _ in range(count)]


def accuracy(images, wanted) -> float:
    return float(np.mean([scenes.verify(image, scene).correct for image, scene in zip(images, wanted, strict=True)]))


def test_the_judge_accepts_drawn_scenes():
    wanted = sample_many(120)
    assert accuracy([scenes.draw(s) for s in wanted], wanted) > 0.99


def test_the_judge_accepts_drawn_scenes_with_held_out_combinations():
    wanted = sample_many(100, held_out=True)
    assert accuracy([scenes.draw(s) for s in wanted], wanted) > 0.99


def test_the_judge_tolerates_blur_and_noise():
    wanted, rng = sample_many(80), np.random.default_rng(1)
    images = [ndimage.gaussian_filter(scenes.draw(s).astype(float), (0.8, 0.8, 0)) for s in wanted]
    noisy = [np.clip(i + rng.normal(0, 8, i.shape), 0, 255).astype(np.uint8) for i in images]
    assert accuracy(noisy, wanted) > 0.97


def test_the_judge_refuses_other_scenes():
    wanted = sample_many(80)
    images = [scenes.draw(s) for s in wanted]
    assert accuracy(images[1:] + images[:1], wanted) < 0.01


def test_the_judge_refuses_siblings_that_differ_in_one_attribute():
    wanted, rng = sample_many(120), np.random.default_rng(1)
    verdicts = [scenes.verify(scenes.draw(scenes.sibling(rng, s)), s) for s in wanted]
    assert np.mean([v.correct for v in verdicts]) < 0.01
    assert 0.5 < np.mean([v.fraction for v in verdicts]) < 0.9


@pytest.mark.parametrize("value", [0, 128, 255])
def test_the_judge_refuses_empty_images(value):
    images = [np.full((64, 64, 3), value, np.uint8)] * 50
    assert accuracy(images, sample_many(50)) == 0


def test_the_judge_refuses_an_object_too_many():
    objects = scenes.Object("red", "circle", x=20, y=20), scenes.Object("blue", "square", x=45, y=45)
    both = scenes.draw(scenes.Scene("white", objects, "left of"))
    alone = scenes.Scene("white", objects[:1])
    assert not scenes.verify(both, alone).checks["nothing else"]
    assert scenes.verify(scenes.draw(alone), alone).correct


@settings(deadline=None, max_examples=100)
@given(seed=seeds, held_out=st.booleans())
def test_objects_lie_inside_the_image_and_have_distinct_colors(seed, held_out):
    scene = scenes.sample(np.random.default_rng(seed), held_out)
    assert len({o.color for o in scene.objects}) == len(scene.objects)
    for o in scene.objects:
        for center, extent in zip((o.x, o.y), scenes.half_extents(o.shape), strict=True):
            assert center - extent * o.radius >= 1.0
            assert center + extent * o.radius <= scenes.SIZE - 1.0


@settings(deadline=None, max_examples=200)
@given(seed=seeds, held_out=st.booleans())
def test_held_out_combinations_occur_exactly_when_asked_for(seed, held_out):
    rng = np.random.default_rng(seed)
    scene = scenes.sample(rng, held_out)
    assert any((o.color, o.shape) in scenes.HELD_OUT for o in scene.objects) == held_out
    relative = scenes.sibling(rng, scene)
    assert not any((o.color, o.shape) in scenes.HELD_OUT for o in relative.objects)


@settings(deadline=None, max_examples=100)
@given(seed=seeds)
def test_captions_state_everything_that_is_judged(seed):
    rng = np.random.default_rng(seed)
    scene = scenes.sample(rng)
    caption = scenes.caption(rng, scene)
    assert caption == caption.lower()
    assert scene.background in caption
    for o in scene.objects:
        assert " ".join(filter(None, (o.size, o.color, o.shape))) in caption
    assert ("small" in caption or "large" in caption) == any(o.size for o in scene.objects)


def test_everything_follows_from_the_seed():
    assert scenes.evaluation_prompts(20) == scenes.evaluation_prompts(50)[:20]
    first, second = (sample_many(20, seed=3) for _ in range(2))
    assert first == second
    np.testing.assert_array_equal(scenes.draw(first[0]), scenes.draw(second[0]))
