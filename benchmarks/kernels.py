"""Which kernels a call spends its time in on the device, by JAX's profiler."""

import collections
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Kernel(NamedTuple):
    """One run of a kernel: its name, the operation of the compiled program that it is part of, and its seconds."""

    name: str
    op: str
    seconds: float


def longest(call: Callable[[], Any], count: int) -> dict[str, Any]:
    """The kernels that take the most of a warm call's time.

    Args:
      call: returns when the device is done.
      count: how many kernels are told apart.

    Returns:
      `busy`, seconds of all kernels together, and `longest`, for each kernel its name, an operation of the compiled
      program that it is part of, how often it ran, and its seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        kernels = [kernel for path in Path(folder).rglob("*.xplane.pb") for kernel in _read(path)]
    seconds: dict[str, float] = collections.defaultdict(float)
    for kernel in kernels:
        seconds[kernel.name] += kernel.seconds
    ops, runs = {kernel.name: kernel.op for kernel in kernels}, collections.Counter(kernel.name for kernel in kernels)
    first = sorted(seconds, key=seconds.get, reverse=True)[:count]
    rows = [{"kernel": name, "op": ops[name], "runs": runs[name], "seconds": seconds[name]} for name in first]
    return {"busy": sum(seconds.values()), "longest": rows}


def _read(path: Path) -> Iterator[Kernel]:
    """The kernels of a profile: on a GPU those on its streams, elsewhere whatever names an operation."""
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        lines = list(plane.lines)
        streams = [line for line in lines if line.name.startswith("Stream")]
        for event in (event for line in streams or lines for event in line.events):
            op = dict(event.stats).get("hlo_op") or (streams and event.name)
            if op:
                yield Kernel(event.name, str(op), event.duration_ns / 1e9)
