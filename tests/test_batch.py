"""Batch runs: what they write, what each row draws, what fails alone, what goes on after which kind of end."""

import dataclasses
import itertools
import json
import os

import batch_runs
import forked
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from batch_runs import PIPELINE, PROMPTS, REWARD, SETTINGS, finished, lines, run, stable_files

import ses_jax
from ses_jax import cli
from ses_jax.batch import progress, prompts, run_folder
from ses_jax.batch import run as batch
from ses_jax.engine import files, models, output
from ses_jax.engine.result import SearchResult
from ses_jax.rewards.reward import Part, Reward


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of all prompts."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(PROMPTS, out)


def test_a_run_holds_a_folder_a_prompt_and_merged_results(whole):
    out, summary = whole
    names = [f"{i:05d}" for i in range(len(PROMPTS))]
    files = {"run.json", "prompts.jsonl", "results-0.jsonl", "results.jsonl", "summary.json", "report.html"}
    assert {path.name for path in out.iterdir()} == {*names, *files}
    rows = lines(out / "results.jsonl")
    assert [row["id"] for row in rows] == names
    assert [row["prompt"] for row in rows] == PROMPTS
    for row in rows:
        saved = json.loads((out / row["folder"] / "result.json").read_text())
        assert {name: row[name] for name in run_folder.SCORES} == {name: saved[name] for name in run_folder.SCORES}
        timings = [saved["timings"][name] for name in ("encode", "search", "render")]
        np.testing.assert_allclose(row["seconds"], sum(timings))
    assert json.loads((out / "summary.json").read_text()) == summary
    assert lines(out / "results-0.jsonl") == rows


def test_the_summary_has_means_and_standard_errors(whole):
    out, summary = whole
    rows = lines(out / "results.jsonl")
    counts = {name: summary[name] for name in ("prompts", "finished", "failed", "unfinished")}
    assert counts == {"prompts": 8, "finished": 8, "failed": 0, "unfinished": 0}
    for kind, before, after in (("preview", *run_folder.SCORES[:2]), ("final", *run_folder.SCORES[2:])):
        columns = {"baseline": [row[before] for row in rows], "search": [row[after] for row in rows]}
        columns["gain"] = np.subtract(columns["search"], columns["baseline"])
        for name, values in columns.items():
            mean = sum(values) / 8
            error = (sum((value - mean) ** 2 for value in values) / 7 / 8) ** 0.5
            found = summary["scores"][kind][name]
            np.testing.assert_allclose([found["mean"], found["standard_error"]], [mean, error], rtol=1e-9)
    np.testing.assert_allclose(summary["images_per_second"], 40 / sum(row["search_seconds"] for row in rows))


def test_summaries_of_few_or_broken_scores():
    row = dict.fromkeys(run_folder.SCORES, 1.0) | {"components": {}, "scored": 9, "seconds": 3.0}
    row |= {"search_seconds": 2.0, "images_per_second": 1.5}  # of a search that was continued after six
    one = run_folder.summarize([row, None, {"error": "x"}])
    assert [one[name] for name in ("prompts", "finished", "failed", "unfinished")] == [3, 1, 1, 1]
    assert one["scores"]["preview"]["search"] == {"mean": 1.0, "standard_error": None}
    assert one["images_per_second"] == 1.5
    none = run_folder.summarize([row | {"baseline_score": None}])
    assert none["scores"]["preview"]["gain"] == {"mean": None, "standard_error": None}
    assert none["scores"]["final"]["gain"]["mean"] == 0.0


def test_rows_are_the_results_of_a_search_over_the_list(whole):
    out, _ = whole
    results = ses_jax.search(PROMPTS[:3], model=PIPELINE, reward=REWARD, progress=False, **SETTINGS)
    for index, found in enumerate(results):
        np.testing.assert_array_equal(np.load(out / f"{index:05d}" / "noise.npy"), found.noise)
        assert lines(out / f"{index:05d}" / "history.jsonl") == found.history


