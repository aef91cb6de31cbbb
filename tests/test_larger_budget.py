"""Going on with a larger budget: as if it had been given from the start, and only what is missing is scored."""

import dataclasses
import json

import batch_runs
import numpy as np
import pytest
import toy
from batch_runs import PIPELINE, PROMPTS, REWARD, SETTINGS

import ses_jax
from ses_jax.engine import kept
from ses_jax.rewards.reward import Part, Reward

POPULATION = SETTINGS["population"]
MIXTURE = Reward((*REWARD.parts, *toy.mixture(green=0.5).parts))


def search(prompt=PROMPTS[0], reward=REWARD, **settings):
    settings = {"model": PIPELINE, "progress": False} | SETTINGS | settings
    return ses_jax.search(prompt, reward=reward, **settings)


def counting(fails_at=None, error=RuntimeError):
    """A reward on the host, and the sizes of what it was asked for."""
    calls = []

    def brightness(images, prompts):
        calls.append(len(images))
        if len(calls) == fails_at:
            raise error("judge is down")
        return images.mean(axis=(1, 2, 3))

    return ses_jax.load_reward(brightness, traceable=False), calls


def same(found, expected):
    assert found.history == expected.history
    np.testing.assert_array_equal(found.noise, expected.noise)
    np.testing.assert_array_equal(found.image, expected.image)
    assert (found.score, found.final_score) == (expected.score, expected.final_score)
    assert found.config["budget"] == expected.config["budget"]
    assert seen(found) == seen(expected)


def seen(result):
    return [(shot.generation, shot.index, shot.best, shot.image.tobytes()) for shot in result.film]


@pytest.mark.parametrize("before", [6, 8, 2])
def test_a_finished_search_goes_on_bit_equal(tmp_path, before):
    search(out=tmp_path, budget=before)
    reward, calls = counting()
    found = search(reward=reward, out=tmp_path, resume=True, budget=11)
    same(found, search(budget=11))
    generations = 4 - before // POPULATION  # what the smaller budget did not fill is made again
    assert calls == [POPULATION] * generations + [2]
    scored = 11 - POPULATION * (before // POPULATION)
    assert found.timings["images_per_second"] * found.timings["search"] == pytest.approx(scored)
    assert search(reward=reward, out=tmp_path, resume=True, budget=11).history == found.history
    assert len(calls) == generations + 1


def test_a_mixture_whose_scores_change_as_it_grows_goes_on(tmp_path):
    settings = {"reward": MIXTURE, "out": tmp_path}
    search(**settings, budget=7)
    same(search(**settings, resume=True, budget=14), search(reward=MIXTURE, budget=14))


def test_one_that_was_stopped_goes_on_with_more_although_it_was_not_saved_on_its_way(tmp_path):
    stopped = search(out=tmp_path, budget=9, on_generation=lambda generation, *_: generation == 1)
    assert len(stopped.history) == 6
    reward, calls = counting()
    images = []
    told = {"on_generation": lambda generation, image, scores: images.append((generation, image.size)) or False}
    same(search(reward=reward, out=tmp_path, resume=True, budget=12, **told), search(budget=12))
    assert calls == [POPULATION] * 2 + [2]
    assert images == [(2, (16, 16)), (3, (16, 16))]  # also where the best so far is of before


@pytest.mark.parametrize("fails_at", [2, 4])  # in its second generation, and in the images after its partial third
def test_an_unfinished_one_goes_on_with_more(tmp_path, fails_at):
    with pytest.raises(RuntimeError):
        search(reward=counting(fails_at)[0], out=tmp_path, resume=True, budget=7)
    reward, calls = counting()
    same(search(reward=reward, out=tmp_path, resume=True, budget=11), search(budget=11))
    assert calls == [POPULATION] * (3 if fails_at == 2 else 2) + [2]
    assert not (tmp_path / ".search").exists()


def test_of_a_list_each_goes_on_from_where_it_is(tmp_path):
    search(PROMPTS[:2], out=tmp_path, budget=6)
    search(PROMPTS[0], out=tmp_path / "000", budget=9, resume=True)
    expected = search(PROMPTS[:3], budget=9)
    reward, calls = counting()
    for found, one in zip(search(PROMPTS[:3], reward, out=tmp_path, budget=9, resume=True), expected, strict=True):
        same(found, one) if found.prompt != PROMPTS[0] else None
    assert len(calls) == 2 + 4  # none of the first, one generation of the second, all of the third
    search(PROMPTS[:2], out=tmp_path / "at_once", budget=6, prompts_at_once=2)
    found = search(PROMPTS[:2], out=tmp_path / "at_once", budget=9, prompts_at_once=2, resume=True)
    assert [one.history for one in found] == [one.history for one in expected[:2]]


def test_a_smaller_budget_and_other_settings_are_refused(tmp_path):
    search(out=tmp_path, budget=6)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match="holds a finished search of budget=6, now budget=4; go on with a larger budget"
    ):
        search(out=tmp_path, budget=4, resume=True)
    with pytest.raises(ValueError, match=r"other settings \(seed 0 -> 1, budget 6 -> 9\)"):
        search(out=tmp_path, budget=9, seed=1, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    search(out=tmp_path / "stopped", budget=9, on_generation=lambda generation, *_: generation == 1)
    with pytest.raises(ValueError, match="of which 6 candidates are scored, more than budget=5"):
        search(out=tmp_path / "stopped", budget=5, resume=True)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-40], lambda data: None])
