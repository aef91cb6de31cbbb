"""Memory, work and time of a search, before it runs: neither weights nor the device are needed.

Weights are counted leaf by leaf where the mesh puts them, temporaries from the jaxpr (`footprint`), FLOPs likewise
(`flops`). Time is the longer of arithmetic, at a stated share of the device's peak, and of reading the weights once a
step; traffic between devices is not in it. On a mesh the temporaries count as if no network were split, which errs on
the safe side. With `compile=True` the device's own compiler says what it takes, see `compilation`.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from ses_jax.engine import memory
from ses_jax.engine.config import SearchConfig
from ses_jax.engine.settings import takes
from ses_jax.loading import partition
from ses_jax.pipelines.registry import FAMILIES, abstract_pipeline
from ses_jax.planner import compilation, footprint, topologies
from ses_jax.planner import devices as machines
from ses_jax.planner.workload import Work
from ses_jax.rewards.reward import Part, Reward

# Of a device's memory; the rest is the runtime's and lost between arrays.
USABLE = 0.92
MODEL_AXES = (2, 4, 8, 16)
REWARD = "reward"
# The settings of a search that make it take more or less.
PLANNED = ("height", "width", "population", "budget", "nfe", "preview_steps", "steps", "guidance", "chunk")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a search needs on each device and how long it takes.

    Attributes:
      model, device, mesh, offload_text_encoder: what was planned.
      settings: of the search, the model's defaults filled in, and the assumed utilization.
      weights: bytes per device, by network.
      encode_bytes, search_bytes: per device while prompts are encoded and while candidates are made, weights included;
        estimates also where it was compiled.
      limit_bytes: what a device lets programs use.
      fits: whether both fit; where it was compiled, whether that fits.
      chunk: the most candidates at a time that fit; 1 where none do; where it was compiled, those of the program.
      candidate_flops, search_flops: of one candidate, and of a whole search with its two final images.
      candidate_seconds, search_seconds: expected.
      advice: what to change, best first; empty if nothing needs to be.
      compiled: what the device's compiler says; None where it was not asked.
    """

    model: str
    device: str
    mesh: str
    offload_text_encoder: bool
    settings: Mapping[str, Any]
    weights: Mapping[str, int]
    encode_bytes: int
    search_bytes: int
    limit_bytes: int
    fits: bool
    chunk: int
    candidate_flops: int
    search_flops: int
    candidate_seconds: float
    search_seconds: float
    advice: tuple[str, ...] = ()
    compiled: compilation.Compilation | None = None

    def as_json(self) -> dict[str, Any]:
        """The attributes as plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """A table for people."""
        return "\n".join(f"{name:<22}{text}" for name, text in _lines(self))


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


@takes(SearchConfig, only=PLANNED)
def plan(
    model: str,
    *,
    tokens: int = 128,
    device: str = "h200",
    mesh: str = "data=1,model=1",
    offload_text_encoder: bool = False,
    utilization: float = 0.4,
    dtype: Any = jnp.bfloat16,
    compile: bool = False,
    **settings: Any,
) -> Plan:
    """Plans a search.

    Args:
      model: Hugging Face id of a published model.
      tokens: length of the prompt.
      device: a name in `ses_jax.planner.devices`.
      mesh: sizes of its axes, such as "data=4,model=2".
      offload_text_encoder: as in `load_pipeline`.
      utilization: share of the device's peak that the networks reach, in (0, 1].
      dtype: of the weights.
      compile: whether to compile the programs of the search for the device, which takes minutes, the device's compiler
        (extras "tpu" and "cuda") and not the device.
      {settings}

    Returns:
      A `Plan`; `print` it.

    Raises:
      TypeError: for a setting that makes no difference to a plan.
      ValueError: for unknown models, devices and meshes, for settings that the model cannot run, and where the device's
        compiler is not installed.
    """
    if not 0 < utilization <= 1:
        raise ValueError(f"utilization={utilization} must lie in (0, 1]")
    machine = Machine(device, mesh, offload_text_encoder, utilization)
    pipeline = abstract_pipeline(model, dtype=dtype, mesh=machine.to_compile_for() if compile else None)
    for name in settings:
        if name not in PLANNED:
            raise TypeError(f"plan() got an unexpected argument {name!r}; settings are {', '.join(PLANNED)}")
    config = SearchConfig(elites=1, **settings)
    blank = pipeline.blank_tokens(1, tokens, guidance=config.with_defaults(pipeline).guidance)
    config = config.resolve(pipeline, blank)
    work = Work(pipeline, config, tokens)
    planned = plan_on(work, machine)
    return _compiled(planned, work, machine) if compile else planned


def plan_on(work: Work, machine: Machine) -> Plan:
    """The plan of work that may be planned for several machines."""
    chunk = _chunk(work, machine)
    need = _need(work, machine, chunk)
    config = work.config
    settings = {name: getattr(config, name) for name in ("height", "width", "population", "budget")}
    settings |= {name: getattr(config, name) for name in ("preview_steps", "steps", "guidance")}
    search_seconds = _candidates_seconds(work, machine, chunk)
    fits = need.fits(machine)
    return Plan(
        model=str(work.pipeline.folder),
        device=machine.name,
        mesh=machine.mesh,
        offload_text_encoder=machine.offload,
        settings=settings | {"utilization": machine.utilization},
        weights=_weights(work, machine, work.pipeline.params) | {REWARD: footprint.size_of(work.scorer.params)},
        encode_bytes=need.encode,
        search_bytes=need.search,
        limit_bytes=_limit(machine),
        fits=fits,
        chunk=chunk,
        candidate_flops=work.candidate_flops(config.preview_steps),
        search_flops=work.search_flops(),
        candidate_seconds=search_seconds / config.budget,
        search_seconds=search_seconds + _other_seconds(work, machine),
        advice=() if fits else tuple(_advice(work, machine)),
    )


def overview(devices: Sequence[str], models: Sequence[str] | None = None) -> str:
    """A Markdown table: every published model with its defaults on one of each device, and what it takes if it must.

    Args:
      devices: names in `ses_jax.planner.devices`.
      models: Hugging Face ids; None is all published models.
    """
    rows = [["model", *devices], ["---"] * (len(devices) + 1)]
    for model in published() if models is None else models:
        pipeline = abstract_pipeline(model)
        work = Work(pipeline, SearchConfig().resolve(pipeline), 128)
        rows.append([f"`{model}`", *(_cell(work, name) for name in devices)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def published() -> list[str]:
    """Hugging Face ids of the models that can be planned."""
    return [p.source for family in dict.fromkeys(FAMILIES.values()) for p in family.PUBLISHED if p.configs]


class Need(NamedTuple):
    """Bytes per device in the two phases of a search."""

    encode: int
    search: int

    def fits(self, machine: Machine) -> bool:
        return max(self) <= _limit(machine)


def _weights(work: Work, machine: Machine, params: Mapping[str, Any]) -> dict[str, int]:
    """Bytes per device by network."""
    mesh = partition.abstract_mesh(machine.mesh)
    parts = FAMILIES[work.pipeline.family].COMPONENTS
    return {name: partition.bytes_per_device(mesh, parts[name].partition, tree) for name, tree in params.items()}


def _lying(work: Work, machine: Machine) -> Need:
    """The weights that lie on a device: without offloading all networks, all the time."""
    reward = footprint.size_of(work.scorer.params)
    if not machine.offload:
        everything = sum(_weights(work, machine, work.pipeline.params).values()) + reward
        return Need(everything, everything)
    text = _weights(work, machine, work.pipeline.text_params(work.pipeline.params))
    return Need(*(sum(part.values()) + reward for part in (text, _weights(work, machine, work.image_params))))


def _need(work: Work, machine: Machine, chunk: int) -> Need:
    """Weights and temporaries."""
    weights = _lying(work, machine)
    # Denoised along the data axis, decoded and scored on all devices.
    step = work.step(_rows(chunk, machine.axes[partition.DATA]))
    config, platform = work.config, topologies.platform(machine.name)
    most = memory.decoded_at_once(config.height, config.width, platform)
    finish = work.finish(memory.even_part(_rows(chunk, _count(machine)), most))
    return Need(
        encode=weights.encode + work.encode.temporary_bytes,
        search=weights.search + max(step.temporary_bytes, finish.temporary_bytes),
    )


def _compiled(planned: Plan, work: Work, machine: Machine) -> Plan:
    """The plan with what the device's compiler says."""
    weights = _lying(work, machine)
    target = compilation.Target(machine.name, weights.encode, weights.search, planned.chunk)
    reward = Reward((Part(work.scorer.name, scorer=work.scorer),))
    found = compilation.compile_search(work.pipeline, reward, work.config, work.tokens, target)
    need = _need(work, machine, found.chunk)
    return dataclasses.replace(
        planned, compiled=found, chunk=found.chunk, fits=found.fits, encode_bytes=need.encode, search_bytes=need.search
    )


