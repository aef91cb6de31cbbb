"""The compiled part of a search: pure functions from a state and arrays to the next state.

`generation_step` is one generation of one or more prompts as one program; everything else here is a piece of it, or a
small program that runs once a prompt. The functions of a model are static arguments, its params and the prompts' arrays
are traced ones: new prompts of the same token-length bucket run what is already compiled.

Prompts stand along a leading axis P of states and inputs. For the networks, P prompts with N candidates each are P * N
rows, prompt after prompt, which a mesh spreads over its data axis.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ses_jax.engine import memory
from ses_jax.loading import partition
from ses_jax.loading.programs import compiled
from ses_jax.pipelines import sampler
from ses_jax.rewards import mixture
from ses_jax.searchers import cem, wavelet


class Model(NamedTuple):
    """How noise becomes images: the two functions of a pipeline that run inside the compiled step, and its devices.

    Attributes:
      mesh: None is the default device.
      decoded: how many rows each device decodes, and scores, at a time; None is all of them.
    """

    velocity: Callable[..., Array]
    decode: Callable[..., Array]
    mesh: Mesh | None = None
    decoded: int | None = None


class Program(NamedTuple):
    """All that a compiled generation depends on besides arrays; equal programs share one compilation.

    Attributes:
      score: `(params, images, texts) -> [n, parts]`, the reward's parts on the device; None if there are none.
      weights: of all parts in the sum.
      standardize: whether parts are standardised over all candidates so far before they are summed.
      shape: `(h, w)` of the latents.
      population: samples drawn a generation.
      evaluated: how many of them are denoised; fewer than drawn only where the whole budget is smaller.
      chunk: how many rows are denoised at a time.
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
    """The arrays of P prompts that stay the same from generation to generation.

    Attributes:
      key: `[P]`; draws of generation g come from `fold_in(key, g)`.
      low: `[P, C, a, b]`, low bands of the base noise.
      high: their high bands.
      condition, text: the prompts for the model and for the reward, leading axis P.
      sigmas: `[preview_steps + 1]`.
      budget: int scalar, how many candidates are scored a prompt.
    """

    key: Array
    low: Array
    high: Any
    condition: Any
    text: Any
    sigmas: Array
    budget: Array


class Rows(NamedTuple):
    """A batch for the networks: noise `[r, C, h, w]`, and which prompt each row belongs to, `[r]`."""

    noise: Array
    owner: Array


class Archive(NamedTuple):
    """All candidates so far, for a mixture whose scores change as the population grows.

    Attributes:
      lows: `[P, generations * n, C, a, b]`.
      components: `[P, generations * n, parts]`, NaN where there is no candidate yet.
    """

    lows: Array
    components: Array


class State(NamedTuple):
    """The search between two generations; the archive is None unless scores are standardised."""

    cem: cem.State
    archive: Archive | None


class Scored(NamedTuple):
    """A generation's components `[P, n, parts]` and root mean squares `[P, n]` of the low bands."""

    components: Array
    low_rms: Array


def init(program: Program, low_shape: tuple[int, ...], *, elites: int, generations: int) -> State:
    """The state before the first generation, for low bands of shape `[P, C, a, b]`."""
    prompts, *shape = low_shape
    archive = None
    if program.standardize:
        rows = generations * program.evaluated
        unknown = jnp.full((rows, len(program.weights)), jnp.nan, jnp.float32)
        archive = Archive(jnp.zeros((rows, *shape), jnp.float32), unknown)
    state = State(cem.init(tuple(shape), elites=elites), archive)
    return jax.tree.map(lambda x: jnp.repeat(x[None], prompts, axis=0), state)


@compiled(static=1)
def generation_step(
    program: Program, params: Any, inputs: Inputs, generation: Array, state: State
) -> tuple[State, Scored]:
    """One generation: ask, preview, score, tell.

    Args:
      params: `(pipeline's, reward's)`.
      generation: int scalar, from 0.
    """
    lows = propose(program, inputs, generation, state)

    def components(images, owner):
        return _components(program, params, inputs, images, owner)

    scores = _preview(program, params[0], inputs, lows, components)
    return tell(program, inputs, generation, state, lows, scores.reshape(*lows.shape[:2], -1))


