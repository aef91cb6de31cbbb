"""Searches that are large: several prompts at once, weights on the host, memory that runs out, runs that are killed."""

import dataclasses
import functools
import gc
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toy
from jax.sharding import Mesh

import ses_jax
from ses_jax.engine import generation, generations, memory, output, tasks
from ses_jax.loading import checkpoint, compiler, partition
from ses_jax.rewards import reward as rewards
from ses_jax.rewards import scorers

PROMPTS = ["a cat", "two blue squares", "a red circle on a hill"]
SETTINGS = {"budget": 23, "population": 10, "elites": 4, "progress": False}


def scores(result):
    return [row["score"] for row in result.history]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(*(np.array(scores(each), float) for each in (a, b)), atol=1e-5)  # None is NaN
        np.testing.assert_allclose(a.noise, b.noise, atol=1e-5)
        np.testing.assert_allclose(a.final_score, b.final_score, atol=1e-5)
        assert a.components.keys() == b.components.keys()


def test_prompts_searched_at_once_are_searched_as_if_alone():
    run = {"model": toy.pipeline(), "reward": toy.mixture(red=1.0, blue=-0.5, green=0.0), **SETTINGS}
    alone = ses_jax.search(PROMPTS, **run)
    together = ses_jax.search(PROMPTS, prompts_at_once=2, chunk=7, **run)
    assert_same(together, alone)
    assert [result.config["prompt_index"] for result in together] == [0, 1, 2]


def test_rewards_on_the_host_see_every_image_with_its_prompt():
    def judge(images, prompts):
        assert len(images) == len(prompts)
        return np.asarray(images)[..., 0].mean(axis=(1, 2)) + np.array([len(prompt) for prompt in prompts])

    run = {"model": toy.pipeline(), "reward": judge, **SETTINGS}
    assert_same(ses_jax.search(PROMPTS, prompts_at_once=3, **run), ses_jax.search(PROMPTS, **run))


@pytest.mark.parametrize("resume", [False, True])
def test_prompts_before_one_without_a_score_are_finished(tmp_path, resume):
    """As they are one at a time."""

    def judge(images, prompts):
        return np.where([prompt == PROMPTS[1] for prompt in prompts], np.nan, images.mean(axis=(1, 2, 3)))

    run = {"model": toy.pipeline(), "reward": ses_jax.load_reward(judge, traceable=False), **SETTINGS}
    with pytest.raises(ValueError, match="gave no finite score in 23 candidates") as caught:
        ses_jax.search(PROMPTS, prompts_at_once=3, out=tmp_path, resume=resume, **run)
    assert_same(caught.value.results, [ses_jax.search(PROMPTS[0], **run)])
    assert [path.name for path in tmp_path.glob("*/result.json")] == ["result.json"]
    assert ses_jax.SearchResult.load(tmp_path / "000").prompt == PROMPTS[0]


def test_a_traceable_function_keeps_its_prompt():
    def length(images, prompts):
        return images.mean(axis=(1, 2, 3)) + len(prompts[0])

    for result in ses_jax.search(PROMPTS, model=toy.pipeline(), reward=length, prompts_at_once=3, **SETTINGS):
        assert len(result.prompt) < result.score < len(result.prompt) + 1


def test_one_compilation_for_all_batches_of_prompts(fresh_programs):
    pipeline, reward = toy.pipeline(), toy.brightness()
    before = generation.generation_step.cache_size()
    ses_jax.search(PROMPTS[:2] * 3, model=pipeline, reward=reward, prompts_at_once=2, **SETTINGS)
    assert generation.generation_step.cache_size() - before == 1


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="prompts_at_once=0"):
        ses_jax.search("a", model=toy.pipeline(), prompts_at_once=0)
    with pytest.raises(ValueError, match="resume needs out="):
        ses_jax.search("a", model=toy.pipeline(), resume=True)


# Memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    sizes = oracle.ZImageSizes(vae_layers=1, vae_widths=(8, 16))  # an image of twice the latents' side
    oracle.z_image_pipeline(sizes, seed=3).save_pretrained(folder)
    return folder


