"""Rewards: how good an image is for a prompt, as numbers to maximise.

A reward has one or more parts. A part is a published scorer (`scorers.py`) or a user's function; a function that JAX
can trace is compiled into the search like a scorer, any other runs on the host between denoise and update. A part of
weight zero is only reported: it scores every image and drives nothing.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ses_jax.loading import partition
from ses_jax.loading.programs import comparable, compiled
from ses_jax.models import target
from ses_jax.rewards import host, mixture
from ses_jax.rewards.host import Calls
from ses_jax.rewards.images import Images, batches
from ses_jax.rewards.scorers import KINDS, Scorer, load_scorer

Function = Callable[[Array, Sequence[str]], Any]
RewardSpec = str | Function | Mapping[str | Function, float]  # a loaded Reward is a Function too
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
          ValueError: for images of other shapes or scales, and unless there is one prompt and one score an image.
        """
        return mixture.plain_sum(self.components(images, prompts), self.weights)

    def components(self, images: Images, prompts: str | Sequence[str]) -> np.ndarray:
        """The parts' own scores, float32 `[B, parts]`; takes and raises what `__call__` does."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        count = len(images)
        if len(prompts) not in (1, count):
            raise ValueError(f"{count} images need as many prompts or a single one, got {len(prompts)}")
        prompts = prompts * count if len(prompts) == 1 else prompts
        scores = np.empty((count, len(self.parts)), np.float32)
        for places, batch in batches(images):
            columns = [_column(part, batch, [prompts[i] for i in places]) for part in self.parts]
            scores[places] = np.stack(columns, axis=1)
        return scores


def load_reward(
    kind: RewardSpec = "pick",
    *,
    source: str | Path | Mapping[str, str | Path] | None = None,
    dtype: Any = None,
    traceable: bool | None = None,
    quantize: str | None = None,
    name: str | None = None,
    workers: int = 1,
    timeout: float | None = None,
    retries: int = 0,
) -> Reward:
    """Loads a reward.

    Args:
      kind: a name of `scorers.KINDS` ("pick", "hps", "clip", "aesthetic", "imagereward"); a function
        `(images [B, H, W, 3] in [0, 1], prompts) -> [B]`; a loaded reward; or a mapping of these to weights.
      source: a local folder, file or Hugging Face id with the weights, by kind where there are several; None is the
        published ones.
      dtype: of the weights; None is bfloat16 on GPU and TPU, float32 on CPU.
      traceable: whether JAX can trace the functions in `kind`; None finds out by trying.
      quantize: "int8" or "fp8" puts the linear layers of scorers into eight bits as they are read; None leaves them.
      name: what the scores of a single part are called in results, such as those of a second CLIP; None is its kind or
        the function's own name.
      workers: how many calls of a function are made at once, each with its share of the images, from threads.
      timeout: seconds that a call may take.
      retries: how often a call is made again that raised or took too long; each one is logged, and in the result's
        `notes`. Functions that workers, timeout or retries are given for run on the host.

    Raises:
      ValueError: for an unknown kind, a name for several parts, or a broken checkpoint.
    """
    check(kind)
    calls = Calls(workers, timeout, retries).check()
    if calls != host.PLAIN:
        if traceable:
            raise ValueError("workers, timeout and retries are for functions on the host; leave traceable out")
        traceable = False
    weights = dict(kind) if isinstance(kind, Mapping) else {kind: 1.0}
    if source is not None and not isinstance(source, Mapping):
        if len(weights) > 1:
            raise ValueError("several rewards need a source each: pass source={kind: source, ...}")
        source = dict.fromkeys(weights, source)
    known = {
        name: load_scorer(name, source=(source or {}).get(name), dtype=dtype, quantize=quantize)
        for name in weights
        if not callable(name)
    }
    parts = assemble(weights, known, traceable=traceable).parts
    if name is not None and len(parts) > 1:
        raise ValueError(f"name={name!r} is for one part, and the reward has {len(parts)}; load them one by one")
    return Reward(tuple(dataclasses.replace(p, name=p.name if name is None else name, calls=calls) for p in parts))


def assemble(spec: RewardSpec | Reward, known: Mapping[str, Scorer], *, traceable: bool | None = None) -> Reward:
    """The reward of a specification that was checked, from loaded scorers by their names."""
    if isinstance(spec, Reward):
        return spec
    weights = spec if isinstance(spec, Mapping) else {spec: 1.0}
    parts: list[Part] = []
    for kind, weight in weights.items():
        if isinstance(kind, Reward):
            parts += [dataclasses.replace(part, weight=weight * part.weight) for part in kind.parts]
        else:
            parts.append(_part(kind, weight, known, traceable))
    return Reward(tuple(parts))


def check(kind: Any, setting: str = "reward") -> None:
    """Raises ValueError for a reward that `load_reward` does not know, before anything is loaded."""
    if isinstance(kind, Reward):
        return
    parts = kind if isinstance(kind, Mapping) else {kind: 1.0} if isinstance(kind, Hashable) else None
    if parts is None:
        raise ValueError(f"{setting}={kind!r} is no name, function or mapping of these to weights")
    if not parts:
        raise ValueError("a mixture of rewards needs at least one part")
    titles: dict[str, Any] = {}
    for name, weight in parts.items():
        if not callable(name) and name not in KINDS:
            raise ValueError(f"unknown reward {name!r}; known: {', '.join(KINDS)}, a mapping of these, or a function")
        if isinstance(weight, bool | str) or not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise ValueError(f"{setting}: the weight {weight!r} of {_titles(name)[0]!r} is not a number")
        for title in _titles(name):
            if titles.setdefault(title, name) is not name:
                raise ValueError(f"{setting} has two parts of the name {title!r}; load one with load_reward(name=...)")


def check_drives(kind: RewardSpec | Reward) -> None:
    """Raises ValueError for a checked reward whose every weight is 0."""
    weights = kind.weights if isinstance(kind, Reward) else kind.values() if isinstance(kind, Mapping) else [1.0]
    if not any(weights):
        raise ValueError("every weight of the reward is 0, so nothing drives the search; report= only reports")


def with_report(reward: Reward, report: Reward | None) -> Reward:
    """The reward with another's parts beside it, reported only; parts of a name that is there already are left out.

    Raises:
      ValueError: for another scorer of a name that is there already.
    """
    known = {part.name: part for part in reward.parts}
    extra = []
    for part in () if report is None else report.parts:
        same = known.setdefault(part.name, part)
        if part.scorer is not None and same.scorer is not part.scorer:
            raise ValueError(
                f"report: the reward has another scorer of the name {part.name!r}; load one with load_reward(name=...)"
            )
        extra += [] if same in reward.parts else [dataclasses.replace(part, weight=0.0)]
    return Reward((*reward.parts, *extra))


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
    """

    function: Function
    prompt: str | None

    def __call__(self, params: None, images: Array, text: None) -> Array:
        prompts = UnreadPrompts(len(images)) if self.prompt is None else [self.prompt] * len(images)
        with host.raised_by(*_titles(self.function)):
            return self.function(images, prompts)


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
    scores = tuple(comparable(p.scorer.score) if p.scorer else _traced(p, prompt) for p in parts)
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


