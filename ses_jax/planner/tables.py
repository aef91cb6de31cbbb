"""Plans as tables for people: one plan, and every published model on some devices."""

from collections.abc import Iterator, Sequence
from typing import Any

from ses_jax.engine.config import SearchConfig
from ses_jax.pipelines.registry import FAMILIES, abstract_pipeline
from ses_jax.planner import compilation
from ses_jax.planner import devices as machines
from ses_jax.planner.advice import MODEL_AXES
from ses_jax.planner.need import Machine, candidates_seconds, chunk_of, device_count, fits_somehow
from ses_jax.planner.workload import Work


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


def _cell(work: Work, name: str) -> str:
    """One model on one device, and if need be on the fewest devices that hold it."""
    for mesh, offload in [("data=1,model=1", False), *((f"data=1,model={n}", True) for n in (1, *MODEL_AXES))]:
        machine = Machine(name, mesh, offload, machines.device(name).utilization)
        if fits_somehow(work, machine):
            chunk = chunk_of(work, machine)
            seconds = candidates_seconds(work, machine, chunk) / work.config.budget
            devices = "" if device_count(machine) == 1 else f"{device_count(machine)} devices, "
            return f"{devices}chunk {chunk}{', offloaded' if offload else ''}, {seconds:.2g} s"
    return "no"


def lines(plan: Any) -> Iterator[tuple[str, str]]:
    """Names and texts of a `Plan`."""
    settings = plan.settings
    yield (
        "model",
        f"{plan.model}, {settings['height']} x {settings['width']}{f', {plan.quantize}' * bool(plan.quantize)}",
    )
    yield "device", f"{plan.device}, mesh {plan.mesh}, {_gib(plan.limit_bytes)} usable on each"
    offloaded = ", not all at once (text encoders offloaded)" if plan.offload_text_encoder else ""
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in plan.weights.items())
    yield "weights per device", f"{_gib(sum(plan.weights.values()))}{offloaded}: {parts}"
    yield "while encoding", _gib(plan.encode_bytes)
    yield "while searching", f"{_gib(plan.search_bytes)}, {plan.chunk} of {settings['population']} candidates at a time"
    yield "fits", "yes" if plan.fits else "no"
    looks = "" if settings["fidelity"] == "full" else f" after {settings['fidelity']}"
    preview = f"{settings['preview_steps']} steps{' and their gradient' * settings['gradient']}{looks}"
    yield "a candidate", _cost(plan.candidate_flops, plan.candidate_seconds, preview)
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
        yield "but" if plan.fits else "instead", line


def _cost(count: int, seconds: float, what: str) -> str:
    work = f"{count / 1e12:,.0f} TFLOP" if count >= 1e13 else f"{count / 1e9:,.0f} GFLOP"
    return f"{work}, {f'{seconds:,.2f}' if seconds >= 0.01 else f'{seconds:.1g}'} s ({what})"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
