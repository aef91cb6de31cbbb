"""Compiled programs: shared by what is equal, kept within a bound, gone when they are dropped."""

import functools
import gc
import logging
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import ses_jax
from ses_jax.engine import ahead, memory, models, outline, tasks
from ses_jax.engine.config import SearchConfig
from ses_jax.loading import compiler, partition, programs
from ses_jax.loading.programs import comparable, compiled
from ses_jax.rewards import scorers
from ses_jax.rewards.reward import Reward

SETTINGS = {"budget": 4, "population": 2, "elites": 1, "steps": 2, "preview_steps": 2, "progress": False}
SETTINGS |= {"height": 64, "width": 64}


@pytest.fixture
def compilations():
    """`compilations()` is how many programs XLA has compiled since the test began."""
    count = 0

    def listen(name, seconds, **kwargs):
        nonlocal count
        count += name == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: count
    jax.monitoring.unregister_event_duration_listener(listen)


def affine(a, b, x):
    return a * x + b


def test_partials_compare_by_value():
    make = functools.partial
    assert comparable(make(affine, 1, b=2)) == comparable(make(affine, 1, b=2))
    assert hash(comparable(make(affine, 1, b=2))) == hash(comparable(make(affine, 1, b=2)))
    assert comparable(make(affine, 1, b=2)) != comparable(make(affine, 1, b=3))
    assert comparable(make(affine, make(affine, 1, 2))) == comparable(make(affine, make(affine, 1, 2)))
    assert comparable(make(affine, 3, 2))(10) == 32
    unhashable = make(affine, [1])
    assert comparable(unhashable) is unhashable
    assert comparable(affine) is affine


def test_programs_are_kept_within_a_bound(compilations):
    @compiled(static=1, keep=2)
    def scaled(factor, x):
        return factor * x

    x = jnp.arange(3)
    before = compilations()
    for factor in (1, 2, 3, 3, 2):
        np.testing.assert_array_equal(scaled(factor, x), factor * np.arange(3))
    assert compilations() - before == 3
    gc.collect()
    assert scaled.cache_size() == 2
    assert [scaled.is_kept(factor) for factor in (1, 2, 3)] == [False, True, True]
    scaled(1, x)
    assert compilations() - before == 4
    programs.clear()
    gc.collect()
    assert scaled.cache_size() == 0


def test_what_is_lowered_and_compiled_is_not_compiled_again(compilations):
    @compiled(static=1)
    def scaled(factor, x):
        return factor * x

    x = jnp.arange(7)
    before = compilations()
    scaled.lower(5, x).compile()
    assert scaled.is_kept(5)
    scaled(5, x)
    assert compilations() - before == 1


def test_dropped_programs_leave_no_memory_mappings():
    def maps():
        gc.collect()
        return len(Path("/proc/self/maps").read_text().splitlines())

    @compiled(static=1, keep=2)
    def sorted_product(factor, x):
        return jnp.sort(jnp.sin(x @ x) * factor, axis=0)

    x = jnp.ones((64, 64))
    for factor in range(4):
        sorted_product(factor, x)
    before = maps()
    for factor in range(4, 34):
        sorted_product(factor, x)
    assert maps() - before < 60  # 12 a program if they stayed


def redness(images, prompts):
    return images[..., 0].mean(axis=(1, 2)) - images[..., 2].mean(axis=(1, 2))


def brightness(images, prompts):
    return images.mean(axis=(1, 2, 3))


def on_host(images, prompts):
    return np.asarray(images)[..., 0].mean(axis=(1, 2))


FORMS = {
    "a pipeline": lambda prompt, demo: ses_jax.search(prompt, model=demo, **SETTINGS),
    "a name": lambda prompt, demo: ses_jax.search(prompt, **SETTINGS),
    "a mixture with a report": lambda prompt, demo: ses_jax.search(
        prompt, model=demo, reward={brightness: 1.0, redness: 0.3}, report=["clip"], **SETTINGS
    ),
    "on the host": lambda prompt, demo: ses_jax.search(prompt, model=toy.pipeline(), reward=on_host, **SETTINGS),
    "loaded again": lambda prompt, demo: ses_jax.search(
        prompt,
        model=ses_jax.load_pipeline("demo"),
        reward=ses_jax.load_reward("clip", source=demo.folder / "clip"),
        **SETTINGS,
    ),
    "generate": lambda prompt, demo: ses_jax.generate("demo", prompt, steps=2, height=64, width=64),
}


