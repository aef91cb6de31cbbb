"""The search: conditions, generations of what a searcher proposes, the winner's render.

prompt -> condition
seed -> noise -> split -> ask -> merge -> denoise -> decode -> reward -> tell -> (next generation)
                                                                 |
                                           winner -> denoise (all steps) -> decode -> image
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ses_jax.engine import base, finals, kept, lock, tasks
from ses_jax.engine.base import Base, Given
from ses_jax.engine.cases import Case, cases, prompt_list, several
from ses_jax.engine.config import Placement, RenderConfig, RunConfig, SearchConfig, check_reward, check_size
from ses_jax.engine.denoising import Rows
from ses_jax.engine.finals import Found, NoScoreError
from ses_jax.engine.identity import identity_of, settings_of
from ses_jax.engine.models import check_rewards, find_pipeline, load_models
from ses_jax.engine.output import Output, claim
from ses_jax.engine.placement import check_path
from ses_jax.engine.progress import waiting
from ses_jax.engine.result import SearchResult
from ses_jax.engine.runner import search_prompts
from ses_jax.engine.settings import fields, gather, read, shown, takes
from ses_jax.engine.stopping import TERMINATED, Stop, noticed
from ses_jax.engine.tasks import encode, image_params
from ses_jax.engine.watching import OnGeneration, Watch, check_function
from ses_jax.loading import partition
from ses_jax.pipelines.base import Pipeline
from ses_jax.rewards.reward import Reward

LOG = logging.getLogger("ses_jax")


@takes(RunConfig, SearchConfig, Placement)
def search(
    prompt: str | Sequence[str],
    *,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    base_noise: Any = None,
    index: int = 0,
    on_generation: OnGeneration | None = None,
    **settings: Any,
) -> SearchResult | list[SearchResult]:
    """Searches the initial noise for the image that the reward likes best (arXiv 2602.03208).

    Args:
      prompt: one prompt, or a list of prompts, each searched on its own. `seed` may be a list too: several seeds of one
        prompt, or a seed a prompt of a list.
      out: folder to save to: one result in it, or those of a list in its subfolders `000`, `001`, ...
      overwrite: whether a result that is in `out` already may be replaced. With `resume` a finished one comes back, or
        goes on if the budget is larger now.
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
      A `SearchResult`, or a list of them for a list of prompts or seeds. Prompt i draws from its own key, whatever the
      other prompts are. Ctrl-C ends the search after the generation at hand, and returns the best so far; of a list,
      the results until then. What a reward or `on_generation` raises comes through; any error has the results that were
      finished before it as its `results`.

    Raises:
      TypeError: for an unknown setting.
      ValueError: for bad settings, before any long work starts; for an `out` that holds something else; and where every
        score was NaN or infinite.
      OSError: naming the file that cannot be written.
      SystemExit: of status 143, once the best so far is saved, where SIGTERM ended the search.
      KeyboardInterrupt: for a second Ctrl-C, and where nothing was scored before the first.
    """
    seeds = several(settings.get("seed"))
    settings = {name: value for name, value in settings.items() if name != "seed" or seeds is None}
    run, config, place = gather("search", settings, RunConfig, SearchConfig, Placement)
    asked, listed = cases(prompt, index, seeds, config), seeds is not None or not isinstance(prompt, str)
    report = check_rewards(run.reward, run.report)
    check_function(on_generation)
    if run.save_candidates and out is None:
        raise ValueError("save_candidates needs out=, the folder that they are saved in")
    given = base.read(base_noise)
    output = claim(out, listed=listed, resume=run.resume, overwrite=overwrite)
    with waiting("loading the models", enabled=run.progress):
        pipeline, reward = load_models(run.model, run.reward, report, {"mesh": place.mesh, **(place.load or {})})
    config = config.resolve(pipeline)
    check_reward(config, reward)
    start_from = given and given.fit(pipeline, (config.height, config.width), len(asked))
    alone = reward.one_prompt_at_a_time or on_generation or seeds
    asked = tuple(one._replace(config=dataclasses.replace(config, seed=one.config.seed)) for one in asked)
    work = Work(pipeline, reward, asked, output, run, start_from, on_generation)

    leads = partition.leads(pipeline.mesh)
    if run.progress and leads and (word := partition.unused(pipeline.mesh)):
        LOG.warning(word)
    with lock.held(output.folder if leads else None), noticed() as stop:
        groups = _one_by_one(range(len(asked))) if alone else output.groups(len(asked), run.prompts_at_once)
        results, ended = _search_all(work, groups, stop)
        if leads and not ended:
            output.clean(len(asked))
    if stop.terminated:
        raise _with_results(SystemExit(TERMINATED), results)
    return results if listed else results[0]


class Work(NamedTuple):
    """What a call of `search` is to do.

    Attributes:
      cases: to search, in this order; those that are searched at once have one config.
      base: their base noise; None draws it.
      on_generation: the caller's.
    """

    pipeline: Pipeline
    reward: Reward
    cases: tuple[Case, ...]
    output: Output
    run: RunConfig
    base: Base | None = None
    on_generation: OnGeneration | None = None

    @property
    def saves(self) -> bool:
        """Whether this process writes what is found."""
        return self.output.folder is not None and partition.leads(self.pipeline.mesh)

    def settings_of(self, place: int) -> dict[str, Any]:
        """What the result of a prompt says of what was asked for."""
        noise = None if self.base is None else self.base.of([place]).as_json()[0]
        prompt, index, config = self.cases[place]
        return settings_of(self.pipeline, self.reward, config, index, noise) | {"prompt": prompt}

    def identity_of(self, place: int) -> dict[str, Any]:
        """What the saved search of a prompt must agree in."""
        prompt, index, config = self.cases[place]
        noise = self.base and self.base.of([place])
        return identity_of(self.pipeline, self.reward, config, [prompt], [index], noise)


def _search_all(work: Work, groups: list[range], stop: Stop) -> tuple[list[SearchResult], bool]:
    """The results of all prompts, by groups at once, or of those until it was to stop, and whether it was."""
    results: list[SearchResult] = []
    while groups:
        chosen = groups.pop(0)
        try:
            found, enough = _search_some(work, chosen, stop)
        except KeyboardInterrupt as error:
            if not results or stop.terminated:
                raise _with_results(error, results)  # noqa: B904 (the same error)
            return results, True
        except NoScoreError as error:
            if len(chosen) == 1 or stop:
                raise _with_results(error, results)  # noqa: B904 (the same error)
            # One by one, so that those before it are finished, as they are without `prompts_at_once`.
            if work.saves:
                work.output.forget(chosen[0])
            groups[:0] = _one_by_one(chosen)
            continue
        except BaseException as error:
            raise _with_results(error, results)  # noqa: B904 (the same error)
        results += found
        if (results[-1].interrupted and not enough) or (stop and len(results) < len(work.cases)):
            return results, True
    return results, False


def _one_by_one(chosen: range) -> list[range]:
    return [range(place, place + 1) for place in chosen]


def _search_some(work: Work, chosen: range, stop: Stop) -> tuple[list[SearchResult], bool]:
    """The results of prompts that are searched at once, saved; or those that are there already.

    Returns:
      The results, and whether the caller had enough of them before their budget was spent.
    """
    finished = work.output.finished(chosen, [work.settings_of(i) for i in chosen])
    if finished:
        return finished, False
    begun = work.output.begun(chosen, [work.identity_of(i) for i in chosen])
    if work.saves and work.run.save_candidates:  # as they are written while it searches
        work.output.clear_candidates(chosen)
    said: list[bool] = []

    def ask(*seen: Any) -> bool:
        said.append(bool(work.on_generation(*seen)))
        return said[-1]

    def keep(found: Found) -> None:
        each = zip(chosen, found.noise, found.histories, found.previews, strict=True)
        for place, (i, *one) in enumerate(each if work.saves else ()):
            folder = work.output.keep(i, *one)
            kept.save(folder, work.identity_of(i), found.kept and found.kept.of(place))

    results = search_prompts(
        work.pipeline,
        work.reward,
        work.cases[chosen[0]].config,
        [work.cases[i].prompt for i in chosen],
        indices=[work.cases[i].index for i in chosen],
        base=work.base and work.base.of(chosen),
        progress=work.run.progress,
        state_folder=work.output.state(chosen[0]),
        begun=begun,
        resume_from_state=work.output.resume,
        stop=stop,
        keep=keep,
        watch=Watch(
            work.saves or not work.run.no_report,  # the winner's preview is saved before its image
            work.on_generation and ask,
            [work.output.of(i) for i in chosen] if work.run.save_candidates else None,
        ),
    )
    if work.run.no_report:
        results = [dataclasses.replace(result, film=()) for result in results]
    if work.saves:
        work.output.save(results, chosen, image_format=work.run.image_format, report=not work.run.no_report)
        if not work.run.save_candidates:
            work.output.clear_candidates(chosen)
    return results, bool(said and said[-1])


def _with_results(error: BaseException, results: list[SearchResult]) -> BaseException:
    """An error that knows what was finished before it."""
    with contextlib.suppress(AttributeError):  # there are errors without room for it
        error.results = results
    return error


@takes(RenderConfig, Placement)
def generate(
    pipeline: str | Pipeline,
    prompts: str | Sequence[str],
    *,
    noise: Array | np.ndarray | str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Float[Array, "b H W 3"]:
    """Renders one image a prompt, without a search.

    Args:
      pipeline: a loaded pipeline, or what `load_pipeline` takes.
      prompts: one prompt or `B` prompts.
      noise: `[B, C, h, w]` initial noise, that of a single prompt also `[C, h, w]`; or the folder of a result, or a
        file as `search` takes it for `base_noise`. None draws the noise that `search` starts from with the same seed.
      {settings}

    Returns:
      Images `[B, H, W, 3]` in [0, 1].

    Raises:
      TypeError: for an unknown setting.
      ValueError: for sizes that the model cannot make, and noise of another shape or that is not finite.
    """
    config, place = gather("generate", settings, RenderConfig, Placement)
    prompts = prompt_list(prompts)
    noise = _noise(noise)
    pipeline = find_pipeline(read(fields(RunConfig)["model"], pipeline), place.mesh, **(place.load or {}))
    config = config.with_defaults(pipeline)
    size = config.height, config.width
    check_size(pipeline, *size)
    shape = (len(prompts), *pipeline.noise_shape(*size))
    if isinstance(noise, Given):
        noise = noise.fit(pipeline, size, len(prompts)).noise
    if noise is None:
        noise, _ = tasks.draws(config.seed, range(len(prompts)), shape[1:])
    if len(prompts) == 1 and noise.ndim == 3:
        noise = noise[None]
    if noise.shape != shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}; {len(prompts)} images of {size} need {shape}")
    if not jnp.isfinite(jnp.asarray(noise)).all():
        raise ValueError("noise holds values that are not finite")
    condition = encode(pipeline, prompts, guidance=config.guidance, negative_prompt=config.negative_prompt)
    rows = Rows(jnp.asarray(noise), np.arange(len(prompts), dtype=np.int32))
    params = image_params(pipeline)
    return finals.render(pipeline, params, rows, condition, (config, config.chunk or len(prompts)))


def _noise(noise: Any) -> Array | np.ndarray | Given | None:
    """Noise that was handed over, or what a file or a result's folder has."""
    if isinstance(noise, str | os.PathLike):
        return base.read(check_path(noise, "noise"))
    if noise is not None and not (hasattr(noise, "shape") and hasattr(noise, "dtype")):
        raise ValueError(f"noise={shown(noise)} is neither an array nor a file or folder with one")
    return noise
