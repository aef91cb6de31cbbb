"""The search: conditions, generations of the Cross-Entropy Method over the low band, the winner's render.

prompt -> condition
seed -> noise -> split -> ask -> merge -> denoise -> decode -> reward -> tell -> (next generation)
                                                                 |
                                           winner -> denoise (all steps) -> decode -> image
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ses_jax.engine import resume as saved_search
from ses_jax.engine import runner
from ses_jax.engine.config import SearchConfig, check_size
from ses_jax.engine.generation import Rows
from ses_jax.engine.models import Report, check_rewards, find_pipeline, load_models
from ses_jax.engine.result import SearchResult, writable_folder
from ses_jax.engine.runner import search_prompts
from ses_jax.engine.tasks import base_noise, encode, image_params, prompt_keys
from ses_jax.loading import partition
from ses_jax.pipelines.base import Guidance, Pipeline
from ses_jax.rewards.reward import Reward, RewardSpec

STATE = ".search"


def search(
    prompt: str | Sequence[str],
    *,
    model: str | Pipeline = "demo",
    reward: RewardSpec | Reward | None = None,
    report: Report = None,
    budget: int = 50,
    preview_steps: int | None = None,
    steps: int | None = None,
    guidance: Guidance | None = None,
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
    prompts_at_once: int = 1,
    mesh: str | Mesh | None = None,
    load: Mapping[str, Any] | None = None,
    resume: bool = False,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SearchResult | list[SearchResult]:
    """Searches the initial noise for the image that the reward likes best (arXiv 2602.03208).

    Args:
      prompt: one prompt, or a list of prompts, each searched on its own.
      model: what `load_pipeline` takes, or a loaded pipeline.
      reward: what `load_reward` takes, or a loaded reward; None is the model's default.
      report: rewards, or names of rewards, that score every image without driving the search: where the search's own
        reward rises and these fall, the search has fooled it.
      budget, preview_steps, steps, guidance, negative_prompt, height, width, seed, population, elites, wavelet, level,
        chunk, standardize: see `SearchConfig`.
      prompts_at_once: how many prompts of a list are searched in one compiled call. Results do not depend on it.
      mesh: devices to spread over, such as "data=4,model=2", see `partition.parse_mesh`; None is the loaded pipeline's
        own, or the default device.
      load: what else `load_pipeline` takes, such as {"offload_text_encoder": True}; only where `model` is a name.
      resume: save the search in `out` after every generation, and go on from there if it holds an unfinished one.
      out: folder to save to: one prompt's result in it, or those of a list in its subfolders `000`, `001`, ...
      progress: whether to show a progress bar.

    Returns:
      A `SearchResult`, or a list of them for a list of prompts. Prompt i draws from its own key, whatever the other
      prompts are. Ctrl-C ends the search after the generation at hand, and returns the best so far.

    Raises:
      ValueError: for bad settings, before any long work starts; and where every score was NaN or infinite.
    """
    config = SearchConfig(
        budget=budget,
        preview_steps=preview_steps,
        steps=steps,
        guidance=guidance,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        seed=seed,
        population=population,
        elites=elites,
        wavelet=wavelet,
        level=level,
        chunk=chunk,
        standardize=standardize,
    )
    prompts = _prompt_list(prompt)
    config.check()
    check_running(prompts_at_once, resume, out)
    report = check_rewards(reward, report)
    folder = None if out is None else writable_folder(out)
    pipeline, reward = load_models(model, reward, report, {"mesh": mesh, **(load or {})})
    config = config.resolve(pipeline)

    results: list[SearchResult] = []
    at_once = 1 if reward.one_prompt_at_a_time else prompts_at_once
    for start in range(0, len(prompts), at_once):
        chosen = range(start, min(start + at_once, len(prompts)))
        state = folder / STATE / f"{start:06d}" if folder and resume else None
        found = search_prompts(
            pipeline,
            reward,
            config,
            [prompts[i] for i in chosen],
            indices=chosen,
            progress=progress,
            state_folder=state,
        )
        if folder is not None and partition.leads(pipeline.mesh):
            _save(found, [folder if isinstance(prompt, str) else folder / f"{i:03d}" for i in chosen], state)
        results += found
        if found[0].interrupted:
            break
    return results[0] if isinstance(prompt, str) else results


def generate(
    pipeline: str | Pipeline,
    prompts: str | Sequence[str],
    *,
    noise: Float[Array | np.ndarray, "b c h w"] | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: Guidance | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    chunk: int | None = None,
    mesh: str | Mesh | None = None,
    load: Mapping[str, Any] | None = None,
) -> Float[Array, "b H W 3"]:
    """Renders one image a prompt, without a search.

    Args:
      pipeline: a loaded pipeline, or what `load_pipeline` takes.
      prompts: one prompt or `B` prompts.
      noise: `[B, C, h, w]` initial noise; None draws the noise that `search` starts from with the same seed.
      seed, steps, guidance, negative_prompt, height, width: as in `SearchConfig`; None is the model's default.
      chunk: images made at a time; None is all.
      mesh, load: as in `search`.

    Returns:
      Images `[B, H, W, 3]` in [0, 1].

    Raises:
      ValueError: for sizes that the model cannot make, or noise of another shape.
    """
    prompts = _prompt_list(prompts)
    config = SearchConfig(
        steps=steps, guidance=guidance, negative_prompt=negative_prompt, height=height, width=width, chunk=chunk
    )
    config.check()
    pipeline = find_pipeline(pipeline, mesh, **(load or {}))
    config = config.with_defaults(pipeline)
    size = config.height, config.width
    check_size(pipeline, *size)
    shape = (len(prompts), *pipeline.noise_shape(*size))
    if noise is None:
        noise = jnp.stack([base_noise(prompt_keys(seed, i)[0], shape[1:]) for i in range(len(prompts))])
    if noise.shape != shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}; {len(prompts)} images of {size} need {shape}")
    condition = encode(pipeline, prompts, guidance=config.guidance, negative_prompt=config.negative_prompt)
    rows = Rows(jnp.asarray(noise), jnp.arange(len(prompts)))
    params = image_params(pipeline)
    return runner.render(pipeline, params, rows, condition, (config, config.chunk or len(prompts)))


def check_running(prompts_at_once: int, resume: bool, out: Any) -> None:
    """Raises ValueError for ways of running that make no sense."""
    if prompts_at_once < 1:
        raise ValueError(f"prompts_at_once={prompts_at_once} must be at least 1")
    if resume and out is None:
        raise ValueError("resume needs out=, the folder that the search is saved in")


def _save(results: Sequence[SearchResult], folders: Sequence[Path], state: Path | None) -> None:
    """Saves results, and only then forgets the state they came from; an interrupted search keeps it."""
    for result, folder in zip(results, folders, strict=True):
        result.save(folder)
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
