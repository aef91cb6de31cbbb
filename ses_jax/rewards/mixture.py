"""How the parts of a reward become one score: a plain weighted sum, or one of standardised parts."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Components = Float[Array | np.ndarray, "n parts"]


def plain_sum(components: Components, weights: Sequence[float]) -> Float[Array | np.ndarray, " n"]:
    """Weighted sums of components; a part of weight zero does not enter, not even as NaN."""
    return sum(weight * components[:, i] for i, weight in enumerate(weights) if weight)


def standardized_sum(
    components: Components, weights: Sequence[float], population: Float[Array | np.ndarray, "m parts"]
) -> Float[Array, " n"]:
    """Weighted sums of components, each standardised to mean 0 and deviation 1 over a population.

    Args:
      components: `[n, parts]`.
      weights: of the parts; a part of weight zero does not enter.
      population: `[m, parts]`; rows in which a weighted part is not finite do not count. A part that is constant over
        the population counts for nothing.
    """
    driving = np.flatnonzero(weights)
    offset, mean, scale = _moments(population[:, driving])
    # Scores of a large common offset, such as 20 +- 0.1, keep their digits if it goes first.
    return ((components[:, driving] - offset - mean) * scale) @ jnp.asarray(weights, jnp.float32)[driving]


def standardized_slopes(weights: Sequence[float], population: Components) -> Float[Array, " driving"]:
    """Derivatives of `standardized_sum` with respect to the components of weight, mean and deviation held."""
    driving = np.flatnonzero(weights)
    return _moments(population[:, driving])[2] * jnp.asarray(weights, jnp.float32)[driving]


def _moments(population: Components) -> tuple[Array, Array, Array]:
    """An offset, the mean beside it, and what the deviation divides by; `[parts]` each."""
    valid = jnp.isfinite(population).all(axis=1, keepdims=True)
    count = jnp.maximum(valid.sum(), 1)
    offset = jnp.where(valid, population, 0).sum(axis=0) / count
    population = jnp.where(valid, population - offset, 0)
    mean = population.sum(axis=0) / count
    deviation = jnp.sqrt(jnp.where(valid, jnp.square(population - mean), 0).sum(axis=0) / count)
    # A deviation that is only rounding would blow rounding up to the size of a real difference.
    constant = deviation <= 1e-6 * jnp.abs(offset)
    # Times zero rather than zero: what is not finite stays so.
    return offset, mean, jnp.where(constant, 0.0, 1.0 / jnp.where(constant, 1.0, deviation))
