"""What a network evaluation is: the FLOPs of a forward for one image, read from the network's function."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from ses_jax.engine import flops
from ses_jax.loading import partition
from ses_jax.loading.programs import compiled
from ses_jax.pipelines import sampler
from ses_jax.pipelines.base import Pipeline
from ses_jax.pipelines.guidance import unguided
from ses_jax.searchers.searcher import Searcher, needs_gradient

# Of the tokens; where FLOPs cannot be counted.
QUARTER = Fraction(1, 4)
# What a step with its gradient counts for, in steps without.
GRADIENT = 3


def one(tree: Any) -> Any:
    """The shapes of one prompt's arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), tree)


def shapes(tree: Any) -> Any:
    """The shapes of arrays, wherever they lie."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def step_flops(velocity: Callable[..., Any], params: Any, shape: tuple[int, ...], condition: Any) -> int | None:
    """FLOPs of a step, guidance included; None where they cannot be counted.

    Args:
      velocity: of a pipeline.
      params: arrays or shapes.
      shape: `(C, h, w)` of the latents.
      condition: of any number of prompts, arrays or shapes.
    """
    latents = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    sigma = jax.ShapeDtypeStruct((1,), jnp.float32)
    try:
        return flops.count_jaxpr(_step.jaxpr(velocity, shapes(params), latents, sigma, one(condition)))
    except Exception:  # of a user's function, such as a loop of unknown length: no reason to lose a search
        return None


def of_searcher(searcher: Searcher) -> int:
    """What a step of a searcher's candidates counts for, in steps without gradients."""
    return GRADIENT if needs_gradient(searcher) else 1


def with_gradient(velocity: Callable[..., Any], params: Any, latents: Any, sigma: Any, condition: Any) -> Any:
    """What a step with its gradient computes: a velocity, and later derivatives through it."""
    out = velocity(params, latents, sigma, condition)
    with partition.differentiated():
        return out, sampler.velocity_slope(lambda x, at: velocity(params, x, at, condition), latents, sigma, out)


def half_share(whole: int | None, half: int | None) -> Fraction:
    """What a step at half the height and width counts for: its share of the FLOPs of one at full size."""
    return Fraction(half, whole) if whole and half is not None else QUARTER


def share_of_half(pipeline: Pipeline, tokens: Any, height: int, width: int, *, guided: bool = True) -> Fraction:
    """The share of a pipeline's images of so many pixels, for prompts of so many tokens; nothing is compiled or run."""
    text, image = (shapes(part(pipeline.params)) for part in (pipeline.text_params, pipeline.image_params))
    condition = jax.eval_shape(pipeline.encode, text, tokens)
    condition = condition if guided else unguided(condition)
    sizes = pipeline.noise_shape(height, width), pipeline.noise_shape(height // 2, width // 2)
    return half_share(*(step_flops(pipeline.velocity, image, tuple(size), condition) for size in sizes))


@compiled(static=1)
def _step(velocity: Any, params: Any, latents: Any, sigma: Any, condition: Any) -> Any:
    with partition.compiled_for_none():
        return velocity(params, latents, sigma, condition)
