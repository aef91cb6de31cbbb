"""What every family of models looks like from outside: a frozen record of pure functions and their params."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

Guidance = float | Mapping[str, float]

TOKEN_BUCKETS = (32, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a search uses where the caller says nothing.

    Attributes:
      height, width: of the image, in pixels.
      steps: of the full render.
      preview_steps: of a candidate.
      guidance: classifier-free or distilled guidance, in the family's own convention.
      level: wavelet level of the low band.
      reward: name of the reward.
    """

    height: int = 1024
    width: int = 1024
    steps: int = 28
    preview_steps: int = 10
    guidance: float = 0.0
    level: int = 4
    reward: str = "pick"


class Published(NamedTuple):
    """A published checkpoint of a family.

    Attributes:
      source: what `load_pipeline` takes.
      defaults: its size and settings, for people.
      verified: what the port was checked against, for people.
    """

    source: str
    defaults: str
    verified: str


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A text-to-image model as pure functions; `params` is always handed in, so that nothing is baked into a program.

    Attributes:
      family: the model family's name, e.g. "ZImagePipeline".
      folder: where the checkpoint lies.
      params: pytree of weights, one entry a network.
      defaults: see `Defaults`.
      size_multiple: height and width must be multiples of this many pixels.
      tokenize: `(prompts, *, guidance, negative_prompt) -> tokens`, on the host. `guidance` is a number or the family's
        own named options; a pytree comes back whose arrays all have the prompts as their leading axis.
      encode: `(params, tokens) -> condition`; again every array of the pytree has the prompts as its leading axis.
      velocity: `(params, latents [B, C, h, w], sigma [B], condition) -> [B, C, h, w]`, noise minus image, guidance
        included; sigma runs from 1 (noise) to 0 (image).
      decode: `(params, latents [B, C, h, w]) -> images [B, H, W, 3]` in [0, 1].
      sigmas: `(steps, height, width) -> [steps + 1]`, from 1 down to 0.
      noise_shape: `(height, width) -> (C, h, w)`.
    """

    family: str
    folder: Path
    params: Any
    defaults: Defaults
    size_multiple: int
    tokenize: Callable[..., Any]
    encode: Callable[[Any, Any], Any]
    velocity: Callable[[Any, jax.Array, jax.Array, Any], jax.Array]
    decode: Callable[[Any, jax.Array], jax.Array]
    sigmas: Callable[[int, int, int], np.ndarray]
    noise_shape: Callable[[int, int], tuple[int, int, int]]


def override(defaults: Defaults, settings: Mapping[str, Any]) -> Defaults:
    """Defaults with the entries that a checkpoint's own `ses_jax.json` names.

    Raises:
      ValueError: for an entry that is no default.
    """
    unknown = settings.keys() - {field.name for field in dataclasses.fields(Defaults)}
    if unknown:
        raise ValueError(f"ses_jax.json has unknown entries {sorted(unknown)}; see ses_jax.pipelines.Defaults")
    return dataclasses.replace(defaults, **settings)


def static_shift_sigmas(steps: int, shift: float) -> np.ndarray:
    """Sigmas `[steps + 1]` of the flow-matching Euler schedule with a constant shift, float32, 1 to 0.

    Reference: diffusers `FlowMatchEulerDiscreteScheduler.set_timesteps(sigmas=linspace(1, 1/n, n))`.
    """
    sigmas = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return np.append(sigmas, 0.0).astype(np.float32)


def pad_to_bucket(token_ids: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads lists of token ids to a shared bucket length, so that a new prompt rarely compiles anew.

    Returns:
      ids int32 `[B, L]`, L the smallest bucket that holds the longest, and lengths int32 `[B]`.
    """
    lengths = np.array([len(ids) for ids in token_ids], np.int32)
    bucket = next(size for size in TOKEN_BUCKETS if size >= lengths.max())
    padded = np.full((len(token_ids), bucket), pad_id, np.int32)
    for row, ids in zip(padded, token_ids, strict=True):
        row[: len(ids)] = ids
    return padded, lengths
