"""The shell: `ses-jax search`, `batch`, `generate`, `plan` and others; the same as the Python API.

Exit status: 0 where all is well, 1 where the reward or a prompt of a batch failed, a plan does not fit or the doctor
finds no device, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM.
"""

import dataclasses
import functools
import logging
import os
import sys
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ses_jax.rewards.host import origin
from ses_jax.shell import errors, words
from ses_jax.shell.commands import convert, doctor, export, models, show, studio
from ses_jax.shell.dry_run import print_dry_run
from ses_jax.shell.options import PlanOptions, Quantize, RenderOptions, SearchOptions, arguments, rendered_with

Text = Annotated[str, tyro.conf.Positional]
Texts = Annotated[tuple[str, ...], tyro.conf.Positional]
File = Annotated[Path, tyro.conf.Positional]
Flat = tyro.conf.OmitArgPrefixes  # its fields are options as they are
INTERRUPTED = 130
STOPPED = "ses-jax: stopped early; {} holds the best so far, and the same command with --resume goes on"
AT_ONCE = "ses-jax: stopped at once; {} holds what was found, and the same command with --resume goes on"


def search(
    prompts: Texts,
    /,
    settings: Flat[SearchOptions],
    out: Path = Path("ses_out"),
    base_noise: Path | None = None,
    index: int | None = None,
    seeds: tuple[int, ...] = (),
    overwrite: bool = False,
    like: Path | None = None,
    prompt_file: Path | None = None,
    config: Path | None = None,
    dry_run: bool = False,
) -> int:
    """Search the initial noise for the image that the reward likes best.

    Exit status: 0 for a finished search, 130 if Ctrl-C and 143 if SIGTERM ended it early (the best so far is saved, a
    second one ends at once), 1 for an error in the reward, 2 for bad input.

    Args:
        prompts: one or more prompts.
        settings: of the search.
        out: folder for the results; several prompts or seeds go to subfolders 000, 001, ...
        base_noise: file of the noise to start from: .npy, .safetensors, .latent or a result's folder.
        index: number of the first prompt, which chooses its random draws; 0, or that of --like, by default.
        seeds: instead of --seed, several of one prompt, or one for each of several prompts.
        overwrite: replace the results that are in the folder already; --resume gives finished ones back.
        like: a picture or folder of an earlier search, to repeat it; other options stand on top of its settings.
        prompt_file: more prompts, in a file as batch takes them, or - for lines of stdin.
        config: a .yaml, .json or .toml file of options by their names; those of the command stand on top.
        dry_run: say what would be done, and do nothing.
    """
    import ses_jax
    from ses_jax.engine.files import expanded
    from ses_jax.engine.output import STATE
    from ses_jax.engine.saved import picture

    words.check_config(config)
    out = expanded(out)
    prompts = [*prompts, *words.of_file(prompt_file)]
    if like is not None:
        prompts, index = words.of_like(like, prompts, index)
    named = arguments(settings) | ({"seed": list(seeds)} if seeds else {})
    if dry_run:
        print_dry_run(prompts, named)
        return 0
    many = len(prompts) != 1 or bool(seeds)
    how = {"out": out, "overwrite": overwrite, "base_noise": base_noise, "index": index or 0}
    try:
        found = ses_jax.search(prompts[0] if len(prompts) == 1 else list(prompts), **how, **named)
    except SystemExit:
        print(STOPPED.format(out), file=sys.stderr)
        raise
    except KeyboardInterrupt:
        if (out / STATE).is_dir():
            print(AT_ONCE.format(out), file=sys.stderr)
        raise
    found = found if many else [found]
    for place, result in enumerate(found):
        print(_told(result, picture(out / f"{place:03d}" if many else out, "best")))
    if len(found) == max(len(prompts), len(seeds)) and not found[-1].interrupted:
        return 0
    print(STOPPED.format(out), file=sys.stderr)
    return INTERRUPTED


