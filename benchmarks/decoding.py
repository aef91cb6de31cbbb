"""What a TPU's compiler says of decoding one image, with its columns by phase (`models/convolution.py`) and without.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --models Qwen/Qwen-Image --height 928 --width 1664

It takes libtpu, no TPU, and minutes for each form. Seconds are the compiler's own estimate, with what the attention
kernel's FLOPs take at the rate that was measured on the chip.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import tyro
from common import RESULTS, save

from ses_jax.engine import denoising
from ses_jax.loading import partition
from ses_jax.models import autoencoder_kl, qwen_vae
from ses_jax.pipelines.registry import abstract_pipeline
from ses_jax.planner import hlo, topologies


@dataclasses.dataclass(frozen=True)
class Arguments:
    """
    Attributes:
      models: Hugging Face ids.
      device: a TPU, as `ses-jax plan` names it.
      mesh: each of its devices decodes one image.
      height, width: in pixels; by default the model's own.
      out: folder of the results.
    """

    models: tuple[str, ...] = ("black-forest-labs/FLUX.2-klein-4B", "Qwen/Qwen-Image")
    device: str = "v6e"
    mesh: str = "data=1,model=1"
    height: int | None = None
    width: int | None = None
    out: Path = RESULTS


def main(args: Arguments) -> None:
    entries = {}
    for model in args.models:
        pipeline = abstract_pipeline(model, mesh=topologies.target_mesh(args.device, args.mesh))
        size = args.height or pipeline.defaults.height, args.width or pipeline.defaults.width
        forms = {"by phase": contextlib.nullcontext, "plain": plain}
        found = {name: decoding(pipeline, size, args.device, form) for name, form in forms.items()}
        key = f"{model}, {size[0]} x {size[1]}, {args.device}, {args.mesh}"
        entries[key] = found
        save("decoding", {"compiler": topologies.compiler(args.device), "entries": entries}, args.out)
        print(f"{key}: {told(found)}", flush=True)


@contextlib.contextmanager
def plain() -> Any:
    """Images as they are, on any device."""
    with contextlib.ExitStack() as stack:
        for module in (autoencoder_kl, qwen_vae):
            stack.enter_context(mock.patch.object(module, "in_phases", lambda x: x))
        yield


def decoding(pipeline: Any, size: tuple[int, int], device: str, form: Callable[[], Any]) -> dict[str, Any]:
    """The compiled decoder, one image on each device, as a search runs it."""
    mesh = pipeline.mesh
    model = denoising.Model(pipeline.velocity, pipeline.decode, mesh, decoded=1)
    count = partition.size(mesh, *partition.AXES)

    def decode(vae, latents):
        rows = denoising.Rows(latents, jnp.arange(count))
        return denoising.decoded(model, {"vae": vae}, rows, denoising.IMAGES)[1]

    latents = jax.ShapeDtypeStruct((count, *pipeline.noise_shape(*size)), jnp.float32)
    with topologies.no_flags(), form():
        lowered = jax.jit(decode).lower(*partition.replicate(mesh, (pipeline.params["vae"], latents)))
        start = time.perf_counter()
        compiled = lowered.compile()
    found = list(hlo.instructions(compiled.as_text()))
    return {
        "seconds": seconds(found, device),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "collectives": hlo.collectives(found),
        "compile_seconds": time.perf_counter() - start,
    }


def seconds(found: list[Any], device: str) -> float:
    """The estimate of a program's instructions."""
    return hlo.cycles(found) / topologies.clock(device) + hlo.kernel_flops(found) / topologies.kernel_rate(device)


def told(found: dict[str, dict[str, Any]]) -> str:
    """Two forms in words."""
    words = [
        f"{name} {each['seconds']:.3f} s, {each['temporary_bytes'] / 1e9:.1f} GB, compiled in "
        f"{each['compile_seconds']:.0f} s"
        for name, each in found.items()
    ]
    ours, other = (each["seconds"] for each in found.values())
    return "; ".join(words) + (f"; {other / ours:.2f} times as fast" if ours else "")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
