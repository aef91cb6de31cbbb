"""Trains the demo checkpoint from nothing: `python examples/train_demo.py --work DIR --out DIR`.

Stages: the tokenizers, the autoencoder, its decoder once more, the CLIP reward, the diffusion transformer with its text
encoder, the export.
Each can be run alone, killed and run again; it continues from its latest checkpoint in the work folder.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import demo_data
import demo_export
import demo_models
import demo_training
import jax
import jax.numpy as jnp
import tyro
from demo_models import CLIP_MEAN, CLIP_STD, Sizes

from ses_jax.models import autoencoder_kl, clip, decoder_lm, z_image

Stage = Literal["tokenizer", "vae", "decoder", "clip", "dit", "export"]
STEPS: dict[str, int] = {"vae": 1640, "decoder": 420, "clip": 1000, "dit": 6000}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains the demo checkpoint.

    Attributes:
      work: folder for checkpoints, pools of scenes and logs.
      out: folder for the exported checkpoint, in diffusers layout.
      stage: which stage to run.
      steps: length of the stage's whole schedule; None for its default.
      minutes: stop a stage after so long, to continue another time.
      seed: of data, initial weights and noise.
      sizes: "tiny" for a quick check of the machinery.
    """

    work: Path
    out: Path | None = None
    stage: Stage | Literal["all"] = "all"
    steps: int | None = None
    minutes: float = float("inf")
    seed: int = 0
    sizes: Literal["demo", "tiny"] = "demo"


def main(args: Arguments) -> None:
    stages: dict[str, Callable[[Arguments, Sizes], None]] = {
        "tokenizer": train_tokenizers,
        "vae": train_vae,
        "decoder": train_decoder,
        "clip": train_clip,
        "dit": train_dit,
        "export": export,
    }
    for name in stages if args.stage == "all" else [args.stage]:
        stages[name](args, demo_models.SIZES[args.sizes])


def train_tokenizers(args: Arguments, sizes: Sizes) -> None:
    demo_models.train_tokenizers(args.work, demo_data.captions(sizes.captions, args.seed))


def train_vae(args: Arguments, sizes: Sizes) -> None:
    """Trains the autoencoder, then encodes the pool and notes its latents' scale."""
    demo_training.train(
        args.work / "vae",
        lambda key: autoencoder_kl.init(key, sizes.vae),
        demo_models.adamw(1e-3),
        lambda params, images, key: vae_loss(params, sizes, images, key),
        lambda step: demo_data.image_batch(step, sizes.vae_batch, args.seed),
        _limits(args, "vae"),
        seed=args.seed,
        average_decay=0.99,
    )


def train_decoder(args: Arguments, sizes: Sizes) -> None:
    """Trains the decoder on, for latents that are not quite right; the encoder, and so the latents, stay."""
    _, vae = demo_training.load(args.work / "vae")
    demo_training.train(
        args.work / "decoder",
        lambda key: vae["decoder"],
        demo_models.adamw(1e-3),
        lambda params, images, key: decoder_loss(params, vae, sizes, images, key),
        lambda step: demo_data.image_batch(step, sizes.vae_batch, args.seed + 1),
        _limits(args, "decoder"),
        seed=args.seed,
        average_decay=0.99,
    )


def train_clip(args: Arguments, sizes: Sizes) -> None:
    """Trains the reward on scenes and their siblings."""
    pool = args.work / "rebuilt.npz"
    _, tokenizer = demo_models.load_tokenizers(args.work)
    if not pool.exists():
        _, vae = demo_training.load(args.work / "vae")
        demo_data.make_rebuilt(pool, sizes, vae, tokenizer, args.seed)
    demo_training.train(
        args.work / "clip",
        lambda key: clip.init(key, sizes.reward),
        demo_models.muon(3e-3, 1e-3),
        lambda params, batch, key: clip_loss(params, sizes, batch, key),
        demo_data.family_batches(pool, tokenizer, sizes.clip_families, args.seed),
        _limits(args, "clip"),
        seed=args.seed,
        average_decay=0.99,
    )


