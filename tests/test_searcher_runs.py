"""Whole searches by every searcher: the contract that `test_engine.py` states for the default holds for all of them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import toy

import ses_jax
from ses_jax import cli
from ses_jax.engine import generation, tasks
from ses_jax.engine.config import SearchConfig
from ses_jax.loading import partition
from ses_jax.rewards import reward as rewards
from ses_jax.searchers import elites
from ses_jax.shell import options

PROMPTS = ["a cat", "two blue squares"]
SETTINGS = {"budget": 23, "population": 10, "elites": 4, "progress": False}
PIPELINE = toy.pipeline()


@dataclasses.dataclass(frozen=True)
class Climber:
    """A user's own: steps from the best so far, in the low band."""

    step: float = 0.5
    space: str = "low"

    def init(self, problem):
        return elites.none(problem.space.like, 1)

    def ask(self, problem, key, state, generation):
        return state.points + self.step * problem.draw(key)

    def tell(self, problem, state, points, scores):
        return elites.best(state, points, scores)


SEARCHERS = ["zero-order,anneal=30", "ses,explore=12,renormalise=channel", Climber(), "gradient,climbers=4"]
NAMES = ["zero-order", "ses-explore", "own", "gradient"]


def scores(result):
    return [row["score"] for row in result.history]


@pytest.mark.parametrize("searcher", SEARCHERS, ids=NAMES)
def test_a_search_depends_on_its_key_alone(searcher):
    """Not on its neighbours, the mesh, how many candidates are made at a time, or a larger budget."""
    run = {"reward": toy.brightness(), "searcher": searcher, **SETTINGS}
    alone = ses_jax.search(PROMPTS, model=PIPELINE, **run)
    on_mesh = toy.pipeline(mesh=partition.parse_mesh("data=2,model=2", jax.devices()[:4]))
    together = ses_jax.search(PROMPTS, model=on_mesh, prompts_at_once=2, chunk=7, **run)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(scores(a), scores(b), atol=1e-5)
        np.testing.assert_allclose(a.noise, b.noise, atol=1e-5)
    shorter = ses_jax.search(PROMPTS, model=PIPELINE, **run | {"budget": 13})
    assert [scores(result) for result in shorter] == [scores(result)[:13] for result in alone]


@pytest.mark.parametrize("searcher", SEARCHERS, ids=NAMES)
def test_the_base_is_the_first_candidate_and_the_best_wins(searcher):
    reward = toy.brightness()
    result = ses_jax.search(PROMPTS[0], model=PIPELINE, reward=reward, searcher=searcher, **SETTINGS)
    steps = result.config["preview_steps"]
    base = np.asarray(tasks.base_noise(tasks.prompt_keys(0, 0)[0], (3, 16, 16)))
    for noise, score in ((base, result.baseline_score), (result.noise, result.score)):
        image = ses_jax.generate(PIPELINE, PROMPTS[0], noise=noise[None], steps=steps)
        np.testing.assert_allclose(reward(image, PROMPTS[:1])[0], score, atol=1e-5)
    assert result.score == max(scores(result)) > result.baseline_score == scores(result)[0]
    assert len(set(scores(result))) == 23


class KilledError(Exception):
    pass


def judge(after):
    """A mixture whose part on the host fails after so many calls, as if the machine had gone."""
    calls = []

    def red(images, prompts):
        calls.append(len(images))
        if len(calls) > after:
            raise KilledError
        return np.asarray(images)[..., 0].mean(axis=(1, 2))

    host = ses_jax.load_reward(red, traceable=False)
    return rewards.Reward((*host.parts, *toy.mixture(green=0.5).parts))


@pytest.mark.parametrize("searcher", [*SEARCHERS[:2], "evosax"], ids=[*NAMES[:2], "evosax"])
def test_a_killed_search_goes_on_bit_equal(tmp_path, searcher):
    """Of a standardised mixture, whose whole archive is saved."""
    run = {"model": PIPELINE, "searcher": searcher, **SETTINGS}
    expected = ses_jax.search("a", reward=judge(99), **run)
    with pytest.raises(KilledError):
        ses_jax.search("a", reward=judge(2), out=tmp_path, resume=True, **run)
    with pytest.raises(ValueError, match=r"other settings \(searcher "):
        ses_jax.search("a", reward=judge(99), out=tmp_path, resume=True, **run | {"searcher": "ses,explore=7"})
    found = ses_jax.search("a", reward=judge(99), out=tmp_path, resume=True, **run)
    assert found.history == expected.history
    np.testing.assert_array_equal(found.noise, expected.noise)
    components = np.array([list(row["components"].values()) for row in found.history])
    standardised = ((components - components.mean(axis=0)) / components.std(axis=0)) @ [1.0, 0.5]
    np.testing.assert_allclose(scores(found), standardised, atol=1e-3)
    assert found.score == max(scores(found))
    assert json.loads((tmp_path / "result.json").read_text())["config"]["searcher"] == found.config["searcher"]


def test_equal_searchers_share_a_program(fresh_programs):
    run = {"model": PIPELINE, "reward": toy.brightness(), **SETTINGS}
    before = generation.generation_step.cache_size()
    for searcher in ("zero-order,parents=2", {"name": "zero-order", "parents": 2}):
        ses_jax.search("a", searcher=searcher, **run)
    assert generation.generation_step.cache_size() - before == 1
    ses_jax.search("a", searcher=Climber(0.5), **run)
    ses_jax.search("b", searcher=Climber(0.5), **run)
    assert generation.generation_step.cache_size() - before == 2


def test_no_finite_score_yet_is_no_reason_to_stop():
    """The first generations fail; parents and high bands come from what follows them."""
    calls = []

    def late(images, prompts):
        calls.append(len(images))
        values = np.asarray(images).mean(axis=(1, 2, 3))
        return values if len(calls) > 2 else np.full(len(values), np.nan)

    for searcher in SEARCHERS[:2]:
        calls.clear()
        reward = ses_jax.load_reward(late, traceable=False)
        result = ses_jax.search("a", model=PIPELINE, reward=reward, searcher=searcher, **SETTINGS | {"budget": 30})
        assert 0.5 < np.std(result.noise) < 2
        assert np.isfinite(result.score)


def test_a_bad_searcher_is_refused_before_a_model_is_looked_for(tmp_path, capsys):
    with pytest.raises(
        ValueError, match="searcher='sea' is unknown; known: auto, ses, best-of-n, zero-order, gradient, evosax"
    ):
        ses_jax.search("a", model="no/such/model", searcher="sea")
    arguments = ["search", "a", "--model", "no/such/model", "--searcher", "ses,depth=3", "--out", str(tmp_path)]
    assert cli.main(arguments) == 2
    assert "ses takes renormalise, explore, space" in capsys.readouterr().err


def test_the_shell_takes_names_and_objects(tmp_path, monkeypatch):
    (tmp_path / "my_searchers.py").write_text("from test_searcher_runs import Climber\nslow = Climber(0.1)\n")
    monkeypatch.chdir(tmp_path)

    def searcher(text):
        return SearchConfig(searcher=options.arguments(options.SearchOptions(searcher=text))["searcher"]).searcher

    assert searcher("zero-order,parents=1").parents == 1
    assert searcher("my_searchers:slow").step == 0.1
    with pytest.raises(ValueError, match="searcher 'my_searchers:fast'"):
        searcher("my_searchers:fast")
