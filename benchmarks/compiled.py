"""What the devices' own compilers say of every published model at its native size, and how far plans are from it.

    python benchmarks/compiled.py                     all that is not there yet, with the compilers that are installed
    python benchmarks/compiled.py --devices v6e h100  those of some devices

An entry takes minutes. Each is written when it is done, and the next run goes on with what is left. Meshes are those
that a plan finds to fit: weights on as few devices as hold them, candidates along the other axis.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro
from common import RESULTS, save

import ses_jax
from ses_jax.loading import programs
from ses_jax.planner import topologies
from ses_jax.planner.tables import published

NAME = "compiled"
# By device, how many of them.
MACHINES = {"h100": (1, 8), "v6e": (1, 8, 4), "h200": (1,), "v5e": (8,)}
COUNTS = (1, 8, 4)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """
    Attributes:
      devices: of which entries are made.
      models: Hugging Face ids; all published models by default.
      counts: how many devices at once.
      height, width: of the image; by default the model's own.
      out: folder of the results.
    """

    devices: tuple[str, ...] = tuple(MACHINES)
    models: tuple[str, ...] = ()
    counts: tuple[int, ...] = COUNTS
    height: int | None = None
    width: int | None = None
    out: Path = RESULTS


class Case(NamedTuple):
    """An entry to be made."""

    model: str
    device: str
    count: int

    @property
    def key(self) -> str:
        return f"{self.model} on {self.count} {self.device}"


def main(arguments: Arguments) -> None:
    for case in cases(arguments):
        if case.key in done(arguments.out):
            continue
        start = time.perf_counter()
        found = entry(case, {"height": arguments.height, "width": arguments.width})
        # Another process, with the other compilers, may have been here in the meantime.
        save(NAME, {"entries": done(arguments.out) | {case.key: found}}, arguments.out)
        print(f"{case.key}: {told(found)}; {time.perf_counter() - start:.0f} s", flush=True)
        programs.clear()
        jax.clear_caches()


def done(folder: Path) -> dict[str, Any]:
    """The entries that are there already."""
    path = folder / f"{NAME}.json"
    return json.loads(path.read_text())["entries"] if path.exists() else {}


def cases(arguments: Arguments) -> Iterator[Case]:
    """What there is to do with the compilers that are here, one device of each kind first."""
    for count in arguments.counts:
        for device in arguments.devices:
            if count not in MACHINES[device]:
                continue
            if not topologies.available(device):
                print(f"{count} {device}: its compiler is not installed", flush=True)
                continue
            for model in arguments.models or published():
                yield Case(model, device, count)


def entry(case: Case, size: Mapping[str, int | None]) -> dict[str, Any]:
    """The plan and what the compiler says; without the latter where not even a plan fits."""
    for placed in placements(case):
        if ses_jax.plan(case.model, device=case.device, **placed, **size).fits:
            try:
                return ses_jax.plan(case.model, device=case.device, compile=True, **placed, **size).as_json()
            except jax.errors.JaxRuntimeError as error:
                return {**placed, "error": str(error).strip()[:2000]}
    return {**placed, "fits": False}


def placements(case: Case) -> Iterator[dict[str, Any]]:
    """Meshes from the fastest: weights on as few devices as hold them."""
    for model in (1, 2, 4, 8):
        if model <= case.count:
            for offload in (False, True):
                yield {"mesh": f"data={case.count // model},model={model}", "offload_text_encoder": offload}


def told(found: Mapping[str, Any]) -> str:
    """An entry in words."""
    if "error" in found:
        return f"refused: {found['error'].splitlines()[0]}"
    if not found.get("compiled"):
        return "does not fit"
    compiled = found["compiled"]
    shares = [found[name] / compiled[name] for name in ("encode_bytes", "search_bytes")]
    return (
        f"{found['mesh']}, chunk {compiled['chunk']}, {compiled['search_bytes'] / 2**30:.1f} GiB, "
        f"the plan's bytes {shares[0]:.2f} and {shares[1]:.2f} of the compiler's"
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
