"""Compiles a search's programs beside each other and beside its work: devices may be busy then, and the host is not."""

import functools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ses_jax.engine import generation, memory, outline, tasks
from ses_jax.engine.config import SearchConfig
from ses_jax.engine.program import Shown
from ses_jax.engine.tasks import FINALS, Task
from ses_jax.pipelines.base import Pipeline
from ses_jax.rewards import device_parts
from ses_jax.rewards.reward import Reward

LOG = logging.getLogger("ses_jax")


def compile_generation(
    pipeline: Pipeline, reward: Reward, config: SearchConfig, prompts: Sequence[str], shown: Shown | None
) -> list[Future[Any]]:
    """Starts to compile the generation and the reward's text encoders, while the prompts are still to be encoded.

    The arguments are those of `tasks.prepare`. The generation is that of all candidates at a time.

    Returns:
      What is to be waited for before the programs are called; the first gives the bytes that the generation needs (see
      `memory.working_bytes`). Empty where a search like this one has been compiled, and where there is nothing to gain,
      or harm: devices that are this host's cores, which are busy, and where a thread's compiler keeps memory; and
      several processes, which have to compile the same programs in the same order.
    """
    program = tasks.program_of(pipeline, reward, config, prompts)._replace(shown=shown)
    if not _is_worth_it(pipeline.mesh) or tasks.compiled_part(program, reward).is_kept(program):
        return []
    jobs = (functools.partial(_generation, pipeline, config, shown), functools.partial(_texts, pipeline.mesh))
    return [_start(functools.partial(job, reward, prompts)) for job in jobs]


def compile_finals(task: Task) -> list[Future[Any]]:
    """Starts to compile the final renders and their scoring; returns what is to be waited for, as above."""
    program = task.program
    if not _is_worth_it(program.model.mesh) or generation.render.is_kept(program.model, program.chunk):
        return []
    return [_start(functools.partial(_finals, task))]


def wait(begun: Sequence[Future[Any]]) -> list[Any]:
    """Waits until everything that was begun has been compiled, or has failed to; returns what it gives, or None."""
    return [each.result() for each in begun]


def _is_worth_it(mesh: Mesh | None) -> bool:
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return device.platform != "cpu" and jax.process_count() == 1


def _start(job: Callable[[], Any]) -> Future[Any]:
    """Runs a job in a thread. What is compiled there is not compiled again by a call; what fails fails again there."""

    def run():
        try:
            return job()
        except Exception as error:  # a call's own words are better
            LOG.debug("not compiled ahead: %s", error)

    pool = ThreadPoolExecutor(1, "ses_jax-compile")
    started = pool.submit(run)
    pool.shutdown(wait=False)
    return started


def _generation(
    pipeline: Pipeline, config: SearchConfig, shown: Shown | None, reward: Reward, prompts: Sequence[str]
) -> int:
    tokens = pipeline.tokenize(list(prompts), guidance=config.guidance, negative_prompt=config.negative_prompt)
    task = outline.outline(pipeline, reward, config, tokens, prompts, shown)
    return memory.working_bytes(outline.lower_generation(task, task.program.chunk))


def _texts(mesh: Mesh | None, reward: Reward, prompts: Sequence[str]) -> None:
    device = jax.devices()[0] if mesh is None else min(mesh.devices.flat, key=lambda device: device.id)
    for lowered in device_parts.lower_text(outline.of_shapes(reward, mesh), prompts, device):
        lowered.compile()


def _finals(task: Task) -> None:
    program, rows = task.program, FINALS * len(task.prompts)
    lowered = outline.lower_render(task, program.chunk)
    rendered, images = lowered.compile(), lowered.out_info
    if program.model.mesh is not None:
        images = images.update(sharding=rendered.output_shardings)
    owner = jax.ShapeDtypeStruct((rows,), jnp.int32)
    generation.score.lower(program, task.params, task.inputs, images, owner).compile()
