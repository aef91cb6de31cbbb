"""Searches that end early, and folders that hold something already: nothing finished is lost or replaced in silence."""

import json
import os
import signal
import subprocess
import sys
import threading

import batch_runs
import numpy as np
import pytest
from batch_runs import PIPELINE, PROMPTS, REWARD, SETTINGS
from PIL import Image

import ses_jax
from ses_jax import cli
from ses_jax.engine import lock, output, stopping
from ses_jax.engine.result import save_search

BUDGET = 9  # three generations
RESULT = {"best.png", "baseline.png", "noise.npy", "history.jsonl", "state.npz", "report.html", "result.json"}


def search(prompt, reward=REWARD, **settings):
    settings = {"model": PIPELINE, "progress": False} | SETTINGS | {"budget": BUDGET} | settings
    return ses_jax.search(prompt, reward=reward, **settings)


def judge(at, act):
    """A reward on the host that does something in one of its calls: three generations a prompt, then its images."""
    calls = []

    def brightness(images, prompts):
        calls.append(prompts[0])
        if len(calls) == at:
            act()
        return images.mean(axis=(1, 2, 3))

    loaded = ses_jax.load_reward(brightness, traceable=False)
    return loaded, calls


def sending(*numbers):
    def act():
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


def failing():
    raise RuntimeError("judge is down")


