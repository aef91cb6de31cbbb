"""What the shell has beside the calls of Python, and what a search shows while it runs."""

import contextlib
import io
import re
import sys
import time

import jax
import pytest
import toy
from PIL import Image
from rich.console import Console

import ses_jax
from ses_jax import cli
from ses_jax.engine import progress, repeat
from ses_jax.engine.progress import Step, Work
from ses_jax.exports import pictures
from ses_jax.shell import doctor, dry_run, options

CACHE = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
WORK = Work("a [red] circle\nof many words " * 9, 40, 4, 2.0)
STEPS = [Step(0, 10, 1.5, 2.0, 70.4, rough=True), Step(1, 20, 1.75, 2.5, 40.0)]


def shown(work=WORK, steps=STEPS, **how):
    with progress.progress_bar(work, **how) as report:
        for step in steps:
            report(step)


def test_a_log_has_a_line_a_generation_without_control_characters(capsys):
    shown()
    out, error = capsys.readouterr()
    assert out == ""
    lines = error.splitlines()
    assert len(lines) == 3
    assert lines[0].endswith(": 40 candidates; compiling")
    assert re.fullmatch(
        r"generation 1/4  10/40 candidates  best 1.5000  2.0 images/s  0:00:00 elapsed, at most 0:01:10 left", lines[1]
    )
    assert lines[2].endswith("about 0:00:40 left")
    assert all(character.isprintable() or character == "\n" for character in error)
    shown(enabled=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_shows_the_bar_while_it_runs(monkeypatch, width):
    """However long the prompt is, and in its own words."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    with progress.progress_bar(WORK) as report:
        for step in STEPS:
            report(step)
            before = screen.tell()
        assert "[red]" in screen.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert before > 0
    assert max(len(line.strip("\r")) for line in re.split(r"[\r\n]", plain)) <= width
    assert "20/40" in plain


def test_a_terminal_says_what_is_waited_for_and_forgets_it(monkeypatch, capsys):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=80))
    with progress.waiting("loading [red]"):
        time.sleep(0.2)
    assert "loading [red]" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[2K")  # the line is empty again
    written = screen.tell()
    with progress.waiting("loading", enabled=False):
        pass
    monkeypatch.undo()
    with progress.waiting("loading"):  # in a log
        pass
    assert (screen.tell(), capsys.readouterr()) == (written, ("", ""))


def test_a_notebook_has_one_place_that_changes(monkeypatch):
    updates = []

    class Handle:
        def update(self, thing):
            updates.append(thing._repr_html_())

    def display(thing, *, display_id):
        assert display_id
        updates.append(thing._repr_html_())
        return Handle()

    monkeypatch.setattr(progress, "_notebook", lambda: display)
    shown(WORK._replace(title="<b>"))
    assert len(updates) == 3
    assert all("&lt;b&gt;" in update for update in updates)
    assert 'max="40" value="20"' in updates[-1]


def test_the_time_that_is_left_counts_compilation():
    assert progress.seconds_left([30.0], 5, 1.0) == 30.0 * 5  # at most
    # Three more generations of 2 s, final images of 1.5 of them, and 28 s to compile those.
    assert progress.seconds_left([30.0, 2.0], 5, 1.5) == 3 * 2 + 1.5 * 2 + 28
    assert progress.seconds_left([2.0, 3.0], 2, 0.0) == 0.0


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [(["plan", "demo"], False), (["-q", "plan", "demo"], False), (["doctor"], True), (["search", "plan"], True)],
)
def test_programs_are_kept_but_those_for_other_devices(monkeypatch, tmp_path, arguments, kept):
    before = {name: getattr(jax.config, name) for name in CACHE}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ses_jax, "search", lambda *_, **__: sys.exit())
    try:
        with contextlib.suppress(SystemExit):
            cli.main(arguments)
        assert jax.config.jax_compilation_cache_dir == (str(tmp_path / "ses_jax" / "xla") if kept else None)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture
def asked(monkeypatch):
    """What the shell asks of `search` and `search_many`, which do nothing."""
    seen = []

    def note(prompts, **settings):
        seen.append((prompts, settings))
        raise ValueError("noted")

    monkeypatch.setattr(ses_jax, "search", note)
    monkeypatch.setattr(ses_jax, "search_many", note)
    return seen


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ses-jax {ses_jax.__version__}\n"
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "by searching its initial noise" in printed
    assert "Exit status: 0 where all is well" in printed


def test_quiet_and_verbose(asked, capsys):
    assert cli.main(["search", "a", "-q"]) == 2
    assert asked[0][1]["progress"] is False
    assert "Traceback" not in capsys.readouterr().err
    assert cli.main(["search", "a", "-v"]) == 2
    assert asked[1][1]["progress"] is True
    assert "Traceback" in capsys.readouterr().err


def test_prompts_from_stdin_and_files(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    cli.main(["search", "zero", "--prompt-file", "-"])
    (tmp_path / "prompts.csv").write_text("caption;n\nthree;1\n")
    cli.main(["search", "--prompt-file", str(tmp_path / "prompts.csv")])
    assert [prompts for prompts, _ in asked] == [["zero", "one", "two"], "three"]
    (tmp_path / "own.csv").write_text("prompt,seed\na,3\n")
    capsys.readouterr()
    assert cli.main(["search", "--prompt-file", str(tmp_path / "own.csv")]) == 2
    assert "row 0: has settings of its own; use ses-jax batch" in capsys.readouterr().err
    cli.main(["batch", "p.csv", "--out", "x", "--prompt-column", "words", "--image-format", "webp"])
    assert (asked[-1][1]["prompt_column"], asked[-1][1]["image_format"]) == ("words", "webp")


def test_options_from_a_file_and_on_top_of_it(asked, tmp_path, capsys):
    text = "budget: 30\nguidance: {scale: 2, true_cfg: 3}\nreport: [pick, hps]\nstandardize: false\nlevel: null\n"
    (tmp_path / "run.yaml").write_text(text + "reward: {clip: 1, pick: 0.5}\npreview_steps: 3\n")
    (tmp_path / "run.toml").write_text('seed = 4\nmodel = "some/model"\n')
    assert cli.main(["search", "a cat", "--config", str(tmp_path / "run.yaml"), "--budget", "40"]) == 2
    assert cli.main(["batch", "p.txt", "--out", "x", f"--config={tmp_path / 'run.toml'}"]) == 2
    (prompts, first), (_, second) = asked
    expected = {"budget": 40, "guidance": {"scale": 2.0, "true_cfg": 3.0}, "report": {"pick": 1.0, "hps": 1.0}}
    expected |= {"reward": {"clip": 1.0, "pick": 0.5}, "standardize": False, "preview_steps": 3, "level": None}
    assert prompts == "a cat"
    assert first.items() >= expected.items()
    assert (second["seed"], second["model"]) == (4, "some/model")
    (tmp_path / "load.yaml").write_text("lora: {a: 0.5, b: 1}\nschedule: {shift: 3, end: null}\nquantize: int8\n")
    (tmp_path / "list.yaml").write_text("lora: [a=0.5, b]\n")
    for words, lora in (
        (["--config", str(tmp_path / "load.yaml")], (("a", 0.5), ("b", 1.0))),
        (["--config", str(tmp_path / "list.yaml")], (("a", 0.5), ("b", 1.0))),
        (["--config", str(tmp_path / "load.yaml"), "--lora", "c"], (("c", 1.0),)),
    ):
        assert cli.main(["search", "a", *words]) == 2
        assert asked[-1][1]["load"]["lora"] == lora
    assert asked[-1][1]["load"].items() >= {"schedule": {"shift": 3, "end": None}, "quantize": "int8"}.items()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    capsys.readouterr()
    for name, message in (
        ("broken.json", "cannot be read"),
        ("list.json", "must hold options by their names, got a list"),
        ("none.yaml", "no such file"),
        ("run.ini", "options are in a .yaml, .yml, .json, .toml file"),
    ):
        assert cli.main(["search", "a", "--config", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_a_dry_run_does_nothing(asked, tmp_path, capsys):
    words = ["search", "a", "b", "--budget", "25", "--model", "a/b", "--dry-run"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "would search 2 prompts with a/b; nothing is loaded or written\n  a\n  b\n" in out
    assert "25 candidates in 3 generations, and 2 final images" in out
    assert "no plan of memory and time: a/b: no published model" in out
    (tmp_path / "prompts.txt").write_text("\n".join("abcdefgh"))
    assert (
        cli.main(
            ["batch", str(tmp_path / "prompts.txt"), "--model", "a/b", "--dry-run", "--out", str(tmp_path / "out")]
        )
        == 0
    )
    assert "and 3 more" in capsys.readouterr().out
    assert cli.main(["search", "a", "--budget", "0", "--dry-run"]) == 2
    assert cli.main(["search", "a", "--reward", "nice", "--dry-run"]) == 2
    assert not asked
    assert not (tmp_path / "out").exists()


def test_a_dry_run_plans_what_the_planner_knows(monkeypatch):
    asked = []
    monkeypatch.setattr(dry_run, "plan", lambda model, **settings: asked.append((model, settings)) or "the plan")
    lines = list(dry_run.describe([], {"model": "a/b", "budget": 7, "seed": 3, "width": None}))
    assert "the plan" in lines
    assert asked == [("a/b", {"budget": 7})]


def test_the_doctor_says_what_there_is(monkeypatch, capsys):
    monkeypatch.setattr(doctor.hub, "ENDPOINT", "https://127.0.0.1:1")
    monkeypatch.setattr(doctor.hub, "HF_HUB_OFFLINE", False)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for said in (
        "versions\n",
        "  jax ",
        "devices\n  cpu 0",
        "caches\n",
        "127.0.0.1:1 can't be reached",
        "torch: there",
    ):
        assert said in out
    monkeypatch.setattr(doctor.hub, "HF_HUB_OFFLINE", True)
    assert doctor._hub() == "not asked: HF_HUB_OFFLINE is set"
    monkeypatch.setattr(doctor.jax, "local_devices", list)
    assert cli.main(["doctor"]) == 1


def test_generated_pictures_say_how_they_were_made(tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.setattr(ses_jax, "generate", lambda model, prompts, **_: np.zeros((len(prompts), 8, 16, 3)))
    monkeypatch.setattr(options, "find_pipeline", lambda *_: toy.pipeline())
    arguments = ["generate", "a", "b", "--seed", "3", "--image-format", "webp", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    notes = pictures.read(tmp_path / "001.webp")
    assert (notes.facts["prompt"], notes.facts["config"]["prompt_index"]) == ("b", 1)
    assert "Steps: 4, Sampler: Euler, CFG scale: 0.0, Seed: 3, Size: 16x8, Model: demo" in notes.parameters
    nothing = {name: value for name, value in notes.facts["config"].items() if name != "guidance"}
    assert "CFG" not in repeat.parameters({**notes.facts, "config": nothing})
    assert Image.open(tmp_path / "000.webp").size == (16, 8)
    assert cli.main(["show", str(tmp_path / "000.webp")]) == 0
    assert cli.main(["search", "--like", str(tmp_path / "000.webp")]) == 2
