"""Searches over many prompts, in one process or in many, that a kill at any moment does not set back.

A prompt is finished when its folder is (`run_folder.py`), and everything about it follows from its row and the run's
settings: neither the other rows, nor the number of processes, nor a restart change it. Rows are dealt out by number:
process `i` of `n` takes the rows `i, i + n, ...`, and no process ever waits for another.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ses_jax.batch.processes import Place, own_place
from ses_jax.batch.progress import batch_progress
from ses_jax.batch.prompts import Row, Source, read_rows
from ses_jax.batch.run_folder import Outcome, Run
from ses_jax.engine import kept, lock, models, output
from ses_jax.engine import resume as saved_search
from ses_jax.engine.config import BUDGET, Placement, RunConfig, SearchConfig, check_reward
from ses_jax.engine.finals import Found, NoScoreError
from ses_jax.engine.identity import identity_of
from ses_jax.engine.progress import waiting
from ses_jax.engine.result import SearchResult
from ses_jax.engine.runner import search_prompts
from ses_jax.engine.settings import gather, takes
from ses_jax.engine.stopping import Stop, noticed
from ses_jax.engine.watching import Watch
from ses_jax.loading import partition
from ses_jax.loading.lora_files import pairs
from ses_jax.pipelines.base import Pipeline
from ses_jax.rewards import host
from ses_jax.rewards.reward import Reward

LOG = logging.getLogger("ses_jax")
# Settings that change how fast a run is and not what comes out, so that they may change when it goes on.
_FREE = ("chunk", "offload_text_encoder", "mesh")
# Errors after which what is saved of a search would only make it fail again.
_USELESS = (NoScoreError, saved_search.OtherSearchError)


class _Work(NamedTuple):
    """What rows are searched with."""

    run: Run
    pipeline: Pipeline
    reward: Reward
    config: SearchConfig
    how: RunConfig
    stop: Stop | None = None


@takes(RunConfig, SearchConfig, Placement)
def search_many(
    prompts: Source,
    *,
    out: str | os.PathLike[str],
    prompt_column: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Searches every prompt of a file or list, each into its own folder, and goes on where an earlier call was stopped.

    Args:
      prompts: a `.txt`, `.csv`, `.tsv`, `.json` or `.jsonl` file, or a list of prompts or of mappings; see
        `prompts.read_rows`. Rows may override the fields of `SearchConfig`. Row `i` draws from the key of prompt `i`.
      out: the run's folder, with a folder a prompt by its id, `results.jsonl` (a line a row: scores, or the error) and
        `summary.json`; see `run_folder.py`. With many processes, the same one on a file system that all share.
      prompt_column: the column of a file that holds the prompts; by default `prompt`, `prompts`, `text` or `caption`.
      process_id, num_processes: this process's place among many, each called with the same arguments; None takes that
        in `jax.distributed`. A mesh is of the devices of this process.
      {settings}

    Returns:
      What `summary.json` holds, of all that is known by now; "unfinished" counts what other processes still have to do.
      A row that cannot be used, or whose search fails, counts as failed and is tried again by the next call.

    Raises:
      TypeError: for an unknown setting.
      ValueError: for bad settings, an unusable prompt file, and an `out` that holds something else or the beginning of
        a run with other settings or prompts.
      OSError: naming the file that cannot be written, as on a full disk; the same call goes on.
      KeyboardInterrupt: Ctrl-C, after the generation at hand; the same call goes on.
      SystemExit: of status 143, likewise after SIGTERM.
    """
    how, config, place = gather("search_many", settings, RunConfig, SearchConfig, Placement)
    rows = read_rows(prompts, prompt_column)
    report = models.check_rewards(how.reward, how.report)
    me = own_place(process_id, num_processes)
    budget = (config.budget or BUDGET) if how.resume and config.nfe is None else None
    run = Run(output.run_folder(out), rows, me.process_id, not how.no_report, how.image_format, budget)
    load = dict(place.load or {})
    load |= {"lora": pairs(load["lora"])} if load.get("lora") else {}
    described = _described(config.as_json()) | {"load": _described(load)}
    described |= {"model": _name(how.model), "reward": _name(how.reward), "report": _name(report)}
    run.check(described)
    with lock.held(run.folder, f".lock-{me.process_id}"):
        return _go_on(run, (how, config, place, report), described, me)


