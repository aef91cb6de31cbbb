"""What a search took: network evaluations, FLOPs, seconds.

A network evaluation (NFE) is one forward of the network for one image at full size. A step is one, and two with
classifier-free guidance; at half the height and width it counts by its share of the FLOPs, and with its gradient as
three. Counted are the candidates that were scored or looked at, each for itself: what a batch is filled up with costs
time and is no part of the account.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ses_jax.engine import evaluations, flops
from ses_jax.engine.config import SearchConfig
from ses_jax.engine.fidelity import WHOLE, Form, Stage
from ses_jax.engine.program import Inputs, Program
from ses_jax.loading import partition
from ses_jax.loading.programs import compiled
from ses_jax.pipelines.guidance import forwards, unguided
from ses_jax.rewards.device_parts import DeviceScores


@dataclasses.dataclass(frozen=True)
class Spent:
    """What some images took.

    Attributes:
      images: how many were decoded and scored, looks among them.
      nfe: network evaluations; a fraction where some were of half the size.
      flops: of network, decoder and the reward's parts on the device, by the convention of `flops`; None where a part
        cannot be counted.
      seconds: this prompt's share of those that its batch took, compilation included; of a search that was continued,
        those since then.
    """

    images: int
    nfe: int | float
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
      evaluations: a step's at full size, in network evaluations.
      step, finish: FLOPs of a step, and of decoding and scoring; None where they cannot be counted.
    """

    evaluations: int
    step: int | None
    finish: int | None

    def flops(self, images: int, steps: int) -> int | None:
        """Of so many images of so many steps."""
        return None if self.step is None or self.finish is None else images * (steps * self.step + self.finish)


class Rates(NamedTuple):
    """What one image takes in each form that a search has; and at full size in those that it has at half of it."""

    by_form: Mapping[Form, Rate]

    def spent(self, stages: Sequence[Stage], seconds: float) -> Spent:
        """What images took."""
        counted = [self.by_form[stage.form].flops(stage.images, stage.steps) for stage in stages]
        return Spent(
            images=sum(stage.images for stage in stages),
            nfe=_number(sum(stage.images * stage.steps * self.evaluations(stage.form) for stage in stages)),
            flops=None if None in counted else sum(counted),
            seconds=seconds,
        )

    def evaluations(self, form: Form) -> Fraction:
        """Of a step."""
        rate, whole = self.by_form[form], self.by_form[form._replace(part=1)]
        share = evaluations.half_share(whole.step, rate.step) if form.part == 2 else 1
        return Fraction(rate.evaluations * share)


def search_stages(config: SearchConfig, candidates: int) -> list[Stage]:
    """What the first so many candidates of a search went through."""
    whole, rest = divmod(candidates, config.population)
    counts = [config.population] * whole + [rest] * (rest > 0)
    return [stage for count in counts for stage in config.fidelity.stages(count, config.preview_steps)]


def rates(program: Program, params: Any, inputs: Inputs) -> Rates:
    """What images of a search take, without gradients."""
    forms = {WHOLE, *(stage.form for stage in program.fidelity.stages(1, 1))}
    forms |= {form._replace(part=1) for form in forms}
    return Rates({form: rate(program, params, inputs, form) for form in forms})


def candidate_rates(program: Program, params: Any, inputs: Inputs) -> Rates:
    """What candidates of a search take, with gradients where the searcher needs them."""
    if program.needs_gradient:
        return Rates({WHOLE: rate(program, params, inputs, gradient=True)})
    return rates(program, params, inputs)


def rate(program: Program, params: Any, inputs: Inputs, form: Form = WHOLE, *, gradient: bool = False) -> Rate:
    """What an image of a search takes, read from its functions; nothing is compiled or run.

    Args:
      program, params, inputs: of the search.
      form: of the image's steps.
      gradient: whether its gradient is taken too.
    """
    condition, text = evaluations.one((inputs.condition, inputs.text))
    condition = condition if form.guided else unguided(condition)
    channels, height, width = program.problem.space.shape
    shape = channels, height // form.part, width // form.part
    params, latents = evaluations.shapes(params), jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    velocity, finish = program.model.velocity, functools.partial(finished, program.model.decode, program.score)
    if gradient:
        velocity = functools.partial(evaluations.with_gradient, velocity)
        finish = functools.partial(finished_with_gradient, program.model.decode, program.score, program.weights)
    step = evaluations.step_flops(velocity, params[0], shape, condition)
    try:
        last = flops.count_jaxpr(_finish.jaxpr(finish, params, latents, text))
    except Exception:  # of a user's function too
        last = None
    return Rate(forwards(condition) * (evaluations.GRADIENT if gradient else 1), step, last)


def finished(decode: Any, score: Any, params: Any, latents: Any, text: Any) -> Any:
    """What comes after the steps: images and, where there are any, scores of the parts on the device."""
    images = decode(params[0], latents)
    return images if score is None else score(params[1], images, text)


def finished_with_gradient(
    decode: Any, score: DeviceScores, weights: Sequence[float], params: Any, latents: Any, text: Any
) -> Any:
    """The same, and the gradient of the parts that drive the search."""
    chosen, parts = score.driving(weights)

    def driving(latents):
        return chosen(parts(params[1]), decode(params[0], latents), parts(text))

    with partition.differentiated():
        scores, pull = jax.vjp(driving, latents)
        return finished(decode, score, params, latents, text), pull(scores)


@compiled(static=1)
def _finish(finish: Any, params: Any, latents: Any, text: Any) -> Any:
    with partition.compiled_for_none():
        return finish(params, latents, text)


def _number(count: Fraction) -> int | float:
    return count.numerator if count.denominator == 1 else float(count)
