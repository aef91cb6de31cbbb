"""A search made ready: prompts encoded, noise drawn and split, weights on their devices, a chunk that fits.

The text encoders are put on their devices first and dropped before the other networks come, where a pipeline keeps its
weights on the host; for any other pipeline these steps move nothing.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ses_jax.engine import generation, memory
from ses_jax.engine.config import RenderConfig, SearchConfig
from ses_jax.engine.denoising import Model
from ses_jax.engine.fidelity import CACHED, EARLY, HALF
from ses_jax.engine.program import Inputs, Program, Shown, State
from ses_jax.loading import compiler, partition
from ses_jax.loading.programs import Compiled, comparable, compiled
from ses_jax.pipelines import sampler
from ses_jax.pipelines.base import Guidance, Pipeline
from ses_jax.rewards import device_parts
from ses_jax.rewards.reward import Reward
from ses_jax.searchers import space
from ses_jax.searchers.searcher import Problem

# Of a prompt, winner and base are rendered with all steps.
FINALS = 2


class Task(NamedTuple):
    """P prompts ready to be searched.

    Attributes:
      program: what is compiled.
      reward: its params on their devices.
      params: the pipeline's and the reward's for the compiled step.
      inputs: the prompts' arrays.
      noise: `[P, C, h, w]`, the base noise.
    """

    program: Program
    reward: Reward
    params: tuple[Any, Any]
    inputs: Inputs
    noise: Array
    prompts: tuple[str, ...]
    config: SearchConfig


def prepare(
    pipeline: Pipeline,
    reward: Reward,
    config: SearchConfig,
    prompts: Sequence[str],
    indices: Sequence[int],
    *,
    noise: np.ndarray | None = None,
    shown: Shown | None = None,
) -> Task:
    """Encodes the prompts, draws and splits their noise, and puts everything where it belongs.

    Nothing is known yet of what fits: all candidates at a time, unless the config says how many.

    Args:
      pipeline, reward, config, prompts: of the search.
      indices: choose the prompts' own random draws.
      noise: `[P, C, h, w]`, the base noise; None draws it.
      shown: what comes along of candidates beside their scores.
    """
    noise, first = draw(pipeline, config, indices, noise)
    condition = encode(pipeline, prompts, guidance=config.guidance, negative_prompt=config.negative_prompt)
    reward = device_parts.place(reward, functools.partial(partition.replicate, pipeline.mesh))
    text = device_parts.device_text(reward, prompts)
    inputs = partition.replicate(pipeline.mesh, first._replace(condition=condition, text=text))
    task = assemble(pipeline, reward, config, prompts, inputs)._replace(noise=noise)
    return task._replace(program=task.program._replace(shown=shown))


def fitted(task: Task, needed: int | None = None) -> Task:
    """The task with as many candidates at a time as fit on a device, unless its config says how many.

    Args:
      task: of all candidates at a time.
      needed: bytes that its generation needs beside its arguments; None where that is still to be asked.
    """
    if task.config.chunk:
        return task
    state, rows = initial_state(task), task.program.chunk

    def working(chunk):
        known = chunk == rows and needed is not None
        return needed if known else memory.working_bytes(lower_generation(task, state, chunk))

    chunk = memory.fitting_chunk(working, rows, memory.device_room(task.program.model.mesh))
    return task._replace(program=task.program._replace(chunk=chunk))


def draw(
    pipeline: Pipeline, config: SearchConfig, indices: Sequence[int], noise: np.ndarray | None = None
) -> tuple[Array, Inputs]:
    """The base noise `[P, C, h, w]` of prompts, and their inputs but for what is encoded; a given noise is the base."""
    drawn, keys = draws(config.seed, indices, pipeline.noise_shape(config.height, config.width))
    noise = drawn if noise is None else jnp.asarray(noise)
    base, rest = generation.split(problem_of(pipeline, config).space, noise)
    sigmas = jnp.asarray(pipeline.sigmas(config.preview_steps, config.height, config.width))
    seen = _sigmas_of_looks(pipeline, config)
    return noise, Inputs(keys, base, rest, None, None, sigmas, np.int32(config.budget), seen)


def _sigmas_of_looks(pipeline: Pipeline, config: SearchConfig) -> tuple[Array | None, ...]:
    """By look, sigmas or what stands in their place; None for those that are a part of the preview."""

    def of_look(look):
        if look.kind == CACHED:
            whole = pipeline.sigmas(config.preview_steps, config.height, config.width)
            return jnp.asarray(sampler.forecast_plan(whole, look.evaluations(config.preview_steps)))
        part = 2 if look.kind == HALF else 1
        size = config.height // part, config.width // part
        return None if look.kind == EARLY else jnp.asarray(pipeline.sigmas(look.steps or config.preview_steps, *size))

    return tuple(map(of_look, config.fidelity.looks))


def assemble(pipeline: Pipeline, reward: Reward, config: SearchConfig, prompts: Sequence[str], inputs: Inputs) -> Task:
    """The task of what lies on its devices already; all rows at a time unless the config says how many."""
    params = image_params(pipeline), device_parts.device_params(reward)
    return Task(program_of(pipeline, reward, config, prompts), reward, params, inputs, None, tuple(prompts), config)


def model_of(pipeline: Pipeline, config: RenderConfig, *, part: int = 1) -> Model:
    """What compiled programs know of a pipeline, for images of the config's size, or half of it: part 2."""
    decoded = memory.decoded_at_once(config.height // part, config.width // part, partition.platform(pipeline.mesh))
    apart = compiler.denoises_apart(pipeline.mesh)
    return Model(comparable(pipeline.velocity), comparable(pipeline.decode), pipeline.mesh, decoded, apart)


def problem_of(pipeline: Pipeline, config: SearchConfig) -> Problem:
    """What the config's searcher is over, for noise of the config's size."""
    shape = tuple(pipeline.noise_shape(config.height, config.width))
    searched = space.make(config.searcher.space, config.wavelet, config.level, shape)
    return Problem(searched, config.population, config.elites)


def program_of(pipeline: Pipeline, reward: Reward, config: SearchConfig, prompts: Sequence[str]) -> Program:
    """What a search's generations are compiled for, with all rows at a time unless the config says how many."""
    evaluated = min(config.population, config.budget)
    rows = evaluated * len(prompts)
    return Program(
        model=model_of(pipeline, config),
        score=device_parts.device_scores(reward, prompts[0]),
        weights=reward.weights,
        # Standardising a single part would change its scores and not their order.
        standardize=config.standardize and np.count_nonzero(reward.weights) > 1,
        searcher=config.searcher,
        problem=problem_of(pipeline, config),
        evaluated=evaluated,
        chunk=min(config.chunk or rows, rows),
        fidelity=config.fidelity,
        half=model_of(pipeline, config, part=2) if config.fidelity.halves else None,
    )


def compiled_part(program: Program, reward: Reward) -> Compiled:
    """That of a generation, or its first half where it is two programs."""
    if reward.on_host:
        return generation.candidates
    return generation.denoised if program.apart else generation.generation_step


def lower_generation(task: Task, state: State, chunk: int) -> list[jax.stages.Lowered]:
    """The compiled part of a generation, `chunk` candidates at a time: one program or two."""
    given = task.params, task.inputs, np.int32(0), state
    first = compiled_part(task.program, task.reward).lower(task.program._replace(chunk=chunk), *given)
    if task.reward.on_host or not task.program.apart:
        return [first]
    found = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), first.out_info)
    found = partition.replicate(task.program.model.mesh, found)
    return [first, generation.judged.lower(task.program.other_half, *given, found)]


