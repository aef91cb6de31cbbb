"""A generation scored by looks: cheap previews of all candidates, and full ones of those that looked best.

All shapes are static: how many candidates go on follows from the population. Where a budget ends inside a generation,
the candidates beyond it come last, and count nowhere.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from ses_jax.engine import denoising
from ses_jax.engine.denoising import Finish
from ses_jax.engine.fidelity import CACHED, EARLY, HALF, Look
from ses_jax.engine.previews import components_alone, noise_of, rows_of, scored
from ses_jax.engine.program import Inputs, Program
from ses_jax.loading import partition
from ses_jax.pipelines import sampler
from ses_jax.pipelines.guidance import unguided
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
    field = everyone(program, inputs, generation, points)
    score = components_alone(program, params, inputs)
    looks, taken = [], 0
    for place, look in enumerate(program.fidelity.looks):
        field, (seen, _) = taken_look(program, params[0], inputs, (place, taken), field, score)
        said, field = best(program, place, generation, field, seen)
        looks.append(said)
        taken = steps_after(look, taken)
    found, shown = finished(program, params[0], inputs, taken, field, scored(program, params, inputs))
    shown = None if shown is None else field.shown(shown, program.evaluated)
    return field.in_place(found, program.evaluated), jnp.stack(looks, axis=-1), shown


def everyone(program: Program, inputs: Inputs, generation: Array, points: Any) -> Field:
    """A whole generation."""
    noise = noise_of(program, inputs, points)
    index = jnp.broadcast_to(jnp.arange(noise.shape[1]), noise.shape[:2])
    counted = jnp.clip(inputs.budget - generation * program.problem.population, 0, noise.shape[1])
    return Field(index, noise, noise, counted)


def taken_look(
    program: Program, params: Any, inputs: Inputs, at: tuple[int, int], field: Field, finish: Finish
) -> tuple[Field, Any]:
    """The field after a look, and what is said and shown of its images, `[P, m, ...]`.

    `at` is the look's place, and how many steps of the preview were taken before it.
    """
    place, taken = at
    look = program.fidelity.looks[place]
    if look.kind == EARLY:
        return _early(program, params, inputs, (taken, look.steps), field, finish)
    model = program.half if look.kind == HALF else program.model
    noise = wavelet.half(field.noise) if look.kind == HALF else field.noise
    denoise = sampler.forecast if look.kind == CACHED else sampler.denoise
    prompts = inputs.looks[place], inputs.condition if look.guided else unguided(inputs.condition)
    found = denoising.images(model, program.chunk, params, prompts, rows_of(noise), finish, denoise)
    return field, _by_prompt(field, found)


def _early(
    program: Program, params: Any, inputs: Inputs, steps: tuple[int, int], field: Field, finish: Finish
) -> tuple[Field, Any]:
    """The preview from one step to another, and what it is predicted to be."""
    prompts = inputs.sigmas[steps[0] : steps[1] + 1], inputs.condition
    rows = rows_of(field.latents)
    latents, found = denoising.predicted(program.model, program.chunk, params, prompts, rows, finish)
    latents = partition.constrain(program.model.mesh, latents)
    return field._replace(latents=_by_prompt(field, latents)), _by_prompt(field, found)


def steps_after(look: Look, taken: int) -> int:
    """How many steps of the preview are taken after a look."""
    return look.steps if look.kind == EARLY else taken


def finished(program: Program, params: Any, inputs: Inputs, taken: int, field: Field, finish: Finish) -> Any:
    """What is said and shown of full previews, `[P, m, ...]`, after the steps that were taken."""
    prompts = inputs.sigmas[taken:], inputs.condition
    found = denoising.images(program.model, program.chunk, params, prompts, rows_of(field.latents), finish)
    return _by_prompt(field, found)


def _by_prompt(field: Field, tree: Any) -> Any:
    """Rows as `[P, m, ...]`."""
    return jax.tree.map(lambda x: x.reshape(*field.index.shape, *x.shape[1:]), tree)


def best(
    program: Program, place: int, generation: Array, field: Field, seen: Float[Array, "p m parts"]
) -> tuple[Float[Array, "p n"], Field]:
    """What a look's components add up to, by candidate, and the field of those that go on."""
    totals = field.hide(jax.vmap(elites.finite)(_totals(program, field.hide(seen, jnp.nan))), jnp.nan)
    look = program.fidelity.looks[place]
    return field.in_place(totals, program.evaluated), _best(program.model.mesh, look, generation, field, totals)


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