def _go_on(run: Run, settings: tuple[Any, ...], described: Mapping[str, Any], me: Place) -> dict[str, Any]:
    """Searches what this process still has to do, and merges what is known."""
    how, config, place, report = settings
    pending = [row for row in run.rows[me.process_id :: me.num_processes] if run.finished(row) is None]
    if not pending:
        return run.merge()
    work = None
    if any(row.error is None for row in pending):
        mesh = partition.parse_mesh(place.mesh, jax.local_devices())
        with waiting("loading the models", enabled=how.progress):
            pipeline, reward = models.load_models(how.model, how.reward, report, {"mesh": mesh, **(place.load or {})})
        check_reward(config.resolve(pipeline), reward)
        word = partition.unused(pipeline.mesh, jax.local_devices())
        if how.progress and me.process_id == 0 and word:
            LOG.warning(word)
        work = _Work(run, pipeline, reward, config, how)
    run.start(described)
    at_once = 1 if work is None or work.reward.one_prompt_at_a_time else how.prompts_at_once
    with noticed() as stop, batch_progress(len(pending), enabled=how.progress) as show:
        for outcome in _outcomes(run, work and work._replace(stop=stop), pending, at_once):
            show(_headline(outcome), "error" in outcome)
        summary = run.merge()
    if stop.terminated:
        stop.leave()
    return summary


def _described(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _FREE}


def _name(thing: Any) -> Any:
    """A model or a reward, in words that are the same in every process and call."""
    if thing is None or isinstance(thing, str):
        return thing
    if isinstance(thing, Pipeline):
        changes = f" {json.dumps(thing.changes)}" if thing.changes else ""
        return f"{thing.family} {thing.folder}{changes}"
    if isinstance(thing, Reward):
        sources = {name: source for name, source in thing.sources.items() if source}
        return thing.name + (f" {json.dumps(sources)}" if sources else "")
    if isinstance(thing, Mapping):
        return {_name(part): weight for part, weight in thing.items()}
    return f"{getattr(thing, '__module__', '')}:{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def _outcomes(run: Run, work: _Work | None, rows: Sequence[Row], at_once: int) -> Iterator[Outcome]:
    """Searches rows, bad ones first: they take no time, and whoever wrote them learns of it early."""
    usable, resolved = [], {}
    for row in rows:
        config, error = _row_config(work, row, resolved)
        error = run.obstacle(row) if error is None else error
        if error is None:
            usable.append((row, config))
        else:
            yield run.fail(row, error)
    for config, chosen in itertools.groupby(usable, key=lambda pair: pair[1]):
        same = [row for row, _ in chosen]
        for start in range(0, len(same), at_once):
            yield from _search(work, same[start : start + at_once], config)


def _row_config(
    work: _Work | None, row: Row, resolved: dict[Any, tuple[SearchConfig | None, str | None]]
) -> tuple[SearchConfig | None, str | None]:
    """The row's own config, or what is wrong with it; `resolved` has those of other rows, by all but their seeds."""
    if work is None or row.error is not None:
        return None, row.error
    overrides = {name: value for name, value in row.overrides.items() if name != "seed"}
    key = frozenset((n, frozenset(v.items()) if isinstance(v, Mapping) else v) for n, v in overrides.items())
    if key not in resolved:
        resolved[key] = _resolved(work, overrides)
    config, error = resolved[key]
    if config is not None and "seed" in row.overrides:
        config = dataclasses.replace(config, seed=row.overrides["seed"])
    return config, error


