"""Rewards: how good an image is for a prompt, as a number to maximise.

A reward is CLIP-like (text embedded once a prompt, images scored inside the compiled step), a weighted sum of rewards,
or a user's own function on the host.
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

from ses_jax import hub, resample
from ses_jax.convert import clip as clip_tables
from ses_jax.models import clip

HostReward = Callable[[Array, Sequence[str]], Any]
RewardSpec = str | Mapping[str, float] | HostReward

VERIFIED = (
    "names and shapes of every published tensor; scores against transformers on tiny random checkpoints; "
    "not run with the published weights"
)
PUBLISHED = {
    "clip": ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", VERIFIED),
    "pick": ("yuvalkirstain/PickScore_v1", VERIFIED),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Reward:
    """A reward: pure functions with their params, or host code.

    Attributes:
      name: for reports.
      params: pytree of weights.
      tokenize: `(prompts) -> tokens`, on the host.
      embed_text: `(params, tokens) -> text`, arrays with the prompts as their leading axis; once a prompt.
      score: `(params, images [B, H, W, 3] in [0, 1], text) -> [B]`, pure; None if the reward is host code.
      host: `(images, prompts) -> [B]`; None unless the reward is host code.
    """

    name: str
    params: Any = None
    tokenize: Callable[[Sequence[str]], Any] = list
    embed_text: Callable[[Any, Any], Any] | None = None
    score: Callable[[Any, Array, Any], Array] | None = None
    host: HostReward | None = None

    def __call__(self, images: Float[Array | np.ndarray, "b h w 3"], prompts: Sequence[str]) -> np.ndarray:
        """Scores `[B]`, float32, of images in [0, 1], each for its own prompt.

        Raises:
          ValueError: unless there is one prompt and one score an image.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images need as many prompts, got {len(prompts)}")
        if self.host is None:
            text = embed(self.embed_text, self.params, self.tokenize(prompts))
            return np.asarray(score(self.score, self.params, images, text))
        scores = np.asarray(self.host(images, prompts), np.float32)
        if scores.shape != (len(prompts),):
            raise ValueError(
                f"reward {self.name!r} returned shape {scores.shape} for {len(prompts)} images; need one score each"
            )
        return scores


def load_reward(kind: RewardSpec = "pick", *, source: str | Path | None = None, dtype: Any = None) -> Reward:
    """Loads a reward.

    Args:
      kind: "pick" (PickScore) or "clip" (CLIP score), both `exp(logit_scale) * cosine`; a mapping of kinds to weights
        for their weighted sum; or a function `(images [B, H, W, 3] in [0, 1], prompts) -> [B]`.
      source: a local folder or Hugging Face id with the weights of a single kind; None is the published one.
      dtype: of the weights; None is bfloat16 on GPU and TPU, float32 on CPU.

    Raises:
      ValueError: for an unknown kind or a broken checkpoint.
    """
    if isinstance(kind, Mapping):
        if source is not None:
            raise ValueError(
                "source names the weights of one reward; load the parts of a mixture from their own sources"
            )
        return weighted_sum([(load_reward(part, dtype=dtype), weight) for part, weight in kind.items()])
    if callable(kind):
        return Reward(name=getattr(kind, "__name__", "custom"), host=kind)
    check(kind)
    return _load_clip(kind, hub.resolve(str(source or PUBLISHED[kind][0])), dtype)


def check(kind: RewardSpec | Reward) -> None:
    """Raises ValueError for a reward that `load_reward` does not know, before anything is loaded."""
    if isinstance(kind, Reward) or callable(kind):
        return
    if isinstance(kind, Mapping) and not kind:
        raise ValueError("a mixture of rewards needs at least one part")
    for name in kind if isinstance(kind, Mapping) else [kind]:
        if not callable(name) and name not in PUBLISHED:
            raise ValueError(
                f"unknown reward {name!r}; known: {', '.join(PUBLISHED)}, a mapping of these, or a function"
            )


def weighted_sum(parts: Sequence[tuple[Reward, float]]) -> Reward:
    """The sum of `weight * reward`; on the device if every part is, else on the host."""
    rewards, weights = zip(*parts, strict=True)
    name = " + ".join(f"{weight:g} {reward.name}" for reward, weight in parts)

    if any(reward.host for reward in rewards):
        return Reward(
            name=name,
            host=lambda images, prompts: sum(w * r(images, prompts) for r, w in parts),
        )
    return Reward(
        name=name,
        params=[reward.params for reward in rewards],
        tokenize=lambda prompts: [reward.tokenize(prompts) for reward in rewards],
        embed_text=lambda params, tokens: [
            reward.embed_text(p, t) for reward, p, t in zip(rewards, params, tokens, strict=True)
        ],
        score=lambda params, images, text: sum(
            weight * reward.score(p, images, t)
            for reward, weight, p, t in zip(rewards, weights, params, text, strict=True)
        ),
    )


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """How CLIP's slow image processor prepares an image (`preprocessor_config.json`)."""

    size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_folder(cls, folder: Path, image_size: int) -> "Preprocessor":
        """Reads the folder's `preprocessor_config.json`; without one, the network's size and CLIP's own values."""
        path = folder / "preprocessor_config.json"
        if not path.exists():
            return cls(image_size)
        config = hub.read_json(path)
        size, crop = config.get("size", image_size), config.get("crop_size", image_size)
        size = size["shortest_edge"] if isinstance(size, Mapping) else size
        crop = crop["height"] if isinstance(crop, Mapping) else crop
        if not size == crop == image_size:
            raise ValueError(f"{path}: resize to {size} and crop to {crop}; the network needs {image_size} for both")
        return cls(size, tuple(config.get("image_mean", cls.mean)), tuple(config.get("image_std", cls.std)))

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b size size 3"]:
        """Standardised pixels of images in [0, 1], rounded to 8 bits first."""
        pixels = resample.resize_and_crop(resample.quantize(images), self.size)
        return (pixels / 255.0 - jnp.array(self.mean)) / jnp.array(self.std)


def clip_score(config: clip.Config, preprocess: Preprocessor, params: Any, images: Array, text: Array) -> Array:
    """`exp(logit_scale) * cosine` of each image and its text embedding, float32 `[B]`."""
    image = clip.embed_image(params, config, preprocess(images))
    return clip.logit_scale(params) * jnp.sum(image * text, axis=-1)


def _load_clip(kind: str, folder: Path, dtype: Any) -> Reward:
    config, params = hub.load_component(folder, clip_tables.COMPONENT, dtype=dtype)
    return Reward(
        name=kind,
        params=params,
        tokenize=functools.partial(_tokenize_clip, hub.load_tokenizer(folder), config.max_length),
        embed_text=functools.partial(_embed_clip, config),
        score=functools.partial(clip_score, config, Preprocessor.from_folder(folder, config.image_size)),
    )


def _tokenize_clip(tokenizer: Any, length: int, prompts: Sequence[str]) -> np.ndarray:
    encoded = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length)
    return np.array(encoded["input_ids"], np.int32)


def _embed_clip(config: clip.Config, params: Any, tokens: Any) -> Array:
    return clip.embed_text(params, config, tokens)


@functools.partial(jax.jit, static_argnums=0)
def embed(embed_text: Callable, params: Any, tokens: Any) -> Any:
    """`embed_text(params, tokens)`, compiled."""
    return embed_text(params, tokens)


@functools.partial(jax.jit, static_argnums=0)
def score(score_images: Callable, params: Any, images: Array, text: Any) -> Array:
    """`score_images(params, images, text)`, compiled."""
    return score_images(params, images, text)
