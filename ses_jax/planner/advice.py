"""What to change where a search does not fit, the mildest change first; and what a large one needs to be told."""

import dataclasses
from collections.abc import Iterator

from ses_jax.loading import partition
from ses_jax.models import quantized
from ses_jax.pipelines.registry import abstract_pipeline
from ses_jax.planner import topologies
from ses_jax.planner.need import USABLE, Machine, Need, fits_somehow, need_of
from ses_jax.planner.workload import Work

MODEL_AXES = (2, 4, 8, 16)
# What JAX takes of an NVIDIA GPU's memory unless told otherwise.
TAKEN = 0.75


def changes(work: Work, machine: Machine) -> Iterator[str]:
    """What makes a search fit that doesn't, the mildest change first."""
    if need_of(work, machine, 1).fits(machine):
        yield "candidates at a time: --chunk 1, or leave it out"
        return
    if not machine.offload and fits_somehow(work, machine._replace(offload=True)):
        yield "text encoders that leave the device after encoding: --offload-text-encoder"
    yield from _eight_bits(work, machine)
    yield from _larger_mesh(work, machine)
    yield from _smaller_image(work, machine)


def _eight_bits(work: Work, machine: Machine) -> Iterator[str]:
    """Half the weights, without offloading if that is enough."""
    if quantized.kind_of(work.pipeline.params):
        return
    pipeline = abstract_pipeline(str(work.pipeline.folder), quantize="int8")
    smaller, guess = (Work(pipeline, work.config, 1) for _ in range(2))
    smaller.tokens = guess.tokens = work.tokens
    # But for a cast layer what programs need is known already; so most of what does not fit is not traced.
    guess.encode, guess.step, guess.finish = work.encode, work.step, work.finish
    for offload in sorted({machine.offload, True}):
        tried = machine._replace(offload=offload)
        if fits_somehow(guess, tried) and fits_somehow(smaller, tried):
            yield f"weights in eight bits: --quantize int8{' --offload-text-encoder' * offload}"
            return


def _larger_mesh(work: Work, machine: Machine) -> Iterator[str]:
    """The smallest model axes that do, with and without offloading."""
    for offload in sorted({machine.offload, True}):
        for size in MODEL_AXES:
            mesh = f"data={machine.axes[partition.DATA]},model={size}"
            larger = machine._replace(mesh=mesh, offload=offload)
            if size > machine.axes[partition.MODEL] and fits_somehow(work, larger):
                flag = " --offload-text-encoder" if offload else ""
                yield f"more devices that share the weights: --mesh {mesh}{flag}"
                break


def _smaller_image(work: Work, machine: Machine) -> Iterator[str]:
    """The largest of three quarters and a half of the image's sides that does."""
    multiple = work.pipeline.size_multiple
    for part in (0.75, 0.5):
        sides = {name: int(getattr(work.config, name) * part) // multiple * multiple for name in ("height", "width")}
        smaller = Work(work.pipeline, dataclasses.replace(work.config, **sides), 1)
        smaller.tokens = work.tokens
        if fits_somehow(smaller, machine):
            yield f"a smaller image: --height {sides['height']} --width {sides['width']}"
            return


def memory_fraction(need: Need, machine: Machine) -> Iterator[str]:
    """A GPU's memory that JAX leaves alone, where what fits needs it."""
    if topologies.platform(machine.name) == "gpu" and max(need) > TAKEN * machine.device.memory:
        yield f"JAX uses {TAKEN:.0%} of a GPU's memory unless told: XLA_PYTHON_CLIENT_MEM_FRACTION={USABLE}"


def idle_rows(work: Work, machine: Machine) -> Iterator[str]:
    """A population that the devices which share it can't share evenly, so that some compute for nothing."""
    population, data = work.config.population, machine.axes[partition.DATA]
    idle = -population % data
    if idle and work.config.population < work.config.budget:
        full = population + idle
        yield f"of {full} rows on data={data}, {idle} compute for nothing: --population {full} makes candidates of them"