@compiled(static=1)
def candidates(
    program: Program, params: Any, inputs: Inputs, generation: Array, state: State
) -> tuple[Array, Array, Array]:
    """For a reward with parts on the host, `update` being the rest of the generation.

    Returns:
      Low bands `[P, n, C, a, b]`, and by row their previews `[P * n, H, W, 3]` and the device parts' components
      `[P * n, device parts]`.
    """
    lows = propose(program, inputs, generation, state)

    def images_and_components(images, owner):
        return images, _components(program, params, inputs, images, owner)

    return lows, *_preview(program, params[0], inputs, lows, images_and_components)


def propose(program: Program, inputs: Inputs, generation: Array, state: State) -> Float[Array, "p n c a b"]:
    """This generation's low bands; a prompt's very first candidate is its base noise's own."""

    def of_prompt(key, low, search):
        lows = cem.ask(jax.random.fold_in(key, generation), search, program.population)[: program.evaluated]
        return lows.at[0].set(jnp.where(generation == 0, low, lows[0]))

    # Every device draws all of them: they are small, and splitting them would cost a sum over devices.
    return partition.constrain(program.model.mesh, jax.vmap(of_prompt)(inputs.key, inputs.low, state.cem))


def _preview(program: Program, params: Any, inputs: Inputs, lows: Array, finish: Callable) -> Any:
    """`finish(images, owner)` of the few-step images of low bands `[P, n, C, a, b]`, by row."""
    merge_one = functools.partial(wavelet.merge, wavelet=program.wavelet, shape=program.shape)
    noise = partition.constrain(program.model.mesh, jax.vmap(merge_one)(lows, inputs.high))
    owner = jnp.repeat(jnp.arange(len(lows)), lows.shape[1])
    rows = Rows(noise.reshape(-1, *noise.shape[2:]), owner)
    return _images(program.model, program.chunk, params, (inputs.sigmas, inputs.condition), rows, finish)


def _components(program: Program, params: Any, inputs: Inputs, images: Array, owner: Array) -> Float[Array, "n parts"]:
    """The device parts' scores; no columns if there are none."""
    if program.score is None:
        return jnp.zeros((len(images), 0), jnp.float32)
    with partition.compiled_for(program.model.mesh):
        return program.score(params[1], images, owned(inputs.text, owner))


def tell(
    program: Program, inputs: Inputs, generation: Array, state: State, lows: Array, components: Array
) -> tuple[State, Scored]:
    """The new state, from components `[P, n, parts]`; candidates beyond the budget are hidden from it."""
    index = generation * program.population + jnp.arange(components.shape[1])
    components = jnp.where((index < inputs.budget)[:, None], components, jnp.nan)
    low_rms = jnp.sqrt(jnp.mean(jnp.square(lows), axis=range(2, lows.ndim)))
    told = jax.vmap(functools.partial(_tell, program, generation))(state, lows, components)
    return partition.constrain(program.model.mesh, (told, Scored(components, low_rms)))


def _tell(program: Program, generation: Array, state: State, lows: Array, components: Array) -> State:
    """One prompt's new state."""
    if state.archive is None:
        return State(cem.tell(state.cem, lows, mixture.plain_sum(components, program.weights)), None)
    rows = generation * len(lows) + jnp.arange(len(lows))
    archive = Archive(state.archive.lows.at[rows].set(lows), state.archive.components.at[rows].set(components))
    scores = mixture.standardized_sum(archive.components, program.weights, archive.components)
    # New candidates move everybody's scores. Elites are the best of all so far, so telling all at once is the same.
    fresh = cem.init(lows.shape[1:], elites=state.cem.elite_scores.size)
    return State(cem.tell(fresh, archive.lows, scores), archive)


