"""What a search says that it cost, against counts by hand and against what really runs; budgets in evaluations."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toy

import ses_jax
from ses_jax.engine import cost, outline
from ses_jax.engine import search as engine
from ses_jax.engine.config import SearchConfig
from ses_jax.loading import partition
from ses_jax.pipelines.guidance import both_branches, classifier_free, guided
from ses_jax.pipelines.registry import abstract_pipeline
from ses_jax.planner import plan as planner
from ses_jax.rewards.reward import Part, Reward

# A multiply-add is two: `[3, 16, 16] @ [16, 16]`, `[16, 16, 3] @ [3, 3]` and `[768] @ [768]`.
STEP, DECODE, SCORE = 2 * 3 * 16 * 16 * 16, 2 * 16 * 16 * 3 * 3, 2 * 768
SETTINGS = {"budget": 7, "population": 4, "elites": 2, "preview_steps": 3, "steps": 5, "progress": False}


@functools.cache  # so that tests share programs
def pipeline(ran=None):
    """One matrix product a forward, one to decode; `ran` is called with the rows of every forward."""

    def forward(prompt, latents):
        if ran is not None:
            jax.debug.callback(ran, latents[:, 0, 0, 0])
        return latents @ jnp.eye(latents.shape[-1]) * 0.5

    def velocity(params, latents, sigma, condition):
        both = both_branches(forward, condition, latents)
        return classifier_free(*both, condition.guidance["scale"])

    def decode(params, latents):
        return jnp.moveaxis(latents, 1, -1) @ jnp.eye(3) * 0.2 + 0.5

    def tokenize(prompts, *, guidance=0.0, negative_prompt=None):
        count = len(prompts)
        rows = np.zeros((2 * count if guidance > 1 else count, 4), np.float32)
        return guided(rows, count, {"scale": guidance})

    functions = {"velocity": velocity, "decode": decode, "tokenize": tokenize}
    return dataclasses.replace(toy.pipeline(), encode=lambda params, tokens: tokens, **functions)


def flat_mean(images):
    flat = images.reshape(len(images), -1)
    return flat @ jnp.full(flat.shape[1], 1 / flat.shape[1])


REWARD = Reward((Part("sum", scorer=toy.scorer("sum", flat_mean)),))


@pytest.mark.parametrize(("guidance", "branches"), [(0.0, 1), (3.0, 2)])
def test_counted_by_hand(tmp_path, guidance, branches):
    run = {"model": pipeline(), "reward": REWARD, "guidance": guidance, **SETTINGS}
    results = ses_jax.search(["a", "b"], prompts_at_once=2, chunk=3, out=tmp_path, **run)
    for index, result in enumerate(results):
        search, finals = result.cost.search, result.cost.finals
        assert (search.images, search.nfe, finals.images, finals.nfe) == (7, 7 * 3 * branches, 2, 2 * 5 * branches)
        assert search.flops == 7 * (3 * branches * STEP + DECODE + SCORE)
        assert finals.flops == 2 * (5 * branches * STEP + DECODE + SCORE)
        assert 2 * search.seconds == pytest.approx(result.timings["search"])
        assert 2 * finals.seconds == pytest.approx(result.timings["render"])
        saved = json.loads((tmp_path / f"{index:03d}" / "result.json").read_text())
        assert saved["cost"] == result.cost.as_json() == dataclasses.asdict(result.cost)


def test_a_gradient_counts_as_three_evaluations():
    """And its FLOPs as they are: all of it twice forwards and, with respect to pixels and noise, once backwards."""
    run = {"model": pipeline(), "searcher": "gradient,climbers=2", "guidance": 3.0, **SETTINGS}
    result = ses_jax.search("a", reward=REWARD, **run | {"budget": None, "nfe": 100})
    search, finals = result.cost.search, result.cost.finals
    assert (search.images, search.nfe, finals.images, finals.nfe) == (5, 5 * 3 * 2 * 3, 2, 2 * 5 * 2)
    assert search.flops == 5 * 3 * (3 * 2 * STEP + DECODE + SCORE)
    assert finals.flops == 2 * (5 * 2 * STEP + DECODE + SCORE)
    with pytest.raises(ValueError, match="nfe=17 is less than the 18 network evaluations of one candidate"):
        ses_jax.search("a", reward=REWARD, **run | {"budget": None, "nfe": 17})


def test_as_many_evaluations_as_really_run():
    rows = []
    run = {"model": pipeline(lambda x: rows.append(x.size)), "reward": REWARD, "guidance": 3.0, **SETTINGS}
    result = ses_jax.search("a", chunk=3, searcher="zero-order", **run | {"budget": 8})
    jax.effects_barrier()
    assert sum(rows) == result.cost.search.nfe + result.cost.finals.nfe == 8 * 3 * 2 + 2 * 5 * 2


def test_what_is_scored_on_the_host_or_cannot_be_counted():
    def host(images, prompts):
        return np.asarray(images).mean(axis=(1, 2, 3))

    def endless(images, prompts):
        image = images[..., 0] * 0
        image = jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ x, image)
        return image.mean(axis=(1, 2)) + images.mean(axis=(1, 2, 3))

    run = {"model": pipeline(), "guidance": 0.0, **SETTINGS}
    assert ses_jax.search("a", reward=host, **run).cost.search.flops == 7 * (3 * STEP + DECODE)
    spent = ses_jax.search("a", reward=endless, **run).cost.search
    assert (spent.flops, spent.nfe) == (None, 21)


def test_an_interrupted_search_counts_what_it_scored():
    calls = []

    def judge(images, prompts):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return np.asarray(images).mean(axis=(1, 2, 3))

    result = ses_jax.search("a", model=pipeline(), reward=ses_jax.load_reward(judge, traceable=False), **SETTINGS)
    assert (result.cost.search.images, result.cost.search.nfe, result.cost.finals.nfe) == (4, 12, 10)


@pytest.mark.parametrize("nfe", [42, 47])
def test_a_budget_in_evaluations(nfe):
    run = {"model": pipeline(), "reward": REWARD, "guidance": 3.0, **SETTINGS}
    result = ses_jax.search("a", **run | {"budget": None, "nfe": nfe})
    assert result.cost.search.nfe == 42
    assert result.history == ses_jax.search("a", **run).history
    assert (result.config["budget"], result.config["nfe"]) == (7, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nfe": 5}, "nfe=5 is less than the 6 network evaluations of one candidate"),
        ({"nfe": 60, "budget": 50}, "budget=50 and nfe=60 exclude each other"),
        ({"nfe": 0}, "nfe=0 must be at least 1"),
        ({"nfe": "many"}, "nfe='many' is not a whole number"),
    ],
)
def test_bad_budgets_are_refused_before_any_work(monkeypatch, settings, message):
    monkeypatch.setattr(engine, "search_prompts", None)
    with pytest.raises(ValueError, match=message):
        ses_jax.search("a", model=pipeline(), reward=REWARD, guidance=3.0, preview_steps=3, **settings)


def test_the_default_budget():
    assert SearchConfig().resolve(toy.pipeline()).budget == 50
    assert SearchConfig(nfe=4 * 50).resolve(toy.pipeline()) == SearchConfig().resolve(toy.pipeline())


def test_rows_may_have_their_own_kind_of_budget(tmp_path):
    rows = [
        {"prompt": "a"},
        {"prompt": "b", "budget": 5},
        {"prompt": "c", "nfe": "9", "searcher": "zero-order,parents=1"},
        {"prompt": "d", "nfe": 2},
    ]
    run = {"model": pipeline(), "reward": REWARD, **SETTINGS} | {"budget": None, "nfe": 12}
    summary = ses_jax.search_many(rows, out=tmp_path, **run)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line.get("scored") for line in lines] == [4, 5, 3, None]
    assert summary["failed"] == 1
    saved = [json.loads(line)["overrides"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    zero_order = {"name": "zero-order", "parents": 1, "mutation": 0.35, "anneal": 50, "space": "whole"}
    assert saved == [{}, {"budget": 5}, {"nfe": 9, "searcher": zero_order}, {"nfe": 2}]
    assert json.loads((tmp_path / "00002" / "result.json").read_text())["config"]["searcher"] == zero_order
    assert "nfe=2 is less than the 3" in lines[3]["error"]


# Half the height and width is an eighth of the FLOPs of these products.
HALF_STEP, QUARTER_OF_THE_PIXELS = STEP // 8, (DECODE + SCORE) // 4


def test_looks_counted_by_hand():
    """Of 7 candidates, 4 and 3 a generation: 2 and 2 go on from half the size, 1 and 1 from there to the end."""
    run = {"model": pipeline(), "reward": REWARD, "guidance": 3.0, **SETTINGS}
    spent = ses_jax.search("a", fidelity="half:0.5>early1:0.3", chunk=3, **run).cost.search
    assert spent.images == 7 + 4 + 2
    assert spent.nfe == 2 * (7 * 3 / 8 + 4 * 1 + 2 * 2)
    halves = 7 * (6 * HALF_STEP + QUARTER_OF_THE_PIXELS)
    assert spent.flops == halves + (4 * 2 + 2 * 4) * STEP + 6 * (DECODE + SCORE)


@pytest.mark.parametrize("kind", ["steps", "cached"])
def test_looks_take_as_many_evaluations_as_really_run(kind):
    """A generation that is full; those that go on from an early look don't begin again."""
    rows = []
    run = {"model": pipeline(lambda x: rows.append(x.size)), "reward": REWARD, "guidance": 3.0, **SETTINGS}
    result = ses_jax.search("a", fidelity=f"{kind}2:0.75>early1:0.5", **run | {"budget": 4})
    jax.effects_barrier()
    assert sum(rows) == result.cost.search.nfe + result.cost.finals.nfe
    assert result.cost.search.nfe == 2 * (4 * 2 + 3 * 1 + 2 * 2)
    assert isinstance(result.cost.search.nfe, int)


