"""The Cross-Entropy Method of Spectral Evolution Search: maximise a score over Gaussian samples.

`init -> (ask -> score -> tell) * generations`. Everything is a pure function of arrays, so a search jits, scans and
vmaps over prompts. Elites are cumulative: the best samples of all generations so far, not of the last one. Semantics:
the reference implementation of arXiv 2602.03208, which searches from mean 0 and variance 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ses_jax.searchers import elites as best_so_far
from ses_jax.searchers.elites import Elites

MIN_VARIANCE = 1e-9
EXTRA_VARIANCE = 1e-7


class State(NamedTuple):
    """A search over arrays of shape `S`.

    Attributes:
      mean: `[*S]`, of the sampling distribution.
      variance: `[*S]`, of the sampling distribution, per element.
      elite_samples: `[k, *S]`, best first.
      elite_scores: `[k]`, descending, -inf where there is no elite yet.
      count: how many samples have had a finite score.
    """

    mean: Float[Array, "*shape"]
    variance: Float[Array, "*shape"]
    elite_samples: Float[Array, "k *shape"]
    elite_scores: Float[Array, " k"]
    count: Int[Array, ""]

    @property
    def best_sample(self) -> Float[Array, "*shape"]:
        """`[*S]`, the best sample so far; zeros before there is one."""
        return self.elite_samples[0]

    @property
    def best_score(self) -> Float[Array, ""]:
        """Its score, -inf before there is one."""
        return self.elite_scores[0]


def init(shape: tuple[int, ...], *, elites: int = 5) -> State:
    """A search over arrays of `shape` from the standard normal distribution, keeping `elites` samples."""
    mean = jnp.zeros(shape, jnp.float32)
    return State(mean, jnp.ones(shape, jnp.float32), *best_so_far.none(mean, elites), count=jnp.int32(0))


def ask(key: PRNGKeyArray, state: State, population: int) -> Float[Array, "population *shape"]:
    """Draws `population` samples from the state's distribution."""
    normal = jax.random.normal(key, (population, *state.mean.shape), state.mean.dtype)
    return state.mean + normal * jnp.sqrt(jnp.maximum(state.variance, MIN_VARIANCE))


def tell(state: State, samples: Float[Array, "n *shape"], scores: Float[Array, " n"]) -> State:
    """Updates the distribution with scored samples.

    The elites become the best of the old elites and the new samples (on equal scores, the earlier one stays ahead); the
    mean becomes their mean and the variance their unbiased variance + 1e-7. With one elite the variance stays, with
    none the distribution does. A sample whose score is not finite never becomes elite.
    """
    found = best_so_far.best(Elites(state.elite_samples, state.elite_scores), samples, scores)
    mean, variance = _moments(found.points, jnp.isfinite(found.scores))
    held = jnp.isfinite(found.scores).sum()
    return State(
        mean=jnp.where(held > 0, mean, state.mean),
        variance=jnp.where(held > 1, variance + EXTRA_VARIANCE, state.variance),
        elite_samples=found.points,
        elite_scores=found.scores,
        count=state.count + jnp.isfinite(scores).sum(dtype=jnp.int32),
    )


def _moments(samples: jax.Array, held: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and unbiased variance over those `samples [k, *S]` that `held [k]` marks."""
    weight = held.astype(samples.dtype).reshape(-1, *(1,) * (samples.ndim - 1))
    mean = (samples * weight).sum(axis=0) / jnp.maximum(weight.sum(), 1)
    squares = (jnp.square(samples - mean) * weight).sum(axis=0)
    return mean, squares / jnp.maximum(weight.sum() - 1, 1)
