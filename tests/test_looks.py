"""Looks before full previews: the same candidates at half size or after some steps, and only the best go on."""

import dataclasses
import itertools
import json
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import ses_jax
from ses_jax.engine import fidelity, looks, outline, program, resume, tasks
from ses_jax.engine import search as engine
from ses_jax.engine.fidelity import Look, Stage
from ses_jax.loading import partition
from ses_jax.pipelines import sampler
from ses_jax.rewards.reward import Reward
from ses_jax.searchers import wavelet

PROMPTS = ["a cat", "two blue squares"]
SETTINGS = {"budget": 13, "population": 10, "elites": 4, "preview_steps": 4, "progress": False}
PLAN = "half3:0.5>early2:0.5"


def velocity(params, latents, sigma, condition):
    drift = jnp.sin(3 * latents) + jnp.roll(latents, 1, axis=-1) * sigma[:, None, None, None]
    return drift * params["gain"] + condition[:, :1, None, None]


def sigmas(steps, height, width):
    return np.linspace(1, 0, steps + 1, dtype=np.float32) ** (width / 16)


def pipeline(mesh=None):
    """The toy with a schedule that depends on the size, and a velocity that mixes neighbours."""
    return dataclasses.replace(toy.pipeline(mesh=mesh), velocity=velocity, sigmas=sigmas)


PIPELINE, REWARD = pipeline(), toy.brightness()


@pytest.fixture(scope="module")
def full():
    """Independent noises, so that candidates are the same whatever is known of them."""
    return ses_jax.search(PROMPTS[0], model=PIPELINE, reward=REWARD, searcher="best-of-n", **SETTINGS)


@pytest.fixture(scope="module")
def looked():
    run = {"model": PIPELINE, "reward": REWARD, "searcher": "best-of-n", **SETTINGS}
    return ses_jax.search(PROMPTS[0], fidelity=PLAN, **run)


def scores(result):
    return [row["score"] for row in result.history]


# The same candidate at half size


@pytest.mark.quick
@pytest.mark.parametrize("level", [2, 3])
def test_half_the_noise_has_the_same_low_band(key, level):
    noise = jax.random.normal(key, (2, 3, 16, 24))
    low, _ = wavelet.split(noise, level=level)
    np.testing.assert_allclose(wavelet.split(wavelet.half(noise), level=level - 1)[0], low, atol=1e-6)


@pytest.mark.quick
def test_half_of_gaussian_noise_is_gaussian_noise():
    """An orthonormal map of independent standard normal numbers gives such numbers."""
    rows = np.asarray(wavelet.half(jnp.eye(48).reshape(48, 6, 8)).reshape(48, 12)).T
    np.testing.assert_array_equal(rows @ rows.T, np.eye(12))


