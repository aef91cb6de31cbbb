"""A whole search with a published model at its real size, on random weights: what a user waits for.

    python benchmarks/real_search.py black-forest-labs/FLUX.2-klein-4B --budget 50

Twice in one process: first with everything still to be compiled, then another prompt with another seed. The weights are
random bfloat16 values made on the device, CLIP ViT-H/14 is the reward; loading from a disk is no part of it.
"""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Annotated, Any

import common
import jax
import random_weights
import tyro

import ses_jax

PROMPTS = ("a red circle left of a blue square", "three green triangles above a yellow star")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """
    Attributes:
      model: Hugging Face id of a published model.
      budget: candidates.
      height, width, steps, preview_steps: None is the model's default.
      chunk: candidates at a time; None is as many as fit.
      out: folder of the JSON.
    """

    model: Annotated[str, tyro.conf.Positional]
    budget: int = 50
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    preview_steps: int | None = None
    chunk: int | None = None
    out: Path = common.RESULTS


def main(args: Arguments) -> Path:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ses_jax").setLevel(logging.INFO)
    start = time.perf_counter()
    pipeline, reward = random_weights.random_model(args.model)
    jax.block_until_ready(pipeline.params)
    made = time.perf_counter() - start
    names = ("budget", "height", "width", "steps", "preview_steps", "chunk")
    settings = {name: value for name in names if (value := getattr(args, name)) is not None}
    searches = [one(pipeline, reward, prompt, settings | {"seed": seed}) for seed, prompt in enumerate(PROMPTS)]
    result = {"arguments": {"model": args.model, **settings}, "weights_seconds": made, "searches": searches}
    name = f"search_{Path(args.model).name}_{jax.devices()[0].device_kind.replace(' ', '-')}"
    path = common.save(name, result, args.out)
    print(path)
    return path


def one(pipeline: ses_jax.Pipeline, reward: ses_jax.Reward, prompt: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The figures of one search."""
    start = time.perf_counter()
    result = ses_jax.search(prompt, model=pipeline, reward=reward, **settings)
    seconds = time.perf_counter() - start
    cost, stats = result.cost.as_json(), jax.local_devices()[0].memory_stats() or {}
    candidate, final = (cost[part]["seconds"] / cost[part]["images"] for part in ("search", "finals"))
    print(
        f"{seconds:.1f} s: {', '.join(f'{name} {value:.3g}' for name, value in result.timings.items())}; "
        f"{candidate:.3f} s a candidate, {final:.3f} s a final image",
        flush=True,
    )
    return {
        "seconds": seconds,
        "timings": result.timings,
        "cost": cost,
        "chunk": result.config["chunk"],
        "scored": len(result.history),
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }


if __name__ == "__main__":
    main(tyro.cli(Arguments))
