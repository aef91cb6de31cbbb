"""What a search needs on a machine: bytes on each device, candidates at a time, seconds.

Weights are counted leaf by leaf where the mesh puts them, temporaries from the jaxpr (`footprint`). Time is the longer
of arithmetic, at a stated share of the device's peak, and of reading the weights once a step; traffic between devices
is not in it.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

from jax.sharding import Mesh

from ses_jax.engine import evaluations, memory
from ses_jax.engine.fidelity import WHOLE, Form
from ses_jax.loading import partition
from ses_jax.pipelines.registry import FAMILIES
from ses_jax.planner import devices as machines
from ses_jax.planner import footprint, topologies
from ses_jax.planner.workload import Work

# Of a device's memory; the rest is the runtime's and lost between arrays.
USABLE = 0.92
# GPUs' compiler holds this much more at once than the program asks for, with the published models; a TPU's does not.
HELD = {"gpu": 1.06, "tpu": 1.0}


class Machine(NamedTuple):
    """Where a search is to run."""

    name: str
    mesh: str
    offload: bool
    utilization: float

    @property
    def device(self) -> machines.Device:
        return machines.device(self.name)

    @property
    def axes(self) -> dict[str, int]:
        """Sizes by axis."""
        axes = partition.parse_axes(self.mesh)
        if min(axes.values()) < 1:
            raise ValueError(f"mesh {self.mesh!r}: a plan needs the size of every axis")
        return axes

    def to_compile_for(self) -> Mesh:
        """The mesh, of devices that need not be there; raises ValueError as `topologies.target_mesh` does."""
        machines.device(self.name)  # the list of all devices, rather than of those with a compiler
        return topologies.target_mesh(self.name, self.mesh)


class Need(NamedTuple):
    """Bytes per device in the two phases of a search."""

    encode: int
    search: int

    def fits(self, machine: Machine) -> bool:
        return max(self) <= limit_bytes(machine)


def weights_of(work: Work, machine: Machine, part: str = "all") -> dict[str, int]:
    """Bytes per device by network: of all params, or those of "text" or "image"."""
    return dict(_weights(work, machine.mesh, part))


@functools.lru_cache(maxsize=128)  # asked for again and again while a chunk is found
def _weights(work: Work, mesh: str, part: str) -> Mapping[str, int]:
    params = work.pipeline.params
    if part != "all":
        params = work.pipeline.text_params(params) if part == "text" else work.image_params
    mesh, rules = partition.abstract_mesh(mesh), FAMILIES[work.pipeline.family].COMPONENTS
    return {name: partition.bytes_per_device(mesh, rules[name].partition, tree) for name, tree in params.items()}


def lying(work: Work, machine: Machine) -> Need:
    """The weights that lie on a device: without offloading all networks, all the time."""
    reward = footprint.size_of(work.scorer.params)
    if not machine.offload:
        everything = sum(weights_of(work, machine).values()) + reward
        return Need(everything, everything)
    return Need(*(sum(weights_of(work, machine, part).values()) + reward for part in ("text", "image")))


def need_of(work: Work, machine: Machine, chunk: int) -> Need:
    """Weights and temporaries."""
    weights = lying(work, machine)
    # Denoised along the data axis, decoded and scored on all devices.
    rows, model = _rows(chunk, machine.axes[partition.DATA]), machine.axes[partition.MODEL]
    step = work.step(rows, gradient=work.gradient, model=model)
    platform = topologies.platform(machine.name)
    most = memory.decoded_at_once(work.config.height, work.config.width, platform)
    finish = work.finish(memory.even_part(_rows(chunk, device_count(machine)), most), gradient=work.gradient)
    temporary = Need(work.encode(model).temporary_bytes, max(step.temporary_bytes, finish.temporary_bytes))
    held = HELD[platform]
    return Need(*(weight + int(held * each) for weight, each in zip(weights, temporary, strict=True)))


def chunk_of(work: Work, machine: Machine) -> int:
    """The most candidates at a time that fit, by bisection; those that the caller wants if so."""
    most = min(work.config.population, work.config.budget)
    if work.config.chunk:
        return min(work.config.chunk, most)
    low, high = 1, most + 1
    while high - low > 1:
        middle = high - 1 if low == 1 and high == most + 1 else (low + high) // 2
        low, high = (middle, high) if need_of(work, machine, middle).fits(machine) else (low, middle)
    return low


def candidates_seconds(work: Work, machine: Machine, chunk: int) -> float:
    """All generations' candidates with their looks, whole chunks and what is left over."""
    config, generation = work.config, 0.0
    for stage in config.fidelity.stages(min(config.population, config.budget), config.preview_steps):
        chunks, rest = divmod(stage.images, chunk)
        counts = [chunk] * chunks + [rest] * (rest > 0)
        seconds = functools.partial(_render_seconds, work, machine, gradient=work.gradient)
        generation += sum(seconds(n, stage.steps, stage.form) for n in counts)
    return math.ceil(config.budget / config.population) * generation


def other_seconds(work: Work, machine: Machine) -> float:
    """Encoding one prompt, and the two final images."""
    encode = work.encode().flops / (machine.device.flops * machine.utilization * machine.axes[partition.MODEL])
    return encode + _render_seconds(work, machine, 2, work.config.steps)


def _render_seconds(
    work: Work, machine: Machine, count: int, steps: int, form: Form = WHOLE, *, gradient: bool = False
) -> float:
    """From noise to scores for candidates that are made at once."""
    rate = machine.device.flops * machine.utilization
    axes = machine.axes
    step, finish = (phase(1, form, gradient=gradient).flops for phase in (work.step, work.finish))
    arithmetic = step * _rows(count, axes[partition.DATA]) / (rate * axes[partition.MODEL])
    reading = sum(weights_of(work, machine, "image").values()) / machine.device.bandwidth
    reading *= evaluations.GRADIENT if gradient else 1
    return steps * max(arithmetic, reading) + finish * _rows(count, device_count(machine)) / rate


def _rows(count: int, devices: int) -> int:
    """Of so many candidates, those of the busiest device."""
    return -(-count // devices)


def device_count(machine: Machine) -> int:
    """How many devices the mesh has."""
    return math.prod(machine.axes.values())


def limit_bytes(machine: Machine) -> int:
    """Bytes of each device that programs may use."""
    return int(USABLE * machine.device.memory)


def fits_somehow(work: Work, machine: Machine) -> bool:
    """Whether one candidate at a time fits; a mesh that the weights do not divide over does not."""
    try:
        return need_of(work, machine, 1).fits(machine)
    except ValueError:
        return False