@pytest.mark.parametrize("count", [2, 3, 10])
def test_any_number_of_processes_gives_the_same_bytes(whole, tmp_path, count):
    for index in reversed(range(count)):
        assert not (tmp_path / "results.jsonl").exists()
        summary = run(PROMPTS, tmp_path, process_id=index, num_processes=count)
    assert summary["unfinished"] == 0
    assert stable_files(tmp_path) == stable_files(whole[0])
    journals = {i: [row["index"] for row in lines(tmp_path / f"results-{i}.jsonl")] for i in range(min(count, 8))}
    assert journals == {i: list(range(i, 8, count)) for i in range(min(count, 8))}


def test_a_row_does_not_depend_on_the_others(whole, tmp_path):
    others = [f"another {i}" for i in range(8)]
    run([*others[:5], PROMPTS[5], *others[6:]], tmp_path)
    files = {name: data for name, data in stable_files(tmp_path).items() if name.startswith("00005/")}
    assert len(files) == 4
    assert files.items() <= stable_files(whole[0]).items()


def test_prompts_at_once_give_the_same_scores(whole, tmp_path):
    rows = [{"prompt": prompt, "metadata": i} for i, prompt in enumerate(PROMPTS)]
    summary = run(rows, tmp_path, prompts_at_once=3)
    for name in sorted(finished(tmp_path)):
        scores = [[row["score"] for row in lines(out / name / "history.jsonl")] for out in (tmp_path, whole[0])]
        np.testing.assert_allclose(*scores, atol=1e-6)
    times = [json.loads(path.read_text())["timings"] for path in sorted(tmp_path.glob("*/result.json"))]
    once = {tuple(sorted(time.items())) for time in times}
    assert len(once) == 3
    total = sum(time["encode"] + time["search"] + time["render"] for time in map(dict, once))
    np.testing.assert_allclose(summary["seconds"], total)


def test_rows_override_settings_and_keep_their_columns(tmp_path):
    rows = [
        {"id": "a", "prompt": "one", "seed": 5, "budget": 4, "tag": "counting"},
        {"id": "b", "prompt": "one", "height": 8, "width": 12, "tag": None},
        {"id": "c", "prompt": "one", "population": 2},
    ]
    run(rows, tmp_path)
    found = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/result.json")}
    assert (found["a"]["config"]["seed"], found["a"]["scored"]) == (5, 4)
    assert np.load(tmp_path / "b" / "noise.npy").shape == (3, 8, 12)
    assert [row["generation"] for row in lines(tmp_path / "c" / "history.jsonl")] == [0, 0, 1, 1, 2]
    assert [row["metadata"] for row in lines(tmp_path / "results.jsonl")] == [{"tag": "counting"}, {}, {}]
    settings = SETTINGS | {"seed": 5, "budget": 4}
    alone = ses_jax.search("one", model=PIPELINE, reward=REWARD, progress=False, **settings)
    np.testing.assert_allclose(found["a"]["score"], alone.score, atol=1e-6)


def test_bad_rows_and_failing_prompts_fail_alone_and_are_tried_again(tmp_path):
    broken, seen = {"two"}, []

    def reward(images, prompts):
        seen.extend(prompts)
        if broken & set(prompts):
            raise RuntimeError("judge is down")
        values = np.asarray(images).mean(axis=(1, 2, 3))
        return np.full_like(values, np.nan) if "three" in prompts and broken else values

    rows = ["one", "", {"prompt": "x", "budget": "many"}, {"prompt": "x", "height": 18}, "two", "three", "four"]
    reward = ses_jax.load_reward(reward, traceable=False)
    summary = run(rows, tmp_path, reward=reward, prompts_at_once=2)
    assert (summary["finished"], summary["failed"], summary["unfinished"]) == (2, 5, 0)
    errors = [row.get("error") for row in lines(tmp_path / "results.jsonl")]
    assert errors[:5] == [
        None,
        "the prompt is empty",
        "budget='many' is not a whole number",
        "height=18 must be a multiple of 4; try 16 or 20",
        "RuntimeError: judge is down",
    ]
    assert "gave no finite score" in errors[5]
    assert errors[6] is None
    assert 'raise RuntimeError("judge is down")' in lines(tmp_path / "results.jsonl")[4]["traceback"]
    assert set(finished(tmp_path)) == {"00000", "00006"}

    before = finished(tmp_path)
    broken.clear()
    seen.clear()
    summary = run(rows, tmp_path, reward=reward)
    assert set(seen) == {"two", "three"}
    assert (summary["finished"], summary["failed"]) == (4, 3)
    assert before.items() <= finished(tmp_path).items()
    assert ["error" in row for row in lines(tmp_path / "results.jsonl")] == [False, True, True, True] + [False] * 3


