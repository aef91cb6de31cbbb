"""What every family of models looks like from outside, and what the families share.

A family is a module with

    COMPONENTS  its networks by subfolder, `{name: convert.table.Component}`
    TOKENIZERS  the subfolders of its tokenizers
    PUBLISHED   the checkpoints it was written for
    OPTIONS     names of what `assemble` takes besides the parts
    assemble    `(parts, **options) -> Pipeline`

so that one loader serves all, and the same pipeline can be assembled around shapes instead of weights.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

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


class Parts(NamedTuple):
    """What a pipeline is assembled from: the content of a checkpoint folder, or the facts of a published one.

    Attributes:
      folder: where the checkpoint lies.
      configs: by name, the networks' configs.
      params: by name, the networks' params, or their shapes.
      tokenizers: by name; empty where only shapes are wanted.
      scheduler: content of `scheduler/scheduler_config.json`.
      index: content of `model_index.json`.
      settings: content of the checkpoint's own `ses_jax.json`.
    """

    folder: Path
    configs: Mapping[str, Any]
    params: Mapping[str, Any]
    tokenizers: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    index: Mapping[str, Any] = {}
    settings: Mapping[str, Any] = {}


class Published(NamedTuple):
    """A published checkpoint of a family.

    Attributes:
      source: what `load_pipeline` takes.
      defaults: its size and settings, for people.
      verified: what the port was checked against, for people.
      configs: by name, the networks' configs; empty for a checkpoint that comes with the package.
      scheduler, index: as in `Parts`.
    """

    source: str
    defaults: str
    verified: str
    configs: Mapping[str, Any] = {}
    scheduler: Mapping[str, Any] = {}
    index: Mapping[str, Any] = {}


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
      blank_tokens: `(count, length, *, guidance) -> tokens`, those of `count` prompts of about `length` tokens, made
        without a tokenizer: for shapes, plans and benchmarks.
      text_params: the part of the params that `encode` uses.
      image_params: the part that `velocity` and `decode` use.
      place: `(params) -> params`, puts any of these parts on their devices; moves nothing that is there already.
      mesh: the devices; None is the default device.
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
    blank_tokens: Callable[..., Any] | None = None
    text_params: Callable[[Any], Any] = lambda params: params
    image_params: Callable[[Any], Any] = lambda params: params
    place: Callable[[Any], Any] = lambda params: params
    mesh: Mesh | None = None


def pick(*names: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """The function that takes only these networks out of the params."""
    return lambda params: {name: params[name] for name in names}


def override(defaults: Defaults, settings: Mapping[str, Any]) -> Defaults:
    """Defaults with the entries that a checkpoint's own `ses_jax.json` names.

    Raises:
      ValueError: for an entry that is no default.
    """
    unknown = settings.keys() - {field.name for field in dataclasses.fields(Defaults)}
    if unknown:
        raise ValueError(f"ses_jax.json has unknown entries {sorted(unknown)}; see ses_jax.pipelines.Defaults")
    return dataclasses.replace(defaults, **settings)


def dynamic_shift_sigmas(steps: int, mu: float, *, terminal: float | None = None) -> np.ndarray:
    """Sigmas `[steps + 1]` of the flow-matching Euler schedule shifted by `exp(mu)`, float32, 1 to 0.

    Reference: diffusers `FlowMatchEulerDiscreteScheduler.set_timesteps(sigmas=linspace(1, 1/n, n), mu=mu)` with
    `time_shift_type="exponential"`; the sigmas before the final 0 are stretched so that the last is `terminal`.
    A single step has nothing to stretch; the reference divides by zero there.
    """
    sigmas = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    sigmas = math.exp(mu) / (math.exp(mu) + (1 / sigmas - 1))
    if terminal and steps > 1:
        sigmas = 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - terminal))
    return np.append(sigmas, 0.0).astype(np.float32)


def linear_mu(tokens: int, scheduler: Mapping[str, Any]) -> float:
    """Shift of the schedule for so many image tokens, linear and unclamped (diffusers `calculate_shift`)."""
    fewest, most = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    slope = (high - low) / (most - fewest)
    return tokens * slope + low - slope * fewest


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


class GuidedTokens(NamedTuple):
    """Token ids of `P` prompts and, where guidance is on, of their negative prompts.

    Attributes:
      ids: `[P, L]`, padded on the right.
      lengths: `[P]`, how many are real.
      negative_ids, negative_lengths: the same; None where guidance is off.
      guidance: the family's options, each `[P]`.
    """

    ids: np.ndarray
    lengths: np.ndarray
    negative_ids: np.ndarray | None
    negative_lengths: np.ndarray | None
    guidance: dict[str, np.ndarray]


def guided_tokens(ids: np.ndarray, lengths: np.ndarray, count: int, options: Mapping[str, float]) -> GuidedTokens:
    """From the rows of `count` prompts, followed by those of their negative prompts where guidance is on."""
    negative = len(ids) > count
    return GuidedTokens(
        ids=ids[:count],
        lengths=lengths[:count],
        negative_ids=ids[count:] if negative else None,
        negative_lengths=lengths[count:] if negative else None,
        guidance={name: np.full(count, value, np.float32) for name, value in options.items()},
    )


def both(positive: Any, negative: Any) -> Any:
    """Two pytrees as one batch, positive rows first: the two branches of classifier-free guidance."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), positive, negative)


def negative_prompts(negative_prompt: str | Sequence[str] | None, count: int, default: str = "") -> list[str]:
    """A negative prompt for each of `count` prompts.

    Raises:
      ValueError: for a list of another length.
    """
    if isinstance(negative_prompt, str | None):
        return [default if negative_prompt is None else negative_prompt] * count
    if len(negative_prompt) != count:
        raise ValueError(f"{len(negative_prompt)} negative prompts for {count} prompts; pass one, or one for each")
    return list(negative_prompt)


def guidance_options(guidance: Guidance, off: Mapping[str, float], family: str) -> dict[str, float]:
    """A family's named guidance options, filled up from those that mean "off"; a number is its `scale`.

    Raises:
      ValueError: for an option that the family does not have.
    """
    options = dict(guidance) if isinstance(guidance, Mapping) else {"scale": guidance}
    unknown = options.keys() - off.keys()
    if unknown:
        raise ValueError(f"unknown guidance options {sorted(unknown)}; {family} takes {', '.join(off)}")
    return {**off, **options}


def to_images(pixels: Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
    """An autoencoder's output in [-1, 1] as float32 images in [0, 1]."""
    return jnp.clip(pixels.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)