def test_without_its_state_it_begins_anew(tmp_path, caplog, damage):
    search(out=tmp_path, budget=6)
    file = tmp_path / kept.STATE
    data = damage(file.read_bytes())
    file.unlink() if data is None else file.write_bytes(data)
    reward, calls = counting()
    same(search(reward=reward, out=tmp_path, budget=9, resume=True), search(budget=9))
    assert calls == [POPULATION] * 3 + [2]
    assert ("the search begins anew" in caplog.text) == (data is not None)


def test_the_state_of_another_search_is_not_used(tmp_path, caplog):
    search(out=tmp_path, budget=6)
    (tmp_path / "result.json").unlink()
    same(search(out=tmp_path, budget=9, seed=1, resume=True), search(budget=9, seed=1))
    assert "is of a search with other settings (seed 0 -> 1)" in caplog.text


def test_what_would_be_large_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "LARGEST", 100)
    search(out=tmp_path, budget=6)
    assert not (tmp_path / kept.STATE).exists()


@pytest.mark.parametrize("finished", [True, False])
def test_a_search_that_keeps_nothing_leaves_no_state_of_the_one_it_replaced(tmp_path, finished):
    search(out=tmp_path, budget=6)
    if not finished:
        (tmp_path / "result.json").unlink()
    search(out=tmp_path, budget=2, overwrite=True)
    same(search(out=tmp_path, budget=4, resume=True), search(budget=4))


def test_a_run_of_many_prompts_goes_on(tmp_path):
    rows = [*({"prompt": prompt} for prompt in PROMPTS[:2]), {"prompt": PROMPTS[2], "budget": 3}]
    batch_runs.run(rows, tmp_path / "whole", budget=9)
    batch_runs.run(rows, tmp_path / "out", budget=6)
    fixed = batch_runs.finished(tmp_path / "out")["00002"]
    with pytest.raises(ValueError, match=r"started with budget=6, now budget=9; .* larger budget and resume=True"):
        batch_runs.run(rows, tmp_path / "out", budget=9)
    with pytest.raises(KeyboardInterrupt):
        batch_runs.run(rows, tmp_path / "out", budget=9, resume=True, reward=counting(3, KeyboardInterrupt)[0])
    reward, calls = counting()
    summary = batch_runs.run(rows, tmp_path / "out", budget=9, resume=True, reward=reward)
    assert (summary["finished"], calls) == (3, [POPULATION, 2])
    assert batch_runs.stable_files(tmp_path / "out") == batch_runs.stable_files(tmp_path / "whole")
    assert batch_runs.finished(tmp_path / "out")["00002"] == fixed
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["budget"] == 9
    with pytest.raises(ValueError, match="started with budget=9, now budget=6"):
        batch_runs.run(rows, tmp_path / "out", budget=6, resume=True)


def channel(name, place):
    """A function by that name that looks at one channel."""

    def score(images, prompts):
        return images[..., place].mean((1, 2))

    score.__name__ = name
    return score


@pytest.mark.parametrize("now", [[channel("blue", 2)], [], [channel("red", 0), channel("green", 1)]])
def test_one_that_reported_something_else_is_not_gone_on_with(tmp_path, now):
    reward, _ = counting(fails_at=3)
    settings = {"budget": 9, "out": tmp_path, "resume": True}
    with pytest.raises(RuntimeError, match="judge is down"):
        search(reward=reward, report=[channel("green", 1)], **settings)
    with pytest.raises(ValueError, match=r"unfinished search with other settings \(.*rewards"):
        search(report=now, **settings)


def test_a_scorer_of_the_same_name_from_elsewhere_is_another(tmp_path):
    scorer = toy.scorer("clip", lambda images: images.mean(axis=(1, 2, 3)))
    one, other = (
        Reward((Part("clip", scorer=dataclasses.replace(scorer, source=source)),)) for source in ("here", "there")
    )
    search(reward=one, out=tmp_path, budget=6)
    assert json.loads((tmp_path / "result.json").read_text())["config"]["reward_sources"] == {"clip": "here"}
    with pytest.raises(ValueError, match=r"reward_sources \{'clip': 'here'\} -> \{'clip': 'there'\}"):
        search(reward=other, out=tmp_path, budget=6, resume=True)
