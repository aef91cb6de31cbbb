"""Rewards: how good an image is for a prompt, as numbers to maximise.

A reward has one or more parts. A part is a published scorer (`scorers.py`) or a user's function; a function that JAX
can trace is compiled into the search like a scorer, any other runs on the host between denoise and update. A part of
weight zero is only reported: it scores every image and drives nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ses_jax.rewards import mixture
from ses_jax.rewards.scorers import KINDS, Scorer, load_scorer

Function = Callable[[Array, Sequence[str]], Any]
RewardSpec = str | Function | Mapping[str | Function, float]
Images = Float[Array | np.ndarray, "b h w 3"]


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One number of a reward: a scorer, or a user's function.

    Attributes:
      name: for reports.
      weight: in the sum; 0 for a part that is only reported.
      scorer: a published network; None for a function.
      function: `(images [B, H, W, 3] in [0, 1], prompts) -> [B]`; None for a scorer.
      traceable: whether JAX can trace the function.
    """

    name: str
    weight: float = 1.0
    scorer: Scorer | None = None
    function: Function | None = None
    traceable: bool = False

    @property
    def on_host(self) -> bool:
        return self.scorer is None and not self.traceable


@dataclasses.dataclass(frozen=True, eq=False)
class Reward:
    """A weighted sum of parts."""

    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """The part's own name, or the weighted sum spelled out."""
        driving = [part for part in self.parts if part.weight]
        return driving[0].name if len(driving) == 1 else " + ".join(f"{p.weight:g} {p.name}" for p in driving)

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(part.weight for part in self.parts)

    @property
    def on_host(self) -> bool:
        return any(part.on_host for part in self.parts)

    @property
    def one_prompt_at_a_time(self) -> bool:
        """Whether a function is compiled with its prompt, and so can't score several prompts' images at once."""
        return any(part.traceable for part in self.parts)

    def __call__(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        """The weighted sum `[B]`, float32, of images in [0, 1], each for its own prompt.

        Raises:
          ValueError: unless there is one prompt and one score an image.
        """
        return mixture.plain_sum(self.components(images, prompts), self.weights)

    def components(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        """The parts' own scores, float32 `[B, parts]`; raises as `__call__`."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images need as many prompts, got {len(prompts)}")
        columns = [_column(part, images, prompts) for part in self.parts]
        return np.stack(columns, axis=1)


def load_reward(
    kind: RewardSpec = "pick",
    *,
    source: str | Path | Mapping[str, str | Path] | None = None,
    dtype: Any = None,
    traceable: bool | None = None,
) -> Reward:
    """Loads a reward.

    Args:
      kind: a name of `scorers.KINDS` ("pick", "hps", "clip", "aesthetic", "imagereward"); a function
        `(images [B, H, W, 3] in [0, 1], prompts) -> [B]`; or a mapping of these to weights.
      source: a local folder or Hugging Face id with the weights, by kind where there are several; None is the
        published ones.
      dtype: of the weights; None is bfloat16 on GPU and TPU, float32 on CPU.
      traceable: whether JAX can trace the functions in `kind`; None finds out by trying.

    Raises:
      ValueError: for an unknown kind or a broken checkpoint.
    """
    check(kind)
    weights = dict(kind) if isinstance(kind, Mapping) else {kind: 1.0}
    if source is not None and not isinstance(source, Mapping):
        if len(weights) > 1:
            raise ValueError("several rewards need a source each: pass source={kind: source, ...}")
        source = dict.fromkeys(weights, source)
    return Reward(tuple(_load_part(name, weight, source or {}, dtype, traceable) for name, weight in weights.items()))


def check(kind: RewardSpec | Reward) -> None:
    """Raises ValueError for a reward that `load_reward` does not know, before anything is loaded."""
    if isinstance(kind, Reward):
        return
    if isinstance(kind, Mapping) and not kind:
        raise ValueError("a mixture of rewards needs at least one part")
    for name in kind if isinstance(kind, Mapping) else [kind]:
        if not callable(name) and name not in KINDS:
            raise ValueError(f"unknown reward {name!r}; known: {', '.join(KINDS)}, a mapping of these, or a function")


def with_report(reward: Reward, report: Reward | None) -> Reward:
    """The reward with another's parts beside it, reported only; parts of a name that is there already are left out."""
    names = {part.name for part in reward.parts}
    extra = () if report is None else tuple(part for part in report.parts if part.name not in names)
    return Reward((*reward.parts, *(dataclasses.replace(part, weight=0.0) for part in extra)))


@dataclasses.dataclass(frozen=True)
class DeviceScores:
    """The parts that run on the device, as one pure function; equal for equal parts, so that programs are shared.

    Attributes:
      scores: of each part, `(params, images, text) -> [B]`.
    """

    scores: tuple[Callable[[Any, Array, Any], Array], ...]

    def __call__(self, params: Sequence[Any], images: Array, texts: Sequence[Any]) -> Float[Array, "b parts"]:
        columns = [score(p, images, t) for score, p, t in zip(self.scores, params, texts, strict=True)]
        return jnp.stack([column.astype(jnp.float32) for column in columns], axis=1)


@dataclasses.dataclass(frozen=True)
class TracedFunction:
    """A user's traceable function as a device part; it sees the prompt itself, so each prompt compiles anew."""

    function: Function
    prompt: str

    def __call__(self, params: None, images: Array, text: None) -> Array:
        return self.function(images, [self.prompt] * len(images))


def device_scores(reward: Reward, prompt: str) -> DeviceScores | None:
    """The device parts for one prompt; None if there are none."""
    parts = [part for part in reward.parts if not part.on_host]
    scores = tuple(p.scorer.score if p.scorer else TracedFunction(p.function, prompt) for p in parts)
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
    return tuple(_embedded(part, prompts) for part in reward.parts if not part.on_host)


def host_components(reward: Reward, device: np.ndarray, images: Images, prompts: Sequence[str]) -> np.ndarray:
    """All components `[B, parts]`: the device parts' columns as given, the host parts' computed."""
    columns = iter(device.T)
    return np.stack(
        [_column(part, images, prompts) if part.on_host else next(columns) for part in reward.parts], axis=1
    )


def _load_part(name: str | Function, weight: float, sources: Mapping, dtype: Any, traceable: bool | None) -> Part:
    if callable(name):
        traced = _is_traceable(name) if traceable is None else traceable
        return Part(getattr(name, "__name__", "custom"), weight, function=name, traceable=traced)
    return Part(name, weight, scorer=load_scorer(name, source=sources.get(name), dtype=dtype))


def _is_traceable(function: Function) -> bool:
    """Whether a function turns abstract images into an abstract score each."""

    def probe(images):
        scores = function(images, ["", ""])
        if not isinstance(scores, jax.core.Tracer):
            raise TypeError("its scores do not come from the images by JAX operations")
        return scores

    try:
        return jax.eval_shape(probe, jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)).shape == (2,)
    except Exception:  # whatever goes wrong under tracing, the function may still be fine on the host
        return False


def _column(part: Part, images: Images, prompts: Sequence[str]) -> np.ndarray:
    """Scores `[B]` of one part, computed on their own."""
    if part.scorer is not None:
        return np.asarray(score(part.scorer.score, part.scorer.params, images, _embedded(part, prompts)), np.float32)
    scores = np.asarray(part.function(images, list(prompts)), np.float32)
    if scores.shape != (len(prompts),):
        raise ValueError(
            f"reward {part.name!r} returned shape {scores.shape} for {len(prompts)} images; need one score each"
        )
    return scores


def _embedded(part: Part, prompts: Sequence[str]) -> Any:
    return part.scorer and _embed(part.scorer.embed_text, part.scorer.params, part.scorer.tokenize(prompts))


@functools.partial(jax.jit, static_argnums=0)
def _embed(embed_text: Callable, params: Any, tokens: Any) -> Any:
    return embed_text(params, tokens)


@functools.partial(jax.jit, static_argnums=0)
def score(function: Callable, params: Any, images: Images, text: Any) -> Array:
    """`function(params, images, text)`, compiled."""
    return function(params, images, text)
