"""Rewards: how good an image is for a prompt, as numbers to maximise.

A reward has one or more parts. A part is a published scorer (`scorers.py`) or a user's function; a function that JAX
can trace is compiled into the search like a scorer, any other runs on the host between denoise and update. A part of
weight zero is only reported: it scores every image and drives nothing.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ses_jax.loading import partition
from ses_jax.loading.programs import compiled
from ses_jax.models import target
from ses_jax.rewards import host, mixture
from ses_jax.rewards.host import Calls
from ses_jax.rewards.images import Images, pairs
from ses_jax.rewards.scorers import Scorer

Function = Callable[[Array, Sequence[str]], Any]
Batch = Float[Array | np.ndarray, "b h w 3"]


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One number of a reward: a scorer, or a user's function.

    Attributes:
      name: for reports.
      weight: in the sum; 0 for a part that is only reported.
      scorer: a published network; None for a function.
      function: `(images [B, H, W, 3] in [0, 1], prompts) -> [B]`; None for a scorer.
      traceable: whether JAX can trace the function.
      reads_prompt: whether a traceable function looks at its prompts; one that does is compiled for each of them.
      calls: how a function on the host is called.
    """

    name: str
    weight: float = 1.0
    scorer: Scorer | None = None
    function: Function | None = None
    traceable: bool = False
    reads_prompt: bool = True
    calls: Calls = host.PLAIN

    @property
    def on_host(self) -> bool:
        return self.scorer is None and not self.traceable


@dataclasses.dataclass(frozen=True, eq=False)
class Reward:
    """A weighted sum of parts."""

    parts: tuple[Part, ...]

    def __repr__(self) -> str:
        """What it is, without its weights."""
        reported = [part.name for part in self.parts if not part.weight]
        return f"Reward({self.name}" + (f", reported: {', '.join(reported)})" if reported else ")")

    @property
    def name(self) -> str:
        """The part's own name, or the weighted sum spelled out."""
        driving = [part for part in self.parts if part.weight]
        return driving[0].name if len(driving) == 1 else " + ".join(f"{p.weight:g} {p.name}" for p in driving)

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(part.weight for part in self.parts)

    @property
    def sources(self) -> dict[str, str]:
        """Where the weights of its scorers are from, by their names."""
        return {part.name: part.scorer.source for part in self.parts if part.scorer is not None}

    @property
    def on_host(self) -> bool:
        return any(part.on_host for part in self.parts)

    @property
    def one_prompt_at_a_time(self) -> bool:
        """Whether a function is compiled with its prompt, and so can't score several prompts' images at once."""
        return any(part.traceable and part.reads_prompt for part in self.parts)

    def __call__(self, images: Images, prompts: str | Sequence[str]) -> np.ndarray:
        """The weighted sum of the parts' scores, float32 `[B]`.

        Args:
          images: `[B, H, W, 3]` floats in [0, 1] or bytes; or a sequence of PIL images or arrays of any sizes.
          prompts: one an image, or a single one for all.

        Raises:
          ValueError: for anything else, for images of other shapes or scales, and unless there is one prompt and one
            score an image.
        """
        return mixture.plain_sum(self.components(images, prompts), self.weights)

    def components(self, images: Images, prompts: str | Sequence[str]) -> np.ndarray:
        """The parts' own scores, float32 `[B, parts]`; takes and raises what `__call__` does."""
        found, prompts = pairs(images, prompts)
        scores = np.empty((len(prompts), len(self.parts)), np.float32)
        for places, batch in found:
            columns = [column(part, batch, [prompts[i] for i in places]) for part in self.parts]
            scores[places] = np.stack(columns, axis=1)
        return scores


def column(part: Part, images: Batch, prompts: Sequence[str]) -> np.ndarray:
    """Scores `[B]` of one part, computed on their own."""
    if part.scorer is not None:
        device, params = partition.device_of(part.scorer.params), part.scorer.params
        return np.asarray(score(part.scorer.score, device, params, images, embedded(part, prompts)), np.float32)
    if part.on_host:
        return host.scores(part.name, part.function, part.calls, images, prompts)
    with host.raised_by(part.name):
        value = part.function(jnp.asarray(images), list(prompts))
    return host.as_scores(part.name, value, len(prompts))


def embedded(part: Part, prompts: Sequence[str]) -> Any:
    """Prompts as one part's network reads them; None for a function."""
    if part.scorer is None:
        return None
    params = part.scorer.params
    return _embed(part.scorer.embed_text, partition.device_of(params), params, part.scorer.tokenize(prompts))


def lower_embedded(scorer: Scorer, device: jax.Device, tokens: Any) -> jax.stages.Lowered:
    """The program of `embedded`, for params that are shapes and will lie on the device."""
    return _embed.lower(scorer.embed_text, device, scorer.params, tokens)


@compiled(static=2)
def _embed(embed_text: Callable, device: Any, params: Any, tokens: Any) -> Any:
    with target.compiled_for(device):
        return embed_text(params, tokens)


@compiled(static=2)
def score(function: Callable, device: Any, params: Any, images: Batch, text: Any) -> Array:
    """`function(params, images, text)`, compiled for the devices that the params lie on."""
    with target.compiled_for(device):
        return function(params, images, text)
