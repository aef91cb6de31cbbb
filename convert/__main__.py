"""`python -m ses_jax.convert SOURCE OUT`: converts a checkpoint, once, for fast loading."""

import sys
from pathlib import Path
from typing import Literal

import tyro

from ses_jax import hub
from ses_jax.convert import folder
from ses_jax.pipelines import FAMILIES


def main(
    source: tyro.conf.Positional[str],
    out: tyro.conf.Positional[Path],
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    drop_unused: bool = False,
    export: bool = False,
) -> None:
    """Writes a checkpoint in the converted form (Orbax), or with --export in the published one (safetensors).

    Args:
      source: "demo", a folder in either form, or a Hugging Face id of a pipeline or a CLIP.
      out: folder to write; must not exist yet.
      dtype: of the weights; by default that of the source.
      drop_unused: leave out the tensors that are never loaded; such a folder can't be exported again.
      export: write the published form.
    """
    try:
        checkpoint = hub.resolve(source)
        parts = folder.components(checkpoint, FAMILIES)
        folder.convert(checkpoint, out, parts, dtype=dtype, drop_unused=drop_unused, export=export)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {out}: {', '.join(name if name != '.' else 'CLIP' for name in parts)}")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m ses_jax.convert", config=(tyro.conf.FlagCreatePairsOff,))
