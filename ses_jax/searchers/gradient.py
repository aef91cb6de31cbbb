"""Ascent of the reward along its gradient, on the shell where Gaussian noise lies.

Independent noises climb side by side. A step goes along the mean of the latest gradients, as long as it is told to be,
whatever the size of the reward; then the noise is brought back to the norm that it had. Sources: the gradient ascent of
noise of ReNO (arXiv 2406.04312), whose gradients are clipped too, and of direct noise optimisation (arXiv 2405.18881);
the norm is held as in arXiv 2602.08646, where those have penalties for leaving it.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ses_jax.searchers.options import Options, number, one_of, option, share, whole
from ses_jax.searchers.searcher import Problem
from ses_jax.searchers.ses import AXES


class Climbers(NamedTuple):
    """Points that climb.

    Attributes:
      points: `[n, *S]`, where they go next.
      mean: `[n, *S]`, of their gradients' directions, the latest of which count most.
      steps: `[n]`, how many each has gone since it began.
      lost: `[n]`, which begin anew.
    """

    points: Array
    mean: Array
    steps: Int[Array, " n"]
    lost: Bool[Array, " n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient(Options):
    """Each generation is a step of all climbers; one without a finite score or gradient begins anew from noise."""

    needs_gradient: ClassVar[bool] = True

    climbers: int = option(
        1, whole(at_least=1), "how many noises climb side by side, a generation; instead of `population`"
    )
    step: float = option(0.1, share, "length of a step, as a share of the norm of the noise")
    momentum: float = option(
        0.8, number(0.0, 1.0), "share of the earlier gradients in a step's direction, from 0 to less than 1"
    )
    shell: str = option(
        "whole", one_of("whole", "channel"), "what keeps its norm: the noise as a whole, or each channel of it"
    )
    space: str = option("whole", one_of("whole", "low"), "what climbs: whole noise, or its low band")

    @property
    def population(self) -> int:
        return self.climbers

    def init(self, problem: Problem) -> Climbers:
        nowhere = jnp.zeros((problem.population, *problem.space.like.shape), jnp.float32)
        count = (problem.population,)
        return Climbers(nowhere, nowhere, jnp.zeros(count, jnp.int32), jnp.ones(count, bool))

    def ask(self, problem: Problem, key: PRNGKeyArray, state: Climbers, generation: Int[Array, ""]) -> Array:
        return jnp.where(_beside(state.lost, state.points), problem.draw(key), state.points)

    def tell(
        self, problem: Problem, state: Climbers, points: Array, scores: Float[Array, " n"], gradients: Array
    ) -> Climbers:
        count = len(points)  # fewer than climb where the whole budget is
        old = jax.tree.map(lambda x: x[:count], state)
        length = jnp.sqrt(jnp.mean(jnp.square(gradients), axis=(1, 2, 3)))
        lost = ~(jnp.isfinite(scores) & jnp.isfinite(length) & (length > 0))
        direction = gradients / _beside(jnp.where(lost, 1.0, length), gradients)
        steps = jnp.where(old.lost, 0, old.steps) + 1
        mean = self.momentum * jnp.where(_beside(old.lost, points), 0.0, old.mean) + (1 - self.momentum) * direction
        ahead = mean / _beside(1 - self.momentum ** steps.astype(jnp.float32), mean)
        new = Climbers(self._stepped(points, ahead), mean, steps, lost)
        return jax.tree.map(lambda all_of, told: all_of.at[:count].set(told), state, new)

    def _stepped(self, points: Array, ahead: Array) -> Array:
        """Points after a step, of the norm that they had."""
        axes = AXES[self.shell]
        size = _rms(points, (-3, -2, -1))
        moved = points + self.step * size * ahead
        return moved * _rms(points, axes) / _rms(moved, axes)


def _rms(points: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(points), axis=axes, keepdims=True))


def _beside(values: Array, points: Any) -> Array:
    """Values `[n]` that broadcast over points `[n, *S]`."""
    return values.reshape(-1, *(1,) * (points.ndim - 1))
