"""The Cross-Entropy Method of Spectral Evolution Search: maximise a score over Gaussian samples.

`init -> (ask -> score -> tell) * generations`. Everything is a pure function of arrays, so a search jits, scans and
vmaps over prompts. Elites are cumulative: the best samples of all generations so far, not of the last one. Semantics:
the reference implementation of arXiv 2602.03208, which searches from mean 0 and variance 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

MIN_VARIANCE = 1e-9
EXTRA_VARIANCE = 1e-7


class State(NamedTuple):
    """A search over arrays of shape `S`.

    Attributes:
      mean: `[*S]`, of the sampling distribution.
      variance: `[*S]`, of the sampling distribution, per element.
      elite_samples: `[k, *S]`, best first.
      elite_scores: `[k]`, descending, -inf where there is no elite yet.
      best_sample: `[*S]`, the best sample so far; zeros before there is one.
      best_score: scalar, -inf before there is one.
      count: how many samples have had a finite score.
    """

    mean: Float[Array, "*shape"]
    variance: Float[Array, "*shape"]
    elite_samples: Float[Array, "k *shape"]
    elite_scores: Float[Array, " k"]
    best_sample: Float[Array, "*shape"]
    best_score: Float[Array, ""]
    count: Int[Array, ""]


def init(shape: tuple[int, ...], *, elites: int = 5) -> State:
    """A search over arrays of `shape` from the standard normal distribution, keeping `elites` samples."""
    return State(
        mean=jnp.zeros(shape, jnp.float32),
        variance=jnp.ones(shape, jnp.float32),
        elite_samples=jnp.zeros((elites, *shape), jnp.float32),
        elite_scores=jnp.full(elites, -jnp.inf, jnp.float32),
        best_sample=jnp.zeros(shape, jnp.float32),
        best_score=jnp.float32(-jnp.inf),
        count=jnp.int32(0),
    )


def ask(key: PRNGKeyArray, state: State, population: int) -> Float[Array, "population *shape"]:
    """Draws `population` samples from the state's distribution."""
    normal = jax.random.normal(key, (population, *state.mean.shape), state.mean.dtype)
    return state.mean + normal * jnp.sqrt(jnp.maximum(state.variance, MIN_VARIANCE))


def tell(state: State, samples: Float[Array, "n *shape"], scores: Float[Array, " n"]) -> State:
    """Updates the distribution with scored samples.

    The elites become the best of the old elites and the new samples (on equal scores, the earlier one stays ahead); the
    mean becomes their mean and the variance their unbiased variance + 1e-7. With one elite the variance stays, with
    none the distribution does. A sample whose score is not finite never becomes elite or best.
    """
    scores = jnp.where(jnp.isfinite(scores), scores, -jnp.inf).astype(jnp.float32)
    pool = jnp.concatenate([state.elite_samples, samples])
    pool_scores = jnp.concatenate([state.elite_scores, scores])
    order = jnp.argsort(-pool_scores, stable=True)[: state.elite_scores.size]
    elites, elite_scores = pool[order], pool_scores[order]

    mean, variance = _moments(elites, jnp.isfinite(elite_scores))
    held = jnp.isfinite(elite_scores).sum()
    best = jnp.argmax(scores)
    improved = scores[best] > state.best_score
    return State(
        mean=jnp.where(held > 0, mean, state.mean),
        variance=jnp.where(held > 1, variance + EXTRA_VARIANCE, state.variance),
        elite_samples=elites,
        elite_scores=elite_scores,
        best_sample=jnp.where(improved, samples[best], state.best_sample),
        best_score=jnp.where(improved, scores[best], state.best_score),
        count=state.count + jnp.isfinite(scores).sum(dtype=jnp.int32),
    )


def _moments(samples: jax.Array, held: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and unbiased variance over those `samples [k, *S]` that `held [k]` marks."""
    weight = held.astype(samples.dtype).reshape(-1, *(1,) * (samples.ndim - 1))
    mean = (samples * weight).sum(axis=0) / jnp.maximum(weight.sum(), 1)
    squares = (jnp.square(samples - mean) * weight).sum(axis=0)
    return mean, squares / jnp.maximum(weight.sum() - 1, 1)
