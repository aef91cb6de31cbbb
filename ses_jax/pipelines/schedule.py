"""Schedules of noise levels, as diffusers' `FlowMatchEulerDiscreteScheduler` makes them from a checkpoint's config."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ses_jax.pipelines.base import Parts

Mu = Callable[[int, int], float]

# What a config says of noise levels; whatever else it holds makes no difference to images.
KNOWN = (
    *("use_dynamic_shifting", "shift", "shift_terminal", "base_shift", "max_shift"),
    *("base_image_seq_len", "max_image_seq_len", "time_shift_type", "num_train_timesteps"),
)
EULER = "FlowMatchEulerDiscreteScheduler"
# Options that no published checkpoint of the families sets.
UNSUPPORTED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling")


def schedule(parts: Parts, cell: int, mu: Mu | None = None) -> Callable[[int, int, int], np.ndarray]:
    """The schedule of a checkpoint, `(steps, height, width) -> sigmas [steps + 1]`.

    Args:
      parts: of the checkpoint.
      cell: side in pixels of what one token stands for.
      mu: as for `sigmas`.

    Raises:
      ValueError: for another sampler, or an option that is not covered.
    """
    scheduler = {**parts.scheduler, **parts.schedule}
    sampler = scheduler.get("_class_name", EULER)
    if sampler != EULER:
        raise ValueError(
            f"{parts.folder}: its sampler, {sampler}, is not supported; Euler's steps may be taken instead, with "
            f'schedule={{"_class_name": "{EULER}"}}'
        )
    wrong = [name for name in UNSUPPORTED if scheduler.get(name)]
    if scheduler.get("time_shift_type", "exponential") != "exponential":
        wrong.append("time_shift_type")
    if wrong:
        raise ValueError(f"{parts.folder}: schedules with {', '.join(wrong)} are not supported")
    return functools.partial(sigmas, scheduler, cell, mu=mu)


def check_override(schedule: Mapping[str, Any]) -> None:
    """Raises ValueError for entries that no scheduler's config has, or of the wrong kind."""
    unknown = [name for name in schedule if name not in (*KNOWN, *UNSUPPORTED, "_class_name", "sigmas")]
    if unknown:
        raise ValueError(f"schedule has unknown entries {unknown}; known: sigmas, {', '.join(KNOWN)}")
    if "sigmas" in schedule:
        _check_levels(schedule["sigmas"])
    for name, value in schedule.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if name.endswith(("shift", "terminal", "seq_len")) and not number and (name, value) != ("shift_terminal", None):
            raise ValueError(f"schedule: {name}={value!r} is not a number")


def _check_levels(levels: Any) -> None:
    """Raises ValueError for noise levels that no image can be denoised along."""
    try:
        found = np.asarray(levels, np.float64)
    except (TypeError, ValueError):
        found = np.zeros(0)
    falling = found.ndim == 1 and found.size and (np.diff([*found, 0.0]) < 0).all() and found[0] <= 1
    if not falling:
        raise ValueError(f"schedule: sigmas={levels!r} are not numbers that fall from at most 1 to above 0")


def sigmas(
    scheduler: Mapping[str, Any], cell: int, steps: int, height: int, width: int, *, mu: Mu | None = None
) -> np.ndarray:
    """Sigmas `[steps + 1]`, float32, 1 to 0, for an image of `height x width` pixels.

    Args:
      scheduler: content of `scheduler_config.json`; its `sigmas`, if it has any, are shifted in the place of even ones,
        as diffusers' pipelines do with theirs.
      cell: side in pixels of what one token stands for.
      steps: how many.
      height, width: of the image.
      mu: `(tokens, steps) -> shift`, where the config asks for one that depends on the size; `linear_mu` by default.

    Raises:
      ValueError: for other steps than the scheduler has sigmas.
    """
    terminal, levels = scheduler.get("shift_terminal"), _levels(scheduler, steps)
    if not scheduler.get("use_dynamic_shifting"):
        return static_shift_sigmas(levels, float(scheduler.get("shift", 1.0)), terminal=terminal)
    tokens = (height // cell) * (width // cell)
    shift = linear_mu(tokens, scheduler) if mu is None else mu(tokens, steps)
    return dynamic_shift_sigmas(levels, shift, terminal=terminal)


def static_shift_sigmas(levels: np.ndarray, shift: float, *, terminal: float | None = None) -> np.ndarray:
    """Sigmas `[steps + 1]` of `levels [steps]` with a constant shift; `terminal` as for `dynamic_shift_sigmas`.

    Reference: `set_timesteps(sigmas=levels)`.
    """
    return _ended(shift * levels / (1 + (shift - 1) * levels), terminal)


def dynamic_shift_sigmas(levels: np.ndarray, mu: float, *, terminal: float | None = None) -> np.ndarray:
    """`levels [steps]` shifted by `exp(mu)`, and 0; those before the 0 are stretched so that the last is `terminal`.

    Reference: `set_timesteps(sigmas=levels, mu=mu)` with `time_shift_type="exponential"`.
    """
    return _ended(math.exp(mu) / (math.exp(mu) + (1 / levels - 1)), terminal)


def linear_mu(tokens: int, scheduler: Mapping[str, Any]) -> float:
    """Shift for so many image tokens, linear and unclamped (reference: `calculate_shift`)."""
    fewest, most = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    slope = (high - low) / (most - fewest)
    return tokens * slope + low - slope * fewest


def even(steps: int) -> np.ndarray:
    """Noise levels `[steps]`, float32, from 1 to `1 / steps`."""
    return np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)


def _levels(scheduler: Mapping[str, Any], steps: int) -> np.ndarray:
    """Noise levels before the shift."""
    given = scheduler.get("sigmas")
    if given is None:
        return even(steps)
    if len(given) != steps:
        raise ValueError(f"the schedule has {len(given)} sigmas, one a step, and {steps} steps are asked for")
    return np.asarray(given, np.float32)


def _ended(sigmas: np.ndarray, terminal: float | None) -> np.ndarray:
    """A single step has nothing to stretch; the reference divides by zero there."""
    if terminal and len(sigmas) > 1:
        sigmas = 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - terminal))
    return np.append(sigmas, 0.0).astype(np.float32)
