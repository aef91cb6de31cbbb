"""Images a second of encode, denoise, decode and reward apart, for any supported model at its real size.

    python benchmarks/throughput.py black-forest-labs/FLUX.1-dev --batch 1 4 10 --steps 4 --against diffusers

A published model runs on random weights, made on the device; "demo" and local folders run on their own. Every side runs
in a process of its own and tells how long each phase takes. FLOPs are those of the model (`ses_jax.planner.flops`);
their share is the one of the rate of large bfloat16 matrix products, measured in the same run. Encoding is not like for
like: diffusers runs all layers of its text encoders, on prompts padded as far as its pipelines pad them.
"""

import concurrent.futures
import dataclasses
import importlib.util
import multiprocessing
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import common
import phases
import tyro

# Before JAX starts in a child: all of the device's memory but what its libraries need.
MEMORY_FRACTION = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Times the phases from prompt to score.

    Attributes:
      model: Hugging Face id of a published model, "demo", or a folder in diffusers layout.
      batch: images at a time, but for our decoding, which takes as many of them at a time as a search does; several
        are measured one after the other, small ones first.
      height, width, steps, guidance: the model's defaults. All steps cost the same, so a few are enough.
      tokens: length of the prompts.
      dtype: of weights and activations.
      reward: CLIP ViT-H/14 at its real size, the checkpoint's own CLIP, or none.
      repeats: timed runs of a phase, whose median counts.
      limit: seconds after which a phase is not repeated.
      kernels: how many kernels of each phase are told apart by their time on the device, in a profile of our side.
      against: the other side, run on the same device right afterwards.
      compile: of the other side: "auto" is "default" on a GPU and "none" on a CPU; "none", "eager", or a mode of
        torch.compile such as "max-autotune-no-cudagraphs".
      attention: backend of the other side, in diffusers' names; "auto" is cuDNN's on a GPU.
      out: folder of the JSON.
    """

    model: Annotated[str, tyro.conf.Positional]
    batch: tuple[int, ...] = (1,)
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    tokens: int = 64
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    reward: Literal["clip-h", "own", "none"] = "clip-h"
    repeats: int = 3
    limit: float = 20.0
    kernels: int = 0
    against: Literal["none", "diffusers"] = "none"
    compile: str = "auto"
    attention: str = "auto"
    out: Path = common.RESULTS


def main(args: Arguments) -> Path:
    os.environ.setdefault(*MEMORY_FRACTION)
    fields = {field.name for field in dataclasses.fields(phases.Job)}
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name in fields}
    ours = run_side("throughput_jax", phases.Job(batches=tuple(sorted(args.batch)), **settings))
    environment = ours.pop("environment")
    result = {"jax": ours, "environment": environment}
    path = store(result, args.out)
    if args.against == "diffusers":
        missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
        if missing:
            print(f"not installed, so there is nothing to compare with: {', '.join(missing)}")
        else:
            # The same sizes: those that our side filled in.
            theirs = run_side("throughput_torch", phases.Job(**ours["job"]))
            result = {"jax": ours, "diffusers": theirs, "ratios": ratios(theirs, ours), "environment": environment}
            path = store(result, args.out)
    print(path)
    return path


def run_side(module: str, job: phases.Job) -> dict[str, Any]:
    """The result of one side, in a process of its own: JAX keeps the device's memory as long as its process lives."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_run, module, job).result()


def _run(module: str, job: phases.Job) -> dict[str, Any]:
    return importlib.import_module(module).run(job)


def store(result: dict[str, Any], folder: Path) -> Path:
    """Writes what is known so far, in a file named for model, size, batches and device."""
    job = result["jax"]["job"]
    size = f"{job['height']}x{job['width']}_b{'-'.join(map(str, job['batches']))}"
    device = result["environment"]["device"].replace(" ", "-")
    return common.save("_".join(["throughput", Path(job["model"]).name, size, device]), result, folder)


def ratios(theirs: dict[str, Any], ours: dict[str, Any]) -> list[dict[str, Any]]:
    """How many times as fast we are, by batch and phase; prints them."""
    rows = []
    for their, our in zip(theirs["batches"], ours["batches"], strict=True):
        both = [p for p in phases.PHASES if "seconds" in our.get(p, {}) and "seconds" in their.get(p, {})]
        row = {p: their[p]["seconds"] / our[p]["seconds"] for p in both}
        if "denoise" in row and "decode" in row:
            times = [side["denoise"]["seconds"] + side["decode"]["seconds"] for side in (their, our)]
            row["denoise and decode"] = times[0] / times[1]
        print(f"batch {our['batch']}: " + ", ".join(f"{p} {ratio:.2f} x as fast" for p, ratio in row.items()))
        rows.append({"batch": our["batch"], **row})
    return rows


if __name__ == "__main__":
    main(tyro.cli(Arguments))
