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
from ses_jax.searchers import elites
from ses_jax.searchers.elites import Elites
from ses_jax.searchers.searcher import Problem, Searcher
from ses_jax.searchers.space import Space


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
      searcher: what proposes points.
      problem: what it is over; its population is drawn a generation.
      evaluated: how many of them are denoised; fewer than drawn only where the whole budget is smaller.
      chunk: how many rows are denoised at a time.
    """

    model: Model
    score: Callable[..., Array] | None
    weights: tuple[float, ...]
    standardize: bool
    searcher: Searcher
    problem: Problem
    evaluated: int
    chunk: int


class Inputs(NamedTuple):
    """The arrays of P prompts that stay the same from generation to generation.

    Attributes:
      key: `[P]`; draws of generation g come from `fold_in(key, g)`.
      base: `[P, *S]`, the points of the base noise: in the low band `[P, C, a, b]`.
      rest: of the noise, beside the points.
      condition, text: the prompts for the model and for the reward, leading axis P.
      sigmas: `[preview_steps + 1]`.
      budget: int scalar, how many candidates are scored a prompt.
    """

    key: Array
    base: Any
    rest: Any
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
      points: `[P, generations * n, *S]`.
      components: `[P, generations * n, parts]`, NaN where there is no candidate yet.
    """

    points: Any
    components: Array


class State(NamedTuple):
    """The search between two generations.

    Attributes:
      searcher: the searcher's own.
      best: the best point so far and its score, `[P, 1, ...]`.
      archive: None unless scores are standardised.
    """

    searcher: Any
    best: Elites
    archive: Archive | None


class Scored(NamedTuple):
    """A generation's components `[P, n, parts]` and root mean squares `[P, n]` of the low bands."""

    components: Array
    low_rms: Array


def init(program: Program, prompts: int, *, generations: int) -> State:
    """The state before the first generation."""
    archive = None
    if program.standardize:
        rows = generations * program.evaluated
        unknown = jnp.full((rows, len(program.weights)), jnp.nan, jnp.float32)
        archive = Archive(elites.none(program.problem.space.like, rows).points, unknown)
    return jax.tree.map(lambda x: jnp.repeat(x[None], prompts, axis=0), State(*_fresh(program), archive))


def _fresh(program: Program) -> tuple[Any, Elites]:
    """The states of a searcher that knows nothing, and of the best so far."""
    return program.searcher.init(program.problem), elites.none(program.problem.space.like, 1)


@compiled(static=1)
def generation_step(
    program: Program, params: Any, inputs: Inputs, generation: Array, state: State
) -> tuple[State, Scored]:
    """One generation: ask, preview, score, tell.

    Args:
      params: `(pipeline's, reward's)`.
      generation: int scalar, from 0.
    """
    points = propose(program, inputs, generation, state)

    def components(images, owner):
        return _components(program, params, inputs, images, owner)

    scores = _preview(program, params[0], inputs, points, components)
    return tell(program, inputs, generation, state, points, scores.reshape(-1, program.evaluated, scores.shape[-1]))


@compiled(static=1)
def candidates(
    program: Program, params: Any, inputs: Inputs, generation: Array, state: State
) -> tuple[Any, Array, Array]:
    """For a reward with parts on the host, `update` being the rest of the generation.

    Returns:
      Points `[P, n, *S]`, and by row their previews `[P * n, H, W, 3]` and the device parts' components
      `[P * n, device parts]`.
    """
    points = propose(program, inputs, generation, state)

    def images_and_components(images, owner):
        return images, _components(program, params, inputs, images, owner)

    return points, *_preview(program, params[0], inputs, points, images_and_components)


def propose(program: Program, inputs: Inputs, generation: Array, state: State) -> Any:
    """This generation's points `[P, n, *S]`; a prompt's very first candidate is its base noise's own."""

    def of_prompt(key, base, search):
        key = jax.random.fold_in(key, generation)
        points = program.searcher.ask(program.problem, key, search, jnp.asarray(generation))
        points = jax.tree.map(lambda x: x[: program.evaluated], points)
        return jax.tree.map(lambda x, own: x.at[0].set(jnp.where(generation == 0, own, x[0])), points, base)

    # Every device draws all of them: they are small, and splitting them would cost a sum over devices.
    return partition.constrain(program.model.mesh, jax.vmap(of_prompt)(inputs.key, inputs.base, state.searcher))


def _preview(program: Program, params: Any, inputs: Inputs, points: Any, finish: Callable) -> Any:
    """`finish(images, owner)` of the few-step images of points `[P, n, *S]`, by row."""
    noise = partition.constrain(program.model.mesh, jax.vmap(program.problem.space.merge)(points, inputs.rest))
    owner = jnp.repeat(jnp.arange(len(noise)), noise.shape[1])
    rows = Rows(noise.reshape(-1, *noise.shape[2:]), owner)
    return _images(program.model, program.chunk, params, (inputs.sigmas, inputs.condition), rows, finish)


def _components(program: Program, params: Any, inputs: Inputs, images: Array, owner: Array) -> Float[Array, "n parts"]:
    """The device parts' scores; no columns if there are none."""
    if program.score is None:
        return jnp.zeros((len(images), 0), jnp.float32)
    with partition.compiled_for(program.model.mesh):
        return program.score(params[1], images, owned(inputs.text, owner))


def tell(
    program: Program, inputs: Inputs, generation: Array, state: State, points: Any, components: Array
) -> tuple[State, Scored]:
    """The new state, from components `[P, n, parts]`; candidates beyond the budget are hidden from it."""
    index = generation * program.problem.population + jnp.arange(components.shape[1])
    components = jnp.where((index < inputs.budget)[:, None], components, jnp.nan)
    lows = program.problem.space.low(points)
    low_rms = jnp.sqrt(jnp.mean(jnp.square(lows), axis=range(2, lows.ndim)))
    told = jax.vmap(functools.partial(_tell, program, generation))(state, points, components)
    return partition.constrain(program.model.mesh, (told, Scored(components, low_rms)))


def _tell(program: Program, generation: Array, state: State, points: Any, components: Array) -> State:
    """One prompt's new state."""
    if state.archive is None:
        scores = mixture.plain_sum(components, program.weights)
        return State(*_told(program, (state.searcher, state.best), points, scores), None)
    rows = generation * len(components) + jnp.arange(len(components))
    archive = jax.tree.map(lambda old, new: old.at[rows].set(new), state.archive, Archive(points, components))
    scores = mixture.standardized_sum(archive.components, program.weights, archive.components)
    # New candidates move everybody's scores. Elites are the best of all so far, so telling all at once is the same.
    return State(*_told(program, _fresh(program), archive.points, scores), archive)


def _told(program: Program, states: tuple[Any, Elites], points: Any, scores: Array) -> tuple[Any, Elites]:
    """The searcher's state and the best so far, after scored points."""
    scores = elites.finite(scores)
    searcher, best = states
    return program.searcher.tell(program.problem, searcher, points, scores), elites.best(best, points, scores)


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


@functools.partial(jax.jit, static_argnums=0)
def split(space: Space, noise: Array) -> tuple[Any, Any]:
    """Points of noise and their rest, compiled."""
    return space.split(noise)


@functools.partial(jax.jit, static_argnums=0)
def winners(space: Space, best: Elites, rest: Any) -> Float[Array, "p c h w"]:
    """The noise of every prompt's best point, compiled."""
    return space.merge(jax.tree.map(lambda x: x[:, 0], best.points), rest)


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