def train_dit(args: Arguments, sizes: Sizes) -> None:
    """Trains the transformer and its text encoder together on the encoded pool."""
    pool, statistics = args.work / "pool.npz", args.work / "latents.json"
    tokenizer, _ = demo_models.load_tokenizers(args.work)
    if not statistics.exists():
        _, vae = demo_training.load(args.work / "vae")
        demo_data.make_pool(pool, sizes, vae, tokenizer, args.seed)
        statistics.write_text(json.dumps(demo_data.latent_statistics(pool)))
    demo_training.train(
        args.work / "dit",
        lambda key: init_dit(key, sizes),
        demo_models.muon(3e-3, 1e-3),
        lambda params, batch, key: dit_loss(params, sizes, batch, key),
        demo_data.pool_batches(pool, json.loads(statistics.read_text()), tokenizer, sizes.dit_batch, args.seed),
        _limits(args, "dit"),
        seed=args.seed,
    )


def export(args: Arguments, sizes: Sizes) -> None:
    demo_export.export(args.work, args.out or args.work / "export", sizes)


def vae_loss(params, sizes: Sizes, images: jax.Array, key: jax.Array):
    """Absolute and squared error of the reconstruction and a small pull of the latents towards N(0, I)."""
    mean, log_variance = autoencoder_kl.encode(params, sizes.vae, images)
    latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    error = autoencoder_kl.decode(params, sizes.vae, latents) - images
    divergence = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance)
    absolute, squared = jnp.mean(jnp.abs(error)), jnp.mean(error**2)
    facts = {"absolute": absolute, "squared": squared, "divergence": divergence, "spread": mean.std()}
    return absolute + squared + 5e-4 * divergence, facts


def decoder_loss(params, vae, sizes: Sizes, images: jax.Array, key: jax.Array):
    """Absolute and squared error of reconstructions from fixed latents with some noise."""
    mean, _ = autoencoder_kl.encode(vae, sizes.vae, images)
    latents = mean + 0.1 * jax.random.normal(key, mean.shape)
    error = autoencoder_kl.decode(vae | {"decoder": params}, sizes.vae, latents) - images
    absolute, squared = jnp.mean(jnp.abs(error)), jnp.mean(error**2)
    return absolute + squared, {"absolute": absolute, "squared": squared}


def clip_loss(params, sizes: Sizes, batch, key: jax.Array):
    """Contrast over the whole batch, both ways, and once more within each family."""
    pixels = (augment(key, batch["images"].astype(jnp.float32) / 255) - CLIP_MEAN) / CLIP_STD
    images = clip.embed_image(params, sizes.reward, pixels)
    texts = clip.embed_text(params, sizes.reward, batch["tokens"].astype(jnp.int32))
    logits = jnp.minimum(clip.logit_scale(params), 100.0) * images @ texts.T  # [image, text]
    size = len(logits)
    same = jnp.arange(size) // demo_data.FAMILY
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


def init_dit(key: jax.Array, sizes: Sizes):
    text_key, dit_key = jax.random.split(key)
    return {"text_encoder": decoder_lm.init(text_key, sizes.text), "transformer": z_image.init(dit_key, sizes.dit)}


def dit_loss(params, sizes: Sizes, batch, key: jax.Array):
    """Flow matching: the velocity from image to noise at a logit-normal noise level."""
    latents = batch["latents"]
    sigma_key, noise_key = jax.random.split(key)
    sigma = jax.nn.sigmoid(0.4 + 1.2 * jax.random.normal(sigma_key, (len(latents),)))
    noise = jax.random.normal(noise_key, latents.shape)
    blend = sigma[:, None, None, None]
    features = decoder_lm.hidden_state(params["text_encoder"], sizes.text, batch["tokens"])
    refined = z_image.refine_caption(params["transformer"], sizes.dit, features, batch["lengths"])
    noisy = (1 - blend) * latents + blend * noise
    predicted = z_image.velocity(params["transformer"], sizes.dit, noisy, sigma, refined)
    errors = jnp.mean((predicted - (noise - latents)) ** 2, axis=(1, 2, 3))
    high = jnp.sum(errors * (sigma > 0.8)) / jnp.maximum(1, jnp.sum(sigma > 0.8))
    return jnp.mean(errors), {"high": high}


def _limits(args: Arguments, stage: str) -> demo_training.Limits:
    return demo_training.Limits(args.steps or STEPS[stage], args.minutes)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
