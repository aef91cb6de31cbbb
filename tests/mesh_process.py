"""One process of searches whose meshes span several.

Arguments are those of `search`; besides, `connect` is what `jax.distributed.initialize` takes, and `model` is a folder
with its own `clip/`, whose networks are split over the processes. Then the toy's candidates are, and last comes a judge
that says something else in every process, and fails.
"""

import json
from pathlib import Path

import jax
import toy

import ses_jax
from ses_jax.loading import partition


def judged():
    """Scores of a search by a judge on the host, how often this process called it, and how a second search fails."""
    calls = []

    def judge(images, prompts):
        calls.append(prompts)
        if len(calls) > 3:
            raise RuntimeError("judge is down")
        return [len(calls) + jax.process_index() + float(image.mean()) for image in images]

    settings = {"model": toy.pipeline(partition.parse_mesh("data=2")), "population": 3, "elites": 1, "progress": False}
    settings["reward"] = ses_jax.load_reward(judge, traceable=False)
    result = ses_jax.search("a", budget=6, **settings)
    scores = [row["score"] for row in result.history] + [result.final_score]
    try:
        ses_jax.search("a", budget=6, **settings)
    except RuntimeError as error:
        return scores, len(calls), str(error)


def candidates(mesh=None, **settings):
    """Scores of two prompts' searches of the toy, whose candidates lie along the mesh."""
    settings |= {"reward": toy.mixture(red=1.0, blue=-0.5), "budget": 6, "population": 3, "elites": 2}
    results = ses_jax.search(["a", "b c"], model=toy.pipeline(mesh), prompts_at_once=2, progress=False, **settings)
    return [[row["score"] for row in result.history] for result in results]


def search(arguments):
    """What the process does; one device is its own."""
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(**arguments.pop("connect"))
    out = Path(arguments.pop("out"))
    results = ses_jax.search(reward="clip", progress=False, mesh="model=2", out=out / "model=2", **arguments)
    print(json.dumps([[row["score"] for row in result.history] for result in results]))
    print(json.dumps(candidates(partition.parse_mesh("data=2"), out=out / "data=2")))
    print(json.dumps(judged()))
