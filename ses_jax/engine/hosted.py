"""A generation of a reward with parts on the host: compiled programs, and the host between them."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from ses_jax.engine import generation, looks, previews
from ses_jax.engine.looks import Field
from ses_jax.engine.program import Inputs, Program, Scored, State
from ses_jax.engine.tasks import Task
from ses_jax.loading import partition
from ses_jax.loading.programs import compiled
from ses_jax.rewards import device_parts


def step(task: Task, index: np.int32, state: State) -> tuple[State, Scored]:
    """One generation: ask, preview, score here, tell."""
    program, inputs = task.program, task.inputs
    seen = None
    if program.fidelity.looks:
        points = propose(program, inputs, index, state)
        components, seen, shown = _looked(task, index, points)
    else:
        points, device, images = generation.candidates(program, task.params, inputs, index, state)
        components = _by_prompt(task, row_components(task, images, device, program.evaluated))
        shown = None if program.shown is None else _by_prompt(task, generation.pixels(program.shown.side, images))
    new, scored = generation.update(program, inputs, index, state, points, components)
    noise = generation.noise_of(program, inputs, points) if program.shown and program.shown.noise else None
    return new, scored._replace(looks=seen, previews=shown, noise=noise)


def _looked(
    task: Task, index: np.int32, points: Any
) -> tuple[Float[Array, "p n parts"], Float[Array, "p n looks"], UInt8[Array, "p n h w 3"] | None]:
    """As `looks.previewed`: a program a look, after which the host says what it sees."""
    program, inputs, said, taken = task.program, task.inputs, [], 0
    field = everyone(program, inputs, index, points)
    for place, look in enumerate(program.fidelity.looks):
        field, (device, images) = taken_look(program, (place, taken), task.params, inputs, field)
        column, field = best(program, place, index, field, _components(task, images, device))
        said.append(column)
        taken = looks.steps_after(look, taken)
    device, images = finished(program, taken, task.params, inputs, field)
    found, shown = in_place(program, field, _components(task, images, device), images)
    return found, jnp.stack(said, axis=-1), shown


def _components(task: Task, images: Array, device: Array) -> Float[Array, "p m parts"]:
    """All components of images `[P, m, H, W, 3]`, from those of the parts on the device."""
    prompts, count = images.shape[:2]
    # Not -1: there may be no columns.
    rows, columns = (x.reshape(prompts * count, *x.shape[2:]) for x in (images, device))
    return _by_prompt(task, row_components(task, rows, columns, count))


def row_components(task: Task, images: Array, device: Array, count: int) -> Float[np.ndarray, "b parts"]:
    """All components of rows, `count` of each prompt; of processes that share a mesh one calls users' functions.

    Two calls of a function need not give the same, and of different scores each process would make another state.
    """
    texts, columns = [prompt for prompt in task.prompts for _ in range(count)], np.asarray(device)
    compute = functools.partial(device_parts.host_components, task.reward, columns, images, texts)
    if not task.reward.on_host:
        return compute()
    return partition.by_leader(task.program.model.mesh, (len(texts), len(task.reward.parts)), compute)


def _by_prompt(task: Task, rows: Any) -> Array:
    return jnp.asarray(rows).reshape(len(task.prompts), -1, *rows.shape[1:])


propose = compiled(static=1)(generation.propose)
everyone = compiled(static=1)(looks.everyone)
best = compiled(static=2)(looks.best)


@compiled(static=2)
def taken_look(program: Program, at: tuple[int, int], params: Any, inputs: Inputs, field: Field) -> tuple[Field, Any]:
    """`looks.taken_look` with the device parts' components and images."""
    finish = previews.with_images(program, params, inputs)
    return looks.taken_look(program, params[0], inputs, at, field, finish)


@compiled(static=2)
def finished(program: Program, taken: int, params: Any, inputs: Inputs, field: Field) -> Any:
    """`looks.finished` with the device parts' components and images."""
    finish = previews.with_images(program, params, inputs)
    return looks.finished(program, params[0], inputs, taken, field, finish)


@compiled(static=1)
def in_place(
    program: Program, field: Field, found: Float[Array, "p m parts"], images: Float[Array, "p m H W 3"]
) -> tuple[Float[Array, "p n parts"], UInt8[Array, "p n h w 3"] | None]:
    """Components by candidate, and what is shown of them."""
    if program.shown is None:
        return field.in_place(found, program.evaluated), None
    pixels = previews.pixels(images.reshape(-1, *images.shape[2:]), program.shown.side)
    shown = field.shown(pixels.reshape(*images.shape[:2], *pixels.shape[1:]), program.evaluated)
    return field.in_place(found, program.evaluated), shown
