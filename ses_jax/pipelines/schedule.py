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
# Options that no published checkpoint of the families sets.
UNSUPPORTED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling")


def schedule(parts: Parts, cell: int, mu: Mu | None = None) -> Callable[[int, int, int], np.ndarray]:
    """The schedule of a checkpoint, `(steps, height, width) -> sigmas [steps + 1]`.

    Args:
      parts: of the checkpoint.
      cell: side in pixels of what one token stands for.
      mu: as for `sigmas`.

    Raises:
      ValueError: for an option that is not covered.
    """
    scheduler = {**parts.scheduler, **parts.schedule}
    wrong = [name for name in UNSUPPORTED if scheduler.get(name)]
    if scheduler.get("time_shift_type", "exponential") != "exponential":
        wrong.append("time_shift_type")
    if wrong:
        raise ValueError(f"{parts.folder}: schedules with {', '.join(wrong)} are not supported")
    return functools.partial(sigmas, scheduler, cell, mu=mu)


def check_override(schedule: Mapping[str, Any]) -> None:
    """Raises ValueError for entries that no scheduler's config has, or of the wrong kind."""
    unknown = [name for name in schedule if name not in (*KNOWN, *UNSUPPORTED)]
    if unknown:
        raise ValueError(f"schedule has unknown entries {unknown}; known: {', '.join(KNOWN)}")
    for name, value in schedule.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if name.endswith(("shift", "terminal", "seq_len")) and not number and (name, value) != ("shift_terminal", None):
            raise ValueError(f"schedule: {name}={value!r} is not a number")


def sigmas(
    scheduler: Mapping[str, Any], cell: int, steps: int, height: int, width: int, *, mu: Mu | None = None
) -> np.ndarray:
    """Sigmas `[steps + 1]`, float32, 1 to 0, for an image of `height x width` pixels.

    Args:
      scheduler: content of `scheduler_config.json`.
      cell: side in pixels of what one token stands for.
      steps: how many.
      height, width: of the image.
      mu: `(tokens, steps) -> shift`, where the config asks for one that depends on the size; `linear_mu` by default.
    """
    terminal = scheduler.get("shift_terminal")
    if not scheduler.get("use_dynamic_shifting"):
        return static_shift_sigmas(steps, float(scheduler.get("shift", 1.0)), terminal=terminal)
    tokens = (height // cell) * (width // cell)
    shift = linear_mu(tokens, scheduler) if mu is None else mu(tokens, steps)
    return dynamic_shift_sigmas(steps, shift, terminal=terminal)


def static_shift_sigmas(steps: int, shift: float, *, terminal: float | None = None) -> np.ndarray:
    """Sigmas `[steps + 1]` with a constant shift; `terminal` as for `dynamic_shift_sigmas`.

    Reference: `set_timesteps(sigmas=linspace(1, 1/n, n))`.
    """
    even = _even(steps)
    return _ended(shift * even / (1 + (shift - 1) * even), terminal)


def dynamic_shift_sigmas(steps: int, mu: float, *, terminal: float | None = None) -> np.ndarray:
    """Sigmas `[steps + 1]` shifted by `exp(mu)`; those before the final 0 are stretched so that the last is `terminal`.

    Reference: `set_timesteps(sigmas=linspace(1, 1/n, n), mu=mu)` with `time_shift_type="exponential"`.
    """
    return _ended(math.exp(mu) / (math.exp(mu) + (1 / _even(steps) - 1)), terminal)


def linear_mu(tokens: int, scheduler: Mapping[str, Any]) -> float:
    """Shift for so many image tokens, linear and unclamped (reference: `calculate_shift`)."""
    fewest, most = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    slope = (high - low) / (most - fewest)
    return tokens * slope + low - slope * fewest


def _even(steps: int) -> np.ndarray:
    return np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)


def _ended(sigmas: np.ndarray, terminal: float | None) -> np.ndarray:
    """A single step has nothing to stretch; the reference divides by zero there."""
    if terminal and len(sigmas) > 1:
        sigmas = 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - terminal))
    return np.append(sigmas, 0.0).astype(np.float32)