@pytest.mark.quick
def test_an_early_look_is_a_loop_that_stops(key):
    noise = jax.random.normal(key, (2, 3, 4, 4))
    sigmas = np.array([1.0, 0.8, 0.3, 0.1, 0.0], np.float32)

    def velocity(x, sigma):
        return jnp.sin(x) + sigma[:, None, None, None] * x

    expected = np.asarray(noise, np.float64)
    for now, after in itertools.pairwise(sigmas[:3]):
        v = np.sin(expected) + now * expected
        clean, expected = expected - now * v, expected + (after - now) * v
    latents, predicted = sampler.predict(velocity, noise, sigmas[:3])
    np.testing.assert_allclose(latents, expected, atol=1e-6)
    np.testing.assert_allclose(predicted, clean, atol=1e-6)
    whole = sampler.denoise(velocity, noise, sigmas)
    np.testing.assert_allclose(sampler.denoise(velocity, latents, sigmas[2:]), whole, atol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize(("evaluations", "at"), [(1, [0]), (3, [0, 2, 4]), (4, [0, 1, 3, 4]), (6, range(6))])
def test_a_forecast_carries_velocities_on_in_a_straight_line(key, evaluations, at):
    noise = jax.random.normal(key, (2, 3, 4, 4))
    sigmas = np.array([1.0, 0.9, 0.7, 0.55, 0.3, 0.1, 0.0], np.float32)
    seen = []

    def velocity(x, sigma):
        jax.debug.callback(lambda s: seen.append(float(s[0])), sigma)
        return jnp.sin(x) + sigma[:, None, None, None] * x

    expected, known = np.asarray(noise, np.float64), []
    for step, (now, after) in enumerate(itertools.pairwise(sigmas.astype(np.float64))):
        if step in at:
            known.append((now, np.sin(expected) + now * expected))
        line = known[-1][1]
        if len(known) > 1:
            (s0, v0), (s1, v1) = known[-2:]
            line = v0 + (now - s0) / (s1 - s0) * (v1 - v0)
        expected = expected + (after - now) * line
    found = sampler.forecast(velocity, noise, sampler.forecast_plan(sigmas, evaluations))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(seen, sigmas[list(at)], rtol=1e-6)


# Plans


@pytest.mark.quick
def test_plans_are_read_and_written():
    half, early = Look("half", None, Fraction(3, 10)), Look("early", 4, Fraction(1, 2))
    assert fidelity.load(" Half:0.30 , early4:1/2").looks == (half, early)
    for text in (
        "full",
        "half:0.3>early4:0.5",
        "steps4:1/3",
        "half2:1",
        "cached3:0.5",
        "unguided-half:0.3>unguided-steps2:0.5",
    ):
        assert str(fidelity.load(text)) == text
        assert ses_jax.SearchConfig(fidelity=text).as_json()["fidelity"] == text
    assert fidelity.load("auto") == fidelity.load("cached:1/5")
    assert hash(fidelity.load("half:0.5")) == hash(fidelity.load("half:1/2"))


@pytest.mark.quick
def test_stages_counted_by_hand():
    plan = fidelity.load("half:0.3>steps2:0.5>early3:0.5>early5:0.1")
    expected = [Stage(True, 8, 10), Stage(False, 2, 3), Stage(False, 3, 2), Stage(False, 2, 1), Stage(False, 3, 1)]
    assert list(plan.stages(10, 8)) == expected
    assert fidelity.load("steps1:0.07").counts(100) == [100, 7]  # 0.07 * 100 is more than 7 in floats
    assert fidelity.load("early1:0.01").counts(1) == [1, 1]
    steps = plan.evaluations(21, 10, 8, lambda form: Fraction(1, form.part**2))
    assert steps == 2 * (80 / 4 + 6 + 6 + 2 + 3) + (8 / 4 + 2 + 3 + 2 + 3)
    assert [next(fidelity.load("auto").stages(10, steps)).steps for steps in (2, 4, 8, 10)] == [1, 2, 4, 4]
    assert list(fidelity.load("unguided-half2:0.5").stages(4, 3)) == [Stage(True, 2, 4, False), Stage(False, 3, 2)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"fidelity": "quarter:0.5"},
            "'quarter:0.5' is no look; known forms are full, auto, or looks such as",
        ),
        ({"fidelity": "half"}, "'half' is no look"),
        ({"fidelity": "early:0.5"}, "'early:0.5' is no look"),
        ({"fidelity": "half:0.5>"}, "'' is no look"),
        ({"fidelity": "half:nan"}, "'half:nan' is no look"),
        ({"fidelity": "half:0"}, "the share 0 that goes on must be more than 0 and at most 1"),
        ({"fidelity": "half:1.5"}, "the share 1.5 that goes on"),
        ({"fidelity": 0.3}, "fidelity=0.3 is not full, auto, or looks such as"),
        ({"fidelity": "early4:0.5"}, "early4 needs more than preview_steps=4"),
        ({"fidelity": "steps5:0.5"}, "steps5 needs more than preview_steps=4"),
        ({"fidelity": "cached4:0.5"}, "cached4 needs more than preview_steps=4"),
        ({"fidelity": "cached:0.5", "preview_steps": 1}, "cached needs more than preview_steps=1"),
        ({"fidelity": "unguided-early2:0.5"}, "'unguided-early2:0.5' is a part of the preview and so guided"),
        ({"fidelity": "unguided-steps2:0.5"}, "there is no classifier-free guidance to leave out; leave unguided- out"),
        ({"fidelity": "early2:0.5>early2:0.5"}, "early2 must come after more than 2 steps"),
        (
            {"fidelity": "half:1/3", "width": 20},
            "so width=20 must be a multiple of 8; try 16 or 24",
        ),
        ({"fidelity": "early1:0.5", "budget": None, "nfe": 3}, "nfe=3 is less than the 4 network evaluations"),
        ({"fidelity": "half:0.5", "budget": None, "nfe": 4}, "nfe=4 is less than the 5 network evaluations"),
    ],
)
def test_bad_plans_are_refused_before_any_work(monkeypatch, settings, message):
    monkeypatch.setattr(engine, "search_prompts", None)
    with pytest.raises(ValueError, match=re.escape(message)):
        ses_jax.search("a", **{"model": PIPELINE, "reward": REWARD, **SETTINGS} | settings)