def _resolved(work: _Work, overrides: Mapping[str, Any]) -> tuple[SearchConfig | None, str | None]:
    """The run's config with a row's settings in it, or what is wrong with it."""
    try:
        # A row's own budget, in either form, stands in the place of the run's.
        own = dict.fromkeys(("budget", "nfe")) if overrides.keys() & {"budget", "nfe"} else {}
        config = dataclasses.replace(work.config, **(own | overrides)).resolve(work.pipeline)
        check_reward(config, work.reward)
        return config, None
    except ValueError as error:
        return None, str(error)


def _search(work: _Work, rows: Sequence[Row], config: SearchConfig) -> Iterator[Outcome]:
    """Searches rows at once; where that fails, one by one, so that each fails for itself only.

    The next call goes on from what is saved of a row that failed alone, and so takes it alone again.
    """
    if work.stop:
        work.stop.leave()
    state, alone = _state_folder(work, rows), len(rows) == 1
    begun_alone = work.how.resume and any(_state_folder(work, [row]).exists() for row in rows)
    try:
        results = [] if begun_alone and not alone else _results(work, rows, config, state)
    except Exception as error:
        if _of_the_disk(error):
            raise
        if not alone or isinstance(error, _USELESS):
            saved_search.clear(state)
        if alone:
            yield _failed(work.run, rows[0], error)
            return
        results = []
    if not results:
        for row in rows:
            yield from _search(work, [row], config)
        return
    for row, result in zip(rows, results, strict=True):
        yield _saved(work.run, row, result)
    saved_search.clear(state)


def _results(work: _Work, rows: Sequence[Row], config: SearchConfig, state: Path | None) -> list[SearchResult]:
    """The results of rows that are searched at once, not saved yet."""
    folders = [work.run.folder / row.folder for row in rows]
    identities = [identity_of(work.pipeline, work.reward, config, [row.prompt], [row.index]) for row in rows]

    def keep(found: Found) -> None:
        if found.interrupted:  # by the next call it is searched to its end
            work.stop.leave()
        for place, folder in enumerate(folders):
            kept.save(folder, identities[place], found.kept and found.kept.of(place))

    return search_prompts(
        work.pipeline,
        work.reward,
        config,
        [row.prompt for row in rows],
        indices=[row.index for row in rows],
        state_folder=state,
        begun=kept.load(folders, identities) if work.how.resume else None,
        stop=work.stop,
        keep=keep,
        watch=Watch(not work.how.no_report, folders=folders if work.how.save_candidates else None),
    )


def _saved(run: Run, row: Row, result: SearchResult) -> Outcome:
    try:
        return run.save(row, result)
    except Exception as error:
        if _of_the_disk(error):
            raise
        return _failed(run, row, error)


def _failed(run: Run, row: Row, error: Exception) -> Outcome:
    return run.fail(row, f"{type(error).__name__}: {error}", traceback=traceback.format_exc())


def _of_the_disk(error: Exception) -> bool:
    """Whether an error is none of a row's: a full disk stays full for the other rows."""
    return isinstance(error, OSError) and bool(error.filename) and host.origin(error) is None


def _state_folder(work: _Work, rows: Sequence[Row]) -> Path | None:
    """Where the search of exactly these rows is saved on its way."""
    if not work.how.resume:
        return None
    rest = hashlib.sha256(",".join(str(row.index) for row in rows).encode()).hexdigest()[:8]
    return work.run.folder / output.STATE / f"{rows[0].index:06d}-{rest}"


def _headline(outcome: Outcome) -> str:
    if "error" in outcome:
        return f"{outcome['id']}: {outcome['error'].splitlines()[0][:100]}"
    scores = (outcome[name] for name in ("baseline_score", "score"))
    return f"{outcome['id']}: " + " -> ".join("-" if score is None else f"{score:.4f}" for score in scores)
