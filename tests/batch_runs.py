"""What the tests of batch runs share: a small run, its files, and processes to kill."""

import sys
import time
from pathlib import Path

import batch_process
import forked
import toy

import ses_jax

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from kills import finished, lines, stable_files  # noqa: F401 (the tests take them from here)

SETTINGS = {"budget": 5, "population": 3, "elites": 1, "steps": 2, "preview_steps": 1}
PROMPTS = [f"prompt {'x' * i}" for i in range(8)]
PIPELINE = toy.pipeline()  # one for all, so that it is compiled once
REWARD = ses_jax.load_reward(batch_process.brightness, traceable=False)


def run(prompts, out, **settings):
    """The same run as `start`, in this process."""
    settings = {"model": PIPELINE, "reward": REWARD, "progress": False} | SETTINGS | settings
    return ses_jax.search_many(prompts, out=out, **settings)


def start(out, prompts=PROMPTS, *, environment=None, **settings):
    """Starts a process; its `SearchResult`s are those of `run`."""
    arguments = {"prompts": prompts, "out": str(out), "progress": False} | SETTINGS | settings
    return forked.fork(out, batch_process.search, arguments, environment)


def wait_for(path, *processes, seconds=60):
    """Waits until a file matching the pattern exists."""
    folder, pattern = path
    deadline = time.monotonic() + seconds
    while not any(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern} after {seconds} s"
        for process, said in processes:
            assert process.is_alive(), forked.said_so_far(said)
        time.sleep(0.01)
