"""A hundred searches of changing sizes in one process: does memory grow, do mappings, are programs let go of.

`python benchmarks/sizes.py` takes the sizes in turn. There are more of them than compiled programs are kept, so that
each search pushes programs out. Prints memory, memory mappings and compilations after every tenth search, and compares
the end with the second time that all sizes have been there.
"""

import dataclasses
import gc
import time
from pathlib import Path
from typing import Any, Literal

import common
import fuzz
import loops
import soak
import tyro

import ses_jax

MARKS = 10


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Searches in ever other sizes.

    Attributes:
      searches: how many.
      sizes: how many different ones.
      model: the demo, or a toy without networks, whose programs compile in no time.
      growth: share by which memory and mappings may grow.
      out: folder for the numbers; None is the benchmarks' own.
    """

    searches: int = 100
    sizes: int = 20
    model: Literal["demo", "toy"] = "demo"
    growth: float = 0.02
    out: Path | None = None


def main(args: Arguments) -> dict[str, Any]:
    """Runs the searches; raises AssertionError if something grew."""
    model = fuzz.toy_pipeline() if args.model == "toy" else ses_jax.load_pipeline("demo")
    settings = {"model": model, "reward": fuzz.brightness, "budget": 4, "population": 2, "elites": 1, "level": 1}
    settings |= {"steps": 1, "preview_steps": 1, "progress": False}
    compilations, start, marks = soak.count_compilations(), time.perf_counter(), []
    for i in range(args.searches):
        ses_jax.search(f"a red circle {i % 7}", height=32, width=32 + 16 * (i % args.sizes), **settings)
        gc.collect()
        if (i + 1) % max(args.searches // MARKS, 1) == 0:
            marks.append({"searches": i + 1, **loops.mark(compilations, time.perf_counter() - start)})
            print(*(f"{name} {value:.4g}" for name, value in marks[-1].items()), sep="  ", flush=True)
    common.save(f"sizes_{args.model}", {"sizes": args.sizes, "marks": marks}, args.out or common.RESULTS)
    check(marks, args)
    return {"marks": marks}


def check(marks: list[dict[str, float]], args: Arguments) -> None:
    """Raises AssertionError if memory or mappings have grown since all sizes have been there twice."""
    first = next((mark for mark in marks if mark["searches"] >= 2 * args.sizes), marks[-1])
    for name in ("resident_bytes", "memory_maps"):
        before, after = first[name], marks[-1][name]
        assert after <= before * (1 + args.growth), f"{name} grew from {before:g} to {after:g}"


if __name__ == "__main__":
    main(tyro.cli(Arguments))