@pytest.fixture(scope="module")
def demo():
    return ses_jax.load_pipeline("demo")


@pytest.mark.parametrize("reward", [redness, {redness: 1.0, on_host: 0.5}], ids=["one", "a mixture with the host"])
def test_a_search_compiles_its_programs_and_hardly_anything_else(reward, compilations, fresh_programs):
    """Each small operation outside of them would be a program of its own, and half a second the more in all."""
    jax.clear_caches()
    before = compilations()
    ses_jax.search("a red circle", model=toy.pipeline(), reward=reward, **SETTINGS)
    assert 6 <= compilations() - before <= 15


@pytest.mark.parametrize("form", FORMS)
def test_a_second_search_compiles_nothing(form, demo, compilations):
    FORMS[form]("a red circle 1", demo)
    before = compilations()
    FORMS[form]("a red circle 2", demo)
    assert compilations() == before


@pytest.mark.parametrize(
    ("axes", "reward", "apart"),
    [
        pytest.param(None, toy.brightness(), False, id="a network"),
        pytest.param(None, toy.brightness(), True, id="a network, in two"),
        pytest.param("data=1", toy.brightness(), False, id="a network on a mesh of one"),
        pytest.param("data=2", redness, False, id="a function on a mesh"),
        pytest.param("data=2", redness, True, id="a function on a mesh, in two"),
        pytest.param(None, on_host, False, id="on the host"),  # never in two
    ],
)
def test_what_is_compiled_ahead_is_not_compiled_again(axes, reward, apart, compilations, monkeypatch, fresh_programs):
    monkeypatch.setattr(compiler, "denoises_apart", lambda mesh: apart)
    pipeline = toy.pipeline(partition.parse_mesh(axes, jax.devices()[: 2 if axes == "data=2" else 1]))
    reward = reward if isinstance(reward, Reward) else ses_jax.load_reward(reward)
    results, counts, begun = [], [], []

    def started(start, job):
        begun.append(start(job))
        begun[-1].result()  # collectives of two programs at once can wait for each other on virtual devices
        return begun[-1]

    monkeypatch.setattr(ahead, "_start", functools.partial(started, ahead._start))
    for is_worth_it in (False, True):
        programs.clear()
        jax.clear_caches()
        before = compilations()
        monkeypatch.setattr(ahead, "_is_worth_it", lambda mesh, is_worth_it=is_worth_it: is_worth_it)
        results.append(ses_jax.search("a", model=pipeline, reward=reward, **SETTINGS))
        counts.append(compilations() - before)
    assert len(begun) == 3
    ses_jax.search("b", model=pipeline, reward=reward, seed=1, **SETTINGS)
    assert len(begun) == 3  # all is there
    assert counts[1] == counts[0]
    for found in results[1:]:
        np.testing.assert_array_equal(found.noise, results[0].noise)
        np.testing.assert_array_equal(found.image, results[0].image)


def test_what_fails_ahead_fails_in_the_call(monkeypatch, caplog):
    monkeypatch.setattr(ahead, "_is_worth_it", lambda mesh: True)
    monkeypatch.setattr(outline, "outline", lambda *args: 1 / 0)
    with caplog.at_level(logging.DEBUG, "ses_jax"):
        ses_jax.search("a", model=toy.pipeline(), reward=toy.brightness(), **SETTINGS)
    assert "not compiled ahead: division by zero" in caplog.text


@pytest.mark.parametrize(("platform", "processes", "count"), [("gpu", 1, 2), ("cpu", 1, 0), ("gpu", 2, 0)])
def test_compiles_ahead_where_the_host_has_time(platform, processes, count, monkeypatch):
    pipeline = toy.pipeline()
    config = SearchConfig().resolve(pipeline)
    monkeypatch.setattr(jax, "devices", lambda *_: [SimpleNamespace(platform=platform)])
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(ahead, "_start", lambda job: Future())
    assert len(ahead.compile_generation(pipeline, toy.brightness(), config, ["a"], None)) == count