def test_noise_that_half_the_size_does_not_halve_is_refused(monkeypatch):
    odd = dataclasses.replace(PIPELINE, noise_shape=lambda height, width: (3, height + 1, width + 1))
    monkeypatch.setattr(engine, "search_prompts", None)
    with pytest.raises(ValueError, match=r"noise \(3, 9, 9\) of such images is not half of \(3, 17, 17\)"):
        ses_jax.search("a", model=odd, reward=REWARD, fidelity="half:0.5", **SETTINGS)


# Searches


def test_equals_looks_written_out_by_hand(full, looked):
    """Of both generations, the second of three candidates within the budget."""
    noise = candidates_noise()
    small = ses_jax.generate(PIPELINE, PROMPTS[:1] * 13, noise=jax.jit(wavelet.half)(noise), height=8, width=8, steps=3)
    first = REWARD(small, PROMPTS[0])
    second = REWARD(predicted_after_two(noise), PROMPTS[0])
    expected = {index: [] for index in range(13)}
    for members, counts in ((range(10), (5, 3)), (range(10, 13), (2, 1))):
        left = list(members)
        for said, count in zip((first, second), counts, strict=True):
            for index in left:
                expected[index].append(said[index])
            left = sorted(left, key=lambda i: (i != 0, -said[i]))[:count]
        for index in members:
            row = looked.history[index]
            np.testing.assert_allclose(row["looks"], expected[index], atol=1e-5)
            assert (row["score"] is not None) == (index in left)
            if index in left:
                np.testing.assert_allclose(row["score"], full.history[index]["score"], atol=1e-6)
    assert sum(score is not None for score in scores(looked)) == 4
    best = np.fmax.accumulate([np.nan if score is None else score for score in scores(looked)])
    assert [row["best"] for row in looked.history] == best.tolist()
    assert looked.score == best[-1]
    np.testing.assert_allclose(looked.baseline_score, full.baseline_score, atol=1e-6)
    assert all("looks" not in row for row in full.history)


