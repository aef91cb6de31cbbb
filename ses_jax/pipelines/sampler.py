"""Flow-matching Euler sampler: one scan from noise to latents, or as far as it goes."""

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


def predict(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    latents: Float[Array | np.ndarray, "batch *shape"],
    sigmas: Float[Array | np.ndarray, " steps_plus_1"],
) -> tuple[Float[Array, "batch *shape"], Float[Array, "batch *shape"]]:
    """Some steps of `denoise`, and where they lead if nothing changes.

    Args:
      velocity: as for `denoise`.
      latents: `[B, ...]` at `sigmas[0]`.
      sigmas: `[steps + 1]`, decreasing, a part of those of `denoise`.

    Returns:
      The latents at `sigmas[-1]`, and the clean latents that the last step's velocity predicts, `latents - sigma *
      velocity`; both `[B, ...]` float32. This takes no evaluation beyond the steps.
    """

    def step(carry, at):
        latents, _ = carry
        sigma, delta = at
        v = velocity(latents, jnp.broadcast_to(sigma, latents.shape[:1])).astype(jnp.float32)
        return (latents + delta * v, latents - sigma * v), None

    sigmas, latents = jnp.asarray(sigmas, jnp.float32), jnp.asarray(latents, jnp.float32)
    both, _ = jax.lax.scan(step, (latents, latents), (sigmas[:-1], jnp.diff(sigmas)))
    return both


def follow(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    noise: Float[Array | np.ndarray, "batch *shape"],
    sigmas: Float[Array | np.ndarray, " steps_plus_1"],
) -> Float[Array, "steps_plus_1 batch *shape"]:
    """`denoise` with all latents on the way, `[steps + 1, B, ...]` from noise to image."""

    def step(latents, at):
        sigma, delta = at
        v = velocity(latents, jnp.broadcast_to(sigma, latents.shape[:1]))
        return latents + delta * v.astype(jnp.float32), latents

    sigmas, noise = jnp.asarray(sigmas, jnp.float32), jnp.asarray(noise, jnp.float32)
    last, before = jax.lax.scan(step, noise, (sigmas[:-1], jnp.diff(sigmas)))
    return jnp.concatenate([before, last[None]])


def pull_back(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    path: Float[Array, "steps_plus_1 batch *shape"],
    sigmas: Float[Array | np.ndarray, " steps_plus_1"],
    slope: Float[Array, "batch *shape"],
) -> Float[Array, "batch *shape"]:
    """The derivative of `denoise`, backwards: each step's velocity is computed once more, and no other step is kept.

    Args:
      velocity: as for `denoise`.
      path: what `follow` gives.
      sigmas: of the path.
      slope: `[B, ...]`, derivatives of something with respect to the last latents.

    Returns:
      `[B, ...]` float32, its derivatives with respect to the noise.
    """

    def step(slope, at):
        latents, sigma, delta = at
        return slope + velocity_slope(velocity, latents, sigma, delta * slope), None

    sigmas = jnp.asarray(sigmas, jnp.float32)
    slope, _ = jax.lax.scan(step, slope.astype(jnp.float32), (path[:-1], sigmas[:-1], jnp.diff(sigmas)), reverse=True)
    return slope


def velocity_slope(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    latents: Float[Array, "batch *shape"],
    sigma: Float[Array, "..."],
    slope: Float[Array, "batch *shape"],
) -> Float[Array, "batch *shape"]:
    """Derivatives with respect to latents, from those with respect to their velocity at a sigma of all, or `[B]`."""
    v, pull = jax.vjp(lambda x: velocity(x, jnp.broadcast_to(sigma, x.shape[:1])), latents)
    return pull(slope.astype(v.dtype))[0]
