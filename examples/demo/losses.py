"""Losses of the demo's networks; each returns the loss and facts to log."""

import contextlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from demo.scenes import SHAPES
from ses_jax.models import autoencoder_kl, clip, decoder_lm, z_image

CLIP_MEAN = np.float32([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.float32([0.26862954, 0.26130258, 0.27577711])
SHAPE_WEIGHT = 0.5
FAMILY = 4  # a scene and its siblings, next to each other in a batch of CLIP


def vae_loss(params, sizes: Any, images: jax.Array, key: jax.Array, edges: float = 0.0, pull: float = 5e-4):
    """Absolute and squared error of the reconstruction and a small pull of the latents towards N(0, I).

    `edges` weighs the absolute error of the differences between neighbouring pixels, `pull` the divergence.
    """
    mean, log_variance = autoencoder_kl.encode(params, sizes.vae, images)
    latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    error = autoencoder_kl.decode(params, sizes.vae, latents) - images
    divergence = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance)
    absolute, squared = jnp.mean(jnp.abs(error)), jnp.mean(error**2)
    facts = {"absolute": absolute, "squared": squared, "divergence": divergence, "spread": mean.std()}
    return absolute + squared + edges * _edge_error(error) + pull * divergence, facts


def decoder_loss(params, vae, sizes: Any, images: jax.Array, key: jax.Array, edges: float = 0.0):
    """Absolute and squared error of reconstructions from fixed latents with some noise."""
    mean, _ = autoencoder_kl.encode(vae, sizes.vae, images)
    latents = mean + 0.1 * jax.random.normal(key, mean.shape)
    error = autoencoder_kl.decode(vae | {"decoder": params}, sizes.vae, latents) - images
    absolute, squared = jnp.mean(jnp.abs(error)), jnp.mean(error**2)
    return absolute + squared + edges * _edge_error(error), {"absolute": absolute, "squared": squared}


def _edge_error(error: jax.Array) -> jax.Array:
    """Mean absolute difference between neighbours of `error [B, H, W, 3]`."""
    return sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (1, 2)) / 2


def clip_loss(params, sizes: Any, batch, key: jax.Array):
    """Contrast over the whole batch, both ways, and once more within each family."""
    pixels = (augment(key, batch["images"].astype(jnp.float32) / 255) - CLIP_MEAN) / CLIP_STD
    images = clip.embed_image(params, sizes.reward, pixels)
    texts = clip.embed_text(params, sizes.reward, batch["tokens"].astype(jnp.int32))
    logits = jnp.minimum(clip.logit_scale(params), 100.0) * images @ texts.T  # [image, text]
    size = len(logits)
    same = jnp.arange(size) // FAMILY
    family = jnp.where(same[:, None] == same, logits, -jnp.inf)
    losses = [-jnp.mean(jnp.diagonal(jax.nn.log_softmax(x, axis))) for x in (logits, family) for axis in (0, 1)]
    facts = {
        "retrieval": jnp.mean(logits.argmax(1) == jnp.arange(size)),
        "siblings": jnp.mean(family.argmax(1) == jnp.arange(size)),
        "scale": clip.logit_scale(params),
    }
    return sum(losses) / 4, facts


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Noise, blur and a change of brightness and contrast, each of a random strength an image."""
    keys = jax.random.split(key, 5)
    strength = jax.random.uniform(keys[0], (4, len(images), 1, 1, 1))
    blurred = images
    for axis in (1, 2):
        blurred = (jnp.roll(blurred, 1, axis) + 2 * blurred + jnp.roll(blurred, -1, axis)) / 4
    images = images + (blurred - images) * strength[0]
    images = images + 0.06 * strength[1] * jax.random.normal(keys[1], images.shape)
    tint = jax.random.uniform(keys[2], (len(images), 1, 1, 3), minval=-0.05, maxval=0.05)
    return jnp.clip(images * (1 + 0.1 * (strength[2] - 0.5)) + tint * strength[3], 0, 1)


def init_dit(key: jax.Array, sizes: Any):
    """Params of text encoder and transformer, and of a head that only the training has."""
    text_key, dit_key, hidden_key, out_key = jax.random.split(key, 4)
    width, classes = sizes.dit.dim, sizes.dit.patch_size**2 * (1 + len(SHAPES))
    return {
        "text_encoder": decoder_lm.init(text_key, sizes.text),
        "transformer": z_image.init(dit_key, sizes.dit),
        "shapes": {
            "hidden": jax.random.normal(hidden_key, (width, width)) / width**0.5,
            "out": jax.random.normal(out_key, (width, classes)) / width,
        },
    }


def dit_loss(params, sizes: Any, batch, key: jax.Array):
    """Flow matching: the velocity from image to noise at a logit-normal noise level; and what shape is where.

    The squared error alone hardly tells a circle from a square, and without the head it takes the network thousands of
    steps to do so. With it, what the words for shapes mean is learnt in hundreds.
    """
    latents = batch["latents"]
    sigma_key, noise_key = jax.random.split(key)
    sigma = jax.nn.sigmoid(0.4 + 1.2 * jax.random.normal(sigma_key, (len(latents),)))
    noise = jax.random.normal(noise_key, latents.shape)
    blend = sigma[:, None, None, None]
    features = decoder_lm.hidden_state(params["text_encoder"], sizes.text, batch["tokens"])
    refined = z_image.refine_caption(params["transformer"], sizes.dit, features, batch["lengths"])
    noisy = (1 - blend) * latents + blend * noise
    with _last_features() as caught:
        predicted = z_image.velocity(params["transformer"], sizes.dit, noisy, sigma, refined)
    errors = jnp.mean((predicted - (noise - latents)) ** 2, axis=(1, 2, 3))
    shapes, right = _shape_error(params["shapes"], sizes.dit.patch_size, caught[0], batch["shapes"])
    high = jnp.sum(errors * (sigma > 0.8)) / jnp.maximum(1, jnp.sum(sigma > 0.8))
    return jnp.mean(errors) + SHAPE_WEIGHT * shapes, {"flow": jnp.mean(errors), "high": high, "shapes": right}


@contextlib.contextmanager
def _last_features() -> Iterator[list[jax.Array]]:
    """What the transformer's last layer is given in this block, `[B, tokens, dim]`."""
    caught: list[jax.Array] = []

    def catch(call, args, kwargs, context):
        if isinstance(context.module, z_image.FinalLayer) and context.method_name == "__call__":
            caught.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(catch):
        yield caught


def _shape_error(head, patch: int, features: jax.Array, shapes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross entropy of the shape in each cell `[B, h, w]`, and how many of the cells with one are right."""
    features = features * jax.lax.rsqrt(jnp.mean(features**2, axis=-1, keepdims=True) + 1e-6)
    logits = jax.nn.silu(features @ head["hidden"]) @ head["out"]
    logits = logits.reshape(*logits.shape[:2], patch**2, -1)
    batch, height, width = shapes.shape
    cells = shapes.reshape(batch, height // patch, patch, width // patch, patch).transpose(0, 1, 3, 2, 4)
    cells = cells.reshape(logits.shape[:-1])
    errors = optax.softmax_cross_entropy_with_integer_labels(logits, cells)
    right = jnp.sum((logits[..., 1:].argmax(-1) + 1 == cells) & (cells > 0))
    return jnp.mean(errors), right / jnp.maximum(1, jnp.sum(cells > 0))