def _images(
    model: Model, chunk: int, params: Any, prompts: tuple[Array, Any], rows: Rows, finish: Callable[[Array, Array], Any]
) -> Any:
    """`finish(images, owner)` of all rows, `chunk` rows at a time; `prompts` are sigmas and conditions.

    On a mesh the rows are denoised along the data axis. Surplus rows fill the last split and are thrown away.
    """
    sigmas, condition = prompts

    def run(part: Rows) -> Any:
        part = partition.constrain(model.mesh, part, partition.DATA)
        texts = partition.constrain(model.mesh, owned(condition, part.owner), partition.DATA)

        def velocity(latents, sigma):
            # Said again and again: where the rows go afterwards would spread into the loop.
            latents = partition.constrain(model.mesh, latents, partition.DATA)
            with partition.compiled_for(model.mesh):
                out = model.velocity(params, latents, sigma, texts)
            return partition.constrain(model.mesh, out, partition.DATA)

        latents = sampler.denoise(velocity, part.noise, sigmas)
        latents = partition.constrain(model.mesh, latents, partition.DATA)
        return _decoded(model, params, Rows(latents, part.owner), finish)

    count, data = len(rows.owner), partition.size(model.mesh, partition.DATA)
    out = in_chunks(run, _fill(rows, data), -(-chunk // data) * data)
    return jax.tree.map(lambda x: x[:count], out)


def _decoded(model: Model, params: Any, rows: Rows, finish: Callable[[Array, Array], Any]) -> Any:
    """`finish(images, owner)` of denoised rows.

    On a mesh they are spread over all devices, which the small networks have no other use for.
    """

    def run(part: Rows) -> Any:
        latents, owner = partition.constrain(model.mesh, part, *partition.AXES)
        with partition.compiled_for(model.mesh):
            images = model.decode(params, latents)
        return partition.constrain(model.mesh, finish(images, owner))

    devices, count = partition.size(model.mesh, *partition.AXES), len(rows.owner)
    chunk = devices * memory.even_part(-(-count // devices), model.decoded)
    out = in_chunks(run, _fill(rows, chunk), chunk)
    return jax.tree.map(lambda x: x[:count], out)


def _fill(rows: Rows, multiple: int) -> Rows:
    """The rows, with copies of the first one behind them, so that their number is a multiple."""
    surplus = -len(rows.owner) % multiple
    return jax.tree.map(lambda x: jnp.concatenate([x, jnp.repeat(x[:1], surplus, axis=0)]), rows)


@compiled(static=2)
def render(
    model: Model,
    chunk: int,
    params: Any,
    prompts: tuple[Array, Any],
    rows: Rows,
) -> Float[Array, "r H W 3"]:
    """Images of rows; `prompts` are `(sigmas, condition)`, the condition of all the rows' owners."""
    return _images(model, chunk, params, prompts, rows, lambda images, owner: images)


score = compiled(static=1)(_components)
update = compiled(static=1)(tell)


@compiled(static=2)
def encode(function: Callable[[Any, Any], Any], mesh: Mesh | None, params: Any, tokens: Any) -> Any:
    """`function(params, tokens)`, compiled: the condition of prompts."""
    with partition.compiled_for(mesh):
        return partition.constrain(mesh, function(params, tokens))


@functools.partial(jax.jit, static_argnums=(1, 2))
def split(noise: Array, name: str, level: int) -> tuple[Array, Any]:
    """`wavelet.split`, compiled."""
    return wavelet.split(noise, wavelet=name, level=level)


@functools.partial(jax.jit, static_argnums=(2, 3))
def merge(low: Array, high: Any, name: str, shape: tuple[int, int]) -> Array:
    """`wavelet.merge` of every prompt's one low band, compiled."""
    return wavelet.merge(low, high, wavelet=name, shape=shape)


def owned(tree: Any, owner: Int[Array, " r"]) -> Any:
    """Every array's rows `[P, ...]` as `[r, ...]`, each row its owner's."""

    def take(x):
        x = jnp.asarray(x)
        return jnp.broadcast_to(x, (len(owner), *x.shape[1:])) if len(x) == 1 else x[owner]

    return jax.tree.map(take, tree)


def in_chunks(function: Callable[[Any], Any], rows: Any, chunk: int) -> Any:
    """`function` over the leading axis of the arrays in `rows`, `chunk` at a time; its outputs have that axis too."""
    count = len(jax.tree.leaves(rows)[0])
    if chunk >= count:
        return function(rows)
    whole = count - count % chunk
    stacked = jax.tree.map(lambda x: x[:whole].reshape(-1, chunk, *x.shape[1:]), rows)
    # Not -1: an array may have no columns.
    out = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), jax.lax.map(function, stacked))
    if whole == count:
        return out
    rest = function(jax.tree.map(lambda x: x[whole:], rows))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, rest)
