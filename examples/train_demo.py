"""Trains the demo's networks from nothing: `python examples/train_demo.py --work DIR`.

Stages: the tokenizers, the autoencoder, its decoder once more, the CLIP that drives the search, the diffusion
transformer with its text encoder, a CLIP trained apart that only measures, and the export.
Each can be run alone, killed at any time and run again: it continues from its latest checkpoint in the work folder,
with the batches and keys that it would have seen.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro
from demo import batches, probes, training
from demo.export import Parts
from demo.export import export as write_checkpoint
from demo.losses import clip_loss, decoder_loss, dit_loss, init_dit, vae_loss
from demo.optimizers import adamw, muon
from demo.sizes import SIZES, Sizes
from demo.tokenizers import load_tokenizers, train_tokenizers

from ses_jax.models import autoencoder_kl, clip

Stage = Literal["tokenizer", "vae", "decoder", "clip", "dit", "held-out-clip", "export"]
STEPS: dict[str, int] = {"vae": 4500, "decoder": 1000, "clip": 4900, "dit": 5000, "held-out-clip": 2800}
SETTINGS = {"steps": 20, "preview_steps": 10, "guidance": 0.0, "level": 2, "reward": "clip"}
HELD_OUT_SEED = 1000  # added to the seed of the CLIP that only measures


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains the demo's networks.

    Attributes:
      work: folder for checkpoints, pools of scenes and logs.
      out: folder for the exported checkpoint, in diffusers layout; None is `export` in the work folder.
      stage: which stage to run.
      steps: length of the stage's whole schedule; None for its default.
      minutes: stop a stage after so long, to continue another time.
      save_seconds: save whenever the last time was so long ago.
      probe_every: steps between evaluations by the judge.
      seed: of data, initial weights and noise.
      sizes: "tiny" for a quick check of the machinery.
    """

    work: Path
    out: Path | None = None
    stage: Stage | Literal["all"] = "all"
    steps: int | None = None
    minutes: float = float("inf")
    save_seconds: float = 150
    probe_every: int = 500
    seed: int = 0
    sizes: Literal["demo", "tiny"] = "demo"


def main(args: Arguments) -> None:
    stages: dict[str, Callable[[Arguments, Sizes], None]] = {
        "tokenizer": make_tokenizers,
        "vae": train_vae,
        "decoder": train_decoder,
        "clip": train_clip,
        "dit": train_dit,
        "held-out-clip": train_held_out_clip,
        "export": export,
    }
    for name in stages if args.stage == "all" else [args.stage]:
        stages[name](args, SIZES[args.sizes])


def make_tokenizers(args: Arguments, sizes: Sizes) -> None:
    """Trains both tokenizers, under a temporary name first: a folder that exists is whole."""
    folder = tokenizers(args)
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        train_tokenizers(partial, batches.caption_sample(sizes.captions, args.seed))
        partial.rename(folder)


def train_vae(args: Arguments, sizes: Sizes) -> None:
    """Trains the autoencoder, edges weighing as much as areas."""
    _train(
        args,
        "vae",
        _vae_parts(sizes),
        lambda step: batches.picture_batch(step, sizes.pictures, args.seed),
        average_decay=0.995,
        probe=probes.rebuilder(sizes),
    )


def train_decoder(args: Arguments, sizes: Sizes) -> None:
    """Trains the decoder on, for latents that are not quite right; the encoder, and so the latents, stay."""
    _, vae = training.load(args.work / "vae")
    probe = probes.rebuilder(sizes)

    def loss(params, images, key):
        return decoder_loss(params, vae, sizes, images, key, edges=1.0)

    _train(
        args,
        "decoder",
        training.Parts(lambda key: vae["decoder"], adamw(1e-3), loss),
        lambda step: batches.picture_batch(step, sizes.pictures, args.seed + 1),
        average_decay=0.99,
        probe=lambda params: probe(vae | {"decoder": params}),
    )