def test_a_run_of_bad_rows_alone_loads_no_model(tmp_path):
    summary = run(["", ""], tmp_path, model="no such model")
    assert summary["failed"] == 2


def test_many_prompts_are_soon_started(tmp_path, monkeypatch):
    """Settings are checked once for all rows that have the same, whatever their seeds."""
    calls, seen = [], []
    resolve = ses_jax.SearchConfig.resolve
    monkeypatch.setattr(ses_jax.SearchConfig, "resolve", lambda *given: calls.append(1) or resolve(*given))

    def begun(pipeline, reward, config, prompts, **how):
        seen.append((config, prompts, how["indices"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "search_prompts", begun)
    rows = [
        {"prompt": f"prompt {i}", "seed": i // 2, "steps": 2 + i % 2, "guidance": {"scale": 1.0}} for i in range(200)
    ]
    with pytest.raises(KeyboardInterrupt):
        run(rows, tmp_path)
    assert len(calls) == 3
    ((config, prompts, indices),) = seen
    assert (config.seed, config.steps, config.guidance, prompts, indices) == (0, 2, {"scale": 1.0}, ["prompt 0"], [0])
    assert len(lines(tmp_path / "prompts.jsonl")) == 200


def test_a_finished_run_loads_no_model_and_changes_nothing(whole, monkeypatch):
    out, summary = whole
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "results.jsonl"}
    monkeypatch.setattr(models, "load_models", None)
    assert run(PROMPTS, out) == summary
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path for path in before if before[path] != after[path]} <= {out, out / "summary.json", out / "report.html"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"budget": 6}, "was started with budget=5, now budget=6; continue with the same setting"),
        ({"seed": 1}, "seed=0, now seed=1"),
        ({"guidance": 2.0}, "guidance=None, now guidance=2.0"),
        ({"reward": "clip"}, "reward='brightness', now reward='clip'"),
        ({"report": ["clip"]}, "report=None, now report={'clip': 1.0}"),
        ({"model": "demo"}, "model='Toy toy', now model='demo'"),
        ({"load": {"dtype": np.float16}}, "load={}, now load={'dtype': .*float16"),
        ({"prompts": [*PROMPTS[:7], "new"]}, "row 7 was .*prompt xxxxxxx.*now .*new"),
        ({"prompts": [{"prompt": PROMPTS[0], "seed": 1}, *PROMPTS[1:]]}, "other prompts: row 0 was"),
        ({"prompts": PROMPTS[:7]}, "was started with 8 prompts, now 7"),
    ],
)
def test_going_on_with_something_else_is_refused(whole, changed, message):
    with pytest.raises(ValueError, match=message):
        run(changed.pop("prompts", PROMPTS), whole[0], **changed)


