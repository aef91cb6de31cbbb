"""Runs a search for one or more prompts at once: generations, final renders, results."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from ses_jax.engine import ahead, cost, evaluations, generation, kept, memory, records, resume, watching
from ses_jax.engine.base import Base
from ses_jax.engine.config import RenderConfig, SearchConfig
from ses_jax.engine.cost import Cost
from ses_jax.engine.denoising import Rows
from ses_jax.engine.fidelity import Stage
from ses_jax.engine.kept import Kept
from ses_jax.engine.program import Scored, State
from ses_jax.engine.progress import Report, Step, Work, progress_bar, seconds_left
from ses_jax.engine.result import SearchResult, to_image
from ses_jax.engine.stopping import Stop
from ses_jax.engine.tasks import FINALS, Task, generation_count, initial_state, model_of, prepare
from ses_jax.engine.watching import NOTHING, Shot, Sight, Watch
from ses_jax.loading import partition
from ses_jax.pipelines.base import Pipeline
from ses_jax.rewards import host
from ses_jax.rewards import reward as rewards
from ses_jax.rewards.reward import Reward

# Seconds between two looks at whether a program has run; signals are noticed in between.
POLL = 0.002


class Outcome(NamedTuple):
    """What all generations came to.

    Attributes:
      state: the last one.
      scored: what was, `[P, candidates, ...]`.
      interrupted: whether there is more to score.
      at_once: whether even the final renders are not wanted any more.
      films: each prompt's.
      last: how many whole generations there are, and the state after them.
    """

    state: State
    scored: Scored
    interrupted: bool
    at_once: bool
    films: list[list[Shot]]
    last: tuple[int, State]


class Found(NamedTuple):
    """What a search has found before its images are rendered.

    Attributes:
      noise: the winners', `[P, C, h, w]`.
      histories: of the prompts.
      previews: of the winners, small; None for one that the film has not.
      interrupted: whether there is more to score.
      kept: what a larger budget goes on from, if anything.
    """

    noise: np.ndarray
    histories: list[list[records.Row]]
    previews: list[Image.Image | None]
    interrupted: bool
    kept: Kept | None


def _drop(found: Found) -> None:
    """Keeps nothing."""


class Finals(NamedTuple):
    """Winner and base of every prompt, rendered with all steps.

    Attributes:
      images: `[P, 2, H, W, 3]`.
      components: `[P, 2, parts]`.
    """

    images: np.ndarray
    components: np.ndarray


class Account(NamedTuple):
    """What a result says of how it came about."""

    history: list[records.Row]
    config: dict[str, Any]
    cost: Cost
    timings: dict[str, float]
    notes: tuple[str, ...]


def search_prompts(
    pipeline: Pipeline,
    reward: Reward,
    config: SearchConfig,
    prompts: Sequence[str],
    *,
    indices: Sequence[int] | None = None,
    base: Base | None = None,
    progress: bool = False,
    state_folder: Path | None = None,
    begun: Kept | None = None,
    resume_from_state: bool = True,
    stop: Stop | None = None,
    keep: Callable[[Found], None] = _drop,
    watch: Watch = NOTHING,
) -> list[SearchResult]:
    """Searches for several prompts at once, as one batch.

    Args:
      pipeline: the model.
      reward: what drives the search. A user's traceable function takes one prompt at a time.
      config: resolved for the pipeline.
      prompts: P of them.
      indices: choose the prompts' own random draws; None counts from 0.
      base: the noise that they start from; None draws it.
      progress: whether to show progress.
      state_folder: where the search is saved after each generation and continued from (`resume.clear` it once the
        results are safe); None saves nothing.
      begun: what is kept of the same searches with a smaller budget, to go on from.
      resume_from_state: False begins anew, and saves the state only where the search ends before its images are there,
        or because it was to stop.
      stop: ends the search after the generation at hand.
      keep: is given what the search has found before the final renders, which take their time.
      watch: what is done with candidates beside scoring them.

    Returns:
      A result a prompt; it does not depend on what else is in the batch.

    Raises:
      ValueError: where every score of a prompt was NaN or infinite, and for a saved search with other settings.
      KeyboardInterrupt: before anything is scored, or where the user interrupts a search that is to stop already.
    """
    times = [time.perf_counter()]
    indices = range(len(prompts)) if indices is None else indices
    given = [None] * len(prompts) if base is None else base.as_json()
    state_folder = state_folder if partition.leads(pipeline.mesh) or resume_from_state else None
    identity = identity_of(pipeline, reward, config, prompts, indices, base)
    if partition.leads(pipeline.mesh) and resume_from_state:
        resume.begin(state_folder, identity)
    noise = None if base is None else base.noise
    task = prepare(pipeline, reward, config, prompts, indices, noise=noise, shown=watch.shown)
    times.append(time.perf_counter())
    work, compiled = _work(config, prompts), ahead.compile_render(task)
    with progress_bar(work, enabled=progress) as report, host.noting() as notes:
        saved = state_folder if resume_from_state else None
        task, outcome = _generations(task, (saved, begun), (work, report, watch), Stop() if stop is None else stop)
        times.append(time.perf_counter())
        found = _found(task, outcome)
        with _left(None if resume_from_state else state_folder, identity, (task, outcome), stop):
            keep(found)
            if outcome.at_once:
                raise KeyboardInterrupt
            if compiled:
                compiled.result()
            finals = _finals(task, pipeline, found.noise)
    times.append(time.perf_counter())

    histories = found.histories
    timings = _timings(times, sum(len(history) for history in histories))
    spent = _cost(task, len(histories[0]), timings)
    described = (settings_of(pipeline, reward, config, *one) for one in zip(indices, given, strict=True))
    settings = [facts | {"chunk": task.program.chunk} for facts in described]
    accounts = [Account(*facts, spent, timings, tuple(notes)) for facts in zip(histories, settings, strict=True)]
    return [_result(task, i, outcome, (found, finals), account) for i, account in enumerate(accounts)]


def settings_of(
    pipeline: Pipeline, reward: Reward, config: SearchConfig, index: int, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What the result of a prompt says of the settings it was searched with, as plain JSON values."""
    facts = {
        "family": pipeline.family,
        "model": pipeline.source or str(pipeline.folder),
        "load": dict(pipeline.options),
        "reward": reward.name,
        "rewards": {part.name: part.weight for part in reward.parts},
        "sigmas": [float(sigma) for sigma in pipeline.sigmas(config.steps, config.height, config.width)],
    }
    return config.as_json() | facts | dict(pipeline.changes) | {"prompt_index": int(index), "base_noise": base}