def initial_state(task: Task) -> State:
    """The state before the first generation, where the compiled step leaves it."""
    return partition.replicate(task.program.model.mesh, first_state(task))


def first_state(task: Task) -> State:
    """The state before the first generation, wherever it lies."""
    # Only an archive is as long as the budget.
    generations = generation_count(task.config) if task.program.standardize else 0
    return generation.init(task.program, len(task.prompts), generations)


def generation_count(config: SearchConfig) -> int:
    """How many generations the budget takes."""
    return math.ceil(config.budget / config.population)


def encode(
    pipeline: Pipeline, prompts: Sequence[str], *, guidance: Guidance | None, negative_prompt: str | None
) -> Any:
    """The condition of prompts; the text encoders' weights are on their devices no longer than this takes."""
    tokens = pipeline.tokenize(list(prompts), guidance=guidance, negative_prompt=negative_prompt)
    params = pipeline.place(pipeline.text_params(pipeline.params))
    return jax.block_until_ready(generation.encode(pipeline.encode, pipeline.mesh, params, tokens))


def image_params(pipeline: Pipeline) -> Any:
    """The weights that make images, on their devices."""
    return pipeline.place(pipeline.image_params(pipeline.params))


def draws(seed: int, indices: Sequence[int], shape: Sequence[int]) -> tuple[Float[Array, "p c h w"], Key[Array, " p"]]:
    """The base noises of prompts, and the keys of their searches; a prompt's do not depend on the others."""
    return _draws(tuple(shape), _words(seed), np.asarray(indices, np.uint32))


@compiled(static=1)
def _draws(shape: tuple[int, ...], words: Array, indices: Array) -> tuple[Array, Array]:
    noise_keys, keys = jax.vmap(functools.partial(_keys, words))(indices)
    return jax.vmap(lambda key: base_noise(key, shape))(noise_keys), keys


def prompt_keys(seed: int, index: int) -> tuple[Array, Array]:
    """Keys of prompt `index`: of its base noise, and of its search. All 64 bits of the seed count."""
    return _keys(_words(seed), index)


def _words(seed: int) -> np.ndarray:
    return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)  # as `jax.random.key` has them for small seeds


def _keys(words: Array | np.ndarray, index: int | Array) -> tuple[Array, Array]:
    root = jax.random.wrap_key_data(words, impl="threefry2x32")
    noise_key, search_key = jax.random.split(jax.random.fold_in(root, index))
    return noise_key, search_key


def base_noise(key: Array, shape: tuple[int, ...]) -> Float[Array, "c h w"]:
    """The unsearched noise, float32 standard normal."""
    return jax.random.normal(key, shape, jnp.float32)
