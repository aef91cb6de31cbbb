"""Flow-matching Euler sampler: one scan from noise to latents, or as far as it goes."""

import itertools
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


def forecast(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    noise: Float[Array | np.ndarray, "batch *shape"],
    plan: Float[Array | np.ndarray, "evaluations 3"],
) -> Float[Array, "batch *shape"]:
    """`denoise` with the velocity evaluated at some of its steps, and carried on in a straight line at the others.

    Args:
      velocity, noise: as for `denoise`.
      plan: what `forecast_plan` makes of the steps.

    Returns:
      `[B, ...]` float32, the latents at the last of the sigmas.
    """

    def leap(carry, at):
        latents, before = carry
        sigma, along, turn = at
        v = velocity(latents, jnp.broadcast_to(sigma, latents.shape[:1])).astype(jnp.float32)
        return (latents + along * v + turn * (v - before), v), None

    noise = jnp.asarray(noise, jnp.float32)
    (latents, _), _ = jax.lax.scan(leap, (noise, jnp.zeros_like(noise)), jnp.asarray(plan, jnp.float32))
    return latents


def forecast_plan(sigmas: Float[Array | np.ndarray, " steps_plus_1"], evaluations: int) -> Float[np.ndarray, "n 3"]:
    """When `forecast` evaluates, evenly among the steps and at the first, and how far it then goes.

    At a step between two evaluations the velocity is taken to be `v + (sigma - s) * (v - v') / (s - s')`, of the latest
    one, `v` at `s`, and the one before. That does not depend on the latents, so all steps up to the next evaluation are
    one leap.

    Args:
      sigmas: of all steps, decreasing.
      evaluations: how many, at most as many as there are steps.

    Returns:
      `[evaluations, 3]` float32: sigma; the factor of the velocity; and that of its change since the evaluation before.
    """
    sigmas = np.asarray(sigmas, np.float64)
    steps = len(sigmas) - 1
    at = [step * steps // evaluations for step in range(evaluations)] + [steps]
    rows = []
    for place, (start, stop) in enumerate(itertools.pairwise(at)):
        deltas, ahead = np.diff(sigmas[start : stop + 1]), sigmas[start:stop] - sigmas[start]
        turn = np.sum(deltas * ahead) / (sigmas[start] - sigmas[at[place - 1]]) if place else 0.0
        rows.append((sigmas[start], np.sum(deltas), turn))
    return np.array(rows, np.float32)


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
