"""Candidates to components: few-step images of their noise, scored by the reward's parts on the device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from ses_jax.engine import denoising
from ses_jax.engine.denoising import Rows
from ses_jax.engine.program import Inputs, Program
from ses_jax.loading import partition


def preview(program: Program, params: Any, inputs: Inputs, points: Any, finish: Callable) -> Any:
    """`finish(images, owner)` of the few-step images of points `[P, n, *S]`, by row."""
    rows = rows_of(noise_of(program, inputs, points))
    return denoising.images(program.model, program.chunk, params, (inputs.sigmas, inputs.condition), rows, finish)


def scored(program: Program, params: Any, inputs: Inputs, images: Array, owner: Array) -> tuple[Array, Array | None]:
    """The components of images, and what is shown of them."""
    shown = None if program.shown is None else pixels(images, program.shown.side)
    return components(program, params, inputs, images, owner), shown


def with_images(program: Program, params: Any, inputs: Inputs, images: Array, owner: Array) -> tuple[Array, Array]:
    """Images, for the reward's parts on the host, and what the others say of them."""
    return images, components(program, params, inputs, images, owner)


def pixels(images: Float[Array, "n H W 3"], side: int | None) -> UInt8[Array, "n h w 3"]:
    """Images of 8 bits, whose longer side has at most `side` pixels, unless they are much longer than wide.

    Pixels are means of whole squares, and what is left over at the lower and right edge is cut off.
    """
    shape = images.shape[1:3]
    factor = 1 if side is None else min(-(-max(shape) // side), *shape)
    window = (1, factor, factor, 1)
    # As sums over windows and not of a reshaped array, whose short axes TPUs would fill up to 128.
    sums = jax.lax.reduce_window(images.astype(jnp.float32), 0.0, jax.lax.add, window, window, "VALID")
    return jnp.round(jnp.clip(sums / factor**2, 0, 1) * 255).astype(jnp.uint8)


def noise_of(program: Program, inputs: Inputs, points: Any) -> Float[Array, "p n c h w"]:
    """The noise of points `[P, n, *S]`, whole on every device."""
    return partition.constrain(program.model.mesh, jax.vmap(program.problem.space.merge)(points, inputs.rest))


def rows_of(noise: Float[Array, "p n c h w"]) -> Rows:
    """The candidates of P prompts as rows, prompt after prompt."""
    owner = jnp.repeat(jnp.arange(len(noise)), noise.shape[1])
    return Rows(noise.reshape(-1, *noise.shape[2:]), owner)


def within_budget(
    program: Program, inputs: Inputs, generation: Array, components: Float[Array, "p n parts"]
) -> Float[Array, "p n parts"]:
    """Components of a generation's candidates, NaN of those beyond the budget."""
    index = generation * program.problem.population + jnp.arange(components.shape[1])
    return jnp.where((index < inputs.budget)[:, None], components, jnp.nan)


def components(program: Program, params: Any, inputs: Inputs, images: Array, owner: Array) -> Float[Array, "n parts"]:
    """The device parts' scores; no columns if there are none."""
    if program.score is None:
        return jnp.zeros((len(images), 0), jnp.float32)
    with partition.compiled_for(program.model.mesh):
        return program.score(params[1], images, denoising.owned(inputs.text, owner))
