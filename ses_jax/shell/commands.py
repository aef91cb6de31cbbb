"""Commands that are no calls of Python: `ses-jax show`, `export`, `doctor` and `studio`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from ses_jax.engine import repeat
from ses_jax.engine.files import writable_folder
from ses_jax.engine.result import export_noise
from ses_jax.exports import noises
from ses_jax.studio import page

File = Annotated[Path, tyro.conf.Positional]


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
    print(export_noise(noises.read(result), repeat.read(result / "result.json"), to, out))


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