def _chunk(work: Work, machine: Machine) -> int:
    """The most candidates at a time that fit, by bisection; those that the caller wants if so."""
    most = min(work.config.population, work.config.budget)
    if work.config.chunk:
        return min(work.config.chunk, most)
    low, high = 1, most + 1
    while high - low > 1:
        middle = high - 1 if low == 1 and high == most + 1 else (low + high) // 2
        low, high = (middle, high) if _need(work, machine, middle).fits(machine) else (low, middle)
    return low


def _candidates_seconds(work: Work, machine: Machine, chunk: int) -> float:
    """All generations' candidates, whole chunks and what is left over."""
    config = work.config
    chunks, rest = divmod(min(config.population, config.budget), chunk)
    generation = chunks * _render_seconds(work, machine, chunk, config.preview_steps)
    if rest:
        generation += _render_seconds(work, machine, rest, config.preview_steps)
    return math.ceil(config.budget / config.population) * generation


def _other_seconds(work: Work, machine: Machine) -> float:
    """Encoding one prompt, and the two final images."""
    encode = work.encode.flops / (machine.device.flops * machine.utilization * machine.axes[partition.MODEL])
    return encode + _render_seconds(work, machine, 2, work.config.steps)


def _render_seconds(work: Work, machine: Machine, count: int, steps: int) -> float:
    """From noise to scores for candidates that are made at once."""
    rate = machine.device.flops * machine.utilization
    axes = machine.axes
    arithmetic = work.step(1).flops * _rows(count, axes[partition.DATA]) / (rate * axes[partition.MODEL])
    reading = sum(_weights(work, machine, work.image_params).values()) / machine.device.bandwidth
    return steps * max(arithmetic, reading) + work.finish(1).flops * _rows(count, _count(machine)) / rate


