"""Evolution strategies of the package evosax, by name.

They compute and draw in JAX's default number of bits, and draws of 64 bits are others: here it is 32, whatever the
default. Its strategies keep part of what they drew in their state, ours propose points from the key alone: those are
taken here whose state does not depend on what was drawn.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ses_jax.searchers.options import Options, one_of, option
from ses_jax.searchers.searcher import Problem
from ses_jax.searchers.ses import AXES, to_shell

STRATEGIES = ("CMA_ES", "Sep_CMA_ES", "SNES", "Rm_ES")
PACKAGE = "evosax"


def _in_32_bits(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any) -> Any:
        with jax.enable_x64(False):
            return method(*args)

    return run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evosax(Options):
    """An evolution strategy, from mean 0 and standard deviation 1, that of the noise."""

    strategy: str = option("Sep_CMA_ES", one_of(*STRATEGIES), "which one, by its name in evosax")
    renormalise: str | None = option(
        None,
        one_of(None, *AXES),
        "samples are brought back to the norm of Gaussian noise, as a whole or each channel of them",
    )
    space: str = option("low", one_of("low", "whole"), "what is searched: the low band, or whole noise")

    def __post_init__(self):
        super().__post_init__()
        if importlib.util.find_spec(PACKAGE) is None:
            raise ValueError(f"needs the package {PACKAGE}: pip install 'ses_jax[{PACKAGE}]'")

    @_in_32_bits
    def init(self, problem: Problem) -> Any:
        strategy, params = self._strategy(problem)
        # The key is for a mean that the next argument replaces.
        return _narrow(strategy.init(jax.random.key(0), jnp.zeros(problem.space.like.shape, jnp.float32), params))

    @_in_32_bits
    def ask(self, problem: Problem, key: PRNGKeyArray, state: Any, generation: Int[Array, ""]) -> Array:
        strategy, params = self._strategy(problem)
        points = _narrow(strategy.ask(key, state, params)[0])
        return points if self.renormalise is None else to_shell(points, AXES[self.renormalise])

    @_in_32_bits
    def tell(self, problem: Problem, state: Any, points: Array, scores: Float[Array, " n"]) -> Any:
        """Generation by generation: a strategy's weights are for a population. Less than one ends a search."""
        if len(scores) < problem.population:
            return state
        strategy, params = self._strategy(problem)
        # Some derive what they need to learn from when they are asked, from the state alone.
        key = jax.random.key(0)

        def learn(state, generation):
            points, scores = generation
            found = jnp.isfinite(scores)
            # As bad as the worst, because not all of them can rank an infinite number.
            losses = jnp.where(found, -scores, -jnp.min(jnp.where(found, scores, jnp.inf)))
            asked = strategy.ask(key, state, params)[1]
            told = _narrow(strategy.tell(key, points, losses, asked, params)[0])
            return jax.tree.map(lambda new, old: jnp.where(found.any(), new, old), told, state), None

        generations = jax.tree.map(lambda x: x.reshape(-1, problem.population, *x.shape[1:]), (points, scores))
        return jax.lax.scan(learn, state, generations)[0]

    def _strategy(self, problem: Problem) -> tuple[Any, Any]:
        return _make(self.strategy, problem.population, problem.space.like.shape)


def _narrow(tree: Any) -> Any:
    """Numbers in 32 bits, also where JAX's default are 64."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.int32 if jnp.result_type(x).kind == "i" else jnp.float32), tree)


@functools.cache
def _make(name: str, population: int, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """A strategy and its parameters; kept, because evosax compiles its functions for each object."""
    from evosax import algorithms

    with jax.enable_x64(False), jax.ensure_compile_time_eval():
        strategy = getattr(algorithms, name)(population_size=population, solution=jnp.zeros(shape, jnp.float32))
        return strategy, strategy.default_params.replace(std_init=1.0)
