"""One process of searches whose meshes span several: `python mesh_process.py '{"meshes": ..., "out": ..., ...}'`.

Arguments are those of `search`; besides, `connect` is what `jax.distributed.initialize` takes, `meshes` are searched on
one after the other, each into a folder of its own, and `model` is a folder with its own `clip/`.
"""

import json
import sys
from pathlib import Path

import jax

import ses_jax

if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    jax.config.update("jax_default_matmul_precision", "float32")
    jax.distributed.initialize(**arguments.pop("connect"))
    meshes, out = arguments.pop("meshes"), Path(arguments.pop("out"))
    for mesh in meshes:
        results = ses_jax.search(reward="clip", progress=False, mesh=mesh, out=out / mesh, **arguments)
        print(json.dumps([[row["score"] for row in result.history] for result in results]))