def _work(config: SearchConfig, prompts: Sequence[str]) -> Work:
    """What there is to do, for people."""
    title = prompts[0] + (f" and {len(prompts) - 1} more" if len(prompts) > 1 else "")
    candidates = min(config.population, config.budget) * config.preview_steps * evaluations.of_searcher(config.searcher)
    return Work(title, config.budget * len(prompts), generation_count(config), FINALS * config.steps / candidates)


def _generations(
    task: Task, saved: tuple[Path | None, Kept | None], seen: tuple[Work, Report, Watch], stop: Stop
) -> tuple[Task, Outcome]:
    """Runs generations until the budget is spent, or until it is to stop, `saved` being what `kept.begin` takes.

    Returns:
      The task, with the chunk that was found to fit, and the outcome.
    """
    mesh, (work, report, watch), folder = task.program.model.mesh, seen, saved[0]
    first, state, parts, films = kept.begin(*saved, initial_state(task))
    state = partition.replicate(mesh, state)
    sight, times, last = watching.recalled(task.program, films, parts), [time.perf_counter()], (0, state)
    interrupted = at_once = False
    for index in range(first, generation_count(task.config)):
        last = index, state
        interrupted = bool(parts) and partition.any_process(mesh, bool(stop) or sight.stop)
        if interrupted:
            break
        try:
            task, state, scored = _roomy_step(task, np.int32(index), state)
        except KeyboardInterrupt:
            if not parts:
                raise
            interrupted, at_once = True, bool(stop)
            break
        sight = _looked(task, watch, sight, index, (parts, scored))
        parts.append(watching.numbers(scored))
        if partition.leads(mesh):
            resume.save_films(folder, sight.films)
            resume.save(folder, index + 1, state, parts)
        times.append(time.perf_counter())
        report(_step_of(task, work, state, range(first, index + 1), times))
    scored = jax.tree.map(lambda *column: np.concatenate(column, axis=1)[:, : task.config.budget], *parts)
    done = first + len(times) - 1
    last = (done, state) if done * task.config.population <= task.config.budget else last
    return task, Outcome(state, scored, interrupted, at_once, sight.films, last)


