"""A generation's previews with the gradients of its scores: through the reward, the decoder and every step.

All candidates are previewed and scored first, because what a standardised mixture's parts count for depends on all of
them. Then they are followed back, for which no more is kept than the latents between steps: a step takes a forward of
the network for its score, and a forward and a backward for its gradient.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ses_jax.engine import denoising, previews
from ses_jax.engine.denoising import Paths
from ses_jax.engine.program import Archive, Inputs, Program
from ses_jax.loading import partition
from ses_jax.rewards import mixture


def previewed(
    program: Program, params: Any, inputs: Inputs, past: tuple[Array, Archive | None], points: Any
) -> tuple[Float[Array, "p n parts"], Array | None, Any]:
    """Components of points `[P, n, *S]`, what is shown of their previews, and the gradients of their scores.

    Args:
      past: the number of the generation, and the archive before it.
    """
    noise, pull = jax.vjp(functools.partial(previews.noise_of, program, inputs), points)
    rows, prompts = previews.rows_of(noise), (inputs.sigmas, inputs.condition)
    finish = previews.scored(program, params, inputs)
    latents, found = denoising.followed(program.model, program.chunk, params[0], prompts, rows, finish)
    components, shown = jax.tree.map(lambda x: x.reshape(*noise.shape[:2], *x.shape[1:]), found)
    components = partition.constrain(program.model.mesh, components)
    paths = Paths(latents, rows.owner, _slopes(program, inputs, past, components).reshape(len(rows.owner), -1))
    score = functools.partial(_driving, program, params, inputs)
    slopes = denoising.pulled_back(program.model, program.chunk, params[0], prompts, paths, score)
    return components, shown, pull(partition.constrain(program.model.mesh, slopes.reshape(noise.shape)))[0]


def archived(archive: Archive, generation: Array, new: Archive) -> Archive:
    """One prompt's archive with a generation in its place."""
    count = len(new.components)
    rows = generation * count + jnp.arange(count)
    return jax.tree.map(lambda old, new: old.at[rows].set(new), archive, new)


def _slopes(
    program: Program, inputs: Inputs, past: tuple[Array, Archive | None], components: Float[Array, "p n parts"]
) -> Float[Array, "p n driving"]:
    """What scores gain by each component that drives the search."""
    generation, archive = past
    count = components.shape[1]
    if archive is None:
        weights = jnp.asarray([weight for weight in program.weights if weight], jnp.float32)
        return jnp.broadcast_to(weights, (len(components), count, len(weights)))
    new = previews.within_budget(program, inputs, generation, components)

    def of_prompt(old, new):
        seen = archived(Archive((), old), generation, Archive((), new)).components
        return mixture.standardized_slopes(program.weights, seen)

    return jnp.repeat(jax.vmap(of_prompt)(archive.components, new)[:, None], count, axis=1)


def _driving(program: Program, params: Any, inputs: Inputs, images: Array, owner: Array) -> Float[Array, "n driving"]:
    """The scores of the parts that drive the search; what is only reported has no say, not even as NaN."""
    score, parts = program.score.driving(program.weights)
    own = inputs._replace(text=parts(inputs.text))
    return previews.components(program._replace(score=score), (params[0], parts(params[1])), own, images, owner)
