"""The compiled part of a search: pure functions from a state and arrays to the next state.

`generation_step` is one generation as one program; everything else here is a piece of it, or a small program that runs
once a prompt. The functions of a model are static arguments, its params and the prompt's arrays are traced ones: a new
prompt of the same token-length bucket runs what is already compiled.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ses_jax import cem, sampler, wavelet


class Model(NamedTuple):
    """How noise becomes images: the two functions of a pipeline that run inside the compiled step."""

    velocity: Callable[..., Array]
    decode: Callable[..., Array]


class Program(NamedTuple):
    """All that a compiled generation depends on besides arrays; equal programs share one compilation.

    Attributes:
      score: the reward's pure function, None for a reward on the host.
      shape: `(h, w)` of the latents.
      population: samples drawn a generation.
      evaluated: how many of them are denoised; fewer than drawn only where the whole budget is smaller.
      chunk: how many are denoised at a time.
    """

    model: Model
    score: Callable[..., Array] | None
    wavelet: str
    shape: tuple[int, int]
    population: int
    evaluated: int
    chunk: int


class Inputs(NamedTuple):
    """The arrays of one prompt that stay the same from generation to generation.

    Attributes:
      key: draws of generation g come from `fold_in(key, g)`.
      low: `[C, a, b]`, low band of the base noise.
      high: its high bands.
      condition, text: the prompt for the model and for the reward, leading axis 1.
      sigmas: `[preview_steps + 1]`.
      budget: int scalar, how many candidates are scored in all.
    """

    key: Array
    low: Array
    high: Any
    condition: Any
    text: Any
    sigmas: Array
    budget: Array


class Scored(NamedTuple):
    """A generation's scores `[n]` (NaN beyond the budget) and root mean squares `[n]` of the low bands."""

    scores: Array
    low_rms: Array


@functools.partial(jax.jit, static_argnums=0)
def generation_step(
    program: Program, params: Any, inputs: Inputs, generation: Array, state: cem.State
) -> tuple[cem.State, Scored]:
    """One generation: ask, preview, score, tell.

    Args:
      params: `(pipeline's, reward's)`.
      generation: int scalar, from 0.
    """
    model_params, reward_params = params
    lows = propose(program, inputs, generation, state)

    def score(rows):
        images = preview(program, model_params, inputs, rows)
        return program.score(reward_params, images, repeat_rows(inputs.text, len(rows)))

    return tell(program, inputs, generation, state, lows, in_chunks(score, lows, program.chunk))


@functools.partial(jax.jit, static_argnums=0)
def candidates(
    program: Program, params: Any, inputs: Inputs, generation: Array, state: cem.State
) -> tuple[Array, Array]:
    """For a reward on the host: low bands `[n, C, a, b]` and their previews `[n, H, W, 3]`; `update` then tells."""
    lows = propose(program, inputs, generation, state)
    return lows, in_chunks(functools.partial(preview, program, params, inputs), lows, program.chunk)


def propose(program: Program, inputs: Inputs, generation: Array, state: cem.State) -> Float[Array, "n c a b"]:
    """This generation's low bands; the very first candidate is the base noise's own."""
    lows = cem.ask(jax.random.fold_in(inputs.key, generation), state, program.population)[: program.evaluated]
    return lows.at[0].set(jnp.where(generation == 0, inputs.low, lows[0]))


def preview(program: Program, params: Any, inputs: Inputs, lows: Float[Array, "n c a b"]) -> Float[Array, "n H W 3"]:
    """Few-step images of low bands."""
    noise = wavelet.merge(lows, inputs.high, wavelet=program.wavelet, shape=program.shape)
    return _render(program.model, params, noise, inputs.sigmas, inputs.condition)


def tell(
    program: Program, inputs: Inputs, generation: Array, state: cem.State, lows: Array, scores: Array
) -> tuple[cem.State, Scored]:
    """The new state; candidates beyond the budget are hidden from it."""
    index = generation * program.population + jnp.arange(len(scores))
    scores = jnp.where(index < inputs.budget, scores, jnp.nan)
    low_rms = jnp.sqrt(jnp.mean(jnp.square(lows), axis=range(1, lows.ndim)))
    return cem.tell(state, lows, scores), Scored(scores, low_rms)


def _render(model: Model, params: Any, noise: Array, sigmas: Array, condition: Any) -> Array:
    """Images `[B, H, W, 3]` of noise `[B, C, h, w]`; a condition of one prompt serves the whole batch."""
    condition = repeat_rows(condition, len(noise))
    latents = sampler.denoise(lambda x, sigma: model.velocity(params, x, sigma, condition), noise, sigmas)
    return model.decode(params, latents)


render = functools.partial(jax.jit, static_argnums=0)(_render)
update = functools.partial(jax.jit, static_argnums=0)(tell)


@functools.partial(jax.jit, static_argnums=0)
def encode(function: Callable[[Any, Any], Any], params: Any, tokens: Any) -> Any:
    """`function(params, tokens)`, compiled: the condition of prompts."""
    return function(params, tokens)


@functools.partial(jax.jit, static_argnums=(1, 2))
def split(noise: Array, name: str, level: int) -> tuple[Array, Any]:
    """`wavelet.split`, compiled."""
    return wavelet.split(noise, wavelet=name, level=level)


@functools.partial(jax.jit, static_argnums=(2, 3))
def merge(low: Array, high: Any, name: str, shape: tuple[int, int]) -> Array:
    """`wavelet.merge`, compiled."""
    return wavelet.merge(low, high, wavelet=name, shape=shape)


def repeat_rows(tree: Any, count: int) -> Any:
    """Every array's rows, broadcast to `count` where there is only one."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x)[1:])), tree)


def in_chunks(function: Callable[[Array], Array], rows: Array, chunk: int) -> Array:
    """`function` over the leading axis of `rows`, `chunk` rows at a time."""
    if chunk >= len(rows):
        return function(rows)
    return jax.lax.map(lambda row: function(row[None])[0], rows, batch_size=chunk)
