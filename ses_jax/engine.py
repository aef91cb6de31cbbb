"""The search: conditions, generations of the Cross-Entropy Method over the low band, the winner's render.

prompt -> condition
seed -> noise -> split -> ask -> merge -> denoise -> decode -> reward -> tell -> (next generation)
                                                                 |
                                           winner -> denoise (all steps) -> decode -> image
"""

import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ses_jax import generation, mixture, records, rewards
from ses_jax.config import SearchConfig, check_size
from ses_jax.generation import Inputs, Model, Program
from ses_jax.pipelines import Guidance, Pipeline, load_pipeline
from ses_jax.progress import Report, progress_bar
from ses_jax.result import SearchResult, to_image, writable_folder
from ses_jax.rewards import Reward, RewardSpec


def search(
    prompt: str | Sequence[str],
    *,
    model: str | Pipeline = "demo",
    reward: RewardSpec | Reward | None = None,
    report: RewardSpec | Reward | Sequence[str] | None = None,
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
    report = dict.fromkeys(report, 1.0) if isinstance(report, Sequence) and not isinstance(report, str) else report
    for spec in (reward, report):
        if spec is not None:
            rewards.check(spec)
    folder = None if out is None else writable_folder(out)
    pipeline = model if isinstance(model, Pipeline) else load_pipeline(model)
    config = config.resolve(pipeline)
    reward = _resolve_reward(pipeline.defaults.reward if reward is None else reward, pipeline)
    if report is not None:
        reward = rewards.with_report(reward, _resolve_reward(report, pipeline))

    results: list[SearchResult] = []
    for index, text in enumerate(prompts):
        results.append(search_prompt(pipeline, reward, config, text, index=index, progress=progress))
        if folder is not None:
            results[-1].save(folder if isinstance(prompt, str) else folder / f"{index:03d}")
        if results[-1].interrupted:
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
) -> Float[Array, "b H W 3"]:
    """Renders one image a prompt, without a search.

    Args:
      pipeline: a loaded pipeline, or what `load_pipeline` takes.
      prompts: one prompt or `B` prompts.
      noise: `[B, C, h, w]` initial noise; None draws the noise that `search` starts from with the same seed.
      seed, steps, guidance, negative_prompt, height, width: as in `SearchConfig`; None is the model's default.

    Returns:
      Images `[B, H, W, 3]` in [0, 1].

    Raises:
      ValueError: for sizes that the model cannot make, or noise of another shape.
    """
    prompts = _prompt_list(prompts)
    config = SearchConfig(steps=steps, guidance=guidance, height=height, width=width)
    config.check()
    pipeline = load_pipeline(pipeline) if isinstance(pipeline, str) else pipeline
    config = config.with_defaults(pipeline)
    size = config.height, config.width
    check_size(pipeline, *size)
    shape = (len(prompts), *pipeline.noise_shape(*size))
    if noise is None:
        noise = jnp.stack([base_noise(prompt_keys(seed, i)[0], shape[1:]) for i in range(len(prompts))])
    if noise.shape != shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}; {len(prompts)} images of {size} need {shape}")
    tokens = pipeline.tokenize(prompts, guidance=config.guidance, negative_prompt=negative_prompt)
    condition = generation.encode(pipeline.encode, pipeline.params, tokens)
    sigmas = pipeline.sigmas(config.steps, *size)
    return generation.render(Model(pipeline.velocity, pipeline.decode), pipeline.params, noise, sigmas, condition)


def search_prompt(
    pipeline: Pipeline, reward: Reward, config: SearchConfig, prompt: str, *, index: int = 0, progress: bool = False
) -> SearchResult:
    """Searches for one prompt with a resolved config; `index` chooses the prompt's own random draws."""
    times = [time.perf_counter()]
    noise_key, key = prompt_keys(config.seed, index)
    noise = base_noise(noise_key, pipeline.noise_shape(config.height, config.width))
    program = _program(pipeline, reward, config, prompt)
    inputs = _inputs(pipeline, reward, config, prompt, (key, noise))
    times.append(time.perf_counter())

    step = functools.partial(_step, program, pipeline.params, reward, inputs, prompt)
    with progress_bar(prompt, config.budget, enabled=progress) as report:
        state, scored, interrupted = _generations(program, step, config, inputs.low.shape, report)
    times.append(time.perf_counter())
    total = functools.partial(_total, program, scored.components)
    names = [part.name for part in reward.parts]
    history = records.history(names, scored, total(scored.components), config.population)
    if history[-1]["best"] is None:
        raise ValueError(f"reward {reward.name!r} gave no finite score in {len(history)} candidates; check the reward")

    winner = generation.merge(state.cem.best_sample, inputs.high, config.wavelet, program.shape)
    images = _render_finals(program, pipeline, config, inputs, jnp.stack([winner, noise]))
    components = _components(program, reward, images, prompt, inputs.text)
    final_score, baseline_final_score = total(components).tolist()
    image, baseline_image = (to_image(pixels) for pixels in np.asarray(images))
    times.append(time.perf_counter())

    encoded, searched, rendered = np.diff(times).tolist()
    return SearchResult(
        prompt=prompt,
        image=image,
        noise=np.asarray(winner),
        score=history[-1]["best"],
        final_score=final_score,
        baseline_image=baseline_image,
        baseline_score=math.nan if history[0]["score"] is None else history[0]["score"],
        baseline_final_score=baseline_final_score,
        components=records.part_scores(names, history, components),
        history=history,
        config=config.as_json() | {"family": pipeline.family, "reward": reward.name, "prompt_index": index},
        timings={
            "encode": encoded,
            "search": searched,
            "render": rendered,
            "images_per_second": len(history) / searched,
        },
        interrupted=interrupted,
    )