def test_what_is_compiled_ahead_says_how_much_memory_it_needs(monkeypatch):
    pipeline = toy.pipeline()
    config = SearchConfig(budget=4, population=4, elites=2, steps=5).resolve(pipeline)
    monkeypatch.setattr(ahead, "_is_worth_it", lambda mesh: True)
    needed, _ = ahead.wait(ahead.compile_generation(pipeline, toy.brightness(), config, ["a"], None))
    task = tasks.prepare(pipeline, toy.brightness(), config, ["a"], [0])
    assert needed == memory.working_bytes(tasks.lower_generation(task, tasks.initial_state(task), 4))


def test_what_a_generation_needs_is_asked_once(monkeypatch):
    """A compiler that refuses a program for want of memory would be asked for minutes again."""
    config = SearchConfig(budget=4, population=4, elites=2, steps=5).resolve(toy.pipeline())
    task = tasks.prepare(toy.pipeline(), toy.brightness(), config, ["a"], [0])
    asked = []
    monkeypatch.setattr(memory, "device_room", lambda mesh: 100)
    monkeypatch.setattr(memory, "working_bytes", lambda chunk: asked.append(chunk) or 30 * chunk)
    monkeypatch.setattr(tasks, "lower_generation", lambda task, state, chunk: chunk)
    assert tasks.fitted(task).program.chunk == 3
    assert tasks.fitted(task, 120).program.chunk == 3
    assert asked == [4, 3, 3]


def test_a_function_that_reads_its_prompts_gets_them():
    def longer_is_better(images, prompts):
        return images.mean(axis=(1, 2, 3)) + jnp.array([len(prompt) for prompt in prompts])

    results = ses_jax.search(
        ["a", "four"], model=toy.pipeline(), reward=longer_is_better, prompts_at_once=2, **SETTINGS
    )
    assert [int(result.score) for result in results] == [1, 4]
    reward = ses_jax.load_reward(longer_is_better)
    assert reward.one_prompt_at_a_time
    assert not ses_jax.load_reward(redness).one_prompt_at_a_time


class Weighted:
    """A reward whose weights change between searches, in whichever way it has them."""

    def __init__(self):
        self.number, self.array, self.large = 1.0, np.ones(3, np.float32), jnp.ones((600, 600))

    def __call__(self, images, prompts):
        return jax.nn.silu((images * self.array).mean((1, 2, 3)) * self.number * self.large.mean())


def test_what_a_function_takes_from_elsewhere_counts_as_it_is_now(compilations):
    function, pipeline = Weighted(), toy.pipeline()
    loaded = ses_jax.load_reward(function)

    def search():
        return [ses_jax.search("a", model=pipeline, reward=r, **SETTINGS).score for r in (function, loaded)]

    first, before = search(), compilations()
    assert search() == first
    assert compilations() == before
    for name, value in {"number": -1.0, "array": np.full(3, 2, np.float32), "large": jnp.zeros((600, 600))}.items():
        before = search()
        setattr(function, name, value)
        now = search()
        assert now[0] == now[1] != before[0]


def test_models_are_kept_until_others_are_wanted(monkeypatch, tmp_path):
    loaded = []

    def load(kind, **options):
        loaded.append(kind)
        return toy.scorer(kind, lambda images: images.mean(axis=(1, 2, 3)))

    monkeypatch.setattr(scorers, "load_scorer", load)
    models.forget()
    pipeline = toy.pipeline()
    for reward in ("pick", {"pick": 1.0, "clip": 2.0}, "clip", "pick", "pick"):
        models.load_models(pipeline, reward, None, {})
    assert loaded == ["pick", "clip", "pick"]
    ses_jax.clear_caches()
    models.load_models(pipeline, "pick", {"hps": 1.0}, {})
    assert loaded[3:] == ["pick", "hps"]


def test_a_checkpoint_that_was_written_again_is_loaded_again(monkeypatch, tmp_path):
    (tmp_path / "weights").write_text("1")
    loaded = []
    monkeypatch.setattr(models, "load_pipeline", lambda source, **options: loaded.append(options) or toy.pipeline())
    models.forget()
    first = models.find_pipeline(str(tmp_path))
    assert models.find_pipeline(str(tmp_path)) is first
    assert models.find_pipeline(str(tmp_path), band="unpacked") is not first
    assert models.find_pipeline(str(tmp_path), band="unpacked").family == "Toy"
    assert len(loaded) == 2
    (tmp_path / "weights").write_text("23")
    models.find_pipeline(str(tmp_path), band="unpacked")
    assert len(loaded) == 3
