"""The best points so far, and their scores."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Elites(NamedTuple):
    """The `k` best of all points so far.

    Attributes:
      points: pytree whose arrays are `[k, ...]`, best first; zeros where there is none yet.
      scores: `[k]`, descending, -inf where there is none yet.
    """

    points: Any
    scores: Float[Array, " k"]


def none(like: Any, count: int) -> Elites:
    """Room for `count` points, of which `like` is one, or its shapes."""
    points = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), jnp.float32), like)
    return Elites(points, jnp.full(count, -jnp.inf, jnp.float32))


def best(elites: Elites, points: Any, scores: Float[Array, " n"]) -> Elites:
    """The best of the elites and of `points`, arrays of `[n, ...]`.

    On equal scores the earlier point stays ahead. A point whose score is not finite never enters.
    """
    scores = finite(scores)
    pool = jax.tree.map(lambda old, new: jnp.concatenate([old, new]), elites.points, points)
    pool_scores = jnp.concatenate([elites.scores, scores])
    order = jnp.argsort(-pool_scores, stable=True)[: elites.scores.size]
    return Elites(jax.tree.map(lambda x: x[order], pool), pool_scores[order])


def finite(scores: Float[Array, " n"]) -> Float[Array, " n"]:
    """Scores in float32, -inf where they are not finite."""
    return jnp.where(jnp.isfinite(scores), scores, -jnp.inf).astype(jnp.float32)
