"""What the tests of batch runs share: a small run, its files, and processes to kill."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import batch_process
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
    tests = Path(__file__).parent
    paths = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, str(tests / "batch_process.py"), json.dumps(arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path, *processes, seconds=60):
    """Waits until a file matching the pattern exists."""
    folder, pattern = path
    deadline = time.monotonic() + seconds
    while not any(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern} after {seconds} s"
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def finish(process, seconds=60):
    """Waits for a process.

    Returns:
      Its exit status, stdout and stderr.
    """
    out, error = process.communicate(timeout=seconds)
    return process.returncode, out, error