def prompt_keys(seed: int, index: int) -> tuple[Array, Array]:
    """Keys of prompt `index`: of its base noise, and of its search."""
    noise_key, search_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), index))
    return noise_key, search_key


def base_noise(key: Array, shape: tuple[int, ...]) -> Float[Array, "c h w"]:
    """The unsearched noise, float32 standard normal."""
    return jax.random.normal(key, shape, jnp.float32)


def _program(pipeline: Pipeline, reward: Reward, config: SearchConfig, prompt: str) -> Program:
    evaluated = min(config.population, config.budget)
    return Program(
        model=Model(pipeline.velocity, pipeline.decode),
        score=rewards.device_scores(reward, prompt),
        weights=reward.weights,
        # Standardising a single part would change its scores and not their order.
        standardize=config.standardize and np.count_nonzero(reward.weights) > 1,
        wavelet=config.wavelet,
        shape=pipeline.noise_shape(config.height, config.width)[1:],
        population=config.population,
        evaluated=evaluated,
        chunk=min(config.chunk or evaluated, evaluated),
    )


def _inputs(
    pipeline: Pipeline, reward: Reward, config: SearchConfig, prompt: str, draws: tuple[Array, Array]
) -> Inputs:
    """Encodes the prompt and splits the noise; `draws` are the search's key and the base noise."""
    key, noise = draws
    tokens = pipeline.tokenize([prompt], guidance=config.guidance, negative_prompt=config.negative_prompt)
    low, high = generation.split(noise, config.wavelet, config.level)
    return Inputs(
        key=key,
        low=low,
        high=high,
        condition=generation.encode(pipeline.encode, pipeline.params, tokens),
        text=rewards.device_text(reward, [prompt]),
        sigmas=jnp.asarray(pipeline.sigmas(config.preview_steps, config.height, config.width)),
        budget=jnp.int32(config.budget),
    )


def _generations(
    program: Program, step: Callable, config: SearchConfig, low_shape: tuple[int, ...], report: Report
) -> tuple[generation.State, generation.Scored, bool]:
    """Runs generations until the budget is spent or the user interrupts.

    Returns:
      The state, all candidates' components `[budget, parts]` and `low_rms [budget]`, whether interrupted.
    """
    count = math.ceil(config.budget / config.population)
    state = generation.init(program, low_shape, elites=config.elites, generations=count)
    parts: list[generation.Scored] = []
    start = time.perf_counter()
    interrupted = False
    for index in range(count):
        try:
            state, scored = step(jnp.int32(index), state)
            parts.append(jax.device_get(scored))
        except KeyboardInterrupt:
            if not parts:
                raise
            interrupted = True
            break
        done = min((index + 1) * config.population, config.budget)
        report(done, index, float(state.cem.best_score), done / (time.perf_counter() - start))
    components, low_rms = (np.concatenate(column)[: config.budget] for column in zip(*parts, strict=True))
    return state, generation.Scored(components, low_rms), interrupted


def _step(
    program: Program, params: Any, reward: Reward, inputs: Inputs, prompt: str, index: Array, state: generation.State
) -> tuple[generation.State, generation.Scored]:
    """One generation, as one compiled program, or as two with the parts on the host between them."""
    params = (params, rewards.device_params(reward))
    if not reward.on_host:
        return generation.generation_step(program, params, inputs, index, state)
    lows, images, device = generation.candidates(program, params, inputs, index, state)
    components = rewards.host_components(reward, np.asarray(device), images, [prompt] * len(images))
    return generation.update(program, inputs, index, state, lows, jnp.asarray(components))


def _render_finals(
    program: Program, pipeline: Pipeline, config: SearchConfig, inputs: Inputs, noise: Array
) -> Float[Array, "b H W 3"]:
    """The winner and the base with all steps; one after the other if candidates were."""
    sigmas = pipeline.sigmas(config.steps, config.height, config.width)
    render = functools.partial(generation.render, program.model, pipeline.params)
    parts = jnp.split(noise, len(noise) if program.chunk == 1 else 1)
    return jnp.concatenate([render(part, sigmas, inputs.condition) for part in parts])


def _components(
    program: Program, reward: Reward, images: Array, prompt: str, texts: Any
) -> Float[np.ndarray, "b parts"]:
    """All parts' scores of images of one prompt, whose embeddings are `texts`."""
    device = np.zeros((len(images), 0), np.float32)
    if program.score is not None:
        rows = generation.repeat_rows(texts, len(images))
        device = np.asarray(rewards.score(program.score, rewards.device_params(reward), images, rows))
    return rewards.host_components(reward, device, images, [prompt] * len(images))


def _total(
    program: Program, population: Float[np.ndarray, "m parts"], components: Float[np.ndarray, "n parts"]
) -> Float[np.ndarray, " n"]:
    """Scores of components; in a standardised mixture as the whole population of the search has them in the end."""
    if not program.standardize:
        return np.asarray(mixture.plain_sum(components, program.weights))
    return np.asarray(mixture.standardized_sum(components, program.weights, population))


def _resolve_reward(reward: RewardSpec | Reward, pipeline: Pipeline) -> Reward:
    """The loaded reward; a checkpoint that ships its own scorer in `clip/` is scored by that one."""
    if isinstance(reward, Reward):
        return reward
    own = Path(pipeline.folder) / "clip"
    return rewards.load_reward(reward, source={"clip": own} if own.exists() else None)


def _prompt_list(prompt: Any) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("no prompts: pass at least one")
    for text in prompts:
        if not isinstance(text, str):
            raise ValueError(f"prompts must be strings, got {text!r}")
    return prompts