def test_a_cached_look_is_the_preview_with_a_velocity_carried_on(full):
    """Of four steps, the network runs at the first and the third."""
    run = {"model": PIPELINE, "reward": REWARD, "searcher": "best-of-n", "fidelity": "cached2:0.3", **SETTINGS}
    result = ses_jax.search(PROMPTS[0], **run)
    condition, sigmas = PIPELINE.encode(PIPELINE.params, PIPELINE.tokenize(PROMPTS[:1])), PIPELINE.sigmas(4, 16, 16)
    noise, before, slope = candidates_noise(), None, 0.0
    for step, (now, after) in enumerate(itertools.pairwise(sigmas)):
        if step % 2 == 0:
            v = PIPELINE.velocity(PIPELINE.params, noise, jnp.full(len(noise), now), condition)
            slope = 0.0 if before is None else (v - before[1]) / (now - before[0])
            before = now, v
        noise = noise + (after - now) * (v + (now - before[0]) * slope)
    said = REWARD(PIPELINE.decode(PIPELINE.params, noise), PROMPTS[0])
    np.testing.assert_allclose([row["looks"][0] for row in result.history], said, atol=1e-5)
    kept = [score for score in zip(scores(result), scores(full), strict=True) if score[0] is not None]
    assert len(kept) == 3 + 1
    np.testing.assert_allclose(*np.transpose(kept), atol=1e-6)


@jax.jit
def candidates_noise():
    """Independent draws, the base noise first."""
    noise_key, key = tasks.prompt_keys(0, 0)
    draws = [jax.random.normal(jax.random.fold_in(key, g), (10, 3, 16, 16)) for g in range(2)]
    return jnp.concatenate(draws)[:13].at[0].set(tasks.base_noise(noise_key, (3, 16, 16)))


@jax.jit
def predicted_after_two(noise):
    """Images that the second of four steps predicts."""
    condition, sigmas = PIPELINE.encode(PIPELINE.params, PIPELINE.tokenize(PROMPTS[:1])), PIPELINE.sigmas(4, 16, 16)
    for now, after in itertools.pairwise(sigmas[:3]):
        v = PIPELINE.velocity(PIPELINE.params, noise, jnp.full(len(noise), now), condition)
        clean, noise = noise - now * v, noise + (after - now) * v
    return PIPELINE.decode(PIPELINE.params, clean)


def test_chunks_meshes_and_neighbours_change_nothing():
    """Of a standardised mixture, whose looks are standardised within what they see."""
    reward = toy.mixture(red=1.0, blue=-0.5, green=0.0)
    run = {"reward": reward, "fidelity": PLAN, **SETTINGS}
    alone = ses_jax.search(PROMPTS, model=PIPELINE, **run)
    on_mesh = pipeline(mesh=partition.parse_mesh("data=2,model=1", jax.devices()[:2]))
    together = ses_jax.search(PROMPTS, model=on_mesh, prompts_at_once=2, chunk=10, **run)
    for a, b in zip(together, alone, strict=True):
        assert [score is None for score in scores(a)] == [score is None for score in scores(b)]
        for row, other in zip(a.history, b.history, strict=True):
            np.testing.assert_allclose(row["looks"], other["looks"], atol=1e-3)
            assert set(row["components"]) == {"red", "blue", "green"}
            if row["score"] is not None:
                np.testing.assert_allclose(row["score"], other["score"], atol=1e-3)
        np.testing.assert_allclose(a.noise, b.noise, atol=1e-5)
    first = np.array([row["looks"][0] for row in alone[0].history[:10]])
    np.testing.assert_allclose([first.mean(), first.max() > 0.5, first.min() < -0.5], [0, 1, 1], atol=1e-3)


def on_host(images, prompts):
    return np.asarray(images).mean(axis=(1, 2, 3))


@pytest.mark.parametrize("more", [{}, {"red": -0.5, "blue": 0.3}], ids=["alone", "in a mixture"])
def test_the_host_looks_as_the_device_does(more):
    """Several prompts on a mesh, and what is seen of candidates too."""
    model = pipeline(mesh=partition.parse_mesh("data=2,model=1", jax.devices()[:2]))
    run = {"fidelity": "half3:0.7>early1:0.7>early2:0.5", "prompts_at_once": 2, "chunk": 4, **SETTINGS}
    host, device = ses_jax.load_reward(on_host, traceable=False), toy.brightness()
    rest = toy.mixture(**more).parts
    sides = [
        ses_jax.search(PROMPTS, model=model, reward=Reward((*reward.parts, *rest)), **run) for reward in (host, device)
    ]
    for found, wanted in zip(*sides, strict=True):
        assert [score is None for score in scores(found)] == [score is None for score in scores(wanted)]
        for row, other in zip(found.history, wanted.history, strict=True):
            np.testing.assert_allclose(row["looks"], other["looks"], atol=1e-3)
            np.testing.assert_allclose(row["score"] or np.nan, other["score"] or np.nan, atol=1e-3)
        assert [shot.index for shot in found.film] == [shot.index for shot in wanted.film]
        np.testing.assert_allclose(found.noise, wanted.noise, atol=1e-5)


