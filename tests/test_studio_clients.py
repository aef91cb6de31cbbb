"""The studio's page with several people at once, through Gradio's own client: who waits, who sees what, who stops."""

import importlib.util
import json
import threading
import time
from pathlib import Path

import pytest
import toy

import ses_jax
from ses_jax.studio import page

gradio = pytest.importorskip("gradio")
client = pytest.importorskip("gradio_client")

FAST = {"population": 4, "elites": 2, "preview_steps": 2, "steps": 2}
SECONDS = 120
PIPELINE, REWARD = toy.pipeline(), toy.brightness()


class Searches:
    """The page's search, of the toy: what began and ended, and a gate that it waits at after its first generation."""

    def __init__(self):
        self.log = []
        self.gates = {}

    def __call__(self, prompt, *, on_generation, **settings):
        def told(generation, *seen):
            self.log.append((prompt, generation))
            assert self.gates.get(prompt, done()).wait(SECONDS)
            return on_generation(generation, *seen)

        self.log.append((prompt, "began"))
        settings |= {"model": PIPELINE, "reward": REWARD}
        result = ses_jax.search(prompt, on_generation=told, **settings, **FAST)
        self.log.append((prompt, len(result.history)))
        return result


def done():
    event = threading.Event()
    event.set()
    return event


def wait_for(condition, job):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        assert not job.done(), job.result()
        time.sleep(0.02)


def unwrapped(module):
    """The module without the run-time type checks of tests: Gradio asks functions whether they are generators."""
    spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    return plain


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page, served on this machine, with its address."""
    searches, folder = Searches(), tmp_path_factory.mktemp("studio")
    blocks = unwrapped(page).build("demo", folder, find=searches)
    blocks.queue(default_concurrency_limit=8)
    _, address, _ = blocks.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, share=False)
    yield searches, address
    blocks.close()


@pytest.fixture
def people(served, tmp_path):
    """What the page searched with, and two people."""
    searches, address = served
    searches.log.clear()
    searches.gates.clear()
    return searches, *(client.Client(address, verbose=False, download_files=tmp_path) for _ in range(2))


def ask(person, prompt, budget=12):
    return person.submit(prompt, "demo", "", budget, 0, api_name="/search")


def seen(job):
    """The status, the captions of the session's history, and the result's own file."""
    status, _, _, files, history = job.result(SECONDS)[:5]
    (file,) = (file for file in files if Path(file).name.startswith("result"))
    return status, [entry["caption"].split(" (")[0] for entry in history], json.loads(Path(file).read_text())


def test_one_waits_for_the_other_and_stops_only_their_own(people):
    searches, ann, bob = people
    searches.gates["hers"] = gate = threading.Event()
    hers = ask(ann, "hers")
    wait_for(lambda: ("hers", 0) in searches.log, hers)
    his = ask(bob, "his")
    wait_for(lambda: his.status().code == client.utils.Status.IN_QUEUE, his)
    assert bob.predict(api_name="/stop") == "stopping after this generation"  # of his, which has not begun
    assert ann.predict(api_name="/stop") == "stopping after this generation"
    assert ("his", "began") not in searches.log
    gate.set()
    status, captions, result = seen(hers)
    assert status.startswith("stopped: preview ")
    assert (captions, result["prompt"], result["scored"], result["interrupted"]) == (["hers"], "hers", 4, True)
    status, captions, result = seen(his)
    assert status.startswith("found: preview ")
    assert (captions, result["prompt"], result["scored"], result["interrupted"]) == (["his"], "his", 12, False)
    order = [
        ("hers", "began"),
        ("hers", 0),
        ("hers", 4),
        ("his", "began"),
        *(("his", i) for i in range(3)),
        ("his", 12),
    ]
    assert searches.log == order


def test_each_has_a_history_of_their_own_and_errors_stop_nobody_else(people):
    searches, ann, bob = people
    jobs = [ask(ann, "one", 4), ask(bob, "two", 4), ask(ann, "three", 4)]
    wrong = ask(bob, " ")
    with pytest.raises(Exception, match="write what to search for"):
        wrong.result(SECONDS)
    captions = [seen(job)[1] for job in jobs]
    assert captions[:2] == [["one"], ["two"]]
    assert captions[2][0] == "three"
    assert "two" not in captions[2]
    began = [prompt for prompt, what in searches.log if what == "began"]
    ended = [prompt for prompt, what in searches.log if what == 4]
    assert began == ended
    assert sorted(began) == ["one", "three", "two"]
