"""What a call is to search: prompts with their numbers and seeds."""

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ses_jax.engine.config import SearchConfig
from ses_jax.engine.settings import check_text, shown

# What random draws are chosen by has 32 bits.
INDICES = 2**32


class Case(NamedTuple):
    """A prompt to search.

    Attributes:
      index: number of the prompt, which chooses its random draws.
      config: with the case's own seed.
    """

    prompt: str
    index: int
    config: SearchConfig


def cases(prompt: Any, index: Any, seeds: Sequence[Any] | None, config: SearchConfig) -> list[Case]:
    """The cases of a call of `search`.

    Args:
      prompt: one, or a list of them.
      index: number of the first prompt.
      seeds: one for each prompt, or several of one prompt; None is that of the config for all.
      config: of all cases.

    Raises:
      ValueError: for what is no prompt, number or seed, and for prompts and seeds of different numbers.
    """
    prompts = prompt_list(prompt)
    first = _whole(index, 1 if isinstance(prompt, str) else len(prompts))
    if seeds is None:
        return [Case(text, first + place, config) for place, text in enumerate(prompts)]
    configs = [dataclasses.replace(config, seed=seed) for seed in seeds]
    if isinstance(prompt, str):
        return [Case(prompt, first, own) for own in configs]
    if len(prompts) != len(configs):
        raise ValueError(
            f"{len(prompts)} prompts and {len(configs)} seeds: give a seed a prompt, or several seeds of one prompt"
        )
    return [Case(text, first + place, own) for place, (text, own) in enumerate(zip(prompts, configs, strict=True))]


def several(seed: Any) -> list[Any] | None:
    """The seeds of a list; None for what is no list, which is one seed or none.

    Raises:
      ValueError: for an empty list.
    """
    listed = isinstance(seed, Sequence) and not isinstance(seed, str | bytes)
    if not listed and not (isinstance(seed, np.ndarray) and seed.ndim == 1):
        return None
    if not len(seed):
        raise ValueError("seed=[] holds no seed; pass at least one")
    return list(seed)


def prompt_list(prompt: Any) -> list[str]:
    """One prompt or several as a list; raises ValueError for anything else."""
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Iterable):
        raise ValueError(f"prompts must be strings, got {shown(prompt)}")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("no prompts: pass at least one")
    for text in prompts:
        if not isinstance(text, str):
            raise ValueError(f"prompts must be strings, got {shown(text)}")
        check_text(text)
    return prompts


def _whole(index: Any, count: int) -> int:
    """The number of the first of so many prompts; raises ValueError for anything else."""
    try:
        index = operator.index(index)
    except TypeError:
        raise ValueError(f"index={shown(index)} is not a whole number") from None
    if index < 0:
        raise ValueError(f"index={index} must be at least 0")
    if index + count > INDICES:
        raise ValueError(f"index={shown(index)} must be less than {INDICES - count + 1}")
    return index
