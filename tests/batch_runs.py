"""What the tests of batch runs share: a small run, its files, and processes to kill."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import batch_process
import toy
from PIL import Image

import ses_jax

SETTINGS = {"budget": 5, "population": 3, "elites": 1, "steps": 2, "preview_steps": 1}
PROMPTS = [f"prompt {'x' * i}" for i in range(8)]
PIPELINE = toy.pipeline()  # one for all, so that it is compiled once
REWARD = ses_jax.load_reward(batch_process.brightness, traceable=False)
STABLE = ("best.png", "baseline.png", "noise.npy", "history.jsonl")


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


def stable_files(out):
    """Content of everything in a run that must not depend on how it was run."""
    return {str(path.relative_to(out)): _content(path) for name in STABLE for path in out.glob(f"*/{name}")}


def _content(path):
    """Of a picture its pixels: it also names its reward, which tests call as they like."""
    return Image.open(path).tobytes() if path.suffix == ".png" else path.read_bytes()


def finished(out):
    """When each finished prompt was finished, by its folder."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/result.json")}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