def tree_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_text_encoders_and_the_other_networks_are_never_on_the_device_together(folder, monkeypatch):
    """Live arrays are what is on the device: the weights at rest are NumPy's."""
    settings = {"reward": toy.brightness(), "level": 1, "height": 16, "width": 16}
    settings |= {"budget": 4, "population": 3, "elites": 1, "steps": 2, "preview_steps": 2, "progress": False}
    expected = ses_jax.search(PROMPTS[:2], model=ses_jax.load_pipeline(str(folder)), **settings)
    gc.collect()
    base = tree_bytes(jax.live_arrays())
    pipeline = ses_jax.load_pipeline(str(folder), offload_text_encoder=True)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(pipeline.params))
    text, image = (tree_bytes(part(pipeline.params)) for part in (pipeline.text_params, pipeline.image_params))
    live = {}

    def watched(name, function):
        def run(*args):
            out = function(*args)
            gc.collect()
            live.setdefault(name, []).append(tree_bytes(jax.live_arrays()) - base)
            return out

        return run

    monkeypatch.setattr(generation, "encode", watched("text", generation.encode))
    monkeypatch.setattr(generations, "_step", watched("image", generations._step))
    found = ses_jax.search(PROMPTS[:2], model=pipeline, **settings)
    assert_same(found, expected)
    tokens = pipeline.tokenize(PROMPTS[:2], guidance=pipeline.defaults.guidance)
    conditions = jax.eval_shape(pipeline.encode, pipeline.params, tokens)
    small = 0.15 * min(text, image) + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(conditions))
    assert text + small < text + image
    assert text <= max(live["text"]) <= text + small
    assert image <= max(live["image"]) <= image + small
    gc.collect()
    assert tree_bytes(jax.live_arrays()) - base < small


@pytest.mark.parametrize("mesh", [None, "data=2,model=4"])
@pytest.mark.parametrize("images", [1, 3])
def test_images_may_be_decoded_in_parts(monkeypatch, mesh, images):
    """Ten rows, on each device at most so many at a time; parts are even, and what fills the last is dropped.

    All ten are scored at a time.
    """
    mesh = partition.parse_mesh(mesh)
    expected = ses_jax.search(PROMPTS[:2], model=toy.pipeline(), reward=toy.brightness(), **SETTINGS)
    monkeypatch.setattr(memory, "DECODED_PIXELS", images * 16 * 16)
    pipeline, (own,) = toy.pipeline(mesh), toy.brightness().parts
    seen, scored = [], []

    def decode(params, latents):
        seen.append(len(latents))
        return toy.pipeline().decode(params, latents)

    def say(params, means, text):
        scored.append(len(means))
        return own.scorer.score.say(params, means, text)

    score = scorers.ImageScore(own.scorer.score.see, say)
    part = dataclasses.replace(own, scorer=dataclasses.replace(own.scorer, score=score))
    pipeline = dataclasses.replace(pipeline, decode=decode)
    found = ses_jax.search(PROMPTS[:2], model=pipeline, reward=rewards.Reward((part,)), **SETTINGS)
    assert_same(found, expected)
    devices = 1 if mesh is None else mesh.size
    assert max(seen) <= images * devices
    assert 10 <= max(scored) < 10 + images * devices


@pytest.fixture
def used(monkeypatch):
    """Which programs of generations were called, where they can be two."""
    used = []

    def noted(name):
        function = getattr(generation, name)
        monkeypatch.setattr(generation, name, lambda *args: used.append(name) or function(*args))

    for name in ("generation_step", "denoised", "judged"):
        noted(name)
    return used


@pytest.mark.parametrize("mesh", [None, "data=2,model=2"])
def test_a_generation_in_two_programs_is_the_same(monkeypatch, used, mesh):
    run = {"reward": toy.mixture(red=1.0, blue=-0.5, green=0.0), "prompts_at_once": 2, **SETTINGS}
    pipeline = toy.pipeline(mesh and partition.parse_mesh(mesh, jax.devices()[:4]))
    expected = ses_jax.search(PROMPTS[:2], model=pipeline, **run)
    assert set(used) == {"generation_step"}
    used.clear()
    monkeypatch.setattr(compiler, "denoises_apart", lambda mesh: True)
    found = ses_jax.search(PROMPTS[:2], model=pipeline, chunk=7, **run)
    assert_same(found, expected)
    assert set(used) == {"denoised", "judged"}


