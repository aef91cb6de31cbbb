"""Commands that are no calls of Python: `ses-jax convert`, `models`, `show`, `export`, `doctor` and `studio`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from ses_jax.engine import repeat
from ses_jax.engine.files import expanded, writable_folder
from ses_jax.engine.result import export_noise
from ses_jax.exports import noises
from ses_jax.shell.options import Quantize
from ses_jax.studio import page

Text = Annotated[str, tyro.conf.Positional]
File = Annotated[Path, tyro.conf.Positional]


def convert(
    source: Text,
    out: File,
    /,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    drop_unused: bool = False,
    export: bool = False,
    quantize: Quantize = None,
) -> None:
    """Write a checkpoint in the converted form (Orbax), or with --export in the published one (safetensors).

    Args:
        source: "demo", a folder in either form, or a Hugging Face id of a pipeline or a CLIP.
        out: folder to write; must not exist yet.
        dtype: of the weights; by default that of the source.
        drop_unused: leave out the tensors that are never loaded; such a folder can't be exported again.
        export: write the published form.
        quantize: put the large layers into eight bits; such a folder can't be exported.
    """
    from ses_jax.loading import folder, hub
    from ses_jax.pipelines.registry import FAMILIES

    checkpoint = hub.resolve(source)
    parts = folder.components(checkpoint, FAMILIES)
    how = {"dtype": dtype, "drop_unused": drop_unused, "export": export, "quantize": quantize}
    folder.convert(checkpoint, expanded(out), parts, **how)
    print(f"wrote {out}: {', '.join(name if name != '.' else 'CLIP' for name in parts)}")


def models() -> None:
    """List the supported models and rewards, and what each was verified with."""
    from ses_jax.pipelines.registry import FAMILIES
    from ses_jax.rewards.scorers import KINDS

    rows = [
        (model.source, model.defaults, model.verified)
        for family in dict.fromkeys(FAMILIES.values())
        for model in family.PUBLISHED
    ]
    rows += [(kind.source, f"--reward {name}", kind.verified) for name, kind in KINDS.items()]
    for source, use, verified in rows:
        print(f"{source}\n    {use}\n    verified: {verified}")


def show(file: File, /) -> None:
    """Print how an image was made, and the command that makes it again.

    Args:
        file: a picture of ses_jax, or the folder of a result.
    """
    about = repeat.read(file)
    print(repeat.parameters(about))
    if "budget" in about["config"]:
        print(f"\n{repeat.command(about['prompt'], about['config'])}")


def export(result: File, /, to: Literal["diffusers", "comfyui"], out: Path | None = None) -> None:
    """Write a found noise for another program.

    Args:
        result: folder of a result.
        to: a file for `latents=` of diffusers and a script that uses it; or a .latent file, a custom node and a
            workflow of ComfyUI.
        out: folder to write to, ses_diffusers or ses_comfyui by default.
    """
    about = repeat.read(result)
    print(export_noise(noises.read(result), about, to, out))


def doctor() -> int:
    """Print devices, versions, caches and what is missing; exit status 1 where nothing can run."""
    from ses_jax.shell import doctor

    return 0 if doctor.doctor() else 1


def studio(model: str = "demo", out: Path = Path("ses_studio"), host: str = "127.0.0.1", port: int = 7860) -> None:
    """Show a local page for searching without writing code; it takes pip install 'ses_jax[studio]'.

    Args:
        model: what the page's field of the model says at first.
        out: folder of the results.
        host: address to listen on; 127.0.0.1 is this machine only, 0.0.0.0 everybody who reaches it.
        port: of the page.
    """
    page.serve(model, writable_folder(out).resolve(), host, port)
