"""How long weights take from a disk to the device, and how much memory: here, converted, and in diffusers.

    python benchmarks/loading.py black-forest-labs/FLUX.2-klein-4B --networks transformer

The networks are written at their published sizes, of random bfloat16 values, in the published layout. Each way of
loading them then runs in a process of its own, after the files have been read once: times are those of a disk that is
never waited for.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import common
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tyro

from ses_jax.convert.files import write_json, write_weights
from ses_jax.convert.table import Component
from ses_jax.loading import hub, network
from ses_jax.pipelines.registry import FAMILIES

WAYS = ("published", "convert", "converted", "int8", "diffusers")
CLASSES = {"text_encoder": 0, "text_encoder_2": 1}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """
    Attributes:
      model: Hugging Face id of a published model.
      networks: which of its networks.
      ways: of loading them: published or converted, into int8, by diffusers; "convert" writes what "converted" reads.
      scratch: folder for the weights, which are left there and used again; None is a temporary one.
      out: folder of the JSON.
      way: what a child process does; not for you.
    """

    model: Annotated[str, tyro.conf.Positional]
    networks: tuple[str, ...] = ("transformer", "text_encoder")
    ways: tuple[Literal["published", "convert", "converted", "int8", "diffusers"], ...] = WAYS
    scratch: Path | None = None
    out: Path = common.RESULTS
    way: str | None = None


def main(args: Arguments) -> None:
    """Writes what is not there, and measures."""
    if args.way:
        print(json.dumps(measure(args)), flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.scratch or Path(temporary)
        rows = {name: measured(dataclasses.replace(args, networks=(name,), scratch=scratch)) for name in args.networks}
    result = {"model": args.model, "rows": rows, "environment": common.environment()}
    print(common.save(f"loading_{args.model.split('/')[-1]}_{common.environment()['platform']}", result, args.out))


def measured(args: Arguments) -> dict[str, Any]:
    """One network, loaded in every way."""
    folder = folder_of(args)
    if not (folder / "config.json").exists():
        write(args.model, args.networks[0], folder)
    size, rows = sum(file.stat().st_size for file in folder.glob("*.safetensors")), {}
    for way in args.ways:
        for file in (folder.parent / f"{folder.name}-converted" if way == "converted" else folder).rglob("*"):
            if file.is_file():
                _read_once(file)
        rows[way] = child(args, way)
        seconds, peak = rows[way]["seconds"], rows[way]["peak_bytes"]
        print(
            f"{args.networks[0]:16}{way:12}{seconds:7.1f} s {size / seconds / 1e9:6.2f} GB/s   "
            f"{peak / 1e9:6.2f} GB at most, of {size / 1e9:.2f} GB",
            flush=True,
        )
    return {"bytes": size, "ways": rows}


def child(args: Arguments, way: str) -> dict[str, float]:
    """What a process says that loads the network in one way."""
    command = [sys.executable, __file__, args.model, "--networks", *args.networks, "--scratch", str(args.scratch)]
    ended = subprocess.run([*command, "--way", way], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def measure(args: Arguments) -> dict[str, float]:
    """Seconds of one way of loading, without imports, and the most memory that the process ever had."""
    folder, name = folder_of(args), args.networks[0]
    run = _torch(args.model, name, folder) if args.way == "diffusers" else _ours(args.model, name, folder, args.way)
    start = time.perf_counter()
    kept = run()
    seconds = time.perf_counter() - start
    del kept
    return {"seconds": seconds, "peak_bytes": _peak()}


def folder_of(args: Arguments) -> Path:
    return args.scratch / args.model.replace("/", "--") / args.networks[0]


def component_of(model: str, name: str) -> Component:
    """A network of a published model."""
    published = (family for family in FAMILIES.values() if model in {known.source for known in family.PUBLISHED})
    return next(published).COMPONENTS[name]


def _ours(model: str, name: str, folder: Path, way: str) -> Any:
    component, converted = component_of(model, name), folder.parent / f"{folder.name}-converted"
    jax.devices()
    if way == "convert":
        loaded = network.load(folder, component, dtype=jnp.bfloat16)
        return lambda: network.save_converted(converted, loaded)
    source, quantize = converted if way == "converted" else folder, "int8" if way == "int8" else None
    return lambda: jax.block_until_ready(hub.load_component(source, component, dtype=jnp.bfloat16, quantize=quantize))


def _torch(model: str, name: str, folder: Path) -> Any:
    import torch
    import torch_pipelines

    found = torch_network(model, name)
    kind = getattr(torch_pipelines.diffusers, found.name, None) or getattr(torch_pipelines.transformers, found.name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    copied = {"device_map": device} if device != "cpu" else {}

    def load():
        loaded = kind.from_pretrained(folder, torch_dtype=torch.bfloat16, **copied)
        # On a CPU tensors are mapped files until somebody reads them.
        return loaded if copied else [parameter.clone() for parameter in loaded.parameters()]

    return load


def torch_network(model: str, name: str) -> Any:
    """The class and the config of a network."""
    import torch_pipelines

    published = torch_pipelines.PUBLISHED[model]
    return published.texts[CLASSES[name]] if name in CLASSES else getattr(published, name)


def write(model: str, name: str, folder: Path) -> None:
    """A network's folder as published, of random values."""
    import torch
    import torch_pipelines

    folder.mkdir(parents=True, exist_ok=True)
    made = torch_pipelines.build(torch_network(model, name), "meta", torch.bfloat16)
    shapes = {key: tuple(value.shape) for key, value in made.state_dict().items()}
    for key in getattr(made, "_tied_weights_keys", None) or ():
        shapes.pop(key, None)
    write_weights(folder, component_of(model, name).stem, _tensors(shapes))
    config = made.config.to_dict() if hasattr(made.config, "to_dict") else dict(made.config)
    write_json(folder / "config.json", json.loads(json.dumps(config, default=str)))


def _tensors(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    values = (0.02 * np.random.default_rng(0).standard_normal(1 << 24)).astype(ml_dtypes.bfloat16)
    for name, shape in shapes.items():
        yield name, np.resize(values, shape)


def _peak() -> int:
    """Most bytes that this process had in memory; `getrusage` counts those of the process that began it, too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def _read_once(file: Path) -> None:
    buffer = bytearray(1 << 24)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


if __name__ == "__main__":
    main(tyro.cli(Arguments))
