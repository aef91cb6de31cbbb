"""Candidates to components: few-step images of their noise, scored by the reward's parts on the device."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from ses_jax.engine import denoising
from ses_jax.engine.denoising import Finish, Rows
from ses_jax.engine.program import Inputs, Program
from ses_jax.loading import partition


def preview(program: Program, params: Any, inputs: Inputs, points: Any, finish: Finish) -> tuple[Any, Any]:
    """What is said, and shown, of the few-step images of points `[P, n, *S]`, by row."""
    rows = rows_of(noise_of(program, inputs, points))
    return denoising.images(program.model, program.chunk, params, (inputs.sigmas, inputs.condition), rows, finish)


def components_alone(program: Program, params: Any, inputs: Inputs) -> Finish:
    """The components of images; no columns if the reward has no parts on the device."""
    if program.score is None:
        return Finish(lambda images: jnp.zeros((len(images), 0), jnp.float32), lambda seen, owner: seen, _nothing)

    def see(images: Array) -> Any:
        with partition.compiled_for(program.model.mesh):
            return program.score.see(images)

    def say(seen: Any, owner: Array) -> Float[Array, "n parts"]:
        with partition.compiled_for(program.model.mesh):
            return program.score.say(params[1], seen, denoising.owned(inputs.text, owner))

    return Finish(see, say, _nothing)


def scored(program: Program, params: Any, inputs: Inputs) -> Finish:
    """The components of images, and what is shown of them."""
    finish = components_alone(program, params, inputs)
    return finish if program.shown is None else finish._replace(show=lambda images: pixels(images, program.shown.side))


def with_images(program: Program, params: Any, inputs: Inputs) -> Finish:
    """What the reward's parts on the device say, and the images, for those on the host."""
    return components_alone(program, params, inputs)._replace(show=lambda images: images)


def _nothing(images: Array) -> None:
    return None


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
    finish = components_alone(program, params, inputs)
    return finish.say(finish.see(images), owner)
