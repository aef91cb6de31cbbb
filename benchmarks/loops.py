"""Hundreds of calls one after the other, in every form that the README shows: what grows, and what is compiled again.

`python benchmarks/loops.py` runs each form in a process of its own on the demo, and prints memory, memory mappings and
compilations after the first calls and at the end. Forms that `loops.json` has already, with as many calls, are not run
again: what is interrupted goes on, and who wants all of it anew removes the file.
"""

import concurrent.futures
import dataclasses
import gc
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import soak
import tyro
from soak import on_host, warm

import ses_jax

SETTINGS = {"budget": 10, "steps": 2, "preview_steps": 2, "progress": False}
# Calls until every prompt length has been compiled, and the allocator has its pools.
WARM_UP = 20


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Calls the library again and again.

    Attributes:
      calls: of each form.
      forms: which ones; by default all.
      growth: bytes by which memory may grow after the warm-up.
      maps: mappings by which the process may grow after the warm-up.
      out: folder of the JSON.
    """

    calls: int = 300
    forms: tuple[str, ...] = ()
    growth: float = 50e6
    maps: int = 200
    out: Path = common.RESULTS


def own_clip(pipeline: Any) -> Any:
    """The demo's reward, loaded by hand."""
    return ses_jax.load_reward("clip", source=pipeline.folder / "clip")


# `(prompt, loaded pipeline, loaded reward)`; a fresh function a call has to be compiled each time, and only it.
FORMS: dict[str, Callable[[str, Any, Any], Any]] = {
    "all loaded": lambda p, model, reward: ses_jax.search(p, model=model, reward=reward, **SETTINGS),
    "pipeline loaded": lambda p, model, _: ses_jax.search(p, model=model, **SETTINGS),
    "by name": lambda p, *_: ses_jax.search(p, **SETTINGS),
    "mixture": lambda p, model, _: ses_jax.search(p, model=model, reward={"clip": 1.0, warm: 0.3}, **SETTINGS),
    "report": lambda p, model, _: ses_jax.search(p, model=model, reward=warm, report=["clip"], **SETTINGS),
    "on the host": lambda p, model, _: ses_jax.search(p, model=model, reward=on_host, **SETTINGS),
    "loaded each time": lambda p, model, _: ses_jax.search(
        p, model=ses_jax.load_pipeline("demo"), reward=own_clip(model), **SETTINGS
    ),
    "generate": lambda p, *_: ses_jax.generate("demo", p, steps=2),
    "fresh function": lambda p, model, _: ses_jax.search(
        p, model=model, reward=lambda images, prompts: images.mean(axis=(1, 2, 3)), **SETTINGS
    ),
}


def main(args: Arguments) -> dict[str, Any]:
    """Runs the forms; raises AssertionError if something grew or was compiled again."""
    context = multiprocessing.get_context("spawn")
    results = done(args)
    for form in args.forms or FORMS:
        if form not in results:
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                results[form] = pool.submit(run, form, args.calls).result()
            common.save("loops", {"calls": args.calls, "warm_up": WARM_UP, "forms": results}, args.out)
        marks = (f"{name} {old:g} -> {new:g}" for name, (old, new) in results[form].items())
        print(f"{form}: {', '.join(marks)}", flush=True)
    for form, result in results.items():
        check(form, result, args)
    return results


def done(args: Arguments) -> dict[str, Any]:
    """The forms that were run already, with as many calls."""
    path = args.out / "loops.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    return saved["forms"] if saved.get("calls") == args.calls else {}


def run(form: str, calls: int) -> dict[str, tuple[float, float]]:
    """What is there after the warm-up and at the end."""
    compilations = soak.count_compilations()
    pipeline = ses_jax.load_pipeline("demo")
    reward = own_clip(pipeline)
    marks = []
    start = time.perf_counter()
    for i in range(calls):
        FORMS[form](f"a red circle {i % 1000:03d}", pipeline, reward)
        if i + 1 in (min(WARM_UP, calls - 1), calls):
            marks.append(mark(compilations, time.perf_counter() - start))
    return {name: (marks[0][name], marks[1][name]) for name in marks[0]}


def mark(compilations: list[int], seconds: float) -> dict[str, float]:
    gc.collect()
    counted = soak.mark(0, compilations, seconds)
    return {
        "seconds": seconds,
        "resident_bytes": counted["resident_bytes"],
        "memory_maps": len(Path("/proc/self/maps").read_text().splitlines()),
        "compilations": counted["compilations"],
    }


def check(form: str, result: dict[str, tuple[float, float]], args: Arguments) -> None:
    for name, allowed in (("resident_bytes", args.growth), ("memory_maps", args.maps)):
        before, after = result[name]
        assert after - before <= allowed, f"{form}: {name} grew from {before:g} to {after:g}"
    before, after = result["compilations"]
    assert after == before or form == "fresh function", f"{form}: {after - before} compilations after the warm-up"


if __name__ == "__main__":
    main(tyro.cli(Arguments))
