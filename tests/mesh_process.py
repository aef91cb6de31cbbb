"""One process of searches whose meshes span several.

Arguments are those of `search`; besides, `connect` is what `jax.distributed.initialize` takes, `meshes` are searched on
one after the other, each into a folder of its own, and `model` is a folder with its own `clip/`. Last comes a judge
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


def search(arguments):
    """What the process does; one device is its own."""
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(**arguments.pop("connect"))
    meshes, out = arguments.pop("meshes"), Path(arguments.pop("out"))
    for mesh in meshes:
        results = ses_jax.search(reward="clip", progress=False, mesh=mesh, out=out / mesh, **arguments)
        print(json.dumps([[row["score"] for row in result.history] for result in results]))
    print(json.dumps(judged()))
