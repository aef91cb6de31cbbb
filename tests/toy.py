"""A pipeline without networks: its image is a plain function of the noise, so that a search can be checked by hand.

Its functions are the same each time it is made, and so are those of its rewards: tests of a file share programs.
"""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ses_jax.loading import partition
from ses_jax.pipelines.base import Defaults, Pipeline
from ses_jax.rewards.reward import Part, Reward
from ses_jax.rewards.scorers import ImageScore, Scorer

CHANNELS = 3


def pipeline(mesh=None, **defaults) -> Pipeline:
    """Latents grow or shrink by a gain and drift with the prompt's length; one pixel a latent cell."""
    return Pipeline(
        family="Toy",
        folder=Path("toy"),
        params={"gain": jnp.float32(1.0)},
        defaults=Defaults(**{"height": 16, "width": 16, "steps": 4, "level": 2, "reward": "clip"} | defaults),
        size_multiple=4,
        tokenize=lambda prompts, *, guidance=0.0, negative_prompt=None: np.array(
            [[len(prompt) / 100, guidance] for prompt in prompts], np.float32
        ),
        encode=_encode,
        velocity=_velocity,
        decode=_decode,
        sigmas=lambda steps, height, width: np.linspace(1, 0, steps + 1, dtype=np.float32),
        noise_shape=lambda height, width: (CHANNELS, height, width),
        place=lambda params: partition.replicate(mesh, params),
        mesh=mesh,
    )


def _encode(params, tokens):
    return tokens * params["gain"]


def _velocity(params, latents, sigma, condition):
    return latents * 0.5 * params["gain"] + condition[:, :1, None, None]


def _decode(params, latents):
    return jnp.clip(jnp.moveaxis(latents, 1, -1) * 0.2 + 0.5, 0, 1)


def scorer(name: str, score) -> Scorer:
    """A scorer of images alone, with a param of 1 that multiplies its scores."""
    return Scorer(
        name=name,
        params=jnp.float32(1.0),
        tokenize=lambda prompts: np.zeros((len(prompts), 1), np.float32),
        embed_text=lambda params, tokens: tokens,
        score=ImageScore(score, _say),
    )


def _say(params, seen, text):
    return params * seen + text[:, 0]


def brightness() -> Reward:
    """The mean of the image, on the device."""
    return Reward((Part("brightness", scorer=scorer("brightness", _mean)),))


def _mean(images):
    return images.mean(axis=(1, 2, 3))


def mixture(**weights: float) -> Reward:
    """A mixture of the means of the colour channels, by name."""
    return Reward(tuple(Part(name, weight, scorer=scorer(name, _channel(name))) for name, weight in weights.items()))


@functools.cache
def _channel(name):
    i = ("red", "green", "blue").index(name)
    return lambda images: 100 * i + images[..., i].mean(axis=(1, 2))
