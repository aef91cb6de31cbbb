"""Memory, work and time of a search, before it runs: neither weights nor the device are needed.

How it is estimated is said in `need`. With `compile=True` the device's own compiler says what it takes, see
`compilation`.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ses_jax.engine.config import SearchConfig
from ses_jax.engine.settings import takes
from ses_jax.loading import partition
from ses_jax.models import quantized
from ses_jax.pipelines.base import TOKEN_BUCKETS, Pipeline
from ses_jax.pipelines.registry import abstract_pipeline
from ses_jax.planner import compilation, devices, footprint, tables
from ses_jax.planner.advice import changes, idle_rows, memory_fraction
from ses_jax.planner.need import (
    Machine,
    candidates_seconds,
    chunk_of,
    device_count,
    limit_bytes,
    lying,
    need_of,
    other_seconds,
    weights_of,
)
from ses_jax.planner.workload import Work
from ses_jax.rewards.reward import Part, Reward

LOG = logging.getLogger("ses_jax")
REWARD = "reward"
# The settings of a search that make it take more or less.
PLANNED = (
    *("height", "width", "population", "budget", "nfe", "preview_steps", "steps", "guidance"),
    *("fidelity", "searcher", "chunk"),
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a search needs on each device and how long it takes.

    Attributes:
      model, device, mesh, offload_text_encoder, quantize: what was planned.
      settings: of the search, the model's defaults filled in, and the assumed utilization.
      weights: bytes per device, by network.
      encode_bytes, search_bytes: per device while prompts are encoded and while candidates are made, weights included;
        estimates also where it was compiled.
      limit_bytes: what a device lets programs use.
      fits: whether both fit; where it was compiled, whether that fits.
      chunk: the most candidates at a time that fit; 1 where none do; where it was compiled, those of the program.
      candidate_flops, search_flops: of one candidate, on average where not all get a full preview, and of a whole
        search with its two final images.
      candidate_seconds, search_seconds: expected.
      advice: what to change so that it fits, best first; or, where it does, what else it needs and what it wastes.
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
    quantize: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The attributes as plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """A table for people."""
        return "\n".join(f"{name:<22}{text}" for name, text in tables.lines(self))


@takes(SearchConfig, only=PLANNED)
def plan(
    model: str,
    *,
    tokens: int = 128,
    device: str = "h200",
    mesh: str = "data=1,model=1",
    offload_text_encoder: bool = False,
    utilization: float | None = None,
    dtype: Any = jnp.bfloat16,
    compile: bool = False,
    quantize: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> Plan:
    """Plans a search.

    Args:
      model: Hugging Face id of a published model; or "demo", or a local folder, of which the configs are read.
      tokens: length of the prompt.
      device: a name in `ses_jax.planner.devices`.
      mesh: sizes of its axes, such as "data=4,model=2".
      offload_text_encoder: as in `load_pipeline`.
      utilization: share of the device's peak that the networks reach, in (0, 1]; None is 0.55 on Hopper's GPUs, as
        measured, and 0.4 elsewhere.
      dtype: of the weights.
      compile: whether to compile the programs of the search for the device, which takes minutes, the device's compiler
        (extras "tpu" and "cuda") and not the device.
      quantize: as in `load_pipeline`.
      progress: whether a word is said where this machine has more devices of the kind than the mesh uses.
      {settings}

    Returns:
      A `Plan`; `print` it.

    Raises:
      TypeError: for a setting that makes no difference to a plan.
      ValueError: for unknown models, devices and meshes, for settings that the model cannot run, and where the device's
        compiler is not installed.
    """
    if utilization is not None and not 0 < utilization <= 1:
        raise ValueError(f"utilization={utilization} must lie in (0, 1]")
    if not 1 <= tokens <= TOKEN_BUCKETS[-1]:
        raise ValueError(f"tokens={tokens} must be at least 1 and at most {TOKEN_BUCKETS[-1]}, what models read")
    check_model(model)
    share = devices.device(device).utilization if utilization is None else utilization
    machine = Machine(device, mesh, offload_text_encoder, share)
    target = machine.to_compile_for() if compile else None
    if progress:
        _say_unused(machine)
    pipeline = abstract_pipeline(model, dtype=dtype, mesh=target, quantize=quantize)
    for name in settings:
        if name not in PLANNED:
            raise TypeError(f"plan() got an unexpected argument {name!r}; settings are {', '.join(PLANNED)}")
    config = SearchConfig(elites=1, **settings)
    blank = pipeline.blank_tokens(1, tokens, guidance=config.with_defaults(pipeline).guidance)
    config = config.resolve(pipeline, blank)
    work = Work(pipeline, config, tokens)
    planned = plan_on(work, machine)
    return _compiled(planned, work, machine) if compile else planned


def check_model(model: Any) -> None:
    """Raises ValueError for a loaded pipeline, which lies on devices and in bits that are not those of the plan."""
    if isinstance(model, Pipeline):
        raise ValueError(f"model is a loaded pipeline; pass its name or folder, {str(model.folder)!r}")


def _say_unused(machine: Machine) -> None:
    """Says so where this machine has more devices of the kind than the mesh uses."""
    try:
        present = jax.devices()
    except RuntimeError:  # such as a TPU that another process holds
        return
    if word := partition.unused_word(device_count(machine), devices.of_name(machine.name, present)):
        LOG.warning(word)


def plan_on(work: Work, machine: Machine) -> Plan:
    """The plan of work that may be planned for several machines."""
    chunk = chunk_of(work, machine)
    need = need_of(work, machine, chunk)
    config = work.config
    settings = {name: getattr(config, name) for name in ("height", "width", "population", "budget")}
    settings |= {name: getattr(config, name) for name in ("preview_steps", "steps", "guidance")}
    settings |= {"fidelity": str(config.fidelity), "gradient": work.gradient}
    search_seconds = candidates_seconds(work, machine, chunk)
    fits = need.fits(machine)
    return Plan(
        model=work.pipeline.source or str(work.pipeline.folder),
        device=machine.name,
        mesh=machine.mesh,
        offload_text_encoder=machine.offload,
        settings=settings | {"utilization": machine.utilization},
        weights=weights_of(work, machine) | {REWARD: footprint.size_of(work.scorer.params)},
        encode_bytes=need.encode,
        search_bytes=need.search,
        limit_bytes=limit_bytes(machine),
        fits=fits,
        chunk=chunk,
        candidate_flops=work.candidates_flops // config.budget,
        search_flops=work.search_flops(),
        candidate_seconds=search_seconds / config.budget,
        search_seconds=search_seconds + other_seconds(work, machine),
        advice=(*memory_fraction(need, machine), *idle_rows(work, machine)) if fits else tuple(changes(work, machine)),
        quantize=quantized.kind_of(work.pipeline.params),
    )


def _compiled(planned: Plan, work: Work, machine: Machine) -> Plan:
    """The plan with what the device's compiler says."""
    weights = lying(work, machine)
    target = compilation.Target(machine.name, weights.encode, weights.search, planned.chunk)
    reward = Reward((Part(work.scorer.name, scorer=work.scorer),))
    found = compilation.compile_search(work.pipeline, reward, work.config, work.tokens, target)
    need = need_of(work, machine, found.chunk)
    return dataclasses.replace(
        planned, compiled=found, chunk=found.chunk, fits=found.fits, encode_bytes=need.encode, search_bytes=need.search
    )
