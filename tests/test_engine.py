"""The search's contract: what is scored, what wins, what repeats, what compiles, what is refused."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from PIL import Image

import ses_jax
from ses_jax.engine import generation, output, repeat, tasks, watching
from ses_jax.engine import search as engine
from ses_jax.searchers import cem, wavelet

PROMPT = "a bright image"


@pytest.fixture(scope="module")
def pipeline():
    return toy.pipeline()


@pytest.fixture(scope="module")
def reward():
    return toy.brightness()


@pytest.fixture
def search(pipeline, reward):
    def run(prompt=PROMPT, **settings):
        settings = {"model": pipeline, "reward": reward, "budget": 20, "progress": False} | settings
        return ses_jax.search(prompt, **settings)

    return run


def scores(result):
    return [row["score"] for row in result.history]


@pytest.mark.quick
def test_equals_a_search_written_out_by_hand(search, pipeline, reward):
    result = search(budget=23, population=10, elites=4, preview_steps=3, seed=7)

    noise_key, key = tasks.prompt_keys(7, 0)
    noise = tasks.base_noise(noise_key, (3, 16, 16))
    low, high = wavelet.split(noise, level=2)
    ask, tell = jax.jit(cem.ask, static_argnums=2), jax.jit(cem.tell)
    state = cem.init(low.shape, elites=4)
    expected = []
    for index in range(3):
        lows = ask(jax.random.fold_in(key, index), state, 10)
        lows = lows.at[0].set(low) if index == 0 else lows
        for i, candidate in enumerate(lows):
            if len(expected) < 23:
                candidate_noise = wavelet.merge(candidate, high, shape=(16, 16))
                image = ses_jax.generate(pipeline, PROMPT, noise=candidate_noise[None], steps=3)
                expected.append(float(reward(image, [PROMPT])[0]))
            else:
                lows = lows.at[i].set(0.0)
        told = jnp.array(expected[index * 10 :] + [jnp.nan] * 10)[:10]
        state = tell(state, lows, told)
    np.testing.assert_allclose(scores(result), expected, atol=1e-5)
    np.testing.assert_allclose(result.score, max(expected), atol=1e-5)


def test_row_zero_is_the_base_noise_and_the_result_never_loses_to_it(search, pipeline, reward):
    for seed in range(4):
        result = search(budget=6, population=3, elites=1, seed=seed)
        base = ses_jax.generate(pipeline, PROMPT, seed=seed, steps=result.config["preview_steps"])
        np.testing.assert_allclose(scores(result)[0], reward(base, [PROMPT])[0], atol=1e-6)
        assert result.baseline_score == scores(result)[0]
        assert result.score == max(scores(result)) >= result.baseline_score


def test_search_improves_and_beats_random_draws(search):
    found = np.mean([search(budget=60, seed=seed).score for seed in range(3)])
    random = np.mean([search(budget=60, population=60, seed=seed).score for seed in range(3)])
    base = np.mean([search(budget=1, seed=seed).score for seed in range(3)])
    assert found > random > base


@pytest.mark.parametrize("budget", [1, 4, 10, 17, 30])
def test_exactly_the_budget_is_scored(search, budget):
    result = search(budget=budget)
    assert [row["index"] for row in result.history] == list(range(budget))
    assert [row["generation"] for row in result.history] == [i // 10 for i in range(budget)]
    best = np.maximum.accumulate(scores(result))
    np.testing.assert_array_equal([row["best"] for row in result.history], best)


def test_surplus_of_a_partial_generation_cannot_win(search):
    long, short = search(budget=30), search(budget=23)
    assert scores(long)[:23] == scores(short)
    assert short.score == max(scores(short))


def test_a_smaller_budget_is_a_prefix(search):
    long = scores(search(budget=40))
    for budget in (5, 13, 20):
        np.testing.assert_allclose(scores(search(budget=budget)), long[:budget], atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 5, 10, 64])
def test_chunks_change_nothing(search, chunk):
    np.testing.assert_allclose(scores(search(chunk=chunk)), scores(search()), atol=1e-6)


def test_prompts_are_independent_and_prompt_zero_is_as_if_alone(search):
    together = search(["one", "another one", "one"])
    assert scores(together[0]) == scores(search("one"))
    assert not np.array_equal(together[0].noise, together[2].noise)
    assert [result.prompt for result in together] == ["one", "another one", "one"]
    assert isinstance(search(["one"]), list)


def test_same_seed_repeats_bit_for_bit(search):
    first, second, other = search(seed=3), search(seed=3), search(seed=4)
    assert scores(first) == scores(second)
    np.testing.assert_array_equal(first.noise, second.noise)
    assert scores(first) != scores(other)


def test_all_bits_of_a_seed_count(search):
    seeds = [0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    found = [scores(search(seed=seed, budget=4)) for seed in seeds]
    assert len({tuple(each) for each in found}) == len(seeds)
    assert scores(search(seed=np.int64(1), budget=4)) == scores(search(seed=1.0, budget=4)) == found[1]


def test_small_seeds_are_jaxs_own_keys():
    for seed in (0, 7, 2**32 - 1):
        expected = jax.random.split(jax.random.fold_in(jax.random.key(np.uint32(seed)), 3))
        np.testing.assert_array_equal(
            jax.random.key_data(jnp.stack(tasks.prompt_keys(seed, 3))), jax.random.key_data(expected)
        )


def test_x64_changes_nothing(search):
    expected = search()
    with jax.enable_x64():
        found = search(seed=0)
        noise = ses_jax.generate(toy.pipeline(), PROMPT).dtype
    assert found.noise.dtype == noise == np.float32
    np.testing.assert_allclose(scores(found), scores(expected), atol=1e-6)


@pytest.mark.parametrize(
    ("setting", "value", "changed"),
    [
        ("debug_nans", True, {"fidelity": "early1:0.5"}),
        ("debug_infs", True, {}),
        ("numpy_dtype_promotion", "strict", {"searcher": "evosax"}),
        ("numpy_rank_promotion", "raise", {}),
        ("threefry_partitionable", False, {}),
    ],
)
def test_settings_of_jax_change_nothing(search, setting, value, changed, fresh_programs):
    def run():
        return search(budget=6, population=4, elites=2, preview_steps=2, steps=2, **changed)

    with getattr(jax, setting)(value):
        found = run()
    ses_jax.clear_caches()
    expected = run()
    assert scores(found) == scores(expected)
    np.testing.assert_array_equal(found.noise, expected.noise)


def test_noise_gives_the_scored_preview_and_the_image_again(search, pipeline, reward):
    result = search(preview_steps=2, steps=5)
    preview = ses_jax.generate(pipeline, PROMPT, noise=result.noise[None], steps=2)
    np.testing.assert_allclose(reward(preview, [PROMPT])[0], result.score, atol=1e-5)
    image = np.asarray(ses_jax.generate(pipeline, PROMPT, noise=result.noise[None], steps=5))[0]
    np.testing.assert_allclose(reward(image[None], [PROMPT])[0], result.final_score, atol=1e-5)
    assert np.abs(np.asarray(result.image, np.int32) - image * 255).max() <= 0.5 + 1e-3
    baseline = np.asarray(ses_jax.generate(pipeline, PROMPT, steps=5))
    np.testing.assert_allclose(reward(baseline, [PROMPT])[0], result.baseline_final_score, atol=1e-5)


def test_only_the_low_band_changes(search):
    result = search()
    base = tasks.base_noise(tasks.prompt_keys(0, 0)[0], (3, 16, 16))
    difference = np.asarray(result.noise - base).reshape(3, 4, 4, 4, 4)
    np.testing.assert_allclose(difference, difference.mean(axis=(2, 4), keepdims=True) * np.ones((4, 1, 4)), atol=1e-5)


@pytest.mark.parametrize("name", ["db1", "db2", "bior2.2"])
def test_other_wavelets_search_too(search, name):
    result = search(wavelet=name, level=1)
    assert result.score > result.baseline_score


def test_one_compilation_for_all_generations_and_prompts(pipeline, reward, fresh_programs):
    pipeline, reward = toy.pipeline(), toy.brightness()
    before = generation.generation_step.cache_size()
    ses_jax.search(["a", "bb", "ccc"], model=pipeline, reward=reward, budget=25, progress=False)
    ses_jax.search("dddd", model=pipeline, reward=reward, budget=33, seed=5, progress=False)
    assert generation.generation_step.cache_size() - before == 1


def test_weights_are_not_baked_into_the_program(pipeline, reward):
    program, params, *rest = _step_arguments(pipeline, reward)
    first = generation.generation_step(program, params, *rest)[1].components
    compilations = generation.generation_step.cache_size()
    changed = ({"gain": jnp.float32(0.0)}, params[1])
    second = generation.generation_step(program, changed, *rest)[1].components
    assert generation.generation_step.cache_size() == compilations
    assert not np.allclose(first, second)


def _step_arguments(pipeline, reward):
    config = ses_jax.SearchConfig().resolve(pipeline)
    task = tasks.prepare(pipeline, reward, config, [PROMPT], [0])
    return task.program, task.params, task.inputs, jnp.int32(0), tasks.initial_state(task)


def test_a_callable_reward_gets_images_in_order(search, reward):
    seen = []

    def host(images, prompts):
        seen.append((np.asarray(images).shape, list(prompts)))
        return reward(images, prompts)

    result = search(reward=host, budget=15, population=5, elites=2)
    np.testing.assert_allclose(scores(result), scores(search(budget=15, population=5, elites=2)), atol=1e-6)
    assert seen[0] == ((5, 16, 16, 3), [PROMPT] * 5)
    assert len(seen) == 4  # three generations, then the two final renders
    assert result.config["reward"] == "host"


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_a_function_on_the_host_may_come_in_chunks(search, reward, chunk):
    def host(images, prompts):
        return reward(np.asarray(images), prompts)

    settings = {"budget": 15, "population": 5, "elites": 2}
    found = search(reward=host, chunk=chunk, **settings)
    np.testing.assert_allclose(scores(found), scores(search(**settings)), atol=1e-6)


def test_non_finite_scores_are_counted_and_never_win(search):
    def host(images, prompts):
        values = np.asarray(images).mean(axis=(1, 2, 3))
        values[::2], values[1] = np.nan, np.inf
        return values

    result = search(reward=host, budget=20)
    assert [row["score"] is None for row in result.history] == [i % 2 == 0 or i == 1 for i in range(10)] * 2
    assert math.isfinite(result.score)
    assert math.isnan(result.baseline_score)
    json.dumps(result.summary(), allow_nan=False)


def test_all_scores_non_finite_is_an_error(search):
    def broken(images, prompts):
        return np.full(len(prompts), np.nan)

    with pytest.raises(ValueError, match="'broken' gave no finite score in 20 candidates"):
        search(reward=broken)


@pytest.mark.parametrize(("searcher", "population"), [("zero-order", 1), ("best-of-n", 4), ("evosax", 9)])
def test_elites_bound_the_population_of_ses_alone(search, searcher, population):
    assert len(search(searcher=searcher, population=population, budget=3).history) == 3


@pytest.mark.parametrize("shape", [(3,), (10, 1), ()])
def test_a_reward_of_the_wrong_shape_is_named(search, shape):
    def wrong(images, prompts):
        return np.zeros(shape)

    with pytest.raises(ValueError, match="reward 'wrong' returned shape"):
        search(reward=wrong)


def test_errors_of_a_users_reward_come_through(search):
    class JudgeError(Exception):
        pass

    def failing(images, prompts):
        raise JudgeError("judge is down")

    with pytest.raises(JudgeError, match="judge is down") as caught:
        search(reward=failing)
    assert caught.value.__notes__ == ["raised by the reward 'failing'"]
    assert caught.value.results == []


def test_interrupt_returns_the_best_so_far(search, tmp_path):
    calls = []

    def host(images, prompts):
        values = np.asarray(images).mean(axis=(1, 2, 3))
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return values

    results = search(["one", "two"], reward=host, budget=100, out=tmp_path)
    assert len(results) == 1
    assert results[0].interrupted
    assert len(results[0].history) == 20
    assert results[0].score == max(scores(results[0]))
    assert json.loads((tmp_path / "000" / "result.json").read_text())["interrupted"] is True


def test_interrupt_before_anything_is_scored_propagates(search):
    def host(images, prompts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(reward=host)


def test_saved_folder(search, tmp_path):
    result = search(out=tmp_path / "deep" / "folder")
    folder = tmp_path / "deep" / "folder"
    loaded = ses_jax.SearchResult.load(folder)
    assert (loaded.summary(), loaded.history) == (result.summary(), result.history)
    np.testing.assert_array_equal(loaded.image, result.image)
    for file in ("result.json", "best.png"):
        assert ses_jax.SearchResult.load(folder / file).history == result.history
    names = {"best.png", "baseline.png", "noise.npy", "history.jsonl", "state.npz", "report.html", "result.json"}
    assert {path.name for path in folder.iterdir()} == names
    np.testing.assert_array_equal(np.load(folder / "noise.npy"), result.noise)
    np.testing.assert_array_equal(Image.open(folder / "best.png"), result.image)
    np.testing.assert_array_equal(Image.open(folder / "baseline.png"), result.baseline_image)
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert rows == result.history
    saved = json.loads((folder / "result.json").read_text())
    assert saved["score"] == result.score
    assert saved["config"]["budget"] == 20
    with pytest.raises(ValueError, match=r"holds a result \(best\.png\) already; .*overwrite=True"):
        search(out=folder, seed=1)
    assert json.loads((folder / "result.json").read_text()) == saved
    search(out=folder, seed=1, overwrite=True)
    assert {path.name for path in folder.iterdir()} == names


def test_a_result_is_a_short_line(search):
    result = dataclasses.replace(search(budget=2), score=2.0, baseline_score=1.0, baseline_final_score=math.nan)
    scores = f"preview 1.0000 -> 2.0000, final nan -> {result.final_score:.4f}"
    assert repr(result) == f"SearchResult('a bright image': {scores}, 2 of 2 candidates, 16 x 16 pixels)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "budget=0 must be at least 1"),
        ({"budget": 2.5}, "budget=2.5 is not a whole number"),
        ({"budget": 10**30}, r"budget=10+ must be less than 2147483648"),
        ({"steps": 10**6}, "steps=1000000 must be less than 10001"),
        ({"height": 10**6}, "height=1000000 must be less than 65537"),
        ({"seed": [0, [1]]}, r"seed=\[1\] is not a whole number"),
        ({"seed": object}, "seed=<class 'object'> is not a whole number"),
        ({"guidance": float("inf")}, "guidance=inf is not a number"),
        ({"guidance": 10**400}, r"guidance=1000\S*\.\.\. is not a number"),
        ({"guidance": {"scale": "x"}}, r"guidance=\{'scale': 'x'\} is not a number"),
        ({"negative_prompt": 5}, "negative_prompt=5 is not text"),
        ({"negative_prompt": "\ud800"}, r"negative_prompt='\\ud800' is not text"),
        ({"mesh": 3}, 'mesh=3 is not a mesh such as "data=4'),
        ({"load": 5}, "load=5 is not a mapping of options"),
        ({"load": {1: 2}}, r"load=\{1: 2\} is not a mapping of options"),
        ({"load": {"mesh": "data=1"}}, "'mesh' is a setting of its own"),
        ({"model": 5}, 'model=5 is not "demo", a folder, a Hugging Face id or a loaded pipeline'),
        ({"model": None}, "model=None is not"),
        ({"model": "a\0b"}, r"model='a\\x00b' is no path"),
        ({"reward": {"clip": 0.0}}, "every weight of the reward is 0"),
        ({"reward": {"clip": float("nan")}}, "reward: the weight nan of 'clip' is not a number"),
        ({"reward": {"clip": "x"}}, "the weight 'x' of 'clip'"),
        ({"reward": {"clip": True}}, "the weight True of 'clip'"),
        ({"reward": ["clip"]}, r"reward=\['clip'\] is no name, function or mapping"),
        ({"reward": {lambda i, p: 0: 1, lambda i, p: 1: 1}}, "two parts of the name '<lambda>'"),
        ({"report": 5}, "unknown reward 5"),
        ({"report": [["clip"]]}, r"report=\[\['clip'\]\] must be names or functions"),
        ({"report": {"clip": None}}, "report: the weight None of 'clip'"),
        ({"out": ""}, "the output folder has no name"),
        ({"out": "a\0"}, r"out='a\\x00' is no path"),
        ({"resume": True}, "resume needs out="),
        ({"resume": True, "overwrite": True, "out": "x"}, "resume goes on with what is in the folder, and overwrite"),
        ({"prompt": "a\ud800"}, r"the text 'a\\ud800' is not Unicode"),
        ({"steps": "20"}, "steps='20' is not a whole number"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seed": 2**64}, "seed=18446744073709551616 must be less than"),
        ({"guidance": float("nan")}, "guidance=nan is not a number"),
        ({"standardize": "no"}, "standardize='no' is not true or false"),
        ({"prompts_at_once": 0}, "prompts_at_once=0 must be at least 1"),
        ({"population": 1}, "elites=5 must be at least 1 and less than population=1"),
        ({"elites": 10}, "elites=10 must be at least 1 and less than population=10"),
        ({"elites": 0}, "elites=0"),
        ({"preview_steps": 0}, "preview_steps=0"),
        ({"steps": -1}, "steps=-1"),
        ({"chunk": 0}, "chunk=0"),
        ({"height": 18}, "height=18 must be a multiple of 4; try 16 or 20"),
        ({"width": 2}, "width=2 must be a multiple of 4; try 4 or 8"),
        ({"wavelet": "db99"}, "unknown wavelet 'db99'"),
        ({"level": 9}, "level=9 does not fit a latent of 16 x 16"),
        ({"reward": "nice"}, "unknown reward 'nice'"),
        ({"reward": {}}, "at least one part"),
        ({"model": "no/such/model"}, "no/such/model"),
        ({"prompt": []}, "no prompts"),
        ({"on_generation": lambda generation: None}, r"called with \(generation, .*, scores\): too many positional"),
        ({"on_generation": lambda *seen, stop: None}, "missing a required .*argument: 'stop'"),
    ],
)
def test_bad_input_is_refused_before_any_work(search, monkeypatch, settings, message):
    def work(*args, **kwargs):
        raise AssertionError("work started")

    monkeypatch.setattr(engine, "search_prompts", work)
    with pytest.raises(ValueError, match=message):
        search(**settings)


def test_what_is_called_after_a_generation_is_a_function(search):
    with pytest.raises(ValueError, match="on_generation=3 is not a function"):
        watching.check_function(3)

    class Enough:
        __signature__ = object()  # as of some functions in C, nobody can read it

        def __call__(self, *seen):
            return True

    assert len(search(budget=20, on_generation=Enough()).history) == 10


def test_an_unknown_setting_is_named(search, pipeline):
    with pytest.raises(TypeError, match=r"search\(\) got an unexpected argument 'bugdet'; settings are .*budget"):
        search(bugdet=3)
    with pytest.raises(TypeError, match=r"generate\(\) got an unexpected argument 'budget'"):
        ses_jax.generate(pipeline, "a", budget=3)


@pytest.mark.parametrize(
    ("name", "ours"),
    [("num_inference_steps", "steps"), ("guidance_scale", "guidance"), ("generator", "seed"), ("output_dir", "out")],
)
def test_the_words_of_other_libraries_are_known(search, name, ours):
    with pytest.raises(TypeError, match=f"unexpected argument '{name}'; here that is {ours}"):
        search(**{name: 1})


def test_a_pipeline_of_diffusers_is_named(search):
    kind = type("StableDiffusionPipeline", (), {"__module__": "diffusers.pipelines.sd"})
    with pytest.raises(ValueError, match="model=StableDiffusionPipeline is a pipeline of diffusers; pass the folder"):
        search(model=kind())


@pytest.mark.parametrize("prompt", [["a", 3], 3, None, {"a": 1}, b"x"])
def test_prompts_that_are_no_strings_are_named(prompt):
    with pytest.raises(ValueError, match="prompts must be strings, got"):
        engine.prompt_list(prompt)


def test_a_folder_without_a_model_is_not_walked(tmp_path, monkeypatch):
    (tmp_path / "much").mkdir()
    monkeypatch.setattr(type(tmp_path), "rglob", None)
    with pytest.raises(FileNotFoundError, match=r"model_index\.json does not exist"):
        ses_jax.search("a", model=str(tmp_path), progress=False)


def test_paths_that_are_none_are_named():
    for value in (5, "a\0", "a\ud800", b"a"):
        with pytest.raises(ValueError, match=r"out=\S+ is no path"):
            output.claim(value, listed=False, resume=False, overwrite=False)
    with pytest.raises(ValueError, match="overwrite='yes' is not true or false"):
        output.claim("a", listed=False, resume=False, overwrite="yes")


def test_the_home_folder_may_be_named_by_a_tilde(search, pipeline, reward, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    result = search(budget=10, out="~/a")
    loaded = ses_jax.SearchResult.load("~/a")
    loaded.save("~/b")
    loaded.plot().save("~/b/plot.svg")
    image = ses_jax.generate(pipeline, PROMPT, noise="~/a/noise.npy")
    np.testing.assert_allclose(np.asarray(result.image), np.asarray(image[0]) * 255, atol=0.51)
    again = search(base_noise="~/a", budget=1)
    assert again.config["base_noise"]["file"] == str(tmp_path / "a")
    (tmp_path / "prompts.txt").write_text(PROMPT)
    settings = {"model": pipeline, "reward": reward, "budget": 1, "progress": False}
    assert ses_jax.search_many("~/prompts.txt", out="~/run", **settings)["finished"] == 1
    assert repeat.read("~/a/best.png") == repeat.read(tmp_path / "a" / "best.png")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "run", "prompts.txt"}


def test_unwritable_folder_is_refused(search, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="not writable"):
        search(out=tmp_path / "file" / "out")


def test_generate_checks_noise_and_sizes(pipeline):
    with pytest.raises(ValueError, match=r"noise has shape \(1, 3, 8, 8\)"):
        ses_jax.generate(pipeline, "a", noise=np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(ValueError, match="noise holds values that are not finite"):
        ses_jax.generate(pipeline, "a", noise=np.full((1, 3, 16, 16), np.nan, np.float32))
    with pytest.raises(ValueError, match="height=18"):
        ses_jax.generate(pipeline, "a", height=18)
    with pytest.raises(ValueError, match="noise=5 is neither an array nor a file"):
        engine._noise(5)
    images = ses_jax.generate(pipeline, ["a", "bb"], height=8, width=12, seed=2)
    assert images.shape == (2, 8, 12, 3)


def test_generate_takes_the_noise_of_one_image_and_its_file(search, pipeline, tmp_path):
    result = search(budget=10, out=tmp_path)
    images = [
        ses_jax.generate(pipeline, PROMPT, noise=noise, steps=4)
        for noise in (result.noise[None], result.noise, tmp_path / "noise.npy", str(tmp_path / "noise.npy"), tmp_path)
    ]
    assert images[0].shape == (1, 16, 16, 3)
    for image in images[1:]:
        np.testing.assert_array_equal(image, images[0])
    (tmp_path / "noise.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"noise\.npy cannot be read: the magic string is not correct"):
        ses_jax.generate(pipeline, PROMPT, noise=tmp_path / "noise.npy")
    with pytest.raises(FileNotFoundError, match=r"none\.npy: no such file"):
        ses_jax.generate(pipeline, PROMPT, noise=tmp_path / "none.npy")
    with pytest.raises(ValueError, match=r"best\.png: noise is a \.npy, .* or the folder of a result"):
        ses_jax.generate(pipeline, PROMPT, noise=tmp_path / "best.png")


def test_a_pipeline_is_a_short_screen(pipeline):
    assert repr(pipeline).splitlines() == ["Toy from toy: 16 x 16, 4 steps", "  gain: 1 parameters, float32, 0.0 MiB"]


def test_settings_reach_the_model(search, pipeline):
    assert scores(search(guidance=0.0)) == scores(search())
    result = search("p", height=24, width=32, level=3)
    assert result.noise.shape == (3, 24, 32)
    assert result.image.size == (32, 24)
