"""What a search has found, and its images: the winners' and the bases', rendered with all steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from ses_jax.engine import generation, hosted, kept, memory, records, watching
from ses_jax.engine.config import RenderConfig
from ses_jax.engine.denoising import Rows
from ses_jax.engine.generations import Outcome
from ses_jax.engine.kept import Kept
from ses_jax.engine.program import Scored
from ses_jax.engine.stopping import waited_for
from ses_jax.engine.tasks import Task, model_of
from ses_jax.loading import partition
from ses_jax.pipelines.base import Pipeline


class NoScoreError(ValueError):
    """A prompt has no finite score: there is no winner, and nothing that is worth going on from."""


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


class Finals(NamedTuple):
    """Winner and base of every prompt, rendered with all steps.

    Attributes:
      images: `[P, 2, H, W, 3]`.
      components: `[P, 2, parts]`.
    """

    images: np.ndarray
    components: np.ndarray


def find(task: Task, outcome: Outcome) -> Found:
    """The winners' noise and the histories; raises NoScoreError where a prompt has no finite score."""
    histories = [_history(task, outcome.scored, i) for i in range(len(task.prompts))]
    winners = generation.winners(task.program.problem.space, outcome.state.best, task.inputs.rest)
    best = [records.winner(history)["index"] for history in histories]
    previews = [watching.preview(film, index) for film, index in zip(outcome.films, best, strict=True)]
    state = kept.make(outcome.last, task.config.population, outcome.scored, outcome.films)
    return Found(np.asarray(winners), histories, previews, outcome.interrupted, state)


def _history(task: Task, scored: Scored, prompt: int) -> list[records.Row]:
    """The rows of one prompt; raises NoScoreError if there is no finite score."""
    one = jax.tree.map(lambda x: x[prompt], scored)
    components, names = one.components, [part.name for part in task.reward.parts]
    rows = records.history(names, one, records.total(task.program, components, components), task.config.population)
    if rows[-1]["best"] is None:
        raise NoScoreError(
            f"reward {task.reward.name!r} gave no finite score in {len(rows)} candidates; check the reward"
        )
    return rows


def finals(task: Task, pipeline: Pipeline, winners: Float[np.ndarray, "p c h w"]) -> Finals:
    """Renders and scores the winners and the bases."""
    program, inputs, prompts = task.program, task.inputs, task.prompts
    noise = np.stack([winners, np.asarray(task.noise)], axis=1).reshape(-1, *winners.shape[1:])
    owner = np.repeat(np.arange(len(prompts), dtype=np.int32), 2)
    images = render(pipeline, task.params[0], Rows(noise, owner), inputs.condition, (task.config, program.chunk))
    device = generation.score(program, task.params, inputs, images, owner)
    components = hosted.row_components(task, images, device, count=2)
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
            return jax.block_until_ready(waited_for(generation.render(model, chunk, params, *arrays)))
        except jax.errors.JaxRuntimeError as error:
            chunk = memory.half(pipeline.mesh, min(chunk, len(rows.owner)), error)
