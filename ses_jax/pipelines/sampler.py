"""Flow-matching Euler sampler: one scan from noise to latents."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def denoise(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    noise: Float[Array | np.ndarray, "batch *shape"],
    sigmas: Float[Array | np.ndarray, " steps_plus_1"],
) -> Float[Array, "batch *shape"]:
    """Integrates `d latents / d sigma = velocity(latents, sigma)` from noise to image.

    Args:
      velocity: `(latents [B, ...], sigma [B]) -> [B, ...]`, noise minus image.
      noise: `[B, ...]`, the latents at `sigmas[0]`.
      sigmas: `[steps + 1]`, decreasing, from 1 to 0.

    Returns:
      `[B, ...]` float32, the latents at `sigmas[-1]`.
    """

    def step(latents, at):
        sigma, delta = at
        v = velocity(latents, jnp.broadcast_to(sigma, latents.shape[:1]))
        return latents + delta * v.astype(jnp.float32), None

    sigmas = jnp.asarray(sigmas, jnp.float32)
    latents, _ = jax.lax.scan(step, jnp.asarray(noise, jnp.float32), (sigmas[:-1], jnp.diff(sigmas)))
    return latents
