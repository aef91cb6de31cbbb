"""The demo's scenes: what is sampled, said and drawn agrees; the judge tells right pictures from wrong ones."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import captions, drawing, judge, scenes

RESOLUTIONS = ((128, 128), (96, 96), (64, 64), (96, 128))
seeds = st.integers(0, 2**32 - 1)
tiers = st.sampled_from(scenes.TIERS)


def sample_many(count: int, seed: int = 0) -> list[scenes.Scene]:
    """Scenes of all tiers in turn, a quarter of them with held-out combinations."""
    rng = np.random.default_rng(seed)
    return [scenes.sample(rng, scenes.TIERS[i % 3], held_out=i % 4 == 0) for i in range(count)]


def pictures(wanted: list[scenes.Scene], height: int = 128, width: int = 128) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [drawing.picture(rng, scene, height, width) for scene in wanted]


def accuracy(images, wanted) -> float:
    return float(np.mean([judge.verify(image, scene).correct for image, scene in zip(images, wanted, strict=True)]))


@pytest.mark.parametrize(("height", "width"), RESOLUTIONS)
def test_the_judge_accepts_drawn_scenes(height, width):
    wanted = sample_many(150 if height == width == 128 else 60)
    assert accuracy(pictures(wanted, height, width), wanted) >= (0.99 if height == width == 128 else 0.95)


def test_the_judge_tolerates_blur_and_noise():
    wanted, rng = sample_many(40), np.random.default_rng(2)
    images = [ndimage.gaussian_filter(image / 255, (0.7, 0.7, 0)) for image in pictures(wanted)]
    assert accuracy([image + rng.normal(0, 0.03, image.shape) for image in images], wanted) > 0.95


def test_the_judge_refuses_siblings():
    wanted, rng = sample_many(120), np.random.default_rng(2)
    images = pictures([scenes.sibling(rng, scene) for scene in wanted])
    verdicts = [judge.verify(image, scene) for image, scene in zip(images, wanted, strict=True)]
    assert np.mean([v.correct for v in verdicts]) < 0.01
    assert 0.5 < np.mean([v.fraction for v in verdicts]) < 0.9


@pytest.mark.parametrize("value", [0, 150, 255])
def test_the_judge_refuses_empty_images(value):
    assert accuracy([np.full((64, 64, 3), value, np.uint8)] * 12, sample_many(12)) == 0


CIRCLE, SQUARE = scenes.Group("red", "circle"), scenes.Group("blue", "square", count=2, texture="striped")


@pytest.mark.parametrize(
    ("drawn", "failed"),
    [
        (scenes.Scene("white", (CIRCLE, SQUARE), "left of"), set()),
        (scenes.Scene("pink", (CIRCLE, SQUARE), "left of"), {"background"}),
        (scenes.Scene("white", (CIRCLE, SQUARE), "right of"), {"relation 0"}),
        (scenes.Scene("white", (CIRCLE, scenes.Group("blue", "square", 3, texture="striped")), "left of"), {"count 1"}),
        (scenes.Scene("white", (CIRCLE, scenes.Group("blue", "square", 2)), "left of"), {"texture 1"}),
        (scenes.Scene("white", (CIRCLE, scenes.Group("blue", "star", 2, texture="striped")), "left of"), {"shape 1"}),
        (scenes.Scene("white", (CIRCLE, SQUARE, scenes.Group("green", "cross")), "left of"), {"nothing else"}),
        (
            scenes.Scene("white", (CIRCLE,)),
            {"count 1", "shape 1", "texture 1", "relation 0"},
        ),
    ],
)
def test_a_verdict_names_what_is_wrong(drawn, failed):
    checks = judge.verify(pictures([drawn])[0], scenes.Scene("white", (CIRCLE, SQUARE), "left of")).checks
    assert {name for name, passed in checks.items() if not passed} == failed


@pytest.mark.parametrize(("size", "other"), [("small", "large"), ("large", "small")])
def test_stated_sizes_are_judged(size, other):
    wanted, drawn = (scenes.Scene("gray", (scenes.Group("green", "star", size=s),)) for s in (size, other))
    image = pictures([drawn])[0]
    assert judge.verify(image, drawn).correct
    assert not judge.verify(image, wanted).checks["size 0"]


def test_resolutions_of_the_same_places_look_alike():
    for scene in sample_many(20):
        places = drawing.layout(np.random.default_rng(0), scene, 1.0)
        large, small = (drawing.draw(scene, places, side, side).astype(float) for side in (128, 64))
        halved = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
        assert np.abs(halved - small).mean() < 1.5


@settings(max_examples=20)
@given(seeds, tiers, st.sampled_from(RESOLUTIONS))
def test_cells_are_covered_by_the_shapes_that_are_drawn_there(seed, tier, size):
    rng, cell = np.random.default_rng(seed), 8
    scene = scenes.sample(rng, tier)
    places = drawing.layout(rng, scene, size[1] / size[0])
    covered = drawing.covered(scene, places, *size, cell)
    assert covered.shape == (size[0] // cell, size[1] // cell)
    named = {0, *(1 + scenes.SHAPES.index(group.shape) for group in scene.groups)}
    assert set(np.unique(covered)) == named
    # Of a cell that no shape reaches, no pixel within the largest circle around its centre is painted.
    image = drawing.draw(scene, places, *size)
    painted = (image != scenes.BACKGROUNDS[scene.background]).any(-1)
    inner = painted.reshape(size[0] // cell, cell, size[1] // cell, cell)[:, 2:6, :, 2:6].any((1, 3))
    assert not (inner & (covered == 0)).any()
    for group, members in zip(scene.groups, places, strict=True):
        for place in members:
            x, y = (int(v * drawing.unit(*size) / cell) for v in (place.x, place.y))
            assert covered[y, x] == 1 + scenes.SHAPES.index(group.shape)


@settings(max_examples=100)
@given(seed=seeds, tier=tiers, aspect=st.sampled_from([0.75, 1.0, 4 / 3]))
def test_objects_lie_inside_the_canvas_apart_and_of_their_stated_size(seed, tier, aspect):
    rng = np.random.default_rng(seed)
    scene = scenes.sample(rng, tier)
    places = drawing.layout(rng, scene, aspect)
    canvas, boxes = drawing.SIDE * np.array([aspect**0.5, aspect**-0.5]), []
    for group, members in zip(scene.groups, places, strict=True):
        assert len(members) == group.count
        for place in members:
            center, reach = np.array(place[:2]), place.radius * np.array(drawing.HALF_EXTENTS[group.shape])
            assert (center - reach > 1).all()
            assert (center + reach < canvas - 1).all()
            assert not group.size or (place.radius > 8.6) == (group.size == "large")
            assert all((np.abs(center - c) > reach + r).any() for c, r in boxes)
            boxes.append((center, reach))


@settings(max_examples=200)
@given(seed=seeds, tier=tiers, held_out=st.booleans())
def test_held_out_combinations_occur_exactly_when_asked_for(seed, tier, held_out):
    rng = np.random.default_rng(seed)
    scene = scenes.sample(rng, tier, held_out)
    assert scenes.has_held_out(scene) == held_out
    relative = scenes.sibling(rng, scene)
    assert not scenes.has_held_out(relative)
    assert relative.count <= 4
    for each in (scene, relative):
        assert len({g.color for g in each.groups}) == len(each.groups)


def test_every_word_is_seen_in_training_and_a_tenth_of_the_combinations_is_not():
    for axis, names in enumerate((scenes.COLORS, scenes.SHAPES, scenes.TEXTURES)):
        held = [sum(combination[axis] == name for combination in scenes.HELD_OUT) for name in names]
        assert max(held) < len(scenes.COLORS) * len(scenes.SHAPES) * len(scenes.TEXTURES) / len(names) / 4
    assert 0.08 < len(scenes.HELD_OUT) / 144 < 0.14


@settings(max_examples=100)
@given(seed=seeds, tier=tiers)
def test_captions_state_everything_that_is_judged(seed, tier):
    rng = np.random.default_rng(seed)
    scene = scenes.sample(rng, tier)
    text = captions.caption(rng, scene)
    assert text == text.lower()
    assert scene.background in text
    words = text.replace(",", "").split()
    for group in scene.groups:
        assert words[words.index(group.color) + 1].startswith(group.shape)
    for names in ("small", "large", *scenes.TEXTURES[1:]):
        stated = sum(words.count(w) for w in captions.SYNONYMS.get(names, (names,)))
        assert stated == sum(names in (g.size, g.texture) for g in scene.groups)


def test_tiers_differ_in_how_much_there_is():
    rng = np.random.default_rng(0)
    counts = {tier: {scenes.sample(rng, tier).count for _ in range(200)} for tier in scenes.TIERS}
    assert counts == {"easy": {1}, "medium": {2, 3, 4}, "hard": {2, 3, 4}}


def test_everything_follows_from_the_seed():
    assert scenes.evaluation_scenes(20, "hard") == scenes.evaluation_scenes(50, "hard")[:20]
    first, second = (pictures(sample_many(5, seed=3)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_evaluation_prompts_take_tiers_in_turn_and_stay_the_same():
    cases = captions.evaluation_prompts(5, seed=3)
    assert cases == captions.evaluation_prompts(5, seed=3)
    assert cases[:2] != captions.evaluation_prompts(2, seed=4)
    for place, tier in enumerate(scenes.TIERS):
        of_tier = scenes.evaluation_scenes(2, tier, seed=3)
        assert [scene for scene, _ in cases[place::3]] == of_tier[: len(cases[place::3])]
    assert [scene for scene, _ in captions.evaluation_prompts(2, "hard", seed=3)] == of_tier
    assert all(scene.background in prompt for scene, prompt in cases)
