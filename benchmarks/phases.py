"""What both sides of the throughput benchmark share: what is asked of them, how it is timed, how it is told.

A side is a function `run(Job) -> result` that is called in a process of its own, so that it finds the device's memory
free. Its result is plain JSON:

    job           the job, defaults filled in
    peak_flops    of one large bfloat16 matrix product, a second
    setup         seconds for weights and whatever else comes before the phases
    compiling     seconds for all programs, where they are compiled side by side
    batches       for each batch size its phases, or the error that ended it
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

PHASES = ("encode", "denoise", "decode", "reward")


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured; a None is the model's default.

    Attributes:
      model: Hugging Face id of a published model, whose weights are then random; or "demo", or a local folder.
      batches: images at a time.
      steps: denoising steps; all cost the same, so a few are enough.
      tokens: length of the prompts.
      dtype: of the weights.
      reward: "clip-h", random at its real size; "own", the checkpoint's; "none".
      repeats, limit: how often a phase is timed at most, and after how many seconds it is not repeated.
      kernels: how many kernels of each phase are told apart by their time, in a profile of our side.
      compile, attention: of the torch side, see `throughput_torch`.
    """

    model: str
    batches: tuple[int, ...] = (1,)
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    tokens: int = 64
    dtype: str = "bfloat16"
    reward: str = "clip-h"
    repeats: int = 3
    limit: float = 20.0
    kernels: int = 0
    compile: str = "auto"
    attention: str = "auto"


class Clock:
    """Prints a line with the seconds since the side started."""

    def __init__(self, side: str):
        self.side, self.start = side, time.perf_counter()

    def say(self, text: str) -> None:
        print(f"[{self.side} {self.seconds():6.1f} s] {text}", flush=True)

    def seconds(self) -> float:
        return time.perf_counter() - self.start


def median_seconds(call: Callable[[], Any], job: Job) -> tuple[float, int]:
    """Median time of a call that returns when the device is done, and of how many calls; it is warm already."""
    times: list[float] = []
    while len(times) < job.repeats and sum(times) < job.limit:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times)), len(times)


def rates(seconds: float, batch: int, flops: int | None, peak: float) -> dict[str, Any]:
    """The figures that follow from a phase's time."""
    result = {"seconds": seconds, "images_per_second": batch / seconds}
    if flops is not None:
        result |= {"flops": flops, "flops_per_second": flops / seconds, "share_of_peak": flops / seconds / peak}
    return result


def line(phase: str, batch: int, result: dict[str, Any]) -> str:
    """A phase's result in words."""
    parts = [f"{phase} of {batch}: {result['seconds']:.4g} s, {result['images_per_second']:.4g} images/s"]
    if "share_of_peak" in result:
        parts.append(f"{result['flops_per_second'] / 1e12:.4g} TFLOP/s ({result['share_of_peak']:.1%} of the peak)")
    if result.get("peak_bytes"):
        parts.append(f"peak {result['peak_bytes'] / 2**30:.1f} GiB")
    if "kernels" in result:
        parts.append(f"kernels {result['kernels']['busy']:.4g} s")
    return ", ".join([*parts, f"compiled in {result['compile_seconds']:.1f} s"])
