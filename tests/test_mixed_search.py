"""Searches by mixtures, with reported rewards, and by a user's traceable function."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import ses_jax
from ses_jax.engine import generation
from ses_jax.rewards import mixture
from ses_jax.rewards import reward as rewards

PROMPT = "a bright image"
SETTINGS = {"budget": 27, "population": 8, "elites": 3, "progress": False}


@pytest.fixture(scope="module")
def pipeline():
    return toy.pipeline()


def columns(result):
    """Components `[n, parts]` of a result's history."""
    return np.array([list(row["components"].values()) for row in result.history], np.float32)


def scores(result):
    return np.array([row["score"] for row in result.history])


def test_history_ends_in_scores_standardised_over_the_whole_search(pipeline):
    result = ses_jax.search(PROMPT, model=pipeline, reward=toy.mixture(red=1.0, blue=0.5), **SETTINGS)
    components = columns(result)
    assert list(result.history[0]["components"]) == ["red", "blue"]
    expected = ((components - components.mean(axis=0)) / components.std(axis=0)) @ [1.0, 0.5]
    np.testing.assert_allclose(scores(result), expected, atol=1e-3)
    assert result.score == max(scores(result)) >= result.baseline_score == scores(result)[0]
    assert result.config["reward"] == "1 red + 0.5 blue"


def test_elites_follow_the_scores_as_they_change(pipeline):
    """Each generation draws around the best of all candidates so far, under the statistics of that moment."""
    reward = toy.mixture(red=1.0, blue=1.0)
    result = ses_jax.search(PROMPT, model=pipeline, reward=reward, **SETTINGS)
    components = columns(result)
    for generations in (1, 2, 3):
        budget = 8 * generations
        shorter = ses_jax.search(PROMPT, model=pipeline, reward=reward, **SETTINGS | {"budget": budget})
        np.testing.assert_allclose(columns(shorter), components[:budget], atol=1e-5)
        expected = mixture.standardized_sum(components[:budget], (1.0, 1.0), components[:budget])
        np.testing.assert_allclose(scores(shorter), expected, atol=1e-3)
        best = ses_jax.generate(pipeline, PROMPT, noise=shorter.noise[None], steps=shorter.config["preview_steps"])
        winner = columns(shorter)[np.argmax(scores(shorter))]
        np.testing.assert_allclose(reward.components(best, [PROMPT])[0], winner, atol=1e-4)


def test_the_plain_sum_on_request(pipeline):
    reward = toy.mixture(red=1.0, blue=-2.0)
    result = ses_jax.search(PROMPT, model=pipeline, reward=reward, standardize=False, **SETTINGS)
    np.testing.assert_allclose(scores(result), columns(result) @ [1.0, -2.0], rtol=1e-5)
    np.testing.assert_allclose(result.score, max(scores(result)))


def test_standardising_balances_parts_of_different_units(pipeline):
    """With raw sums the part of large numbers decides alone; standardised, both improve."""

    def run(standardize, scale):
        reward = rewards.Reward(
            (
                rewards.Part("red", 1.0, scorer=toy.scorer("red", lambda x: scale * x[..., 0].mean(axis=(1, 2)))),
                rewards.Part("blue", 1.0, scorer=toy.scorer("blue", lambda x: x[..., 2].mean(axis=(1, 2)))),
            )
        )
        settings = SETTINGS | {"budget": 80, "standardize": standardize}
        result = ses_jax.search([PROMPT] * 4, model=pipeline, reward=reward, **settings)
        return np.mean([r.components["blue"]["score"] - r.components["blue"]["baseline_score"] for r in result])

    balanced = run(True, 1000.0)
    assert balanced > run(False, 1000.0)
    np.testing.assert_allclose(balanced, run(True, 1.0), atol=0.02)


def test_reported_rewards_score_everything_and_drive_nothing(pipeline, tmp_path):
    both = toy.mixture(red=1.0, blue=1.0)
    red = dataclasses.replace(both, parts=both.parts[:1])
    alone = ses_jax.search(PROMPT, model=pipeline, reward=red, **SETTINGS)
    result = ses_jax.search(PROMPT, model=pipeline, reward=red, report=both, out=tmp_path, **SETTINGS)
    np.testing.assert_allclose(scores(result), scores(alone), rtol=1e-6)
    assert list(result.components) == ["red", "blue"]
    for name, index in (("red", 0), ("blue", 1)):
        winner = int(np.argmax(scores(result)))
        assert result.components[name]["score"] == result.history[winner]["components"][name]
        assert result.components[name]["baseline_score"] == result.history[0]["components"][name]
        finals = np.asarray(ses_jax.generate(pipeline, PROMPT, noise=result.noise[None]))
        expected = toy.mixture(**{name: 1.0})(finals, [PROMPT])[0]
        np.testing.assert_allclose(result.components[name]["final_score"], expected, rtol=1e-4, err_msg=str(index))
    assert json.loads((tmp_path / "result.json").read_text())["components"] == result.components
    assert alone.components == {}
    assert "components" not in alone.history[0]