def text_shapes(reward: Reward, prompts: Sequence[str]) -> tuple[Any, ...]:
    """What `device_text` gives, as shapes; the params may be shapes too."""

    def of_part(part):
        scorer = part.scorer
        return scorer and jax.eval_shape(scorer.embed_text, scorer.params, scorer.tokenize(prompts))

    return tuple(of_part(part) for part in reward.parts if not part.on_host)


def host_components(reward: Reward, device: np.ndarray, images: Batch, prompts: Sequence[str]) -> np.ndarray:
    """All components `[B, parts]`: the device parts' columns as given, the host parts' computed."""
    columns = iter(device.T)
    return np.stack(
        [_column(part, images, prompts) if part.on_host else next(columns) for part in reward.parts], axis=1
    )


def _part(name: str | Function, weight: float, known: Mapping[str, Scorer], traceable: bool | None) -> Part:
    if not callable(name):
        return Part(name, weight, scorer=known[name])
    found, reads_prompt = (False, True) if traceable is False else _probe(name)
    return Part(*_titles(name), weight, function=name, traceable=found or bool(traceable), reads_prompt=reads_prompt)


def _titles(kind: str | Function) -> tuple[str, ...]:
    """What the parts of something in a mixture are called in results."""
    if isinstance(kind, Reward):
        return tuple(part.name for part in kind.parts)
    return (getattr(kind, "__name__", "custom") if callable(kind) else kind,)


def _traced(part: Part, prompt: str) -> TracedFunction:
    return TracedFunction(part.function, prompt if part.reads_prompt else None)


def _probe(function: Function) -> tuple[bool, bool]:
    """Whether a function turns abstract images into an abstract score each, and whether it looks at its prompts."""
    unread = UnreadPrompts(2)
    if _is_traceable(function, unread) and not unread.read:
        return True, False
    return _is_traceable(function, ["", ""]), True


def _is_traceable(function: Function, prompts: Any) -> bool:
    def probe(images):
        scores = function(images, prompts)
        if not isinstance(scores, jax.core.Tracer):
            raise TypeError("its scores do not come from the images by JAX operations")
        return scores

    try:
        return jax.eval_shape(probe, jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)).shape == (2,)
    except Exception:  # whatever goes wrong under tracing, the function may still be fine on the host
        return False


def _column(part: Part, images: Batch, prompts: Sequence[str]) -> np.ndarray:
    """Scores `[B]` of one part, computed on their own."""
    if part.scorer is not None:
        device, params = partition.device_of(part.scorer.params), part.scorer.params
        return np.asarray(score(part.scorer.score, device, params, images, _embedded(part, prompts)), np.float32)
    if part.on_host:
        return host.scores(part.name, part.function, part.calls, images, prompts)
    with host.raised_by(part.name):
        value = part.function(jnp.asarray(images), list(prompts))
    return host.as_scores(part.name, value, len(prompts))


def _embedded(part: Part, prompts: Sequence[str]) -> Any:
    if part.scorer is None:
        return None
    params = part.scorer.params
    return _embed(part.scorer.embed_text, partition.device_of(params), params, part.scorer.tokenize(prompts))


@compiled(static=2)
def _embed(embed_text: Callable, device: Any, params: Any, tokens: Any) -> Any:
    with target.compiled_for(device):
        return embed_text(params, tokens)


@compiled(static=2)
def score(function: Callable, device: Any, params: Any, images: Batch, text: Any) -> Array:
    """`function(params, images, text)`, compiled for the devices that the params lie on."""
    with target.compiled_for(device):
        return function(params, images, text)
