"""Runs a search's generations, one compiled step after the other, until its budget is spent or it is to stop."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ses_jax.engine import generation, hosted, kept, memory, resume, watching
from ses_jax.engine.kept import Kept
from ses_jax.engine.program import Scored, State
from ses_jax.engine.progress import Report, Step, Work, seconds_left
from ses_jax.engine.stopping import Stop, waited_for
from ses_jax.engine.tasks import Task, generation_count, initial_state
from ses_jax.engine.watching import Shot, Sight, Watch
from ses_jax.loading import partition


class Outcome(NamedTuple):
    """What all generations came to.

    Attributes:
      state: the last one.
      scored: what was, `[P, candidates, ...]`.
      interrupted: whether there is more to score.
      at_once: whether even the final renders are not wanted any more.
      films: each prompt's.
      last: how many whole generations there are, and the state after them.
      earlier: candidates of a prompt that were scored before this call.
    """

    state: State
    scored: Scored
    interrupted: bool
    at_once: bool
    films: list[list[Shot]]
    last: tuple[int, State]
    earlier: int = 0


Leave = Callable[[Task, Outcome], None]


def run(
    task: Task,
    saved: tuple[Path | None, Kept | None],
    seen: tuple[Work, Report, Watch],
    ends: tuple[Stop, Leave],
) -> tuple[Task, Outcome]:
    """Runs generations until the budget is spent, or until it is to stop.

    Args:
      task: what is searched.
      saved: what `kept.begin` takes.
      seen: what there is to do for people, how they are told, and what is done with candidates.
      ends: whether to stop, and what is called with the generations before one that raises.

    Returns:
      The task, with the chunk that was found to fit, and the outcome.
    """
    mesh, (work, report, watch), folder, (stop, leave) = task.program.model.mesh, seen, saved[0], ends
    first, state, parts, films = kept.begin(*saved, initial_state(task))
    state = partition.replicate(mesh, state)
    sight, times, last = watching.recalled(task.program, films, parts), [time.perf_counter()], (0, state)
    interrupted = at_once = False
    for index in range(first, generation_count(task.config)):
        last = index, state
        interrupted = bool(parts) and partition.any_process(mesh, bool(stop) or sight.stop)
        if interrupted:
            break
        with _left(leave, task, (last, parts, sight)):
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
    done = first + len(times) - 1
    last = (done, state) if done * task.config.population <= task.config.budget else last
    earlier = min(first * task.config.population, task.config.budget)
    return task, Outcome(state, _joined(task, parts), interrupted, at_once, sight.films, last, earlier)


@contextlib.contextmanager
def _left(leave: Leave, task: Task, done: tuple[tuple[int, State], list[Scored], Sight]) -> Iterator[None]:
    """Where a reward or the caller's function raises within, what was `done` before is left, if anything was."""
    last, parts, sight = done
    try:
        yield
    except BaseException:
        if parts:
            leave(task, Outcome(last[1], _joined(task, parts), True, False, sight.films, last))
        raise


def _joined(task: Task, parts: Sequence[Scored]) -> Scored:
    """What was scored within the budget."""
    return jax.tree.map(lambda *column: np.concatenate(column, axis=1)[:, : task.config.budget], *parts)


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
            return task, new, jax.device_get(waited_for(scored))
        except jax.errors.JaxRuntimeError as error:
            smaller = memory.half(task.program.model.mesh, task.program.chunk, error)
            task = task._replace(program=task.program._replace(chunk=smaller))


def _step(task: Task, index: np.int32, state: State) -> tuple[State, Scored]:
    """One generation, as one compiled program, or as two, or as several with the parts on the host between them."""
    if task.reward.on_host:
        return hosted.step(task, index, state)
    program, given = task.program, (task.params, task.inputs, index, state)
    if program.apart:
        return generation.judged(program.other_half, *given, generation.denoised(program, *given))
    return generation.generation_step(program, *given)
