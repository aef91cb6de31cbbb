"""The search: conditions, generations of what a searcher proposes, the winner's render.

prompt -> condition
seed -> noise -> split -> ask -> merge -> denoise -> decode -> reward -> tell -> (next generation)
                                                                 |
                                           winner -> denoise (all steps) -> decode -> image
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ses_jax.engine import base, runner, tasks
from ses_jax.engine import resume as saved_search
from ses_jax.engine.config import Placement, RenderConfig, RunConfig, SearchConfig, check_looks, check_size
from ses_jax.engine.denoising import Rows
from ses_jax.engine.files import writable_folder
from ses_jax.engine.models import check_rewards, find_pipeline, load_models
from ses_jax.engine.result import SearchResult
from ses_jax.engine.runner import search_prompts
from ses_jax.engine.settings import gather, takes
from ses_jax.engine.tasks import encode, image_params, prompt_keys
from ses_jax.engine.watching import OnGeneration, Watch
from ses_jax.loading import partition
from ses_jax.pipelines.base import Pipeline

STATE = ".search"


@takes(RunConfig, SearchConfig, Placement)
def search(
    prompt: str | Sequence[str],
    *,
    out: str | os.PathLike[str] | None = None,
    base_noise: Any = None,
    index: int = 0,
    on_generation: OnGeneration | None = None,
    **settings: Any,
) -> SearchResult | list[SearchResult]:
    """Searches the initial noise for the image that the reward likes best (arXiv 2602.03208).

    Args:
      prompt: one prompt, or a list of prompts, each searched on its own.
      out: folder to save to: one prompt's result in it, or those of a list in its subfolders `000`, `001`, ...
      base_noise: of the image that the search starts from, `[C, h, w]` or one a prompt: an array, a tensor of torch, or
        a `.npy`, `.safetensors` or `.latent` file; in the model's own layout, in that of `latents=` of its diffusers
        pipeline, or in ComfyUI's. By default it is drawn.
      index: number of the first prompt, which chooses its random draws: with it, a prompt from the middle of a list is
        searched again alone.
      on_generation: `(generation, best preview so far, scores) -> bool`, called after each generation of each prompt,
        with a PIL image and the generation's scores (NaN where there is none); the search of a prompt ends where it
        returns True, with the best so far.
      {settings}

    Returns:
      A `SearchResult`, or a list of them for a list of prompts. Prompt i draws from its own key, whatever the other
      prompts are. Ctrl-C ends the search after the generation at hand, and returns the best so far.

    Raises:
      TypeError: for an unknown setting.
      ValueError: for bad settings, before any long work starts; and where every score was NaN or infinite.
    """
    run, config, place = gather("search", settings, RunConfig, SearchConfig, Placement)
    prompts = _prompt_list(prompt)
    if index < 0:
        raise ValueError(f"index={index} must be at least 0")
    check_resume(run.resume, out)
    if run.save_candidates and out is None:
        raise ValueError("save_candidates needs out=, the folder that they are saved in")
    report = check_rewards(run.reward, run.report)
    given = base.read(base_noise)
    folder = None if out is None else writable_folder(out)
    pipeline, reward = load_models(run.model, run.reward, report, {"mesh": place.mesh, **(place.load or {})})
    config = config.resolve(pipeline)
    check_looks(config, reward)
    start_from = given and given.fit(pipeline, (config.height, config.width), len(prompts))

    results: list[SearchResult] = []
    saves = run.save_candidates and partition.leads(pipeline.mesh)
    at_once = 1 if reward.one_prompt_at_a_time or on_generation else run.prompts_at_once
    stops: list[bool] = []

    def ask(*seen):
        stops.append(bool(on_generation(*seen)))
        return stops[-1]

    for start in range(0, len(prompts), at_once):
        chosen = range(start, min(start + at_once, len(prompts)))
        folders = folder and [folder if isinstance(prompt, str) else folder / f"{i:03d}" for i in chosen]
        state = folder / STATE / f"{start:06d}" if folder and run.resume else None
        found = search_prompts(
            pipeline,
            reward,
            config,
            [prompts[i] for i in chosen],
            indices=[index + i for i in chosen],
            base=start_from and start_from.of(chosen),
            progress=run.progress,
            state_folder=state,
            watch=Watch(
                not run.no_report,
                on_generation and ask,
                folders if saves else None,
            ),
        )
        if folder is not None and partition.leads(pipeline.mesh):
            _save(found, folders, state, run)
        results += found
        if found[0].interrupted and not (stops and stops[-1]):
            break
    return results[0] if isinstance(prompt, str) else results


@takes(RenderConfig, Placement)
def generate(
    pipeline: str | Pipeline,
    prompts: str | Sequence[str],
    *,
    noise: Float[Array | np.ndarray, "b c h w"] | None = None,
    **settings: Any,
) -> Float[Array, "b H W 3"]:
    """Renders one image a prompt, without a search.

    Args:
      pipeline: a loaded pipeline, or what `load_pipeline` takes.
      prompts: one prompt or `B` prompts.
      noise: `[B, C, h, w]` initial noise; None draws the noise that `search` starts from with the same seed.
      {settings}

    Returns:
      Images `[B, H, W, 3]` in [0, 1].

    Raises:
      TypeError: for an unknown setting.
      ValueError: for sizes that the model cannot make, or noise of another shape.
    """
    config, place = gather("generate", settings, RenderConfig, Placement)
    prompts = _prompt_list(prompts)
    pipeline = find_pipeline(pipeline, place.mesh, **(place.load or {}))
    config = config.with_defaults(pipeline)
    size = config.height, config.width
    check_size(pipeline, *size)
    shape = (len(prompts), *pipeline.noise_shape(*size))
    if noise is None:
        noise = jnp.stack([tasks.base_noise(prompt_keys(config.seed, i)[0], shape[1:]) for i in range(len(prompts))])
    if noise.shape != shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}; {len(prompts)} images of {size} need {shape}")
    condition = encode(pipeline, prompts, guidance=config.guidance, negative_prompt=config.negative_prompt)
    rows = Rows(jnp.asarray(noise), jnp.arange(len(prompts)))
    params = image_params(pipeline)
    return runner.render(pipeline, params, rows, condition, (config, config.chunk or len(prompts)))


def check_resume(resume: bool, out: Any) -> None:
    """Raises ValueError where there is no folder to save a search in."""
    if resume and out is None:
        raise ValueError("resume needs out=, the folder that the search is saved in")


def _save(results: Sequence[SearchResult], folders: Sequence[Path], state: Path | None, run: RunConfig) -> None:
    """Saves results, and only then forgets the state they came from; an interrupted search keeps it."""
    for result, folder in zip(results, folders, strict=True):
        result.save(folder, image_format=run.image_format, report=not run.no_report)
    if not results[0].interrupted:
        saved_search.clear(state)
        if state is not None and not any(state.parent.iterdir()):
            state.parent.rmdir()


def _prompt_list(prompt: Any) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("no prompts: pass at least one")
    for text in prompts:
        if not isinstance(text, str):
            raise ValueError(f"prompts must be strings, got {text!r}")
    return prompts
