"""The shell: `ses-jax search`, `ses-jax generate`, `ses-jax plan`, `ses-jax models`; the same as the Python API."""

import functools
import importlib
import os
import sys
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import tyro

Text = Annotated[str, tyro.conf.Positional]
Texts = Annotated[tuple[str, ...], tyro.conf.Positional]


def search(
    prompts: Texts,
    /,
    model: str = "demo",
    reward: str | None = None,
    report: tuple[str, ...] = (),
    budget: int = 50,
    preview_steps: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    population: int = 10,
    elites: int = 5,
    wavelet: str = "db1",
    level: int | None = None,
    chunk: int | None = None,
    standardize: bool = True,
    out: Path = Path("ses_out"),
    progress: bool = True,
) -> None:
    """Search the initial noise for the image that the reward likes best.

    Args:
        prompts: one or more prompts.
        model: "demo", a folder, or a Hugging Face id.
        reward: a name such as "pick" (see `ses-jax models`), your own function "module:function", or a mixture of both
            such as "pick=1,hps=0.5"; the model's own by default.
        report: rewards that score every image without driving the search.
        budget: candidates to score.
        preview_steps: denoising steps of a candidate.
        steps: denoising steps of the final image.
        guidance: guidance scale, in the model's own convention.
        negative_prompt: what to steer away from, where guidance is on.
        height: of the image, in pixels.
        width: of the image, in pixels.
        seed: of all random draws.
        population: candidates per generation.
        elites: best candidates that shape the next generation.
        wavelet: name in PyWavelets.
        level: how deep the searched low band lies.
        chunk: candidates denoised at a time, to save memory.
        standardize: give the parts of a mixture the same spread before they are summed.
        out: folder for the results; several prompts go to subfolders 000, 001, ...
        progress: show a progress bar.
    """
    settings = {name: value for name, value in locals().items() if name not in ("prompts", "reward", "report")}
    import ses_jax

    many = len(prompts) != 1
    found = ses_jax.search(
        list(prompts) if many else prompts[0],
        reward=None if reward is None else _parse_reward(reward),
        report={_parse_part(name): 1.0 for name in report} or None,
        **settings,
    )
    for index, result in enumerate(found if many else [found]):
        folder = out / f"{index:03d}" if many else out
        print(
            f"{result.prompt}\n  preview reward {result.baseline_score:.4f} -> {result.score:.4f}"
            f"  final {result.baseline_final_score:.4f} -> {result.final_score:.4f}"
            f"  {result.timings['search']:.1f} s\n  {folder / 'best.png'}"
        )


def generate(
    prompts: Texts,
    /,
    model: str = "demo",
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    out: Path = Path("ses_out"),
) -> None:
    """Render one image a prompt, without a search.

    Args:
        prompts: one or more prompts.
        model: "demo", a folder, or a Hugging Face id.
        steps: denoising steps.
        guidance: guidance scale, in the model's own convention.
        negative_prompt: what to steer away from, where guidance is on.
        height: of the image, in pixels.
        width: of the image, in pixels.
        seed: of all random draws.
        out: folder for the images 000.png, 001.png, ...
    """
    settings = {name: value for name, value in locals().items() if name not in ("prompts", "model", "out")}
    import numpy as np

    import ses_jax
    from ses_jax.result import to_image, writable_folder, write

    writable_folder(out)
    for index, pixels in enumerate(np.asarray(ses_jax.generate(model, list(prompts), **settings))):
        path = out / f"{index:03d}.png"
        write(path, functools.partial(to_image(pixels).save, format="PNG"))
        print(path)


def plan(
    model: Text,
    /,
    height: int | None = None,
    width: int | None = None,
    population: int = 10,
    budget: int = 50,
    preview_steps: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    tokens: int = 128,
    chunk: int | None = None,
    device: str = "h200",
    mesh: str = "data=1,model=1",
    offload_text_encoder: bool = False,
    utilization: float = 0.4,
    json: bool = False,
) -> int:
    """Say what a search needs and how long it takes, without weights or the device; exit status 1 if it doesn't fit.

    Args:
        model: Hugging Face id of a published model.
        height: of the image, in pixels.
        width: of the image, in pixels.
        population: candidates per generation.
        budget: candidates to score.
        preview_steps: denoising steps of a candidate.
        steps: denoising steps of the final image.
        guidance: guidance scale, in the model's own convention.
        tokens: length of the prompt.
        chunk: candidates denoised at a time; as many as fit by default.
        device: h200, h100, b200, a100-80, a100-40, 4090, 5090, v4, v5e, v5p or v6e.
        mesh: how many devices share the candidates and how many the weights, such as data=1,model=8.
        offload_text_encoder: text encoders leave the device before the other networks come.
        utilization: share of the device's peak that the networks reach.
        json: print JSON instead of a table.
    """
    settings = {name: value for name, value in locals().items() if name not in ("model", "json")}
    import ses_jax

    planned = ses_jax.plan(model, **settings)
    print(dumps(planned.as_json(), indent=2) if json else planned)
    return 0 if planned.fits else 1


def models() -> None:
    """List the supported models and rewards, and what each was verified with."""
    from ses_jax.pipelines import FAMILIES
    from ses_jax.scorers import KINDS

    rows = [
        (model.source, model.defaults, model.verified) for family in FAMILIES.values() for model in family.PUBLISHED
    ]
    rows += [(kind.source, f"--reward {name}", kind.verified) for name, kind in KINDS.items()]
    for source, use, verified in rows:
        print(f"{source}\n    {use}\n    verified: {verified}")


def main(args: list[str] | None = None) -> int:
    """Runs the command line; bad input is one line on stderr and exit status 2."""
    _keep_compiled_programs()
    try:
        commands = {"search": search, "generate": generate, "plan": plan, "models": models}
        status = tyro.extras.subcommand_cli_from_dict(commands, prog="ses-jax", args=args)
    except (ValueError, OSError) as error:
        print(f"ses-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status or 0


def _keep_compiled_programs() -> None:
    """Compiled programs are kept between runs, so that a second search of the same shape starts at once."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(cache) / "ses_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _parse_reward(text: str) -> Any:
    """`"pick"` and `"module:function"` as what they name; `"pick=1,module:function=0.5"` as a mapping to weights."""
    if "=" not in text:
        return _parse_part(text)
    try:
        weights = [(name.strip(), float(weight)) for name, weight in (part.split("=") for part in text.split(","))]
    except ValueError:
        raise ValueError(f"--reward {text}: expected a name, or weights such as pick=1,hps=0.5") from None
    return {_parse_part(name): weight for name, weight in weights}


def _parse_part(name: str) -> Any:
    """A reward's name as it is; `"module:function"` as the function, modules of the current folder included."""
    if ":" not in name:
        return name
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
