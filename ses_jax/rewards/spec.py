"""Rewards from what people say they are: names, functions and mappings of these to weights."""

import dataclasses
import math
import numbers
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ses_jax.rewards import host
from ses_jax.rewards.device_parts import UnreadPrompts
from ses_jax.rewards.host import Calls
from ses_jax.rewards.reward import Function, Part, Reward
from ses_jax.rewards.scorers import KINDS, Scorer, load_scorer

RewardSpec = str | Function | Mapping[str | Function, float]  # a loaded Reward is a Function too


def load_reward(
    kind: RewardSpec = "pick",
    *,
    source: str | Path | Mapping[str, str | Path] | None = None,
    dtype: Any = None,
    traceable: bool | None = None,
    quantize: str | None = None,
    name: str | None = None,
    workers: int | None = None,
    timeout: float | None = None,
    retries: int | None = None,
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
        `notes`. Left out, these three are 1, any and 0, and those of a loaded reward stay. Functions that they are
        given for run on the host.

    Raises:
      ValueError: for an unknown kind, a name for several parts, workers, timeout or retries without a function, or a
        broken checkpoint.
    """
    check(kind)
    weights = dict(kind) if isinstance(kind, Mapping) else {kind: 1.0}
    given = {"workers": workers, "timeout": timeout, "retries": retries}
    given = {name: value for name, value in given.items() if value is not None}
    if Calls(**given).check() != host.PLAIN:
        _check_called(weights, traceable, given)
        traceable = False
    if source is not None and not isinstance(source, Mapping):
        if len(weights) > 1:
            raise ValueError("several rewards need a source each: pass source={kind: source, ...}")
        source = dict.fromkeys(weights, source)
    known = {
        name: load_scorer(name, source=(source or {}).get(name), dtype=dtype, quantize=quantize)
        for name in weights
        if not callable(name)
    }
    parts = [_called(part, given) for part in assemble(weights, known, traceable=traceable).parts]
    if name is not None and len(parts) > 1:
        raise ValueError(f"name={name!r} is for one part, and the reward has {len(parts)}; load them one by one")
    return Reward(tuple(dataclasses.replace(p, name=p.name if name is None else name) for p in parts))


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
    check_hashable(kind, setting)
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


def check_hashable(kind: Any, setting: str = "reward") -> None:
    """Raises ValueError for an object that can be called but is no key of a mixture."""
    try:
        hash(kind)
    except TypeError:
        if callable(kind):
            name = type(kind).__name__
            raise ValueError(
                f"{setting}: a {name} can be called but is not hashable; a dataclass is with eq=False or frozen=True"
            ) from None


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


def _check_called(weights: Mapping[Any, float], traceable: bool | None, given: Mapping[str, Any]) -> None:
    """Raises ValueError where no function would be called as is given."""
    if traceable:
        raise ValueError("workers, timeout and retries are for functions on the host; leave traceable out")
    parts = [part for kind in weights for part in (kind.parts if isinstance(kind, Reward) else [kind])]
    if not any(part.function if isinstance(part, Part) else callable(part) for part in parts):
        titles = ", ".join(repr(title) for kind in weights for title in _titles(kind))
        raise ValueError(f"{titles}: no function that {' and '.join(given)} could be for; leave them out")


def _called(part: Part, given: Mapping[str, Any]) -> Part:
    """A part whose function is called as is given, on the host if that asks for more than plain calls."""
    if part.function is None:
        return part
    if Calls(**given) != host.PLAIN:
        part = dataclasses.replace(part, traceable=False, reads_prompt=True)
    return dataclasses.replace(part, calls=part.calls._replace(**given))


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