@pytest.mark.parametrize("settings", [{"fidelity": "cached2:0.5"}, {"searcher": "gradient"}], ids=str)
def test_looks_and_gradients_stay_one_program(monkeypatch, used, settings):
    """The program that it is elsewhere, so with the same results."""
    run = {"model": toy.pipeline(), "reward": toy.brightness(), **SETTINGS, **settings}
    expected = ses_jax.search("a", **run)
    monkeypatch.setattr(compiler, "denoises_apart", lambda mesh: True)
    assert_same([ses_jax.search("a", **run)], [expected])
    assert set(used) == {"generation_step"}


def test_the_half_that_judges_is_the_same_for_any_chunk(monkeypatch, fresh_programs):
    """It is compiled once while a chunk is found that fits."""
    monkeypatch.setattr(compiler, "denoises_apart", lambda mesh: True)
    pipeline = toy.pipeline()
    config = ses_jax.SearchConfig(**{key: SETTINGS[key] for key in ("budget", "population", "elites")})
    task = tasks.prepare(pipeline, toy.brightness(), config.resolve(pipeline), PROMPTS[:1], [0])
    all_at_once, some = (tasks.lower_generation(task, tasks.initial_state(task), chunk) for chunk in (10, 3))
    assert all_at_once[1].as_text() == some[1].as_text()
    assert all_at_once[0].as_text() != some[0].as_text()
    size = generation.judged.cache_size()
    task = task._replace(program=task.program._replace(chunk=3))
    generations._step(task, np.int32(0), tasks.initial_state(task))
    assert generation.judged.cache_size() == size + 1
    generations._step(task._replace(program=task.program._replace(chunk=5)), np.int32(0), tasks.initial_state(task))
    assert generation.judged.cache_size() == size + 1


