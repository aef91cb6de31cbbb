"""How the parts of a reward become one score: a plain weighted sum, or one of standardised parts.

What NumPy arrays are given is computed by NumPy: on the host populations grow with every generation, and JAX would
compile each operation anew for each size.
"""

from collections.abc import Sequence
from types import ModuleType

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Components = Float[Array | np.ndarray, "n parts"]
# Scores may be infinite or no numbers, and JAX says nothing of it either.
SILENT = np.errstate(invalid="ignore", over="ignore")


def plain_sum(components: Components, weights: Sequence[float]) -> Float[Array | np.ndarray, " n"]:
    """Weighted sums of components; a part of weight zero does not enter, not even as NaN."""
    return sum(weight * components[:, i] for i, weight in enumerate(weights) if weight)


@SILENT
def standardized_sum(
    components: Components, weights: Sequence[float], population: Float[Array | np.ndarray, "m parts"]
) -> Float[Array | np.ndarray, " n"]:
    """Weighted sums of components, each standardised to mean 0 and deviation 1 over a population.

    Args:
      components: `[n, parts]`.
      weights: of the parts; a part of weight zero does not enter.
      population: `[m, parts]`; rows in which a weighted part is not finite do not count. A part that is constant over
        the population counts for nothing.
    """
    driving = np.flatnonzero(weights)
    offset, mean, scale = _moments(population[:, driving])
    # Scores of a large common offset, such as 20 +- 0.1, keep their digits if it goes first. No matrix product: devices
    # take that of float32 with fewer digits, and the best there would not be the best of the history.
    return ((components[:, driving] - offset - mean) * scale * np.float32(weights)[driving]).sum(axis=1)


def standardized_slopes(weights: Sequence[float], population: Components) -> Float[Array | np.ndarray, " driving"]:
    """Derivatives of `standardized_sum` with respect to the components of weight, mean and deviation held."""
    driving = np.flatnonzero(weights)
    return _moments(population[:, driving])[2] * np.float32(weights)[driving]


@SILENT
def _moments(population: Components) -> tuple[Array | np.ndarray, ...]:
    """An offset, the mean beside it, and what the deviation divides by; `[parts]` each."""
    xp: ModuleType = np if isinstance(population, np.ndarray) else jnp
    valid = xp.isfinite(population).all(axis=1, keepdims=True)
    count = xp.maximum(valid.sum(), 1).astype(np.float32)
    offset = xp.where(valid, population, 0).sum(axis=0) / count
    population = xp.where(valid, population, offset) - offset
    mean = population.sum(axis=0) / count
    deviation = xp.sqrt(xp.where(valid, xp.square(population - mean), 0).sum(axis=0) / count)
    # A deviation that is only rounding would blow rounding up to the size of a real difference.
    constant = deviation <= 1e-6 * xp.abs(offset)
    # Times zero rather than zero: what is not finite stays so.
    return offset, mean, xp.where(constant, 0.0, 1.0 / xp.where(constant, 1.0, deviation))