class KilledError(Exception):
    pass


def test_a_killed_search_goes_on_bit_equal(tmp_path, monkeypatch, looked):
    run = {"model": PIPELINE, "reward": REWARD, "searcher": "best-of-n", "out": tmp_path, "resume": True, **SETTINGS}

    def killed(*args):
        save(*args)
        raise KilledError

    save = resume.save
    monkeypatch.setattr(resume, "save", killed)
    with pytest.raises(KilledError):
        ses_jax.search(PROMPTS[0], fidelity=PLAN, **run)
    monkeypatch.setattr(resume, "save", save)
    with pytest.raises(ValueError, match="other settings \\(fidelity "):
        ses_jax.search(PROMPTS[0], fidelity="half:0.5", **run)
    found = ses_jax.search(PROMPTS[0], fidelity=PLAN, **run)
    assert found.history == looked.history
    np.testing.assert_array_equal(found.noise, looked.noise)


def test_an_outline_is_of_the_program_that_runs():
    model = pipeline(mesh=partition.parse_mesh("data=2,model=1", jax.devices()[:2]))
    config = ses_jax.SearchConfig(fidelity=PLAN, chunk=7, budget=13, preview_steps=4).resolve(model)
    task = tasks.prepare(model, REWARD, config, PROMPTS, [0, 1], shown=program.FILM)
    (runs,) = tasks.lower_generation(task, tasks.initial_state(task), 7)
    shapes = outline.outline(model, REWARD, config, model.tokenize(PROMPTS))
    (lowered,) = outline.lower_generation(shapes, 7)
    assert lowered.as_text() == runs.as_text()


def test_rows_of_a_file_may_have_their_own_looks(tmp_path):
    host = ses_jax.load_reward(on_host, traceable=False)
    rows = [{"prompt": "a", "fidelity": "full"}, {"prompt": "b", "fidelity": "early9:0.5"}, {"prompt": "c"}]
    summary = ses_jax.search_many(rows[:2], out=tmp_path, model=PIPELINE, reward=host, **SETTINGS)
    assert summary["failed"] == 1
    assert json.loads((tmp_path / "00000" / "result.json").read_text())["config"]["fidelity"] == "full"
    assert "early9 needs more than preview_steps=4" in (tmp_path / "results.jsonl").read_text()


@pytest.mark.quick
@pytest.mark.parametrize(("generation", "expected"), [(0, [0, 1, 3]), (1, [1, 3, 0])])
def test_what_is_not_finite_or_beyond_the_budget_comes_last(generation, expected):
    """But for the base noise, which always goes on."""
    field = looks.Field(jnp.arange(6)[None], jnp.arange(6.0)[None], jnp.arange(6.0)[None], jnp.int32(4))
    totals = field.hide(jnp.array([[jnp.nan, 3.0, jnp.inf, 1.0, 9.0, 9.0]]), jnp.nan)
    best = looks._best(None, Look("half", None, Fraction(1, 2)), jnp.int32(generation), field, totals)
    assert (best.index.tolist(), best.noise.tolist(), int(best.counted)) == ([expected], [expected], 2)
    counted = [index if index in expected[:2] else np.nan for index in range(6)]
    np.testing.assert_array_equal(best.in_place(best.noise, 6), [counted])
