"""The parts of a reward that run on the device, as one pure function, and what it is given."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ses_jax.rewards import host, meaning
from ses_jax.rewards.reward import Batch, Function, Part, Reward, column, embedded, lower_embedded
from ses_jax.rewards.scorers import ImageScore


@dataclasses.dataclass(frozen=True)
class DeviceScores:
    """The parts that run on the device, as one pure function; equal for equal parts, so that programs are shared.

    Attributes:
      scores: of each part.
    """

    scores: "tuple[ImageScore | TracedFunction, ...]"

    def __call__(self, params: Sequence[Any], images: Array, texts: Sequence[Any]) -> Float[Array, "b parts"]:
        """The scores of images."""
        return self.say(params, self.see(images), texts)

    def see(self, images: Array) -> tuple[Any, ...]:
        """What the parts need of images, see `ImageScore`."""
        return tuple(score.see(images) for score in self.scores)

    def say(self, params: Sequence[Any], seen: Sequence[Any], texts: Sequence[Any]) -> Float[Array, "b parts"]:
        """The scores of images of which so much is kept."""
        columns = [score.say(*given) for score, *given in zip(self.scores, params, seen, texts, strict=True)]
        return jnp.stack([column.astype(jnp.float32) for column in columns], axis=1)

    def driving(self, weights: Sequence[float]) -> tuple["DeviceScores", Callable[[Sequence[Any]], tuple[Any, ...]]]:
        """The parts whose weight is not 0, and what takes out of all parts' params or texts those of theirs."""
        places = tuple(int(place) for place in np.flatnonzero(weights))
        chosen = DeviceScores(tuple(self.scores[place] for place in places))
        return chosen, lambda of_all: tuple(of_all[place] for place in places)


@dataclasses.dataclass(frozen=True)
class TracedFunction:
    """A user's traceable function as a device part; one that reads its prompt is compiled anew for each.

    Attributes:
      prompt: None where the function does not look at it.
      meaning: what it computes, with the values that it takes from elsewhere: those may be others in the next search.
    """

    function: Function
    prompt: str | None
    meaning: Hashable = None

    def see(self, images: Array) -> Array:
        """Its scores, for which it is given images as they are."""
        prompts = UnreadPrompts(len(images)) if self.prompt is None else [self.prompt] * len(images)
        with host.raised_by(getattr(self.function, "__name__", "custom")):
            return self.function(images, prompts)

    def say(self, params: None, seen: Array, text: None) -> Array:
        """They are what it said already."""
        return seen


class UnreadPrompts(Sequence):
    """Stands for prompts that a function is not expected to look at; whatever it tries, it can't help being noticed."""

    def __init__(self, count: int):
        self.count, self.read = count, False

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        self.read = True
        raise TypeError("a reward that did not look at its prompts does so now; load it with traceable=False")


def device_scores(reward: Reward, prompt: str) -> DeviceScores | None:
    """The device parts for one prompt; None if there are none."""
    parts = [part for part in reward.parts if not part.on_host]
    scores = tuple(p.scorer.score if p.scorer else _traced(p, prompt) for p in parts)
    return DeviceScores(scores) if scores else None


def device_params(reward: Reward) -> tuple[Any, ...]:
    """Params of the device parts, in order; None for functions."""
    return tuple(part.scorer.params if part.scorer else None for part in reward.parts if not part.on_host)


def place(reward: Reward, put: Callable[[Any], Any]) -> Reward:
    """The reward with `put` applied to its params, which puts them where they are needed."""

    def placed(part):
        if part.scorer is None:
            return part
        return dataclasses.replace(part, scorer=dataclasses.replace(part.scorer, params=put(part.scorer.params)))

    return Reward(tuple(placed(part) for part in reward.parts))


def device_text(reward: Reward, prompts: Sequence[str]) -> tuple[Any, ...]:
    """Embedded prompts for the device parts, in order; None for functions."""
    return tuple(embedded(part, prompts) for part in reward.parts if not part.on_host)


def text_shapes(reward: Reward, prompts: Sequence[str]) -> tuple[Any, ...]:
    """What `device_text` gives, as shapes; the params may be shapes too."""

    def of_part(part):
        scorer = part.scorer
        return scorer and jax.eval_shape(scorer.embed_text, scorer.params, scorer.tokenize(prompts))

    return tuple(of_part(part) for part in reward.parts if not part.on_host)


def lower_text(reward: Reward, prompts: Sequence[str], device: jax.Device) -> list[jax.stages.Lowered]:
    """The programs of `device_text`, for scorers whose params are shapes and will lie on the device."""
    return [
        lower_embedded(part.scorer, device, part.scorer.tokenize(prompts))
        for part in reward.parts
        if part.scorer is not None
    ]


def host_components(reward: Reward, device: np.ndarray, images: Batch, prompts: Sequence[str]) -> np.ndarray:
    """All components `[B, parts]`: the device parts' columns as given, the host parts' computed."""
    columns = iter(device.T)
    return np.stack([column(part, images, prompts) if part.on_host else next(columns) for part in reward.parts], axis=1)


def _traced(part: Part, prompt: str) -> TracedFunction:
    traced = TracedFunction(part.function, prompt if part.reads_prompt else None)
    return dataclasses.replace(traced, meaning=meaning.of(traced.see))
