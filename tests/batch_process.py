"""One process of a batch run on the toy pipeline, to be killed.

Arguments are those of `search_many`; besides, `sleep` is how many seconds the reward takes, and `meet` what
`processes.meet` takes, or `connect` what `jax.distributed.initialize` takes.
"""

import json
import time

import jax
import numpy as np
import toy

import ses_jax
from ses_jax.batch import processes

SLEEP = 0.0


def brightness(images, prompts):
    time.sleep(SLEEP)
    return np.asarray(images).mean(axis=(1, 2, 3))


def search(arguments):
    """What the process does; returns its exit status."""
    global SLEEP
    SLEEP = arguments.pop("sleep", 0.0)
    if "meet" in arguments:
        place = processes.meet(**arguments.pop("meet"))
        print("met", *place, flush=True)
        arguments |= place._asdict()
    if "connect" in arguments:
        jax.distributed.initialize(**arguments.pop("connect"))
    reward = ses_jax.load_reward(brightness, traceable=False)
    summary = ses_jax.search_many(model=toy.pipeline(), reward=reward, **arguments)
    print(json.dumps(summary))
    return int(summary["failed"] > 0)
