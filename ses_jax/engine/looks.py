"""A generation scored by looks: cheap previews of all candidates, and full ones of those that looked best.

All shapes are static: how many candidates go on follows from the population. Where a budget ends inside a generation,
the candidates beyond it come last, and count nowhere.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from ses_jax.engine import denoising
from ses_jax.engine.fidelity import EARLY, HALF, Look
from ses_jax.engine.previews import components, noise_of, rows_of, scored
from ses_jax.engine.program import Inputs, Program
from ses_jax.loading import partition
from ses_jax.rewards import mixture
from ses_jax.searchers import elites, wavelet


class Field(NamedTuple):
    """The m candidates that are left of a generation's n, the best by the latest look first.

    Attributes:
      index: `[P, m]`, their places in the generation.
      noise: `[P, m, C, h, w]`.
      latents: `[P, m, C, h, w]`, their previews as far as they are denoised.
      counted: int scalar, how many of them are within the budget; the others come last.
    """

    index: Int[Array, "p m"]
    noise: Float[Array, "p m c h w"]
    latents: Float[Array, "p m c h w"]
    counted: Int[Array, ""]

    def hide(self, values: Float[Array, "p m ..."], hidden: float) -> Float[Array, "p m ..."]:
        """The values, but for those of candidates beyond the budget."""
        known = jnp.arange(values.shape[1]) < self.counted
        return jnp.where(known.reshape(-1, *(1,) * (values.ndim - 2)), values, hidden)

    def in_place(self, values: Float[Array, "p m ..."], count: int) -> Float[Array, "p n ..."]:
        """Values as `[P, count, ...]` by candidate, NaN where there is none."""
        nowhere = jnp.full((len(values), count, *values.shape[2:]), jnp.nan, jnp.float32)
        return jax.vmap(lambda to, index, x: to.at[index].set(x))(nowhere, self.index, self.hide(values, jnp.nan))

    def shown(self, pixels: UInt8[Array, "p m h w 3"], count: int) -> UInt8[Array, "p n h w 3"]:
        """Images as `[P, count, ...]` by candidate, black where there is none."""
        black = jnp.zeros((len(pixels), count, *pixels.shape[2:]), pixels.dtype)
        return jax.vmap(lambda to, index, x: to.at[index].set(x))(black, self.index, pixels)


def previewed(
    program: Program, params: Any, inputs: Inputs, generation: Array, points: Any
) -> tuple[Float[Array, "p n parts"], Float[Array, "p n looks"], UInt8[Array, "p n h w 3"] | None]:
    """What full previews and looks say of points `[P, n, *S]`, NaN of those that did not get there; and the previews.

    What a look says is -inf where it is not finite.
    """
    count = program.evaluated
    field = _everyone(program, inputs, generation, noise_of(program, inputs, points))
    looks, taken = [], 0
    for place, look in enumerate(program.fidelity.looks):
        field, seen = _look(program, params, inputs, (place, taken), field)
        totals = field.hide(jax.vmap(elites.finite)(_totals(program, field.hide(seen, jnp.nan))), jnp.nan)
        looks.append(field.in_place(totals, count))
        field = _best(program.model.mesh, look, generation, field, totals)
        taken = look.steps if look.kind == EARLY else taken
    found, shown = _finish(program, params, inputs, taken, field)
    shown = None if shown is None else field.shown(shown, count)
    return field.in_place(found, count), jnp.stack(looks, axis=-1), shown


def _everyone(program: Program, inputs: Inputs, generation: Array, noise: Array) -> Field:
    """A whole generation."""
    index = jnp.broadcast_to(jnp.arange(noise.shape[1]), noise.shape[:2])
    counted = jnp.clip(inputs.budget - generation * program.problem.population, 0, noise.shape[1])
    return Field(index, noise, noise, counted)


def _look(
    program: Program, params: Any, inputs: Inputs, at: tuple[int, int], field: Field
) -> tuple[Field, Float[Array, "p m parts"]]:
    """The field after a look, and the components that it gives; `at` is its place, and how many steps were taken."""
    place, taken = at
    look = program.fidelity.looks[place]
    if look.kind == EARLY:
        return _early(program, params, inputs, (taken, look.steps), field)
    model = program.half if look.kind == HALF else program.model
    noise = wavelet.half(field.noise) if look.kind == HALF else field.noise
    score = functools.partial(components, program, params, inputs)
    prompts = inputs.looks[place], inputs.condition
    found = denoising.images(model, program.chunk, params[0], prompts, rows_of(noise), score)
    return field, _by_prompt(field, found)


def _early(
    program: Program, params: Any, inputs: Inputs, steps: tuple[int, int], field: Field
) -> tuple[Field, Float[Array, "p m parts"]]:
    """The preview from one step to another, and the components of what it is predicted to be."""
    score = functools.partial(components, program, params, inputs)
    prompts = inputs.sigmas[steps[0] : steps[1] + 1], inputs.condition
    rows = rows_of(field.latents)
    latents, found = denoising.predicted(program.model, program.chunk, params[0], prompts, rows, score)
    latents = partition.constrain(program.model.mesh, latents)
    return field._replace(latents=_by_prompt(field, latents)), _by_prompt(field, found)


def _finish(
    program: Program, params: Any, inputs: Inputs, taken: int, field: Field
) -> tuple[Float[Array, "p m parts"], UInt8[Array, "p m h w 3"] | None]:
    """Components of full previews, after the steps that were taken, and what is shown of them."""
    score = functools.partial(scored, program, params, inputs)
    prompts = inputs.sigmas[taken:], inputs.condition
    found = denoising.images(program.model, program.chunk, params[0], prompts, rows_of(field.latents), score)
    return jax.tree.map(functools.partial(_by_prompt, field), found)


def _by_prompt(field: Field, values: Array) -> Array:
    """Rows as `[P, m, ...]`."""
    return values.reshape(*field.index.shape, *values.shape[1:])


def _totals(program: Program, seen: Float[Array, "p m parts"]) -> Float[Array, "p m"]:
    """What a look's components add up to; in a standardised mixture over those that it saw of this generation."""

    def of_prompt(found):
        if program.standardize:
            return mixture.standardized_sum(found, program.weights, found)
        return mixture.plain_sum(found, program.weights)

    return jax.vmap(of_prompt)(seen)


def _best(mesh: Mesh | None, look: Look, generation: Array, field: Field, totals: Float[Array, "p m"]) -> Field:
    """Those that go on. The base noise, first of all, always does; what has no finite score comes last."""
    scores = jax.vmap(elites.finite)(totals)
    scores = scores.at[:, 0].set(jnp.where(generation == 0, jnp.inf, scores[:, 0]))
    # Of equal scores the first comes first, so that candidates beyond the budget stay behind the others.
    _, chosen = jax.lax.top_k(scores, look.kept(scores.shape[1]))
    taken = jax.vmap(lambda x, of: x[of])
    arrays = (taken(x, chosen) for x in (field.index, field.noise, field.latents))
    kept = jnp.array([look.kept(count) for count in range(scores.shape[1] + 1)])
    return Field(*partition.constrain(mesh, tuple(arrays)), kept[field.counted])