def test_what_changes_no_result_may_change_and_rows_may_be_added(whole, tmp_path):
    run(PROMPTS[:6], tmp_path)
    run(PROMPTS[:6], tmp_path, load={"offload_text_encoder": True}, mesh="data=1")
    before = finished(tmp_path)
    run(PROMPTS, tmp_path, chunk=1, prompts_at_once=2)
    assert before.items() <= finished(tmp_path).items()
    assert len(lines(tmp_path / "results.jsonl")) == 8
    files = stable_files(tmp_path)
    assert {name: files[name] for name in files if name < "00006"}.items() <= stable_files(whole[0]).items()


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"is not empty and no run\.json tells of a run"):
        run(PROMPTS, tmp_path)
    with pytest.raises(ValueError, match="not writable"):
        run(PROMPTS, tmp_path / "thesis.tex" / "out")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"budget": 0}, ValueError, "budget=0 must be at least 1"),
        ({"height": 18}, ValueError, "height=18 must be a multiple of 4"),
        ({"reward": "nice"}, ValueError, "unknown reward 'nice'"),
        ({"report": ["nice"]}, ValueError, "unknown reward 'nice'"),
        ({"prompts_at_once": 0}, ValueError, "prompts_at_once=0"),
        ({"mesh": "rows=2"}, ValueError, "mesh 'rows=2'"),
        ({"colour": 3}, TypeError, "unexpected argument 'colour'; settings are .*budget, preview_steps"),
        ({"process_id": 1}, ValueError, "process_id=1 and num_processes=None go together"),
        ({"process_id": 2, "num_processes": 2}, ValueError, "process_id=2 must be at least 0 and less than"),
    ],
)
def test_bad_settings_leave_the_folder_empty(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        run(PROMPTS, tmp_path, **settings)
    assert not list(tmp_path.iterdir())


class Killed(BaseException):
    """Ends everything, as a kill would."""


def test_a_kill_between_any_two_files_loses_and_repeats_nothing(tmp_path, monkeypatch):
    prompts, replace = PROMPTS[:3], os.replace
    run(prompts, tmp_path / "whole")
    for moment in itertools.count():
        out, calls = tmp_path / str(moment), itertools.count()

        def killed(source, target, moment=moment, out=out, calls=calls):
            if out in target.parents and next(calls) == moment:
                raise Killed
            replace(source, target)

        monkeypatch.setattr(os, "replace", killed)
        try:
            run(prompts, out)
        except Killed:
            before = finished(out)
            monkeypatch.setattr(os, "replace", replace)
            summary = run(prompts, out)
            assert before.items() <= finished(out).items()
            assert summary["finished"] == len(lines(out / "results.jsonl")) == 3
            assert stable_files(out) == stable_files(tmp_path / "whole")
        else:
            break
    assert moment == 2 + 3 * 7 + 3  # the run's own files, seven of each prompt, results, summary and report


def test_a_line_that_was_cut_off_does_no_harm(tmp_path):
    run(PROMPTS[:3], tmp_path)
    journal = tmp_path / "results-0.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20] + "ä".encode()[:1])
    summary = run([*PROMPTS[:3], ""], tmp_path)
    assert (summary["finished"], summary["failed"]) == (3, 1)
    assert journal.read_bytes().endswith(b"}\n")
    assert len(lines(tmp_path / "results.jsonl")) == 4


@pytest.mark.parametrize("text", ["", '{"interrupted": true}'])
def test_what_is_no_result_counts_as_unfinished_and_leftovers_go(tmp_path, text):
    run(PROMPTS[:2], tmp_path)
    (tmp_path / "00001" / "result.json").write_text(text)
    (tmp_path / "00001" / ".best.png.0123.tmp").write_text("half")
    assert run(PROMPTS[:2], tmp_path)["finished"] == 2
    assert json.loads((tmp_path / "00001" / "result.json").read_text())["prompt"] == PROMPTS[1]
    assert not list(tmp_path.glob("*/.*"))


def test_two_processes_may_write_a_file_at_once(tmp_path):
    """Their ids may be the same, on two machines."""
    path = tmp_path / "results.jsonl"

    def slow(temporary):
        temporary.write_text("first")
        files.write(path, lambda other: other.write_text("second"))
        assert path.read_text() == "second"

    files.write(path, slow)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def interrupting(calls, at):
    """A reward that counts its calls and is interrupted in one of them."""

    def reward(images, prompts):
        calls.append(prompts[0])
        if len(calls) == at:
            raise KeyboardInterrupt
        return np.asarray(images).mean(axis=(1, 2, 3))

    return ses_jax.load_reward(reward, traceable=False)


@pytest.mark.parametrize("at", [1, 2, 3, 4, 6])
def test_an_interrupted_prompt_is_not_finished(tmp_path, at):
    prompts = PROMPTS[:3]
    run(prompts, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(prompts, tmp_path / "out", reward=interrupting([], at))
    assert len(finished(tmp_path / "out")) == (at - 1) // 3  # two generations and the final images of a prompt
    run(prompts, tmp_path / "out", reward=interrupting([], -1))
    assert stable_files(tmp_path / "out") == stable_files(tmp_path / "whole")


def test_a_saved_search_goes_on_in_the_middle(tmp_path):
    settings = {"budget": 12, "resume": True}
    run(PROMPTS[:2], tmp_path / "whole", budget=12)
    with pytest.raises(KeyboardInterrupt):
        run(PROMPTS[:2], tmp_path / "out", reward=interrupting([], 3), **settings)
    calls = []
    run(PROMPTS[:2], tmp_path / "out", reward=interrupting(calls, -1), **settings)
    assert calls.count(PROMPTS[0]) == calls.count(PROMPTS[1]) - 2
    assert stable_files(tmp_path / "out") == stable_files(tmp_path / "whole")
    assert not list((tmp_path / "out" / output.STATE).iterdir())


@pytest.mark.parametrize(("at_once", "fails_at"), [(1, {3, 6}), (2, {2, 5, 8})])
def test_a_row_whose_reward_failed_goes_on_where_it_was(tmp_path, at_once, fails_at):
    """Both fail in their third generation; of two at once, after both have failed together."""
    calls = []

    def reward(images, prompts):
        calls.append(prompts)
        if len(calls) in fails_at:
            raise RuntimeError("judge is down")
        return np.asarray(images).mean(axis=(1, 2, 3))

    settings = {"reward": ses_jax.load_reward(reward, traceable=False), "budget": 12, "prompts_at_once": at_once}
    assert run(PROMPTS[:2], tmp_path / "out", resume=True, **settings)["failed"] == 2
    before = len(calls)
    assert run(PROMPTS[:2], tmp_path / "out", resume=True, **settings)["finished"] == 2
    assert len(calls) - before == 2 * 3  # two generations and the final images
    run(PROMPTS[:2], tmp_path / "whole", budget=12)
    assert stable_files(tmp_path / "out") == stable_files(tmp_path / "whole")
    assert not list((tmp_path / "out" / output.STATE).iterdir())


def test_a_result_that_cannot_be_saved_fails_alone(tmp_path, monkeypatch):
    save = SearchResult.save

    def failing(result, folder, **how):
        if result.prompt == PROMPTS[0]:
            raise ValueError("too long")
        return save(result, folder, **how)

    monkeypatch.setattr(SearchResult, "save", failing)
    assert run(PROMPTS[:2], tmp_path)["finished"] == 1
    assert [row.get("error") for row in lines(tmp_path / "results.jsonl")] == ["ValueError: too long", None]


def test_a_search_without_a_score_is_not_continued(tmp_path):
    scores = [np.nan]

    def reward(images, prompts):
        return np.asarray(images).mean(axis=(1, 2, 3)) + scores[0]

    reward = ses_jax.load_reward(reward, traceable=False)
    assert run(PROMPTS[:1], tmp_path, reward=reward, resume=True)["failed"] == 1
    scores[0] = 0.0
    assert run(PROMPTS[:1], tmp_path, reward=reward, resume=True)["finished"] == 1


def test_sigterm_ends_a_process_after_the_generation_at_hand(whole, tmp_path):
    """What SLURM and Kubernetes send."""
    process = batch_runs.start(tmp_path, sleep=0.1)
    batch_runs.wait_for((tmp_path, "*/result.json"), process)
    process.process.terminate()
    status, _, error = forked.finish(process)
    assert status == 143
    assert "SIGTERM: stopping after the generation at hand" in error
    assert len(finished(tmp_path)) < len(PROMPTS)
    assert not list(tmp_path.glob(".lock*"))
    run(PROMPTS, tmp_path)
    assert stable_files(tmp_path) == stable_files(whole[0])


def test_merging_goes_on_until_what_is_written_is_what_is_there(whole, tmp_path, monkeypatch):
    rows = [*PROMPTS[:1], ""]
    run(rows, tmp_path)
    folder = run_folder.Run(tmp_path, prompts.read_rows(rows), 0)
    stale = [dict(outcome, prompt="stale") for outcome in folder.outcomes()]
    answers = [stale, folder.outcomes(), folder.outcomes()]
    monkeypatch.setattr(run_folder.Run, "outcomes", lambda self: answers.pop(0))
    folder.merge()
    assert not answers
    assert [row["prompt"] for row in lines(tmp_path / "results.jsonl")] == rows


def test_names_of_models_and_rewards_are_the_same_in_every_process():
    assert batch._name("pick") == "pick"
    assert batch._name({"pick": 1.0, toy.brightness: 0.5}) == {"pick": 1.0, "toy:brightness": 0.5}
    assert batch._name(toy.brightness()) == "brightness"
    scorer = dataclasses.replace(toy.scorer("clip", jnp.mean), source="org/clip")
    assert batch._name(Reward((Part("clip", scorer=scorer),))) == 'clip {"clip": "org/clip"}'
    assert batch._name(None) is None


def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 1e9)
    with progress.batch_progress(5) as report:
        for index in range(5):
            report(f"row {index}", index == 2)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in printed] == ["1/5", "3/5", "5/5"]
    assert printed[1].endswith("1 failed: row 2")
    assert "0:00:00 left" in printed[2]
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with progress.batch_progress(3) as report:
        for index in range(3):
            report(f"row {index}", False)
    assert len(capsys.readouterr().out.splitlines()) == 3
    with progress.batch_progress(1, enabled=False) as report:
        report("row", False)
    assert not capsys.readouterr().out.strip()