def _looked(task: Task, watch: Watch, sight: Sight, index: int, scored: tuple[Sequence[Scored], Scored]) -> Sight:
    """What was seen after generation `index`, `scored` being the generations before it and it."""
    if not partition.leads(task.program.model.mesh):
        watch = watch._replace(folders=None)
    return watching.look(watch, sight, watching.generation(task.program, index, scored, task.config.budget))


def _step_of(task: Task, work: Work, state: State, done: range, times: Sequence[float]) -> Step:
    """The progress after generations `done`, that began at all but the last of `times`."""
    prompts, population = len(task.prompts), task.config.population
    scored = min(done.stop * population, task.config.budget)
    rate = prompts * (scored - done.start * population) / (times[-1] - times[0])
    left = seconds_left(np.diff(times).tolist(), work.generations - done.start, work.finals)
    best = float(np.max(np.asarray(state.best.scores)))
    return Step(done.stop - 1, prompts * scored, best, rate, left, rough=len(done) == 1)


def _roomy_step(task: Task, index: np.int32, state: State) -> tuple[Task, State, Scored]:
    """One generation, with fewer candidates at a time where they prove too many; draws and state stay the same."""
    while True:
        try:
            new, scored = _step(task, index, state)
            return task, new, jax.device_get(_waited_for(scored))
        except jax.errors.JaxRuntimeError as error:
            if not memory.is_exhausted(error) or task.program.chunk == 1:
                raise
            task = task._replace(program=task.program._replace(chunk=memory.half(task.program.chunk)))


def _waited_for(tree: Any) -> Any:
    """Arrays, once they are there; unlike in JAX's own waiting, signals are noticed meanwhile."""
    while not all(leaf.is_ready() for leaf in jax.tree.leaves(tree)):
        time.sleep(POLL)
    return tree


def _step(task: Task, index: np.int32, state: State) -> tuple[State, Scored]:
    """One generation, as one compiled program, or as two with the parts on the host between them."""
    if not task.reward.on_host:
        return generation.generation_step(task.program, task.params, task.inputs, index, state)
    program, shown = task.program, task.program.shown
    points, images, device = generation.candidates(program, task.params, task.inputs, index, state)
    count = task.program.evaluated
    texts = [prompt for prompt in task.prompts for _ in range(count)]
    components = rewards.host_components(task.reward, np.asarray(device), images, texts)
    components = jnp.asarray(components).reshape(len(task.prompts), count, -1)
    new, scored = generation.update(program, task.inputs, index, state, points, components)
    if shown is None:
        return new, scored
    pixels = generation.pixels(shown.side, images)
    noise = generation.noise_of(program, task.inputs, points) if shown.noise else None
    return new, scored._replace(previews=pixels.reshape(len(task.prompts), count, *pixels.shape[1:]), noise=noise)


def _history(task: Task, scored: Scored, prompt: int) -> list[records.Row]:
    """The rows of one prompt; raises ValueError if there is no finite score."""
    one = jax.tree.map(lambda x: x[prompt], scored)
    components, names = one.components, [part.name for part in task.reward.parts]
    rows = records.history(names, one, records.total(task.program, components, components), task.config.population)
    if rows[-1]["best"] is None:
        raise ValueError(
            f"reward {task.reward.name!r} gave no finite score in {len(rows)} candidates; check the reward"
        )
    return rows


def _found(task: Task, outcome: Outcome) -> Found:
    """The winners' noise and the histories; raises ValueError where a prompt has no finite score."""
    histories = [_history(task, outcome.scored, i) for i in range(len(task.prompts))]
    winners = generation.winners(task.program.problem.space, outcome.state.best, task.inputs.rest)
    best = [records.winner(history)["index"] for history in histories]
    previews = [watching.preview(film, index) for film, index in zip(outcome.films, best, strict=True)]
    state = kept.make(outcome.last, task.config.population, outcome.scored, outcome.films)
    return Found(np.asarray(winners), histories, previews, outcome.interrupted, state)


@contextlib.contextmanager
def _left(
    folder: Path | None, identity: Mapping[str, Any], searched: tuple[Task, Outcome], stop: Stop | None
) -> Iterator[None]:
    """Leaves the state of a search that is to stop, or that ends within: it can be gone on with."""
    if stop and searched[1].interrupted:
        _leave(folder, identity, *searched)
        yield
        return
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk has been named by then
            _leave(folder, identity, *searched)
        raise


def _leave(folder: Path | None, identity: Mapping[str, Any], task: Task, outcome: Outcome) -> None:
    resume.clear(folder)
    resume.begin(folder, identity)
    resume.save_films(folder, outcome.films)
    generations = math.ceil(outcome.scored.components.shape[1] / task.config.population)
    resume.save(folder, generations, outcome.state, [outcome.scored])


