"""Guidance: what families take for it, and the two branches of the classifier-free kind.

A family's tokens and its condition are both a `Guided`: the same two branches, before and after the text encoders.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ses_jax.pipelines.base import Guidance


class Guided(NamedTuple):
    """A batch of `P` prompts, as tokens or encoded.

    Attributes:
      positive: pytree whose arrays are `[P, ...]`.
      negative: the same of the negative prompts; None where there is no classifier-free guidance.
      guidance: the family's options, each `[P]`.
    """

    positive: Any
    negative: Any
    guidance: Mapping[str, Any]


def guided(rows: Any, count: int, options: Mapping[str, float]) -> Guided:
    """From the rows of `count` prompts, followed by those of their negative prompts where there are any."""
    negative = len(jax.tree.leaves(rows)[0]) > count
    return Guided(
        positive=jax.tree.map(lambda x: x[:count], rows),
        negative=jax.tree.map(lambda x: x[count:], rows) if negative else None,
        guidance={name: np.full(count, value, np.float32) for name, value in options.items()},
    )


def forwards(condition: Any) -> int:
    """How many forwards of the network a step takes for a prompt, by its tokens or its condition."""
    return 2 if isinstance(condition, Guided) and condition.negative is not None else 1


def unguided(condition: Any) -> Any:
    """A condition without its negative prompts."""
    return condition._replace(negative=None) if isinstance(condition, Guided) else condition


def each_branch(encoder: Callable[[Any], Any], tokens: Guided) -> Guided:
    """Each branch through the text encoders."""
    negative = None if tokens.negative is None else encoder(tokens.negative)
    return Guided(encoder(tokens.positive), negative, tokens.guidance)


def both_branches(run: Callable[..., Array], condition: Guided, *inputs: Array) -> tuple[Array, Array | None]:
    """Velocities `run(prompts, *inputs)` of both branches, as one batch; the second is None where there is but one."""
    if condition.negative is None:
        return run(condition.positive, *inputs), None

    def pairs(positive, negative):
        # A prompt's branches side by side: rows that a mesh spreads over its devices stay where they are.
        return jnp.stack([positive, negative], axis=1).reshape(-1, *positive.shape[1:])

    out = run(*jax.tree.map(pairs, (condition.positive, *inputs), (condition.negative, *inputs)))
    out = out.reshape(-1, 2, *out.shape[1:])
    return out[:, 0], out[:, 1]


def classifier_free(
    positive: Float[Array, "b c h w"], negative: Float[Array, "b c h w"] | None, scale: Float[Array, " b"]
) -> Float[Array, "b c h w"]:
    """`negative + scale * (positive - negative)`, the usual convention: 1 is off."""
    if negative is None:
        return positive
    return negative + scale[:, None, None, None] * (positive - negative)


def options_of(guidance: Guidance, usual: Mapping[str, float], family: str) -> dict[str, float]:
    """A family's named options, filled up from its usual ones; a number is its `scale`.

    Raises:
      ValueError: for an option that the family does not have.
    """
    options = dict(guidance) if isinstance(guidance, Mapping) else {"scale": guidance}
    unknown = options.keys() - usual.keys()
    if unknown:
        raise ValueError(f"unknown guidance options {sorted(unknown)}; {family} takes {', '.join(usual)}")
    return {**usual, **options}


def negative_prompts(
    negative_prompt: str | Sequence[str] | None, count: int, *, on: bool, remedy: str, default: str = ""
) -> list[str]:
    """A negative prompt for each of `count` prompts where guidance is on, and none where it is off.

    Args:
      negative_prompt: one for all, one each, or None for `default`.
      count: of prompts.
      on: whether there is classifier-free guidance.
      remedy: what turns it on, for the message.
      default: the family's own.

    Raises:
      ValueError: for a negative prompt that would have no effect, or a list of another length.
    """
    if not on:
        if negative_prompt:
            raise ValueError(f"negative_prompt has no effect without guidance; pass {remedy}")
        return []
    if isinstance(negative_prompt, str | None):
        return [default if negative_prompt is None else negative_prompt] * count
    if len(negative_prompt) != count:
        raise ValueError(f"{len(negative_prompt)} negative prompts for {count} prompts; pass one, or one for each")
    return list(negative_prompt)
