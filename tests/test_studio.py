"""The studio: a search that is watched and stopped, and the page around it where Gradio is installed."""

import sys
import threading

import pytest
import toy

import ses_jax
from ses_jax import cli
from ses_jax.engine.result import SearchResult
from ses_jax.studio import page, sessions

FAST = {"population": 4, "elites": 2, "preview_steps": 2, "steps": 2}


def find(prompt, **settings):
    """The search of the page, of the toy."""
    settings |= {"model": toy.pipeline(), "reward": toy.brightness()}
    return ses_jax.search(prompt, **settings, **FAST)


def test_a_session_tells_of_every_generation_and_ends_with_the_result(tmp_path):
    *updates, result = sessions.run("a", {"budget": 12}, tmp_path, threading.Event(), find=find)
    assert [update.generation for update in updates] == [0, 1, 2]
    assert max(update.best for update in updates) == pytest.approx(result.score)
    assert isinstance(result, SearchResult)
    assert (tmp_path / "report.html").exists()


def test_stop_keeps_the_best_and_errors_come_through(tmp_path):
    stop = threading.Event()
    stop.set()
    *updates, result = sessions.run("a", {"budget": 12}, tmp_path, stop, find=find)
    assert (len(updates), len(result.history), result.interrupted) == (1, 4, True)
    with pytest.raises(ValueError, match="budget=0 must be at least 1"):
        list(sessions.run("a", {"budget": 0}, tmp_path, stop, find=find))


def test_a_search_that_nobody_watches_ends_and_the_next_waits_for_it(tmp_path):
    over, began = [], threading.Event()

    def watched(prompt, **settings):
        over.append(began.is_set())
        result = find(prompt, **settings)
        over.append(len(result.history))
        return result

    in_turn, stop = sessions.in_turn(watched), threading.Event()
    first = sessions.run("a", {"budget": 400}, tmp_path / "a", stop, find=in_turn)
    next(first)
    first.close()
    began.set()
    *_, result = sessions.run("b", {"budget": 4}, tmp_path / "b", threading.Event(), find=in_turn)
    assert (stop.is_set(), result.interrupted) == (True, False)
    assert over[0] is False
    assert over[1] < 400
    assert over[2:] == [True, 4]


def test_fields_of_the_page_are_settings():
    assert sessions.settings_of(" ", "", 20.0, 3.0) == {"model": "demo", "budget": 20, "seed": 3}
    assert sessions.settings_of("a/b", " pick ", 1.0, 0.0)["reward"] == "pick"
    assert sessions.settings_of("a/b", "pick=1, hps=0.5", 1.0, 0.0)["reward"] == {"pick": 1.0, "hps": 0.5}
    with pytest.raises(ValueError, match="neither a reward nor a mixture"):
        sessions.settings_of("a/b", "pick=x", 1.0, 0.0)


def test_without_gradio_the_shell_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["studio", "--out", str(tmp_path)]) == 2
    assert "pip install 'ses_jax[studio]'" in capsys.readouterr().err


def test_the_page_searches_on_this_machine_only(tmp_path, monkeypatch):
    gradio = pytest.importorskip("gradio")
    blocks = page.build("demo", tmp_path, find=find)
    labels = {block.label for block in blocks.blocks.values() if getattr(block, "label", None)}
    assert {"Prompt", "Model", "Reward", "Budget", "Seed", "Status", "Download", "This session"} <= labels
    asked = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **how: asked.update(how))
    page.serve("demo", tmp_path, "127.0.0.1", 7860)
    assert (asked["server_name"], asked["share"]) == ("127.0.0.1", False)
