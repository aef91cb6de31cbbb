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

from ses_jax import cem, mixture, sampler, wavelet


class Model(NamedTuple):
    """How noise becomes images: the two functions of a pipeline that run inside the compiled step."""

    velocity: Callable[..., Array]
    decode: Callable[..., Array]


class Program(NamedTuple):
    """All that a compiled generation depends on besides arrays; equal programs share one compilation.

    Attributes:
      score: `(params, images, texts) -> [n, parts]`, the reward's parts on the device; None if there are none.
      weights: of all parts in the sum.
      standardize: whether parts are standardised over all candidates so far before they are summed.
      shape: `(h, w)` of the latents.
      population: samples drawn a generation.
      evaluated: how many of them are denoised; fewer than drawn only where the whole budget is smaller.
      chunk: how many are denoised at a time.
    """

    model: Model
    score: Callable[..., Array] | None
    weights: tuple[float, ...]
    standardize: bool
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


class Archive(NamedTuple):
    """All candidates so far, for a mixture whose scores change as the population grows.

    Attributes:
      lows: `[generations * n, C, a, b]`.
      components: `[generations * n, parts]`, NaN where there is no candidate yet.
    """

    lows: Array
    components: Array


class State(NamedTuple):
    """The search between two generations; the archive is None unless scores are standardised."""

    cem: cem.State
    archive: Archive | None


class Scored(NamedTuple):
    """A generation's components `[n, parts]` and root mean squares `[n]` of the low bands."""

    components: Array
    low_rms: Array


def init(program: Program, low_shape: tuple[int, ...], *, elites: int, generations: int) -> State:
    """The state before the first generation."""
    archive = None
    if program.standardize:
        rows = generations * program.evaluated
        archive = Archive(jnp.zeros((rows, *low_shape)), jnp.full((rows, len(program.weights)), jnp.nan, jnp.float32))
    return State(cem.init(low_shape, elites=elites), archive)


@functools.partial(jax.jit, static_argnums=0)
def generation_step(
    program: Program, params: Any, inputs: Inputs, generation: Array, state: State
) -> tuple[State, Scored]:
    """One generation: ask, preview, score, tell.

    Args:
      params: `(pipeline's, reward's)`.
      generation: int scalar, from 0.
    """
    lows = propose(program, inputs, generation, state)

    def components(rows):
        return _components(program, params, inputs, preview(program, params[0], inputs, rows))

    return tell(program, inputs, generation, state, lows, in_chunks(components, lows, program.chunk))


@functools.partial(jax.jit, static_argnums=0)
def candidates(
    program: Program, params: Any, inputs: Inputs, generation: Array, state: State
) -> tuple[Array, Array, Array]:
    """For a reward with parts on the host, `update` being the rest of the generation.

    Returns:
      Low bands `[n, C, a, b]`, their previews `[n, H, W, 3]`, and the device parts' components `[n, device parts]`.
    """
    lows = propose(program, inputs, generation, state)

    def images_and_components(rows):
        images = preview(program, params[0], inputs, rows)
        return images, _components(program, params, inputs, images)

    return lows, *in_chunks(images_and_components, lows, program.chunk)


def propose(program: Program, inputs: Inputs, generation: Array, state: State) -> Float[Array, "n c a b"]:
    """This generation's low bands; the very first candidate is the base noise's own."""
    lows = cem.ask(jax.random.fold_in(inputs.key, generation), state.cem, program.population)[: program.evaluated]
    return lows.at[0].set(jnp.where(generation == 0, inputs.low, lows[0]))


def preview(program: Program, params: Any, inputs: Inputs, lows: Float[Array, "n c a b"]) -> Float[Array, "n H W 3"]:
    """Few-step images of low bands."""
    noise = wavelet.merge(lows, inputs.high, wavelet=program.wavelet, shape=program.shape)
    return _render(program.model, params, noise, inputs.sigmas, inputs.condition)


def _components(program: Program, params: Any, inputs: Inputs, images: Array) -> Float[Array, "n parts"]:
    """The device parts' scores; no columns if there are none."""
    if program.score is None:
        return jnp.zeros((len(images), 0))
    return program.score(params[1], images, repeat_rows(inputs.text, len(images)))


def tell(
    program: Program, inputs: Inputs, generation: Array, state: State, lows: Array, components: Array
) -> tuple[State, Scored]:
    """The new state; candidates beyond the budget are hidden from it."""
    index = generation * program.population + jnp.arange(len(components))
    components = jnp.where((index < inputs.budget)[:, None], components, jnp.nan)
    low_rms = jnp.sqrt(jnp.mean(jnp.square(lows), axis=range(1, lows.ndim)))
    return _tell(program, generation, state, lows, components), Scored(components, low_rms)


def _tell(program: Program, generation: Array, state: State, lows: Array, components: Array) -> State:
    if state.archive is None:
        return State(cem.tell(state.cem, lows, mixture.plain_sum(components, program.weights)), None)
    rows = generation * len(lows) + jnp.arange(len(lows))
    archive = Archive(state.archive.lows.at[rows].set(lows), state.archive.components.at[rows].set(components))
    scores = mixture.standardized_sum(archive.components, program.weights, archive.components)
    # New candidates move everybody's scores. Elites are the best of all so far, so telling all at once is the same.
    fresh = cem.init(lows.shape[1:], elites=state.cem.elite_scores.size)
    return State(cem.tell(fresh, archive.lows, scores), archive)


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


def in_chunks(function: Callable[[Array], Any], rows: Array, chunk: int) -> Any:
    """`function` over the leading axis of `rows`, `chunk` rows at a time; its outputs have that axis too."""
    if chunk >= len(rows):
        return function(rows)
    return jax.lax.map(lambda row: jax.tree.map(lambda x: x[0], function(row[None])), rows, batch_size=chunk)