def train_clip(args: Arguments, sizes: Sizes) -> None:
    """Trains the reward on scenes and their siblings."""
    _clip(args, sizes, "clip", args.seed)


def train_held_out_clip(args: Arguments, sizes: Sizes) -> None:
    """Trains a CLIP from other weights on other data, to measure what the first one only claims."""
    _clip(args, sizes, "held-out-clip", args.seed + HELD_OUT_SEED)


def train_dit(args: Arguments, sizes: Sizes) -> None:
    """Trains the transformer and its text encoder together on the encoded pool."""
    pool, vae = args.work / "pool", load_vae(args)
    tokenizer, _ = load_tokenizers(tokenizers(args))
    batches.make_pool(pool, sizes, vae, tokenizer, args.seed)
    statistics = batches.latent_statistics(pool, sizes.buckets[0])
    (args.work / "latents.json").write_text(json.dumps(statistics))

    def loss(params, batch, key):
        return dit_loss(params, sizes, batch, key)

    _train(
        args,
        "dit",
        training.Parts(lambda key: init_dit(key, sizes), muon(3e-3, 1e-3), loss),
        batches.pool_batches(pool, sizes, statistics, tokenizer, args.seed),
        probe=probes.sampler(vae, sizes, statistics, tokenizer),
    )


def export(args: Arguments, sizes: Sizes) -> None:
    """Writes the averaged weights of every stage as a checkpoint."""
    parts = Parts(
        vae=load_vae(args),
        dit=training.load(args.work / "dit")[1],
        clips={name.replace("-", "_"): training.load(args.work / name)[1] for name in ("clip", "held-out-clip")},
        tokenizers=tokenizers(args),
        latents=json.loads((args.work / "latents.json").read_text()),
        settings=SETTINGS | {"height": sizes.buckets[0].height, "width": sizes.buckets[0].width},
    )
    write_checkpoint(parts, args.out or args.work / "export", sizes)


def load_vae(args: Arguments) -> Any:
    """The autoencoder with its decoder as it was trained on."""
    (_, vae), (_, decoder) = training.load(args.work / "vae"), training.load(args.work / "decoder")
    return vae | {"decoder": decoder}


def tokenizers(args: Arguments) -> Path:
    """The folder of both tokenizers."""
    return args.work / "tokenizers"


def _clip(args: Arguments, sizes: Sizes, name: str, seed: int) -> None:
    pool = args.work / f"{name}-pool"
    _, tokenizer = load_tokenizers(tokenizers(args))
    batches.make_rebuilt(pool, sizes, load_vae(args), tokenizer, seed)
    _train(
        args,
        name,
        _clip_parts(sizes),
        batches.family_batches(pool, sizes, tokenizer, seed),
        average_decay=0.99,
        seed=seed,
        probe=probes.ranker(sizes, tokenizer),
    )


@functools.cache
def _vae_parts(sizes: Sizes) -> training.Parts:
    def loss(params, images, key):
        return vae_loss(params, sizes, images, key, edges=1.0, pull=3e-4)

    return training.Parts(lambda key: autoencoder_kl.init(key, sizes.vae), adamw(1.5e-3), loss)


@functools.cache
def _clip_parts(sizes: Sizes) -> training.Parts:
    """Of both CLIPs, so that the second one compiles nothing anew."""

    def loss(params, batch, key):
        return clip_loss(params, sizes, batch, key)

    return training.Parts(lambda key: clip.init(key, sizes.reward), muon(3e-3, 1e-3), loss)


def _train(args: Arguments, stage: str, *what: Any, seed: int | None = None, **options: Any) -> None:
    limits = training.Limits(
        args.steps or STEPS[stage], args.minutes, save_seconds=args.save_seconds, probe_every=args.probe_every
    )
    seed = args.seed if seed is None else seed
    training.train(args.work / stage, *what, limits, seed=seed, **options)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
