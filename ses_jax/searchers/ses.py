"""Spectral Evolution Search (arXiv 2602.03208): the Cross-Entropy Method over the low band of the noise.

As it stands it is the reference's; its options are what the reference does not have.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ses_jax.searchers import cem, elites
from ses_jax.searchers.elites import Elites
from ses_jax.searchers.options import Options, one_of, option, whole
from ses_jax.searchers.searcher import Problem
from ses_jax.searchers.space import Both

# Over which axes a point `[C, a, b]` is brought back to the shell.
AXES = {"whole": (-3, -2, -1), "channel": (-2, -1)}


class Lent(NamedTuple):
    """A search that has begun with whole noises: over their low bands, and the high bands of the best so far.

    What comes after the whole noises has the high bands of their best, so those of the best so far stay the same.
    """

    cem: cem.State
    high: Elites


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ses(Options):
    """The distribution of the elites is where the next generation comes from."""

    renormalise: str | None = option(
        None,
        one_of(None, "whole", "channel"),
        "samples are brought back to the norm of Gaussian noise, as a whole or each channel of them",
    )
    explore: int = option(
        0, whole(at_least=0), "the first so many candidates are whole noises, and the best of them lends its high bands"
    )
    space: str = option(
        "low",
        one_of("low", "whole", "bands"),
        "what is searched: the low band, or whole noise; `bands` where `explore` is set",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.explore and self.space == "whole":
            raise ValueError(f"explore={self.explore} has no effect where space is whole")
        if self.space != "whole":
            object.__setattr__(self, "space", "bands" if self.explore else "low")

    def init(self, problem: Problem) -> cem.State | Lent:
        like = problem.space.like
        if not self.explore:
            return cem.init(like.shape, elites=problem.elites)
        return Lent(cem.init(like.low.shape, elites=problem.elites), elites.none(like.high, 1))

    def ask(self, problem: Problem, key: PRNGKeyArray, state: cem.State | Lent, generation: Int[Array, ""]) -> Any:
        if not self.explore:
            return self._samples(key, state, problem.population)
        low_key, fresh_key = jax.random.split(key)
        searched = Both(self._samples(low_key, state.cem, problem.population), state.high.points)
        index = generation * problem.population + jnp.arange(problem.population)
        exploring = (index < self.explore) | ~jnp.isfinite(state.high.scores)
        return jax.tree.map(
            lambda new, old: jnp.where(exploring.reshape(-1, *(1,) * (new.ndim - 1)), new, old),
            problem.draw(fresh_key),
            searched,
        )

    def tell(
        self, problem: Problem, state: cem.State | Lent, points: Any, scores: Float[Array, " n"]
    ) -> cem.State | Lent:
        if not self.explore:
            return cem.tell(state, points, scores)
        return Lent(cem.tell(state.cem, points.low, scores), elites.best(state.high, points.high, scores))

    def _samples(self, key: PRNGKeyArray, state: cem.State, population: int) -> Array:
        samples = cem.ask(key, state, population)
        return samples if self.renormalise is None else to_shell(samples, AXES[self.renormalise])


def to_shell(samples: Float[Array, "n c a b"], axes: tuple[int, ...]) -> Float[Array, "n c a b"]:
    """Samples scaled to a root mean square of 1 over some axes: the norm that Gaussian noise of many elements has."""
    return samples * jax.lax.rsqrt(jnp.mean(jnp.square(samples), axis=axes, keepdims=True))
