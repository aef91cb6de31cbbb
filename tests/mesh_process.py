"""One process of a search whose mesh spans several: `python mesh_process.py '{"mesh": ..., "out": ..., ...}'`.

Arguments are those of `search`; besides, `connect` is what `jax.distributed.initialize` takes, and `model` a folder
with its own `clip/`.
"""

import json
import sys

import jax

import ses_jax

if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    jax.config.update("jax_default_matmul_precision", "float32")
    jax.distributed.initialize(**arguments.pop("connect"))
    results = ses_jax.search(reward="clip", progress=False, **arguments)
    print(json.dumps([[row["score"] for row in result.history] for result in results]))