def _told(result: Any, image: Path) -> str:
    """A `SearchResult` in words, for people."""
    return (
        f"{result.prompt}\n  preview reward {result.baseline_score:.4f} -> {result.score:.4f}"
        f"  final {result.baseline_final_score:.4f} -> {result.final_score:.4f}"
        f"  {result.timings['search']:.1f} s\n  {image}"
    )


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process's place, where many share the work.

    Attributes:
        process_id: number of this process, from 0.
        num_processes: how many there are.
        coordinator: HOST:PORT of process 0; all processes wait there for each other before they begin.
        distributed: take all of this from SLURM, the TPU pod or Open MPI.
    """

    process_id: int | None = None
    num_processes: int | None = None
    coordinator: str | None = None
    distributed: bool = False


def batch(
    prompts: File,
    /,
    settings: Flat[SearchOptions],
    processes: Flat[Processes],
    out: Path,
    prompt_column: str | None = None,
    config: Path | None = None,
    dry_run: bool = False,
) -> int:
    """Search every prompt of a file, each into its own folder; the same command goes on after a stop.

    Exit status: 0 if all prompts are fine, 1 if some failed, 2 for bad input, 130 if Ctrl-C and 143 if SIGTERM ended it
    after the generation at hand (a second one ends at once).

    Args:
        prompts: a .txt, .csv, .tsv, .json or .jsonl file; columns named like an option of candidates or images, such as
            budget, seed or steps, override it for their row.
        settings: of the searches.
        processes: where many share the work.
        out: the run's folder: a folder a prompt, results.jsonl, summary.json, report.html.
        prompt_column: the column with the prompts; by default prompt, prompts, text or caption.
        config: a .yaml, .json or .toml file of options by their names; those of the command stand on top.
        dry_run: say what would be done, and do nothing.
    """
    words.check_config(config)
    if dry_run:
        print_dry_run(prompts, arguments(settings), prompt_column)
        return 0
    place = processes.process_id, processes.num_processes
    if processes.coordinator is not None or processes.distributed:
        from ses_jax.batch.processes import meet

        place = meet(processes.coordinator, *place)

    import ses_jax
    from ses_jax.batch.progress import print_summary

    named = arguments(settings) | {"prompt_column": prompt_column}
    try:
        summary = ses_jax.search_many(prompts, out=out, process_id=place[0], num_processes=place[1], **named)
    except (KeyboardInterrupt, SystemExit):
        print("ses-jax: stopped; the same command goes on with what is left", file=sys.stderr)
        raise
    print_summary(summary)
    return int(summary["failed"] > 0)


def generate(
    prompts: Texts,
    /,
    settings: Flat[RenderOptions],
    model: str = "demo",
    noise: Path | None = None,
    out: Path = Path("ses_out"),
    image_format: Literal["png", "jpeg", "webp"] = "png",
) -> None:
    """Render one image a prompt, without a search.

    Args:
        prompts: one or more prompts.
        settings: of the images.
        model: "demo", a folder, or a Hugging Face id.
        noise: file of the noise to start from: .npy, .safetensors, .latent or a result's folder.
        out: folder for the images 000.png, 001.png, ...
        image_format: of the images.
    """
    import numpy as np

    import ses_jax
    from ses_jax.engine import repeat
    from ses_jax.engine.files import writable_folder, write
    from ses_jax.engine.result import to_image
    from ses_jax.exports import pictures

    out = writable_folder(out)
    named = arguments(settings)
    images = ses_jax.generate(model, list(prompts), noise=noise, **named)
    used = rendered_with(model, named) | ({} if noise is None else {"noise": str(noise)})
    for index, pixels in enumerate(np.asarray(images)):
        size = {"height": pixels.shape[0], "width": pixels.shape[1]}
        config = {"model": model, "prompt_index": index, **used, **size}
        notes = repeat.notes(repeat.facts(prompts[index], config, image="generate"))
        path = out / f"{index:03d}.{image_format}"
        write(path, functools.partial(pictures.save, image=to_image(pixels), kind=image_format, notes=notes))
        print(path)


def plan(
    model: Text,
    /,
    settings: Flat[PlanOptions],
    tokens: int = 128,
    device: str = "h200",
    mesh: str = "data=1,model=1",
    offload_text_encoder: bool = False,
    quantize: Quantize = None,
    utilization: float | None = None,
    compile: bool = False,
    json: bool = False,
    progress: bool = True,
) -> int:
    """Say what a search needs and how long it takes, without weights or the device; exit status 1 if it doesn't fit.

    Args:
        model: Hugging Face id of a published model, "demo", or a folder: nothing but its configs is read.
        settings: of the search.
        tokens: length of the prompt.
        device: h200, h100, b200, a100-80, a100-40, l40s, 5090, 4090, 4080, 4070, v4, v5e, v5p, v6e or tpu7x.
        mesh: how many devices share the candidates and how many the weights, such as data=1,model=8.
        offload_text_encoder: text encoders leave the device before the other networks come.
        quantize: the large layers of transformer, text encoders and reward in eight bits.
        utilization: share of the device's peak that the networks reach; without it 0.55 on an h100 or h200, else 0.4.
        compile: ask the device's own compiler, which takes minutes, pip install 'ses_jax[tpu]' or 'ses_jax[cuda]', and
            not the device.
        json: print JSON instead of a table.
        progress: say so where this machine has more devices of the kind than the mesh uses.
    """
    import ses_jax

    planned = ses_jax.plan(
        model,
        tokens=tokens,
        device=device,
        mesh=mesh,
        offload_text_encoder=offload_text_encoder,
        quantize=quantize,
        utilization=utilization,
        compile=compile,
        progress=progress,
        **arguments(settings),
    )
    print(dumps(planned.as_json(), indent=2) if json else planned)
    return 0 if planned.fits else 1


ABOUT = """Better images from the text-to-image model you already have, by searching its initial noise.

-q shows no progress, -v shows more messages and tracebacks, --version the version. Exit status: 0 where all is well, 1
where the reward or a prompt of a batch failed, a plan does not fit or there is no device, 2 for bad input, 130 if
Ctrl-C and 143 if SIGTERM ended it early."""


def main(args: list[str] | None = None) -> int:
    """Runs the command line.

    Returns:
      The exit status: 2 for bad input, which is one line on stderr; 1 for an error of a reward, with its traceback.
    """
    if args is None:
        args = sys.argv[1:]
        errors.only_once()
        errors.print_anything()
    if args == ["--version"]:
        import ses_jax

        print(f"ses-jax {ses_jax.__version__}")
        return 0
    if next((word for word in args if not word.startswith("-")), None) != "plan":
        _keep_compiled_programs()  # those for devices that are not here cannot be read back
    commands = {"search": search, "batch": batch, "generate": generate, "plan": plan, "convert": convert}
    commands |= {"models": models, "show": show, "export": export, "doctor": doctor, "studio": studio}
    verbose = False
    try:
        args, verbose = words.expand(args)
        logging.basicConfig(level=logging.INFO if verbose else logging.WARNING)
        status = tyro.extras.subcommand_cli_from_dict(commands, prog="ses-jax", description=ABOUT, args=args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if origin(error) is None and not isinstance(error, ValueError | OSError):
            raise
        return errors.tell(error, verbose)
    return status or 0


def _keep_compiled_programs() -> None:
    """Compiled programs are kept between runs, so that a second search of the same shape starts at once."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(cache) / "ses_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