def test_a_terminal_gets_a_bar_with_the_time_that_is_left(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.batch_progress(2) as report:
        report("00000: 1.0 -> 2.0", False)
        report("00001: failed", True)
    printed = capsys.readouterr().out
    assert "2/2" in printed
    assert "1 failed  00001: failed" in printed
    assert "left" in printed


FAST = ["--budget", "4", "--population", "2", "--elites", "1", "--preview-steps", "2", "--steps", "2", "--no-progress"]
FAST += ["--height", "64", "--width", "64"]


def test_shell(tmp_path, capsys):
    (tmp_path / "p.csv").write_text("id,prompt,seed\na,a red circle on a white background,\nb,a blue square,7\nc,,\n")
    command = ["batch", str(tmp_path / "p.csv"), *FAST, "--out", str(tmp_path / "run")]
    assert cli.main(command) == 1
    assert "3 prompts: 2 finished, 1 failed, 0 unfinished" in capsys.readouterr().out
    rows = lines(tmp_path / "run" / "results.jsonl")
    assert [row.get("error") for row in rows] == [None, None, "the prompt is empty"]
    assert json.loads((tmp_path / "run" / "b" / "result.json").read_text())["config"]["seed"] == 7
    assert cli.main([*command, "--seed", "1"]) == 2
    assert "was started with seed=0, now seed=1" in capsys.readouterr().err
    (tmp_path / "fine.txt").write_text("a red circle on a white background\n")
    fine = ["batch", str(tmp_path / "fine.txt"), *FAST, "--out", str(tmp_path / "fine")]
    assert cli.main([*fine, "--process-id", "0", "--num-processes", "1"]) == 0
    assert stable_files(tmp_path / "fine") == {
        name.replace("a/", "00000/"): data for name, data in stable_files(tmp_path / "run").items() if name[0] == "a"
    }
    assert cli.main(["batch", str(tmp_path / "none.txt"), *FAST, "--out", str(tmp_path / "x")]) == 2
    assert "none.txt" in capsys.readouterr().err


def test_ctrl_c_in_the_shell_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    (tmp_path / "p.txt").write_text("a red circle\n")
    monkeypatch.setattr(ses_jax, "search_many", interrupted)
    assert cli.main(["batch", str(tmp_path / "p.txt"), "--out", str(tmp_path / "run")]) == 130
    assert "the same command goes on" in capsys.readouterr().err
