"""Compiled programs: shared by what is equal, kept within a bound, gone when they are dropped."""

import dataclasses
import functools
import gc
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import ses_jax
from ses_jax.engine import ahead, finals, models, tasks
from ses_jax.engine.config import SearchConfig
from ses_jax.loading import partition, programs
from ses_jax.loading.programs import comparable, compiled
from ses_jax.rewards import scorers

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


def on_host(images, prompts):
    return np.asarray(images)[..., 0].mean(axis=(1, 2))


FORMS = {
    "a pipeline": lambda prompt, demo: ses_jax.search(prompt, model=demo, **SETTINGS),
    "a name": lambda prompt, demo: ses_jax.search(prompt, **SETTINGS),
    "a mixture": lambda prompt, demo: ses_jax.search(
        prompt, model=demo, reward={"clip": 1.0, redness: 0.3}, **SETTINGS
    ),
    "a report": lambda prompt, demo: ses_jax.search(prompt, model=demo, reward=redness, report=["clip"], **SETTINGS),
    "on the host": lambda prompt, demo: ses_jax.search(prompt, model=demo, reward=on_host, **SETTINGS),
    "loaded again": lambda prompt, demo: ses_jax.search(
        prompt,
        model=ses_jax.load_pipeline("demo"),
        reward=ses_jax.load_reward("clip", source=demo.folder / "clip"),
        **SETTINGS,
    ),
    "generate": lambda prompt, demo: ses_jax.generate("demo", prompt, steps=2),
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


@pytest.mark.parametrize("axes", [None, "data=1"])
def test_final_renders_are_compiled_beside_the_search(axes, compilations, monkeypatch):
    mesh = partition.parse_mesh(axes, jax.devices()[:1])
    pipeline = toy.pipeline(mesh)
    config = SearchConfig(budget=4, population=4, elites=2, steps=5).resolve(pipeline)
    task = tasks.prepare(pipeline, toy.brightness(), config, ["a"], [0])
    noise = np.asarray(task.noise)
    finals.finals(task._replace(config=dataclasses.replace(config, steps=7)), pipeline, noise)  # what is small, once
    before = compilations()
    assert ahead.compile_render(task) is None  # devices that are this host's cores
    with monkeypatch.context() as patched:
        patched.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu")])
        waited_for = ahead.compile_render(task)
    if axes is None:
        waited_for.result()
    else:
        ahead._compile(task)
    assert compilations() == before + 1
    finals.finals(task, pipeline, noise)
    assert compilations() == before + 1


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