def test_decoding_in_parts_takes_less_memory(folder):
    pipeline = ses_jax.load_pipeline(str(folder))
    noise = jnp.zeros((8, *pipeline.noise_shape(32, 32)), jnp.float32)
    tokens = pipeline.tokenize(["a"])
    condition = jax.eval_shape(pipeline.encode, pipeline.params, tokens)
    arrays = (jnp.array([1.0, 0.0]), condition), generation.Rows(noise, jnp.zeros(8, jnp.int32))

    def needed(decoded):
        model = generation.Model(lambda params, latents, *_: latents, pipeline.decode, decoded=decoded)
        compiled = generation.render.lower(model, 8, pipeline.params, *arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert needed(1) < needed(None) / 3


def test_how_many_images_are_decoded_at_once():
    for platform in ("cpu", "gpu", "tpu"):
        at_once = functools.partial(memory.decoded_at_once, platform=platform)
        assert at_once(1024, 1024) == at_once(2048, 2048) == 1
        assert at_once(512, 512) == (1 if platform == "tpu" else 4)
        assert at_once(256, 256) == 16
        assert at_once(64, 64) == 256


class Exhausted:
    """A compiled step that has room for so many candidates only."""

    def __init__(self, step, room):
        self.step, self.room, self.chunks = step, room, []

    def __call__(self, program, *args):
        self.chunks.append(program.chunk)
        if program.chunk > self.room:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return self.step(program, *args)


def test_running_out_of_memory_halves_the_chunk_and_changes_no_result(monkeypatch, caplog):
    pipeline, reward = toy.pipeline(), toy.brightness()
    expected = ses_jax.search("a", model=pipeline, reward=reward, **SETTINGS)
    step = Exhausted(generation.generation_step, room=3)
    monkeypatch.setattr(generation, "generation_step", step)
    monkeypatch.setattr(memory, "device_room", lambda mesh: None)
    with caplog.at_level(logging.WARNING, logger="ses_jax"):
        found = ses_jax.search("a", model=pipeline, reward=reward, **SETTINGS)
    assert step.chunks == [10, 5, 3, 3, 3]
    assert found.config["chunk"] == 3
    assert "out of memory with 10 candidates at a time; going on with 5" in caplog.text
    assert_same([found], [expected])


def test_no_room_for_even_one_candidate_is_an_error(monkeypatch):
    monkeypatch.setattr(generation, "generation_step", Exhausted(generation.generation_step, room=0))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        ses_jax.search("a", model=toy.pipeline(), reward=toy.brightness(), **SETTINGS)


def test_other_errors_of_the_device_come_through(monkeypatch):
    def broken(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(generation, "generation_step", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        ses_jax.search("a", model=toy.pipeline(), reward=toy.brightness(), **SETTINGS)


def test_what_lies_on_the_device_takes_room(monkeypatch):
    stats = {"bytes_limit": 1000, "bytes_in_use": 300}
    monkeypatch.setattr(partition, "local_device", lambda: types.SimpleNamespace(memory_stats=lambda: stats))
    assert memory.device_room() == int(memory.USABLE * 1000) - 300
    stats.clear()
    assert memory.device_room() is None


def test_the_device_of_a_mesh_that_has_least_room_counts(monkeypatch):
    mesh = partition.parse_mesh("data=2", jax.devices()[2:4])
    rooms = {device: 100 * device.id for device in jax.devices()}
    monkeypatch.setattr(memory, "_room", rooms.get)
    assert memory.device_room(mesh) == 200
    rooms[jax.devices()[3]] = None
    assert memory.device_room(mesh) is None


def test_processes_that_share_a_mesh_do_not_halve_alone(monkeypatch):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    assert memory.half(partition.parse_mesh("data=2", jax.devices()[:2]), 5, error) == 3
    monkeypatch.setattr(Mesh, "is_multi_process", True)
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        memory.half(partition.parse_mesh("data=2", jax.devices()[4:6]), 5, error)
    assert raised.value.__notes__ == ["with 5 candidates at a time; pass chunk=3 in every process"]


def test_the_chunk_is_the_largest_that_fits(folder, monkeypatch, caplog, fresh_programs):
    """With less memory to give than a generation needs, fewer candidates go at a time."""
    pipeline = ses_jax.load_pipeline(str(folder))
    config = ses_jax.SearchConfig(population=8, height=32, width=32, level=1, preview_steps=2).resolve(pipeline)
    compilations = generation.generation_step.cache_size()

    def chunk_under(room):
        monkeypatch.setattr(memory, "device_room", lambda mesh: room)
        return tasks.fitted(tasks.prepare(pipeline, toy.brightness(), config, ["a"], [0]))

    task = chunk_under(None)
    assert task.program.chunk == 8
    arguments = task.params, task.inputs, np.int32(0), tasks.initial_state(task)
    needed = {
        chunk: memory.working_bytes([generation.generation_step.lower(task.program._replace(chunk=chunk), *arguments)])
        for chunk in (8, 4, 1)
    }
    assert needed[8] > needed[4] > needed[1]
    assert chunk_under(needed[8]).program.chunk == 8
    with caplog.at_level(logging.WARNING, logger="ses_jax"):
        found = chunk_under(needed[4]).program.chunk
    assert 2 <= found <= 4
    assert f"denoising {found} of 8 candidates at a time" in caplog.text
    assert chunk_under(1).program.chunk == 1
    assert generation.generation_step.cache_size() == compilations


# Saved searches


class KilledError(Exception):
    pass


def dying_judge(after):
    """A reward on the host that fails after so many calls, as if the machine had gone."""
    calls = []

    def judge(images, prompts):
        calls.append(len(images))
        if after is not None and len(calls) > after:
            raise KilledError
        return np.asarray(images)[..., 0].mean(axis=(1, 2))

    return ses_jax.load_reward(judge, traceable=False)


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_killed_search_goes_on_bit_equal(tmp_path, after, mixture):
    def reward(dies_after):
        host = dying_judge(dies_after)
        return rewards.Reward((*host.parts, *toy.mixture(green=0.5).parts)) if mixture else host

    run = {"model": toy.pipeline(), **SETTINGS | {"budget": 37}}
    expected = ses_jax.search("a", reward=reward(None), **run)
    with pytest.raises(KilledError):
        ses_jax.search("a", reward=reward(after), out=tmp_path, resume=True, **run)
    assert not (tmp_path / "result.json").exists()
    found = ses_jax.search("a", reward=reward(None), out=tmp_path, resume=True, **run)
    assert scores(found) == scores(expected)
    np.testing.assert_array_equal(found.noise, expected.noise)
    assert found.history == expected.history
    assert (tmp_path / "result.json").exists()
    assert not (tmp_path / output.STATE).exists()


def test_only_what_is_missing_is_scored_again(tmp_path):
    run = {"model": toy.pipeline(), "out": tmp_path, "resume": True, **SETTINGS | {"budget": 40}}
    with pytest.raises(KilledError):
        ses_jax.search("a", reward=dying_judge(3), **run)
    seen = []

    def judge(images, prompts):
        seen.append(len(images))
        return np.asarray(images)[..., 0].mean(axis=(1, 2))

    ses_jax.search("a", reward=ses_jax.load_reward(judge, traceable=False), **run)
    assert seen == [10, 2]  # the last generation, and the final renders


def test_a_saved_search_with_other_settings_is_refused(tmp_path):
    run = {"model": toy.pipeline(), "out": tmp_path, "resume": True, **SETTINGS}
    with pytest.raises(KilledError):
        ses_jax.search("a", reward=dying_judge(1), **run)
    for change, complaint in (({"seed": 5}, "seed 0 -> 5"), ({"budget": 20}, "budget 23 -> 20")):
        with pytest.raises(ValueError, match=f"other settings .*{complaint}"):
            ses_jax.search("a", reward=dying_judge(None), **run | change)
    with pytest.raises(ValueError, match="prompts"):
        ses_jax.search("b", reward=dying_judge(None), **run)


@pytest.mark.parametrize(("before", "after", "at_once"), [(2, 2, 2), (2, 2, 1), (1, 2, 3), (1, 6, 3)])
def test_several_prompts_are_saved_and_go_on(tmp_path, before, after, at_once):
    """Each time in the third generation of some, however many are searched at once before and after."""
    run, calls = {"model": toy.pipeline(), **SETTINGS}, []
    expected = ses_jax.search(PROMPTS, reward=dying_judge(None), prompts_at_once=before, **run)

    def judge(images, prompts):
        calls.append(prompts)
        return images[..., 0].mean(axis=(1, 2))

    run |= {"out": tmp_path, "resume": True}
    with pytest.raises(KilledError):
        ses_jax.search(PROMPTS, reward=dying_judge(after), prompts_at_once=before, **run)
    judge = ses_jax.load_reward(judge, traceable=False)
    found = ses_jax.search(PROMPTS, reward=judge, prompts_at_once=at_once, **run)
    assert len(calls) == 2 + 4  # one generation and the final images, and all of what was not begun
    assert [scores(result) for result in found] == [scores(result) for result in expected]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000", "001", "002"]


def test_an_interrupted_search_keeps_its_state(tmp_path):
    calls = []

    def judge(images, prompts):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return np.asarray(images)[..., 0].mean(axis=(1, 2))

    judge = ses_jax.load_reward(judge, traceable=False)
    run = {"model": toy.pipeline(), "out": tmp_path, "resume": True, **SETTINGS}
    assert ses_jax.search("a", reward=judge, **run).interrupted
    whole = ses_jax.search("a", reward=judge, **run)
    assert not whole.interrupted
    assert scores(whole) == scores(ses_jax.search("a", model=toy.pipeline(), reward=dying_judge(None), **SETTINGS))


def test_a_half_written_state_does_not_count(tmp_path):
    tree = {"state": [np.arange(3.0)], "scored": [np.zeros((1, 2, 1)), np.zeros((1, 2))]}
    checkpoint.save(tmp_path / "000001", tree)
    restored = checkpoint.restore(tmp_path / "000001", checkpoint.metadata(tmp_path / "000001"))
    np.testing.assert_array_equal(restored["state"][0], tree["state"][0])
