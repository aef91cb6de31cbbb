"""A search as shapes: its programs, lowered with neither weights nor devices.

What `tasks.prepare` makes of prompts, `outline` makes of the shapes of their tokens, by the same functions. So these
are the programs that a search on the pipeline's devices runs, which need not be there.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ses_jax.engine import generation, tasks
from ses_jax.engine.config import SearchConfig
from ses_jax.engine.denoising import Rows
from ses_jax.engine.program import FILM, Shown
from ses_jax.engine.tasks import FINALS, Task
from ses_jax.loading import partition
from ses_jax.pipelines.base import Pipeline
from ses_jax.rewards import device_parts
from ses_jax.rewards.reward import Reward


def outline(
    pipeline: Pipeline,
    reward: Reward,
    config: SearchConfig,
    tokens: Any,
    prompts: Sequence[str] | None = None,
    shown: Shown | None = FILM,
) -> Task:
    """The task of a search, of shapes.

    Args:
      pipeline: its params are arrays or shapes.
      reward: its scorers' params are arrays or shapes.
      config: resolved for the pipeline.
      tokens: of P prompts, as `pipeline.tokenize` and `pipeline.blank_tokens` give them.
      prompts: the prompts; None where none of the reward's functions read them.
      shown: what comes along of candidates beside their scores.
    """
    prompts = ("",) * len(jax.tree.leaves(tokens)[0]) if prompts is None else prompts
    put = functools.partial(partition.replicate, pipeline.mesh)
    noise, first = jax.eval_shape(lambda: tasks.draw(pipeline, config, range(len(prompts))))
    condition = jax.eval_shape(pipeline.encode, pipeline.text_params(pipeline.params), tokens)
    reward = of_shapes(reward, pipeline.mesh)
    inputs = put(first._replace(condition=condition, text=device_parts.text_shapes(reward, prompts)))
    task = tasks.assemble(_abstract(pipeline), reward, config, prompts, inputs)
    return task._replace(noise=noise, program=task.program._replace(shown=shown))


def of_shapes(reward: Reward, mesh: Mesh | None) -> Reward:
    """The reward with shapes for its scorers' params, on every device of the mesh."""
    return device_parts.place(reward, lambda params: partition.replicate(mesh, _shapes(params)))


def lower_encode(pipeline: Pipeline, tokens: Any) -> jax.stages.Lowered:
    """The condition of prompts."""
    params = pipeline.place(_shapes(pipeline.text_params(pipeline.params)))
    return generation.encode.lower(pipeline.encode, pipeline.mesh, params, tokens)


def lower_generation(task: Task, chunk: int) -> list[jax.stages.Lowered]:
    """The compiled part of a generation, `chunk` candidates at a time: one program or two."""
    state = jax.eval_shape(lambda: tasks.first_state(task))
    return tasks.lower_generation(task, partition.replicate(task.program.model.mesh, state), chunk)


def lower_render(task: Task, chunk: int) -> jax.stages.Lowered:
    """The final images of all prompts, `chunk` at a time."""
    model, (prompts, *shape) = task.program.model, task.noise.shape
    noise = jax.ShapeDtypeStruct((FINALS * prompts, *shape), jnp.float32)
    owner = jax.ShapeDtypeStruct((FINALS * prompts,), jnp.int32)
    sigmas = jax.ShapeDtypeStruct((task.config.steps + 1,), jnp.float32)
    arrays = partition.replicate(model.mesh, ((sigmas, task.inputs.condition), Rows(noise, owner)))
    return generation.render.lower(model, chunk, task.params[0], *arrays)


def _abstract(pipeline: Pipeline) -> Pipeline:
    return dataclasses.replace(pipeline, params=_shapes(pipeline.params))


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
