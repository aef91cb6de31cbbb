"""Searches for one or more prompts at once: generations, final renders, results."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ses_jax.engine import ahead, cost, evaluations, finals, generations, records, resume
from ses_jax.engine.base import Base
from ses_jax.engine.config import SearchConfig
from ses_jax.engine.cost import Cost
from ses_jax.engine.fidelity import Stage
from ses_jax.engine.finals import Finals, Found
from ses_jax.engine.generations import Outcome
from ses_jax.engine.identity import identity_of, settings_of
from ses_jax.engine.kept import Kept
from ses_jax.engine.progress import Work, progress_bar
from ses_jax.engine.result import SearchResult, to_image
from ses_jax.engine.stopping import Stop
from ses_jax.engine.tasks import FINALS, Task, fitted, generation_count, prepare
from ses_jax.engine.watching import NOTHING, Watch
from ses_jax.loading import partition
from ses_jax.pipelines.base import Pipeline
from ses_jax.rewards import host
from ses_jax.rewards.reward import Reward


def _drop(found: Found) -> None:
    """Keeps nothing."""


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
    compiled = ahead.compile_generation(pipeline, reward, config, prompts, watch.shown)
    noise = None if base is None else base.noise
    task = prepare(pipeline, reward, config, prompts, indices, noise=noise, shown=watch.shown)
    task = fitted(task, next(iter(ahead.wait(compiled)), None))
    times.append(time.perf_counter())
    work, compiled = _work(config, prompts), ahead.compile_finals(task)
    with progress_bar(work, enabled=progress) as report, host.noting() as notes:
        saved, unsaved = (state_folder, None) if resume_from_state else (None, state_folder)
        ends = Stop() if stop is None else stop, functools.partial(_leave_after, unsaved, identity)
        task, outcome = generations.run(task, (saved, begun), (work, report, watch), ends)
        times.append(time.perf_counter())
        found = finals.find(task, outcome)
        with _left(unsaved, identity, (task, outcome), stop):
            keep(found)
            if outcome.at_once:
                raise KeyboardInterrupt
            ahead.wait(compiled)
            rendered = finals.finals(task, pipeline, found.noise)
    times.append(time.perf_counter())
    facts = [settings_of(pipeline, reward, config, *one) for one in zip(indices, given, strict=True)]
    accounts = _accounts((task, outcome), found.histories, facts, times, notes)
    return [_result(task, i, outcome, (found, rendered), account) for i, account in enumerate(accounts)]


def _work(config: SearchConfig, prompts: Sequence[str]) -> Work:
    """What there is to do, for people."""
    title = prompts[0] + (f" and {len(prompts) - 1} more" if len(prompts) > 1 else "")
    candidates = min(config.population, config.budget) * config.preview_steps * evaluations.of_searcher(config.searcher)
    return Work(title, config.budget * len(prompts), generation_count(config), FINALS * config.steps / candidates)


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
        _leave_after(folder, identity, *searched)
        raise


def _leave_after(folder: Path | None, identity: Mapping[str, Any], task: Task, outcome: Outcome) -> None:
    """Leaves the state for what raised, which is what matters; a full disk has been named by then."""
    with contextlib.suppress(OSError):
        _leave(folder, identity, task, outcome)


def _leave(folder: Path | None, identity: Mapping[str, Any], task: Task, outcome: Outcome) -> None:
    resume.clear(folder)
    resume.begin(folder, identity)
    resume.save_films(folder, outcome.films)
    count = math.ceil(outcome.scored.components.shape[1] / task.config.population)
    resume.save(folder, count, outcome.state, [outcome.scored])


def _accounts(
    ran: tuple[Task, Outcome],
    histories: Sequence[list[records.Row]],
    facts: Sequence[dict[str, Any]],
    times: Sequence[float],
    notes: Sequence[str],
) -> list[Account]:
    """How the results of the prompts came about, by prompt."""
    task, outcome = ran
    timings = _timings(times, sum(len(history) - outcome.earlier for history in histories))
    spent = _cost(task, len(histories[0]), timings)
    settings = [each | {"chunk": task.program.chunk} for each in facts]
    return [Account(*one, spent, timings, tuple(notes)) for one in zip(histories, settings, strict=True)]


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
    (found, made), history = rendered, account.history
    names = [part.name for part in task.reward.parts]
    population = outcome.scored.components[i]
    final_score, baseline_final = records.total(task.program, made.components[i], population).tolist()
    image, baseline_image = (to_image(pixels) for pixels in made.images[i])
    return SearchResult(
        prompt=task.prompts[i],
        image=image,
        noise=found.noise[i],
        score=history[-1]["best"],
        final_score=final_score,
        baseline_image=baseline_image,
        baseline_score=math.nan if history[0]["score"] is None else history[0]["score"],
        baseline_final_score=baseline_final,
        components=records.part_scores(names, history, made.components[i]),
        **account._asdict(),
        interrupted=outcome.interrupted,
        film=outcome.films[i],
    )
