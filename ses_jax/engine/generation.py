"""The compiled part of a search: pure functions from a state and arrays to the next state.

`generation_step` is one generation of one or more prompts as one program, `denoised` and `judged` are the same as two;
everything else here is a piece of it, or a small program that runs once a prompt. The functions of a model are static
arguments, its params and the prompts' arrays are traced ones: new prompts of the same token-length bucket run what is
already compiled.

Prompts stand along a leading axis P of states and inputs. For the networks, P prompts with N candidates each are P * N
rows, prompt after prompt, which a mesh spreads over its data axis.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ses_jax.engine import denoising, gradients, looks, previews
from ses_jax.engine.denoising import Model, Rows
from ses_jax.engine.program import Archive, Inputs, Program, Scored, State
from ses_jax.loading import partition
from ses_jax.loading.programs import compiled
from ses_jax.rewards import mixture
from ses_jax.searchers import elites
from ses_jax.searchers.elites import Elites
from ses_jax.searchers.space import Space


@compiled(static=3)
def init(program: Program, prompts: int, generations: int) -> State:
    """The state before the first generation; an archive has room for so many."""
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
    seen = slopes = None
    if program.needs_gradient:
        components, shown, slopes = gradients.previewed(program, params, inputs, (generation, state.archive), points)
    elif program.fidelity.looks:
        components, seen, shown = looks.previewed(program, params, inputs, generation, points)
    else:
        finish = previews.scored(program, params, inputs)
        found = previews.preview(program, params[0], inputs, points, finish)
        components, shown = jax.tree.map(lambda x: x.reshape(-1, program.evaluated, *x.shape[1:]), found)
    new, scored = tell(program, inputs, generation, state, points, components, slopes)
    return new, _with(program, inputs, points, scored._replace(looks=seen, previews=shown))


@compiled(static=1, denoises=True)
def denoised(program: Program, params: Any, inputs: Inputs, generation: Array, state: State) -> tuple[Any, Array]:
    """The first half of a generation that is two programs: points `[P, n, *S]`, and their previews' latents by row."""
    points = propose(program, inputs, generation, state)
    rows = previews.rows_of(previews.noise_of(program, inputs, points))
    prompts = inputs.sigmas, inputs.condition
    return points, denoising.latents(program.model, program.chunk, params[0], prompts, rows)


@compiled(static=1)
def judged(
    program: Program, params: Any, inputs: Inputs, generation: Array, state: State, found: tuple[Any, Array]
) -> tuple[State, Scored]:
    """The other half, of what the first one gives: decode, score, tell."""
    points, latents = found
    owner = jnp.repeat(jnp.arange(len(inputs.key)), program.evaluated)
    finish = previews.scored(program, params, inputs)
    seen = denoising.decoded(program.model, params[0], Rows(latents, owner), finish)
    components, shown = jax.tree.map(lambda x: x.reshape(-1, program.evaluated, *x.shape[1:]), seen)
    new, scored = tell(program, inputs, generation, state, points, components)
    return new, _with(program, inputs, points, scored._replace(previews=shown))


def _with(program: Program, inputs: Inputs, points: Any, scored: Scored) -> Scored:
    """What is known of a generation, with the noise where it is shown; all of it whole on every device."""
    noise = previews.noise_of(program, inputs, points) if program.shown and program.shown.noise else None
    return partition.constrain(program.model.mesh, scored._replace(noise=noise))


@compiled(static=1)
def candidates(
    program: Program, params: Any, inputs: Inputs, generation: Array, state: State
) -> tuple[Any, Array, Array]:
    """For a reward with parts on the host, `update` being the rest of the generation.

    Returns:
      Points `[P, n, *S]`, and by row the device parts' components of their previews `[P * n, device parts]`, and the
      previews `[P * n, H, W, 3]`.
    """
    points = propose(program, inputs, generation, state)
    finish = previews.with_images(program, params, inputs)
    return points, *previews.preview(program, params[0], inputs, points, finish)


pixels = compiled(static=1)(lambda side, images: previews.pixels(images, side))


def propose(program: Program, inputs: Inputs, generation: Array, state: State) -> Any:
    """This generation's points `[P, n, *S]`; a prompt's very first candidate is its base noise's own."""

    def of_prompt(key, base, search):
        key = jax.random.fold_in(key, generation)
        points = program.searcher.ask(program.problem, key, search, jnp.asarray(generation))
        points = jax.tree.map(lambda x: x[: program.evaluated], points)
        return jax.tree.map(lambda x, own: x.at[0].set(jnp.where(generation == 0, own, x[0])), points, base)

    # Every device draws all of them: they are small, and splitting them would cost a sum over devices.
    return partition.constrain(program.model.mesh, jax.vmap(of_prompt)(inputs.key, inputs.base, state.searcher))


def tell(
    program: Program,
    inputs: Inputs,
    generation: Array,
    state: State,
    points: Any,
    components: Array,
    slopes: Any = None,
) -> tuple[State, Scored]:
    """The new state, from components `[P, n, parts]`; candidates beyond the budget are hidden from it.

    `slopes` are the gradients of the scores with respect to the points, for a searcher that needs them.
    """
    components = previews.within_budget(program, inputs, generation, components)
    lows = program.problem.space.low(points)
    low_rms = jnp.sqrt(jnp.mean(jnp.square(lows), axis=range(2, lows.ndim)))
    told = jax.vmap(functools.partial(_tell, program, generation))(state, points, components, slopes)
    return partition.constrain(program.model.mesh, (told, Scored(components, low_rms)))


def _tell(program: Program, generation: Array, state: State, points: Any, components: Array, slopes: Any) -> State:
    """One prompt's new state."""
    if state.archive is None:
        scores = mixture.plain_sum(components, program.weights)
        return State(*_told(program, (state.searcher, state.best), points, scores, slopes), None)
    archive = gradients.archived(state.archive, generation, Archive(points, components))
    scores = mixture.standardized_sum(archive.components, program.weights, archive.components)
    # New candidates move everybody's scores. Elites are the best of all so far, so telling all at once is the same.
    searcher, best = _fresh(program)
    if slopes is None:
        return State(*_told(program, (searcher, best), archive.points, scores), archive)
    # Gradients are those of the scores as they were; what was learnt from them stays.
    now = mixture.standardized_sum(components, program.weights, archive.components)
    searcher, _ = _told(program, (state.searcher, best), points, now, slopes)
    return State(searcher, elites.best(best, archive.points, elites.finite(scores)), archive)


def _told(
    program: Program, states: tuple[Any, Elites], points: Any, scores: Array, slopes: Any = None
) -> tuple[Any, Elites]:
    """The searcher's state and the best so far, after scored points."""
    scores = elites.finite(scores)
    searcher, best = states
    seen = (points, scores) if slopes is None else (points, scores, slopes)
    return program.searcher.tell(program.problem, searcher, *seen), elites.best(best, points, scores)


@compiled(static=2)
def render(
    model: Model,
    chunk: int,
    params: Any,
    prompts: tuple[Array, Any],
    rows: Rows,
) -> Float[Array, "r H W 3"]:
    """Images of rows; `prompts` are `(sigmas, condition)`, the condition of all the rows' owners."""
    return denoising.images(model, chunk, params, prompts, rows, denoising.IMAGES)[1]


score = compiled(static=1)(previews.components)
noise_of = compiled(static=1)(previews.noise_of)
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
