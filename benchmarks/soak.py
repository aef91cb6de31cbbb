"""A thousand prompts in one process: does memory grow, is anything compiled again, how fast is it.

`python benchmarks/soak.py` searches demo prompts with a small budget, as a batch run that grows from part to part, so
that each part also goes on with a folder that is already there. Prints memory at the start and at the end, compilations
and throughput. `--form` does the same with a reward on the host, with a mixture and a report, or on a mesh.
"""

import dataclasses
import gc
import itertools
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import common
import jax
import numpy as np
import tyro

import ses_jax

# What threads' allocators take once and keep, about 30 MB at worst on the demo's images; it does not grow with prompts.
SLACK = 48e6
COMPILED = "/jax/core/compile/backend_compile_duration"

Form = Literal["plain", "host", "mixed", "mesh"]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Searches many demo prompts in one process.

    Attributes:
      form: the demo's own reward; a function on the host; a mixture of both kinds, with a report; two devices.
      prompts: how many.
      budget: candidates a prompt.
      parts: how often memory and compilations are looked at.
      side: of the pictures, in pixels; by default the demo's.
      warm_up: prompts before the start counts, besides one of each token length.
      growth: bytes a prompt by which memory may grow, besides what the allocator keeps (`SLACK`).
      out: folder for the numbers; None is the benchmarks' own.
    """

    form: Form = "plain"
    prompts: int = 1000
    budget: int = 4
    parts: int = 10
    side: int | None = None
    warm_up: int = 10
    growth: float = 10e3
    out: Path | None = None


def main(args: Arguments) -> dict[str, Any]:
    """Runs the soak; raises AssertionError if memory grew or something was compiled again."""
    if args.form == "mesh" and jax.config.jax_platforms == "cpu":
        jax.config.update("jax_num_cpu_devices", 2)
    pipeline = ses_jax.load_pipeline("demo", mesh="data=2,model=1" if args.form == "mesh" else None)
    prompts = demo_prompts(args.prompts + args.warm_up)
    lengths = {str(jax.tree.map(np.shape, pipeline.tokenize([p], guidance=2.0))): p for p in prompts}
    first = [*lengths.values(), *prompts[: args.warm_up]]
    prompts = first + prompts[args.warm_up :]
    compilations = count_compilations()
    settings = {"budget": args.budget, "population": max(2, args.budget // 2), "elites": 1, "progress": False}
    settings |= {"model": pipeline, "preview_steps": 2, "steps": 2, **rewards(args.form, pipeline)}
    settings |= {"height": args.side, "width": args.side}
    marks = []
    with tempfile.TemporaryDirectory() as folder:
        for done in [len(first), *(len(first) + args.prompts * (i + 1) // args.parts for i in range(args.parts))]:
            start = time.perf_counter()
            summary = ses_jax.search_many(prompts[:done], out=folder, **settings)
            marks.append(mark(done, compilations, time.perf_counter() - start))
            print(*(f"{name} {value:.4g}" for name, value in marks[-1].items()), sep="  ", flush=True)
            assert summary["finished"] == done, summary
    result = report(args, marks)
    print(
        common.save("soak" if args.form == "plain" else f"soak_{args.form}", result, *([args.out] if args.out else []))
    )
    check(args, result)
    return result


def rewards(form: Form, pipeline: Any) -> dict[str, Any]:
    """What drives a search, and what is reported beside it."""
    if form == "host":
        return {"reward": on_host}
    if form == "mixed":
        return {"reward": {"clip": 1.0, warm: 0.3}, "report": [on_host]}
    return {"reward": ses_jax.load_reward("clip", source=pipeline.folder / "clip")}


def warm(images: Any, prompts: Any) -> Any:
    """A reward of the user's own that JAX can trace."""
    return images[..., 0].mean(axis=(1, 2)) - images[..., 2].mean(axis=(1, 2))


def on_host(images: Any, prompts: Any) -> Any:
    """One that runs on the host."""
    return np.asarray(images)[..., 0].mean(axis=(1, 2))


def report(args: Arguments, marks: list[dict[str, float]]) -> dict[str, Any]:
    first, last = marks[0], marks[-1]
    seconds = sum(each["seconds"] for each in marks[1:])
    result = {
        "arguments": dataclasses.asdict(args) | {"out": None},
        "token_lengths_and_warm_up": first["prompts"],
        "resident_bytes": [first["resident_bytes"], last["resident_bytes"]],
        "resident_bytes_per_prompt": (last["resident_bytes"] - first["resident_bytes"]) / args.prompts,
        "live_array_bytes": [first["live_array_bytes"], last["live_array_bytes"]],
        "compilations": [first["compilations"], last["compilations"]],
        "seconds": seconds,
        "prompts_per_second": args.prompts / seconds,
        "images_per_second": args.prompts * args.budget / seconds,
        "marks": marks,
    }
    print(
        f"{args.prompts} prompts in {seconds:.0f} s, {result['images_per_second']:.1f} images/s; memory "
        f"{first['resident_bytes'] / 1e6:.0f} MB at the start, {last['resident_bytes'] / 1e6:.0f} MB at the end; "
        f"{first['compilations']} compilations to begin with, {last['compilations'] - first['compilations']} afterwards"
    )
    return result


def check(args: Arguments, result: dict[str, Any]) -> None:
    before, after = result["compilations"]
    assert after == before, f"{after - before} compilations after the first prompt of each token length"
    before, after = result["live_array_bytes"]
    assert after <= before, f"live arrays grew from {before} to {after} bytes"
    before, after = result["resident_bytes"]
    allowed = SLACK + args.growth * args.prompts
    assert after - before <= allowed, f"memory grew by {after - before} bytes, more than {allowed:.0f}"


def demo_prompts(count: int) -> list[str]:
    """Different prompts in the demo's vocabulary, of two token lengths, always the same ones."""
    colors, shapes = ("red", "green", "blue", "yellow", "purple"), ("circle", "square", "triangle", "diamond")
    things = [f"a {size} {color} {shape}" for size in ("small", "large") for color in colors for shape in shapes]
    pairs = [f"{a} {how} {b}" for a, b in itertools.permutations(things, 2) for how in ("above", "left of")]
    rng = random.Random(0)
    chosen = rng.sample(pairs, count)
    others = [f" and {' and '.join(rng.sample(things, 2))}" if i % 4 == 3 else "" for i in range(count)]
    return [f"{pair}{more} on a white background" for pair, more in zip(chosen, others, strict=True)]


def mark(done: int, compilations: list[str], seconds: float) -> dict[str, float]:
    """What there is to see after so many prompts."""
    gc.collect()
    return {
        "prompts": done,
        "seconds": seconds,
        "resident_bytes": resident_bytes(),
        "live_array_bytes": sum(array.nbytes for array in jax.live_arrays()),
        "compilations": len(compilations),
    }


def resident_bytes() -> int:
    """Memory of this process now; where the system does not say, the most it ever was."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def count_compilations() -> list[str]:
    """A list that grows by one with every compilation from now on."""
    seen: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: seen.append(event) if event == COMPILED else None
    )
    return seen


if __name__ == "__main__":
    main(tyro.cli(Arguments))