@pytest.fixture(autouse=True)
def handlers():
    """Those of a program that is started by hand; the suite's workers ignore Ctrl-C."""
    before = {number: signal.signal(number, default) for number, default in stopping.DEFAULTS.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole():
    return search(PROMPTS[0])


@pytest.mark.parametrize("at", [1, 2])
def test_ctrl_c_ends_a_search_after_the_generation_at_hand(tmp_path, whole, at):
    reward, calls = judge(at, sending(signal.SIGINT))
    result = search(PROMPTS[0], reward, out=tmp_path)
    assert result.interrupted
    assert len(calls) == at + 1  # what was at hand, and the images
    assert result.history == whole.history[: 3 * at]
    assert names(tmp_path) == RESULT | {".search"}
    assert json.loads((tmp_path / "result.json").read_text())["interrupted"] is True
    reward, calls = judge(-1, failing)
    assert search(PROMPTS[0], reward, out=tmp_path, resume=True).history == whole.history
    assert len(calls) == 3 - at + 1  # the other generations, and the images
    assert names(tmp_path) == RESULT
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_the_last_steps_changes_nothing(tmp_path, whole):
    for at in (3, 4):
        result = search(PROMPTS[0], judge(at, sending(signal.SIGINT))[0], out=tmp_path / str(at))
        assert not result.interrupted
        assert result.history == whole.history


@pytest.mark.parametrize(("at", "settings"), [(2, {}), (4, {}), (4, {"no_report": True}), (4, {"resume": True})])
def test_a_second_one_ends_at_once_and_what_was_found_is_kept(tmp_path, whole, at, settings):
    reward, calls = judge(at, sending(signal.SIGINT, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        search(PROMPTS[0], reward, out=tmp_path, **settings)
    assert len(calls) == at
    assert names(tmp_path) == {"preview.png", "noise.npy", "history.jsonl", "state.npz", ".search"}
    done = 3 if at == 2 else BUDGET
    assert batch_runs.lines(tmp_path / "history.jsonl") == whole.history[:done]
    found = search(PROMPTS[0], budget=done)
    np.testing.assert_array_equal(np.load(tmp_path / "noise.npy"), found.noise)
    with Image.open(tmp_path / "preview.png") as preview:
        assert np.asarray(preview).mean() / 255 == pytest.approx(found.score, abs=0.003)  # brightness itself
    reward, calls = judge(-1, failing)
    result = search(PROMPTS[0], reward, out=tmp_path, resume=True)
    assert len(calls) == (3 if at == 2 else 1)  # the images, and nothing that was scored before
    assert result.history == whole.history
    np.testing.assert_array_equal(result.image, whole.image)
    assert names(tmp_path) == RESULT


def test_an_error_in_the_images_loses_no_search(tmp_path, whole):
    search(PROMPTS[1], out=tmp_path)
    with pytest.raises(RuntimeError):
        search(PROMPTS[0], judge(4, failing)[0], out=tmp_path, overwrite=True)
    assert names(tmp_path) == RESULT | {"unfinished", ".search"}
    assert names(tmp_path / "unfinished") == {"preview.png", "noise.npy", "history.jsonl", "state.npz"}
    assert json.loads((tmp_path / "result.json").read_text())["prompt"] == PROMPTS[1]
    reward, calls = judge(-1, failing)
    result = search(PROMPTS[0], reward, out=tmp_path, resume=True)  # what was to replace it goes on
    assert len(calls) == 1
    assert result.history == whole.history
    assert names(tmp_path) == RESULT


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("judged", [True, False])
def test_an_error_in_a_generation_loses_none_before_it(tmp_path, whole, at, judged):
    """Of the reward, or of the caller's own function."""
    reward, _ = judge(at if judged else -1, failing)
    seen = None if judged else lambda generation, *_: failing() if generation == at - 1 else False
    with pytest.raises(RuntimeError):
        search(PROMPTS[0], reward, out=tmp_path, on_generation=seen)
    assert names(tmp_path) == ({".search"} if at > 1 else set())
    reward, calls = judge(-1, failing)
    result = search(PROMPTS[0], reward, out=tmp_path, resume=True)
    assert len(calls) == 3 - (at - 1) + 1  # the other generations, and the images
    assert result.history == whole.history
    assert [shot.index for shot in result.film] == [shot.index for shot in whole.film]
    assert names(tmp_path) == RESULT


def test_a_preview_that_no_film_has_leaves_none_of_another_search(tmp_path):
    noise = np.zeros((1, 2, 2), np.float32)
    save_search(tmp_path, noise, [], Image.new("RGB", (2, 2)))
    assert names(tmp_path) == {"preview.png", "noise.npy", "history.jsonl"}
    save_search(tmp_path, noise, [], None)
    assert names(tmp_path) == {"noise.npy", "history.jsonl"}


def test_of_a_list_what_is_finished_comes_back(tmp_path):
    results = search(PROMPTS[:3], judge(6, sending(signal.SIGINT))[0], out=tmp_path)
    assert [(len(result.history), result.interrupted) for result in results] == [(9, False), (6, True)]
    results = search(PROMPTS[:3], judge(4, sending(signal.SIGINT))[0])  # in the images of the first
    assert [(len(result.history), result.interrupted) for result in results] == [(9, False)]

    def interrupted():
        raise KeyboardInterrupt

    results = search(PROMPTS[:3], judge(5, interrupted)[0])  # before anything of the second is scored
    assert [(len(result.history), result.interrupted) for result in results] == [(9, False)]


def test_an_error_has_what_is_finished(tmp_path):
    with pytest.raises(RuntimeError, match="judge is down") as caught:
        search(PROMPTS[:3], judge(6, failing)[0], out=tmp_path)
    (first,) = caught.value.results
    assert first.prompt == PROMPTS[0]
    assert names(tmp_path) == {"000", ".search"}
    assert ses_jax.SearchResult.load(tmp_path / "000").history == first.history


def test_sigterm_saves_and_ends_the_program(tmp_path, whole):
    reward, calls = judge(2, sending(signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        search(PROMPTS[0], reward, out=tmp_path, resume=True)
    assert caught.value.code == 143
    assert len(calls) == 3
    (best,) = caught.value.results
    assert best.history == whole.history[:6]
    assert names(tmp_path) == RESULT | {".search"}
    reward, calls = judge(-1, failing)
    result = search(PROMPTS[0], reward, out=tmp_path, resume=True)
    assert len(calls) == 2  # the last generation, and the images
    assert result.history == whole.history
    assert names(tmp_path) == RESULT


def test_sigterm_ends_a_batch_run_which_goes_on(tmp_path):
    batch_runs.run(PROMPTS[:3], tmp_path / "whole")
    with pytest.raises(SystemExit) as caught:
        batch_runs.run(PROMPTS[:3], tmp_path / "out", reward=judge(4, sending(signal.SIGTERM))[0], resume=True)
    assert caught.value.code == 143
    assert set(batch_runs.finished(tmp_path / "out")) == {"00000"}
    reward, calls = judge(-1, failing)
    batch_runs.run(PROMPTS[:3], tmp_path / "out", reward=reward, resume=True)
    assert calls.count(PROMPTS[1]) == 2  # of three
    assert batch_runs.stable_files(tmp_path / "out") == batch_runs.stable_files(tmp_path / "whole")


def test_a_programs_own_handlers_stay():
    own = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with stopping.noticed() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not stop
    finally:
        signal.signal(signal.SIGTERM, own)
    found = []

    def elsewhere():  # only the main thread has handlers
        with stopping.noticed() as stop:
            found.append(bool(stop))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [False]


def test_the_shell_says_how_a_search_ended(tmp_path, capsys, monkeypatch):
    def searched(**ending):
        monkeypatch.setattr(ses_jax, "search", lambda *args, **settings: ending["act"]())
        status = cli.main(["search", "a", "--out", str(tmp_path)])
        return status, capsys.readouterr().err

    interrupted = search(PROMPTS[0], judge(1, sending(signal.SIGINT))[0])
    status, error = searched(act=lambda: interrupted)
    assert (status, error.count("\n")) == (130, 1)
    assert error.startswith(f"ses-jax: stopped early; {tmp_path} holds the best so far")

    def broken():
        try:
            failing()
        except RuntimeError as error:
            error.add_note("raised by the reward 'mine'")
            raise

    status, error = searched(act=broken)
    assert status == 1
    assert "in failing" in error
    assert error.splitlines()[-1] == "ses-jax: raised by the reward 'mine': RuntimeError: judge is down"

    def terminated():
        raise SystemExit(143)

    with pytest.raises(SystemExit, match="143"):
        searched(act=terminated)
    capsys.readouterr()

    def interrupted_again():
        raise KeyboardInterrupt

    assert searched(act=interrupted_again) == (130, "")
    (tmp_path / ".search").mkdir()
    status, error = searched(act=interrupted_again)
    assert (status, error.count("\n")) == (130, 1)
    assert error.startswith(f"ses-jax: stopped at once; {tmp_path} holds what was found")


def test_a_result_is_not_replaced_in_silence(tmp_path, whole):
    search(PROMPTS[0], out=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for prompt in (PROMPTS[1], PROMPTS[:2]):
        with pytest.raises(ValueError, match=r"holds a result \(best\.png\) already; choose another folder, go on"):
            search(prompt, out=tmp_path)
    with pytest.raises(ValueError, match=r"holds a result .* already; choose another folder, or replace"):
        search(PROMPTS[:2], out=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"finished search with other settings \(prompt 'prompt ' -> 'prompt x'\)"):
        search(PROMPTS[1], out=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"other settings \(seed 0 -> 1\)"):
        search(PROMPTS[0], out=tmp_path, resume=True, seed=1)
    with pytest.raises(ValueError, match=r"other settings \(prompt_index 0 -> 1\)"):
        search(PROMPTS[0], out=tmp_path, resume=True, index=1)
    with pytest.raises(ValueError, match=r"other settings \(base_noise None -> '[0-9a-f]{64}'\)"):
        search(PROMPTS[0], out=tmp_path, resume=True, base_noise=whole.noise)
    with pytest.raises(RuntimeError):
        search(PROMPTS[1], judge(1, failing)[0], out=tmp_path, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    search(PROMPTS[1], out=tmp_path, overwrite=True)
    assert json.loads((tmp_path / "result.json").read_text())["prompt"] == PROMPTS[1]


def test_a_finished_one_comes_back(tmp_path, whole):
    search(PROMPTS[:2], out=tmp_path)
    (tmp_path / "001" / "result.json").write_text("{}")
    reward, calls = judge(-1, failing)
    results = search(PROMPTS[:3], reward, out=tmp_path, resume=True, chunk=1)
    assert set(calls) == set(PROMPTS[1:3])
    assert results[0].history == whole.history
    np.testing.assert_array_equal(results[0].image, whole.image)
    assert names(tmp_path) == {"000", "001", "002"}


def test_one_of_the_same_base_noise_comes_back_whatever_its_file(tmp_path, whole):
    search(PROMPTS[0], out=tmp_path / "out", base_noise=whole.noise)
    np.save(tmp_path / "noise.npy", whole.noise)
    reward, calls = judge(-1, failing)
    search(PROMPTS[0], reward, out=tmp_path / "out", base_noise=tmp_path / "noise.npy", resume=True)
    assert calls == []
    with pytest.raises(ValueError, match=r"other settings \(base_noise '[0-9a-f]{64}' -> None\)"):
        search(PROMPTS[0], out=tmp_path / "out", resume=True)


def test_a_search_that_the_caller_ended_does_not_end_the_list(tmp_path):
    results = search(PROMPTS[:3], out=tmp_path, on_generation=lambda generation, *_: generation == 0)
    assert [(len(result.history), result.interrupted) for result in results] == [(3, True)] * 3
    assert names(tmp_path) == {"000", "001", "002"}
    reward, _ = judge(2, sending(signal.SIGINT))  # the first prompt's images, after which the list ends
    results = search(PROMPTS[:3], reward, out=tmp_path, overwrite=True, on_generation=lambda *_: True)
    assert len(results) == 1

    def broken(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        search(PROMPTS[:3], on_generation=broken)
    assert caught.value.results == []


@pytest.mark.parametrize("damage", [b"PK", b"", None])
def test_a_damaged_film_loses_no_search(tmp_path, whole, caplog, damage):
    with pytest.raises(RuntimeError):
        search(PROMPTS[0], judge(3, failing)[0], out=tmp_path, resume=True)
    (film,) = tmp_path.glob(".search/*/film.npz")
    film.write_bytes(film.read_bytes()[:-40] if damage is None else damage)
    result = search(PROMPTS[0], out=tmp_path, resume=True)
    assert result.history == whole.history
    assert {shot.generation for shot in result.film} == {2}
    assert "film.npz is damaged" in caplog.text
    assert names(tmp_path) == RESULT


def test_pictures_of_one_format_and_their_own_candidates_stay(tmp_path, whole):
    search(PROMPTS[0], out=tmp_path, save_candidates=True)
    (tmp_path / "candidates" / "mine.txt").write_text("stays")
    search(
        PROMPTS[0], out=tmp_path, overwrite=True, save_candidates=True, budget=4, image_format="webp", no_report=True
    )
    others = {"best.png", "baseline.png", "report.html"}
    assert names(tmp_path) == RESULT - others | {"best.webp", "baseline.webp", "candidates"}
    pairs = {f"{i:05d}.{ending}" for i in range(4) for ending in ("png", "npy")}
    assert names(tmp_path / "candidates") == pairs | {"mine.txt"}
    loaded = ses_jax.SearchResult.load(tmp_path)
    assert (len(loaded.history), loaded.image.size, loaded.film) == (4, (16, 16), ())
    assert search(PROMPTS[0], out=tmp_path, resume=True, budget=4).history == loaded.history
    search(PROMPTS[0], out=tmp_path, overwrite=True)
    assert names(tmp_path) == RESULT | {"candidates"}
    assert names(tmp_path / "candidates") == {"mine.txt"}


def test_results_of_another_shape_go_when_they_are_replaced(tmp_path):
    search(PROMPTS[:2], out=tmp_path)
    (tmp_path / "001" / "mine.txt").write_text("stays")
    (tmp_path / output.STATE / "000000").mkdir(parents=True)
    search(PROMPTS[0], out=tmp_path, overwrite=True)
    assert names(tmp_path) == RESULT | {"001"}
    assert names(tmp_path / "001") == {"mine.txt"}
    search(PROMPTS[:1], out=tmp_path, overwrite=True)
    assert names(tmp_path) == {"000", "001"}


def test_an_unfinished_search_is_something(tmp_path):
    with pytest.raises(RuntimeError):
        search(PROMPTS[0], judge(2, failing)[0], out=tmp_path, resume=True)
    assert names(tmp_path) == {".search"}
    with pytest.raises(ValueError, match=r"holds an unfinished search already; .*--resume"):
        search(PROMPTS[0], out=tmp_path)
    search(PROMPTS[0], out=tmp_path, overwrite=True)
    assert names(tmp_path) == RESULT


def test_a_batch_runs_folder_is_not_searched_into(tmp_path):
    batch_runs.run(PROMPTS[:1], tmp_path)
    for more in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match="holds a batch run; choose another folder"):
            search(PROMPTS[0], out=tmp_path, **more)


def test_two_at_once_in_a_folder_are_noticed(tmp_path):
    with lock.held(tmp_path):
        with pytest.raises(ValueError, match="is in use by another process"):
            search(PROMPTS[0], out=tmp_path)
        with lock.held(tmp_path, ".lock-1"):  # the processes of one batch run
            assert names(tmp_path) == {".lock", ".lock-1"}
    assert names(tmp_path) == set()
    with lock.held(tmp_path, ".lock-0"), pytest.raises(ValueError, match="is in use by another process"):
        batch_runs.run(PROMPTS[:1], tmp_path)


def test_a_lock_dies_with_its_process(tmp_path):
    code = "import sys, time, pathlib; from ses_jax.engine import lock; held = lock.held(pathlib.Path(sys.argv[1]))\n"
    code = f"{code}held.__enter__(); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="in use"), lock.held(tmp_path):
        pass
    process.kill()
    process.communicate()
    assert names(tmp_path) == {".lock"}
    with lock.held(tmp_path):
        pass
    assert names(tmp_path) == set()


def test_file_systems_without_locks_do_not_matter(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with lock.held(tmp_path), lock.held(tmp_path):
        pass
    monkeypatch.setattr(lock, "fcntl", None)
    with lock.held(tmp_path):
        assert names(tmp_path) <= {".lock"}


def test_two_threads_at_once_give_what_one_after_the_other_gives(whole):
    found = {}

    def searching(index):
        found[index] = search(PROMPTS[index])

    threads = [threading.Thread(target=searching, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0].history == whole.history
    assert found[1].history == search(PROMPTS[1]).history