def _finals(task: Task, pipeline: Pipeline, winners: Float[np.ndarray, "p c h w"]) -> Finals:
    """Renders and scores the winners and the bases."""
    program, inputs, prompts = task.program, task.inputs, task.prompts
    noise = jnp.stack([jnp.asarray(winners), task.noise], axis=1).reshape(-1, *winners.shape[1:])
    owner = jnp.repeat(jnp.arange(len(prompts)), 2)
    images = render(pipeline, task.params[0], Rows(noise, owner), inputs.condition, (task.config, program.chunk))
    device = np.asarray(generation.score(program, task.params, inputs, images, np.asarray(owner)))
    texts = [prompt for prompt in prompts for _ in range(2)]
    components = rewards.host_components(task.reward, device, images, texts)
    return Finals(*(np.asarray(x).reshape(len(prompts), 2, *x.shape[1:]) for x in (images, components)))


def render(
    pipeline: Pipeline, params: Any, rows: Rows, condition: Any, how: tuple[RenderConfig, int]
) -> Float[Array, "r H W 3"]:
    """Images of rows with all steps, `how` being the config and how many rows to take at a time."""
    config, chunk = how
    model = model_of(pipeline, config)
    sigmas = jnp.asarray(pipeline.sigmas(config.steps, config.height, config.width))
    arrays = partition.replicate(pipeline.mesh, ((sigmas, condition), rows))
    while True:
        try:
            return jax.block_until_ready(_waited_for(generation.render(model, chunk, params, *arrays)))
        except jax.errors.JaxRuntimeError as error:
            if not memory.is_exhausted(error) or chunk == 1:
                raise
            chunk = memory.half(min(chunk, len(rows.owner)))


def identity_of(
    pipeline: Pipeline,
    reward: Reward,
    config: SearchConfig,
    prompts: Sequence[str],
    indices: Sequence[int],
    base: Base | None = None,
) -> dict[str, Any]:
    """What a saved search must agree in with the one that continues it, as plain JSON values."""
    noises = {} if base is None else {"base_noise": [one["sha256"] for one in base.as_json()]}
    return _identity(pipeline, reward, config, prompts, indices) | noises


def _identity(
    pipeline: Pipeline, reward: Reward, config: SearchConfig, prompts: Sequence[str], indices: Sequence[int]
) -> dict[str, Any]:
    """What a saved search must agree in with the one that continues it; how much fits at a time may change."""
    return {name: value for name, value in config.as_json().items() if name != "chunk"} | {
        **pipeline.changes,
        "load": dict(pipeline.options),
        "model": str(pipeline.folder),
        "reward": reward.name,
        "prompts": list(prompts),
        "indices": [int(index) for index in indices],
    }


def _timings(times: Sequence[float], images: int) -> dict[str, float]:
    encoded, searched, rendered = np.diff(times).tolist()
    return {"encode": encoded, "search": searched, "render": rendered, "images_per_second": images / searched}


def _cost(task: Task, scored: int, timings: dict[str, float]) -> Cost:
    """Of each prompt, which has its part of the batch's seconds."""
    given, count = (task.program, task.params, task.inputs), len(task.prompts)
    rates = cost.rates(*given)
    return Cost(
        search=cost.candidate_rates(*given).spent(cost.search_stages(task.config, scored), timings["search"] / count),
        finals=rates.spent([Stage(False, task.config.steps, FINALS)], timings["render"] / count),
    )


def _result(task: Task, i: int, outcome: Outcome, rendered: tuple[Found, Finals], account: Account) -> SearchResult:
    """The result of prompt `i`."""
    (found, finals), history = rendered, account.history
    names = [part.name for part in task.reward.parts]
    population = outcome.scored.components[i]
    final_score, baseline_final = records.total(task.program, finals.components[i], population).tolist()
    image, baseline_image = (to_image(pixels) for pixels in finals.images[i])
    return SearchResult(
        prompt=task.prompts[i],
        image=image,
        noise=found.noise[i],
        score=history[-1]["best"],
        final_score=final_score,
        baseline_image=baseline_image,
        baseline_score=math.nan if history[0]["score"] is None else history[0]["score"],
        baseline_final_score=baseline_final,
        components=records.part_scores(names, history, finals.components[i]),
        **account._asdict(),
        interrupted=outcome.interrupted,
        film=outcome.films[i],
    )
