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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ses_jax.models.config import check

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
      schedule: what is to be otherwise in the scheduler's content when noise levels are made.
    """

    folder: Path
    configs: Mapping[str, Any]
    params: Mapping[str, Any]
    tokenizers: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    index: Mapping[str, Any] = {}
    settings: Mapping[str, Any] = {}
    schedule: Mapping[str, Any] = {}


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
      source: what `load_pipeline` was given; "" is the folder.
      options: what else `load_pipeline` was given that images depend on, as plain JSON values, to load it so again.
      changes: how images differ from those of the checkpoint by what it was loaded with, as plain JSON values by the
        name of the argument of `load_pipeline`: kept in results, and a saved search goes on only with the same.
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
    source: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        """What it is, without its weights."""
        size = f"{self.defaults.height} x {self.defaults.width}, {self.defaults.steps} steps"
        lines = [f"{self.family} from {self.folder}: {size}", *_networks(self.params)]
        return "\n  ".join(lines + ([f"on {self.mesh}"] if self.mesh is not None and self.mesh.size > 1 else []))


def _networks(params: Any) -> list[str]:
    """A line a network: its parameters, their dtypes and bytes."""
    lines = []
    for name, network in params.items() if isinstance(params, Mapping) else [("params", params)]:
        leaves = [leaf for leaf in jax.tree.leaves(network) if hasattr(leaf, "dtype")]
        count, size = (sum(part) for part in zip(*((x.size, x.size * x.dtype.itemsize) for x in leaves), strict=True))
        dtypes = ", ".join(sorted({x.dtype.name for x in leaves}))
        lines.append(f"{name}: {count:,} parameters, {dtypes}, {size / 2**20:,.1f} MiB")
    return lines


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
        raise ValueError(f"ses_jax.json has unknown entries {sorted(unknown)}; see ses_jax.pipelines.base.Defaults")
    try:
        return check(dataclasses.replace(defaults, **settings))
    except ValueError as error:
        raise ValueError(f"ses_jax.json: {error}") from None


def noise_shape(channels: int, cell: int, height: int, width: int) -> tuple[int, int, int]:
    """Shape `(C, h, w)` of the noise of an image of `height x width` pixels, one latent cell per `cell` squared."""
    return channels, height // cell, width // cell


class Tokens(NamedTuple):
    """Token ids `[B, L]`, padded on the right, and how many of each row are real, `[B]`."""

    ids: np.ndarray
    lengths: np.ndarray


def in_chat_template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """A conversation as text, by the template that came with the tokenizer.

    Raises:
      ValueError: naming the tokenizer, where its template fails.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # the template is a program of the checkpoint, in a sandbox
        name = getattr(tokenizer, "name_or_path", "")
        raise ValueError(f"the chat template of the tokenizer in {name} fails: {error}") from error


def pad_to_bucket(token_ids: Sequence[Sequence[int]], pad_id: int) -> Tokens:
    """Pads lists of token ids to the smallest bucket that holds the longest; so new prompts rarely compile anew."""
    lengths = np.array([len(ids) for ids in token_ids], np.int32)
    bucket = next(size for size in TOKEN_BUCKETS if size >= lengths.max())
    padded = np.full((len(token_ids), bucket), pad_id, np.int32)
    for row, ids in zip(padded, token_ids, strict=True):
        row[: len(ids)] = ids
    return Tokens(padded, lengths)


def to_images(pixels: Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
    """An autoencoder's output in [-1, 1] as float32 images in [0, 1]."""
    return jnp.clip(pixels.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)
