"""Rewards as a user calls them: names, functions and mixtures of both, on images and prompts."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import ses_jax
from ses_jax.engine import models
from ses_jax.rewards import spec

PROMPTS = ["a cat", "", "\u732b on a caf\u00e9 table \U0001f431", "many words " * 30]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two CLIP checkpoints with different weights."""
    found = {}
    for seed, kind in enumerate(("clip", "pick")):
        found[kind] = tmp_path_factory.mktemp(kind)
        oracle.save_clip(found[kind], oracle.clip(act="gelu", seed=seed))
    return found


@pytest.fixture(scope="module")
def reward(folders):
    return ses_jax.load_reward("clip", source=folders["clip"])


@pytest.fixture(scope="module")
def images():
    # Of the networks' own size: a resize may round a pixel the other way in another batch.
    return np.random.default_rng(0).random((4, 56, 56, 3), np.float32)


def red(images, prompts):
    return np.asarray(images)[..., 0].mean(axis=(1, 2))


def test_scores_follow_their_images_and_prompts(reward, images):
    scores = reward(images, PROMPTS)
    order = [2, 0, 3, 1]
    rounding = {"rtol": 1e-5, "atol": 1e-5 * np.abs(scores).max()}  # of cosines, however small they are
    np.testing.assert_allclose(reward(images[order], [PROMPTS[i] for i in order]), scores[order], **rounding)
    for i in range(4):
        np.testing.assert_allclose(reward(images[i : i + 1], PROMPTS[i : i + 1]), scores[i : i + 1], **rounding)
    assert len(set(scores.tolist())) == 4


def test_a_mixture_called_on_its_own_is_the_weighted_sum(folders, images):
    mixture = ses_jax.load_reward({"clip": 2.0, "pick": -0.5, red: 3.0}, source=folders)
    alone = [ses_jax.load_reward(kind, source=folder)(images, PROMPTS) for kind, folder in folders.items()]
    assert not np.allclose(*alone)
    expected = 2 * alone[0] - 0.5 * alone[1] + 3 * images[..., 0].mean(axis=(1, 2))
    np.testing.assert_allclose(mixture(images, PROMPTS), expected, rtol=1e-5)
    np.testing.assert_allclose(mixture.components(images, PROMPTS)[:, 1], alone[1], rtol=1e-5)
    assert mixture.name == "2 clip + -0.5 pick + 3 red"
    assert mixture.on_host


def test_a_reported_reward_does_not_enter(reward, images):
    both = spec.with_report(reward, ses_jax.load_reward(red))
    np.testing.assert_array_equal(both(images, PROMPTS), reward(images, PROMPTS))
    assert [part.name for part in both.parts] == ["clip", "red"]
    assert spec.with_report(reward, reward).parts == reward.parts
    assert both.name == "clip"


def test_a_loaded_reward_counts_as_its_parts(folders, reward, images):
    other = ses_jax.load_reward("clip", source=folders["clip"], name="second")
    mixture = ses_jax.load_reward({other: 2.0, red: 3.0, reward: -1.0})
    assert [(part.name, part.weight, part.on_host) for part in mixture.parts] == [
        ("second", 2.0, False),
        ("red", 3.0, True),
        ("clip", -1.0, False),
    ]
    both = spec.with_report(reward, ses_jax.load_reward({other: 1.0}))
    np.testing.assert_array_equal(both(images, PROMPTS), reward(images, PROMPTS))
    assert [part.weight for part in both.parts] == [1.0, 0.0]


def test_two_scorers_of_a_name_are_told_apart(folders, reward):
    same = ses_jax.load_reward("clip", source=folders["clip"])
    with pytest.raises(ValueError, match=r"two parts of the name 'clip'; load one with load_reward\(name=...\)"):
        ses_jax.load_reward({same: 1.0, reward: 1.0})
    with pytest.raises(ValueError, match="report: the reward has another scorer of the name 'clip'"):
        spec.with_report(reward, same)
    with pytest.raises(ValueError, match="name='both' is for one part, and the reward has 2"):
        ses_jax.load_reward({"clip": 1.0, red: 1.0}, source={"clip": folders["clip"]}, name="both")


def test_image_count_must_match_prompt_count(reward):
    with pytest.raises(ValueError, match="3 images need as many prompts or a single one, got 2"):
        reward(jnp.zeros((3, 64, 64, 3)), ["a", "b"])


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match=r"unknown reward 'aesthetics'; known: .*clip"):
        ses_jax.load_reward("aesthetics")
    with pytest.raises(ValueError, match="unknown reward 'aesthetics'"):
        spec.check({"clip": 1.0, "aesthetics": 2.0})
    with pytest.raises(ValueError, match="at least one part"):
        spec.check({})


def judge(weights, **options):
    @dataclasses.dataclass(**options)
    class Judge:
        weights: Any

        def __call__(self, images, prompts):
            return [0.0] * len(prompts)

    return Judge(weights)


def test_a_function_that_is_not_hashable_is_told_how():
    told = "a Judge can be called but is not hashable; a dataclass is with eq=False or frozen=True"
    for kind in (judge(1.0), judge(np.ones(2), frozen=True)):
        with pytest.raises(ValueError, match=f"reward: {told}"):
            ses_jax.load_reward(kind)
        with pytest.raises(ValueError, match=f"report: {told}"):
            models.check_rewards(None, ["clip", kind])
    for kind in (judge(1.0, frozen=True), judge(np.ones(2), eq=False)):
        assert ses_jax.load_reward(kind).on_host
