"""A pipeline without networks: its image is a plain function of the noise, so that a search can be checked by hand."""

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

    def velocity(params, latents, sigma, condition):
        return latents * 0.5 * params["gain"] + condition[:, :1, None, None]

    return Pipeline(
        family="Toy",
        folder=Path("toy"),
        params={"gain": jnp.float32(1.0)},
        defaults=Defaults(**{"height": 16, "width": 16, "steps": 4, "level": 2, "reward": "clip"} | defaults),
        size_multiple=4,
        tokenize=lambda prompts, *, guidance=0.0, negative_prompt=None: np.array(
            [[len(prompt) / 100, guidance] for prompt in prompts], np.float32
        ),
        encode=lambda params, tokens: tokens * params["gain"],
        velocity=velocity,
        decode=lambda params, latents: jnp.clip(jnp.moveaxis(latents, 1, -1) * 0.2 + 0.5, 0, 1),
        sigmas=lambda steps, height, width: np.linspace(1, 0, steps + 1, dtype=np.float32),
        noise_shape=lambda height, width: (CHANNELS, height, width),
        place=lambda params: partition.replicate(mesh, params),
        mesh=mesh,
    )


def scorer(name: str, score) -> Scorer:
    """A scorer of images alone, with a param of 1 that multiplies its scores."""
    return Scorer(
        name=name,
        params=jnp.float32(1.0),
        tokenize=lambda prompts: np.zeros((len(prompts), 1), np.float32),
        embed_text=lambda params, tokens: tokens,
        score=ImageScore(score, lambda params, seen, text: params * seen + text[:, 0]),
    )


def brightness() -> Reward:
    """The mean of the image, on the device."""
    return Reward((Part("brightness", scorer=scorer("brightness", lambda images: images.mean(axis=(1, 2, 3)))),))


def mixture(**weights: float) -> Reward:
    """A mixture of the means of the colour channels, by name."""
    channels = {"red": 0, "green": 1, "blue": 2}
    scorers = {
        n: scorer(n, lambda images, i=i: 100 * i + images[..., i].mean(axis=(1, 2))) for n, i in channels.items()
    }
    return Reward(tuple(Part(name, weight, scorer=scorers[name]) for name, weight in weights.items()))
