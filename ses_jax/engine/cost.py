"""What a search took: network evaluations, FLOPs, seconds.

A network evaluation (NFE) is one forward of the network for one image at full size. A step is one, and two with
classifier-free guidance. Counted are the candidates that were scored, each for itself: what a batch is filled up with
costs time and is no part of the account.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ses_jax.engine import flops
from ses_jax.engine.generation import Inputs, Program
from ses_jax.loading import partition
from ses_jax.loading.programs import compiled
from ses_jax.pipelines.guidance import forwards


@dataclasses.dataclass(frozen=True)
class Spent:
    """What some images took.

    Attributes:
      images: how many.
      nfe: network evaluations.
      flops: of network, decoder and the reward's parts on the device, by the convention of `flops`; None where a part
        cannot be counted.
      seconds: this prompt's share of those that its batch took, compilation included; of a search that was continued,
        those since then.
    """

    images: int
    nfe: int
    flops: int | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a search took.

    Attributes:
      search: the candidates, with few steps.
      finals: winner and base, with all steps.
    """

    search: Spent
    finals: Spent

    def as_json(self) -> dict[str, dict[str, Any]]:
        """The attributes as plain JSON values."""
        return dataclasses.asdict(self)


class Rate(NamedTuple):
    """What one image takes.

    Attributes:
      evaluations: a step's, in network evaluations. Of a step at another size it would be the share of `step` at full
        size, and a gradient would be three.
      step, finish: FLOPs of a step, and of decoding and scoring; None where they cannot be counted.
    """

    evaluations: int
    step: int | None
    finish: int | None

    def spent(self, images: int, steps: int, seconds: float) -> Spent:
        """What so many images of so many steps took."""
        counted = None if self.step is None or self.finish is None else images * (steps * self.step + self.finish)
        return Spent(images, images * steps * self.evaluations, counted, seconds)


def rate(program: Program, params: Any, inputs: Inputs) -> Rate:
    """What an image of a search takes, read from its functions; nothing is compiled or run."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), (inputs.condition, inputs.text))
    condition, text = one
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    latents = jax.ShapeDtypeStruct((1, *program.problem.space.shape), jnp.float32)
    sigma = jax.ShapeDtypeStruct((1,), jnp.float32)
    try:
        step = flops.count_jaxpr(_step.jaxpr(program.model.velocity, params[0], latents, sigma, condition))
        finish = flops.count_jaxpr(_finish.jaxpr(program.model.decode, program.score, params, latents, text))
    except Exception:  # of a user's function, such as a loop of unknown length: no reason to lose a search
        step = finish = None
    return Rate(forwards(condition), step, finish)


@compiled(static=1)
def _step(velocity: Any, params: Any, latents: Any, sigma: Any, condition: Any) -> Any:
    with partition.compiled_for_none():
        return velocity(params, latents, sigma, condition)


@compiled(static=2)
def _finish(decode: Any, score: Any, params: Any, latents: Any, text: Any) -> Any:
    with partition.compiled_for_none():
        images = decode(params[0], latents)
        return images if score is None else score(params[1], images, text)