def test_looks_without_guidance_counted_by_hand():
    """Of a generation of 4, each is looked at in one forward a step, half of them by the full preview in two."""
    rows = []
    run = {"model": pipeline(lambda x: rows.append(x.size)), "reward": REWARD, "guidance": 3.0, **SETTINGS}
    result = ses_jax.search("a", fidelity="unguided-steps2:0.5", **run | {"budget": 4})
    jax.effects_barrier()
    assert sum(rows) == result.cost.search.nfe + result.cost.finals.nfe
    assert result.cost.search.nfe == 4 * 2 + 2 * (2 * 3)
    half = ses_jax.search("a", fidelity="unguided-half:0.5", **run | {"budget": 4}).cost.search
    assert half.nfe == 4 * 3 / 8 + 2 * (2 * 3)
    assert half.flops == 4 * (3 * HALF_STEP + QUARTER_OF_THE_PIXELS) + 2 * (6 * STEP + DECODE + SCORE)


@pytest.mark.parametrize(
    ("plan", "nfe", "budget"),
    [("half:0.5", 33, 8), ("half:0.5", 29, 6), ("early1:0.25", 24, 8), ("unguided-steps2:0.5", 37, 6)],
)
def test_a_budget_in_evaluations_buys_more_looks(plan, nfe, budget):
    """A generation of 4 takes 2 * (4 * 3 / 8 + 2 * 3) = 15, 2 * (4 * 1 + 1 * 2) = 12, and 4 * 2 + 2 * (2 * 3) = 20."""
    config = SearchConfig(population=4, elites=2, preview_steps=3, steps=5, nfe=nfe, fidelity=plan, guidance=3.0)
    assert config.resolve(pipeline()).budget == budget


class PlannedError(Exception):
    """What was to be planned."""


def test_a_plan_counts_the_same(monkeypatch):
    source = "Tongyi-MAI/Z-Image-Turbo"
    tiny.publish(monkeypatch, source)

    def stop(work, machine):
        raise PlannedError(work)

    monkeypatch.setattr(planner, "plan_on", stop)
    with pytest.raises(PlannedError) as planned:
        ses_jax.plan(source, tokens=32, nfe=83, height=128, width=128, preview_steps=4, guidance=2.0)
    work = planned.value.args[0]
    assert work.config.budget == 83 // (4 * 2)
    model = abstract_pipeline(source, mesh=partition.parse_mesh("data=1", jax.devices()[:1]))
    task = outline.outline(model, Reward((Part("clip", scorer=work.scorer),)), work.config, work.tokens)
    assert cost.rate(task.program, task.params, task.inputs) == (2, work.step(1).flops, work.finish(1).flops)