def test_a_reported_reward_may_be_nan(pipeline):
    def broken(images, prompts):
        return np.full(len(prompts), np.nan)

    result = ses_jax.search(PROMPT, model=pipeline, reward=toy.brightness(), report=broken, **SETTINGS)
    assert np.isfinite(scores(result)).all()
    assert result.components["broken"]["final_score"] is None


def test_a_traceable_function_is_compiled_into_the_step(pipeline):
    traced = []

    def redness(images, prompts):
        traced.append(isinstance(images, jax.core.Tracer))
        return images[..., 0].mean(axis=(1, 2))

    result = ses_jax.search(PROMPT, model=pipeline, reward=redness, **SETTINGS)
    assert all(traced)
    assert result.config["reward"] == "redness"
    expected = ses_jax.search(PROMPT, model=pipeline, reward=toy.mixture(red=1.0), **SETTINGS)
    np.testing.assert_allclose(scores(result), scores(expected), atol=1e-6)


def test_a_traceable_function_sees_its_prompt(pipeline):
    def length(images, prompts):
        assert len(prompts) == len(images)
        return images.mean(axis=(1, 2, 3)) + jnp.array([len(prompt) for prompt in prompts])

    one, other = ses_jax.search(["a", "bbb"], model=pipeline, reward=length, **SETTINGS)
    assert 1 < one.score < 2 < 3 < other.score < 4


@pytest.mark.parametrize("stated", [None, False])
def test_host_code_is_found_out_or_stated(pipeline, stated):
    kinds = []

    def judge(images, prompts):
        kinds.append(type(images))
        return np.asarray(images)[..., 0].mean(axis=(1, 2))

    reward = ses_jax.load_reward(judge, traceable=stated)
    assert reward.on_host
    result = ses_jax.search(PROMPT, model=pipeline, reward=reward, **SETTINGS)
    expected = ses_jax.search(PROMPT, model=pipeline, reward=toy.mixture(red=1.0), **SETTINGS)
    np.testing.assert_allclose(scores(result), scores(expected), atol=1e-6)


def test_a_function_that_looks_at_no_image_is_host_code():
    assert ses_jax.load_reward(lambda images, prompts: np.random.default_rng(0).random(len(prompts))).on_host
    assert ses_jax.load_reward(lambda images, prompts: [1.0] * len(prompts)).on_host
    assert not ses_jax.load_reward(lambda images, prompts: images.sum(axis=(1, 2, 3))).on_host
    assert not ses_jax.load_reward(lambda images, prompts: np.zeros(3), traceable=True).on_host


def test_scorers_and_host_code_mix(pipeline):
    def judge(images, prompts):
        return np.asarray(images)[..., 2].mean(axis=(1, 2))

    reward = rewards.Reward((*toy.mixture(red=1.0).parts, rewards.Part("judge", 0.5, function=judge)))
    result = ses_jax.search(PROMPT, model=pipeline, reward=reward, chunk=3, **SETTINGS)
    expected = ses_jax.search(PROMPT, model=pipeline, reward=toy.mixture(red=1.0, blue=0.5), **SETTINGS)
    np.testing.assert_allclose(columns(result), columns(expected) - [[0, 200]], atol=1e-4)
    np.testing.assert_allclose(scores(result), scores(expected), atol=1e-3)


def test_one_compilation_for_all_prompts_of_a_mixture(pipeline, fresh_programs):
    reward = toy.mixture(red=1.0, green=1.0, blue=0.0)
    before = generation.generation_step.cache_size()
    ses_jax.search(["a", "bb", "ccc"], model=pipeline, reward=reward, **SETTINGS)
    assert generation.generation_step.cache_size() - before == 1


def test_bad_reports_are_refused(pipeline):
    with pytest.raises(ValueError, match="unknown reward 'nice'"):
        ses_jax.search(PROMPT, model=pipeline, reward=toy.brightness(), report=["nice"], **SETTINGS)
    with pytest.raises(ValueError, match="several rewards need a source each"):
        ses_jax.load_reward({"clip": 1.0, "pick": 1.0}, source="somewhere")
