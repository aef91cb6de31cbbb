"""What a compiled generation is given and gives: its static facts, the prompts' arrays, the search's state."""

from typing import Any, NamedTuple

from jaxtyping import Array

from ses_jax.engine.denoising import Model
from ses_jax.engine.fidelity import FULL, Fidelity
from ses_jax.rewards.device_parts import DeviceScores
from ses_jax.searchers.elites import Elites
from ses_jax.searchers.searcher import Problem, Searcher, needs_gradient


class Shown(NamedTuple):
    """What comes along of candidates beside their scores.

    Attributes:
      side: their previews, whose longer side has at most so many pixels; None leaves them as they are.
      noise: whether their noise comes too.
    """

    side: int | None = None
    noise: bool = False


# For the film of a report, which a search makes unless it is told otherwise.
FILM = Shown(256)


class Program(NamedTuple):
    """All that a compiled generation depends on besides arrays; equal programs share one compilation.

    Attributes:
      score: the reward's parts on the device; None if there are none.
      weights: of all parts in the sum.
      standardize: whether parts are standardised over all candidates so far before they are summed.
      searcher: what proposes points.
      problem: what it is over; its population is drawn a generation.
      evaluated: how many of them are denoised; fewer than drawn only where the whole budget is smaller.
      chunk: how many rows are denoised at a time.
      fidelity: the looks before full previews.
      half: the model at half the height and width; None where nothing is looked at so.
      shown: what comes along of candidates; None is nothing but scores.
    """

    model: Model
    score: DeviceScores | None
    weights: tuple[float, ...]
    standardize: bool
    searcher: Searcher
    problem: Problem
    evaluated: int
    chunk: int
    fidelity: Fidelity = FULL
    half: Model | None = None
    shown: Shown | None = None

    @property
    def apart(self) -> bool:
        """Whether a generation is two programs, one that denoises and one that does all else."""
        return self.model.apart and not self.fidelity.looks and not self.needs_gradient

    @property
    def other_half(self) -> "Program":
        """What does all else: the same for any chunk, so that it is compiled once while one is found that fits."""
        return self._replace(chunk=0)

    @property
    def needs_gradient(self) -> bool:
        """Whether the searcher learns from gradients too."""
        return needs_gradient(self.searcher)


class Inputs(NamedTuple):
    """The arrays of P prompts that stay the same from generation to generation.

    Attributes:
      key: `[P]`; draws of generation g come from `fold_in(key, g)`.
      base: `[P, *S]`, the points of the base noise: in the low band `[P, C, a, b]`.
      rest: of the noise, beside the points.
      condition, text: the prompts for the model and for the reward, leading axis P.
      sigmas: `[preview_steps + 1]`.
      budget: int scalar, how many candidates are scored, or looked at, a prompt.
      looks: `[steps + 1]` a look, its sigmas, or `[evaluations, 3]`, its plan; None where they are the preview's.
    """

    key: Array
    base: Any
    rest: Any
    condition: Any
    text: Any
    sigmas: Array
    budget: Array
    looks: tuple[Array | None, ...] = ()


class Archive(NamedTuple):
    """All candidates so far, for a mixture whose scores change as the population grows.

    Attributes:
      points: `[P, generations * n, *S]`.
      components: `[P, generations * n, parts]`, NaN where there is no candidate yet.
    """

    points: Any
    components: Array


class State(NamedTuple):
    """The search between two generations.

    Attributes:
      searcher: the searcher's own.
      best: the best point so far and its score, `[P, 1, ...]`.
      archive: None unless scores are standardised.
    """

    searcher: Any
    best: Elites
    archive: Archive | None


class Scored(NamedTuple):
    """What is known of a generation.

    Attributes:
      components: `[P, n, parts]`, NaN where there was no full preview.
      low_rms: `[P, n]`, root mean squares of the low bands.
      looks: `[P, n, looks]`, what each said, -inf where that was not finite and NaN where it was not taken; None where
        there are no looks.
      previews: `[P, n, h, w, 3]` of 8 bits, zeros where there was no full preview; None where none are shown.
      noise: `[P, n, C, h, w]`; None where it is not shown.
    """

    components: Array
    low_rms: Array
    looks: Array | None = None
    previews: Array | None = None
    noise: Array | None = None