def _rows(count: int, devices: int) -> int:
    """Of so many candidates, those of the busiest device."""
    return -(-count // devices)


def _count(machine: Machine) -> int:
    return math.prod(machine.axes.values())


def _limit(machine: Machine) -> int:
    return int(USABLE * machine.device.memory)


def _advice(work: Work, machine: Machine) -> Iterator[str]:
    """What makes a search fit that doesn't, the mildest change first."""
    if _need(work, machine, 1).fits(machine):
        yield "candidates at a time: --chunk 1, or leave it out"
        return
    if not machine.offload and _fits_somehow(work, machine._replace(offload=True)):
        yield "text encoders that leave the device after encoding: --offload-text-encoder"
    yield from _larger_mesh(work, machine)
    yield from _smaller_image(work, machine)


def _larger_mesh(work: Work, machine: Machine) -> Iterator[str]:
    """The smallest model axes that do, with and without offloading."""
    for offload in sorted({machine.offload, True}):
        for size in MODEL_AXES:
            mesh = f"data={machine.axes[partition.DATA]},model={size}"
            larger = machine._replace(mesh=mesh, offload=offload)
            if size > machine.axes[partition.MODEL] and _fits_somehow(work, larger):
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
        if _fits_somehow(smaller, machine):
            yield f"a smaller image: --height {sides['height']} --width {sides['width']}"
            return


def _fits_somehow(work: Work, machine: Machine) -> bool:
    """Whether one candidate at a time fits; a mesh that the weights do not divide over does not."""
    try:
        return _need(work, machine, 1).fits(machine)
    except ValueError:
        return False


def _cell(work: Work, name: str) -> str:
    """One model on one device, and if need be on the fewest devices that hold it."""
    for mesh, offload in [("data=1,model=1", False), *((f"data=1,model={n}", True) for n in (1, *MODEL_AXES))]:
        machine = Machine(name, mesh, offload, 0.4)
        if _fits_somehow(work, machine):
            chunk = _chunk(work, machine)
            seconds = _candidates_seconds(work, machine, chunk) / work.config.budget
            devices = "" if _count(machine) == 1 else f"{_count(machine)} devices, "
            return f"{devices}chunk {chunk}{', offloaded' if offload else ''}, {seconds:.2g} s"
    return "no"


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    settings = plan.settings
    yield "model", f"{plan.model}, {settings['height']} x {settings['width']}"
    yield "device", f"{plan.device}, mesh {plan.mesh}, {_gib(plan.limit_bytes)} usable on each"
    offloaded = ", not all at once (text encoders offloaded)" if plan.offload_text_encoder else ""
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in plan.weights.items())
    yield "weights per device", f"{_gib(sum(plan.weights.values()))}{offloaded}: {parts}"
    yield "while encoding", _gib(plan.encode_bytes)
    yield "while searching", f"{_gib(plan.search_bytes)}, {plan.chunk} of {settings['population']} candidates at a time"
    yield "fits", "yes" if plan.fits else "no"
    yield "a candidate", _cost(plan.candidate_flops, plan.candidate_seconds, f"{settings['preview_steps']} steps")
    yield (
        "a search",
        _cost(
            plan.search_flops,
            plan.search_seconds,
            f"{settings['budget']} candidates and 2 images of {settings['steps']} steps",
        ),
    )
    if plan.compiled is not None:
        yield from compilation.lines(plan.compiled)
    yield "assumed", f"{settings['utilization']:.0%} of the device's peak; no time between devices"
    for line in plan.advice:
        yield "instead", line


def _cost(count: int, seconds: float, what: str) -> str:
    return f"{count / 1e12:,.0f} TFLOP, {seconds:,.2f} s ({what})"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
