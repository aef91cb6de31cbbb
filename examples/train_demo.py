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
import tyro
from demo_losses import clip_loss, decoder_loss, dit_loss, init_dit, vae_loss
from demo_models import Sizes

from ses_jax.models import autoencoder_kl, clip

Stage = Literal["tokenizer", "vae", "decoder", "clip", "dit", "export"]
STEPS: dict[str, int] = {"vae": 1640, "decoder": 420, "clip": 1000, "dit": 6000}
SETTINGS = {"steps": 20, "preview_steps": 10, "guidance": 0.5, "height": 64, "width": 64, "level": 1, "reward": "clip"}


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
    loaded = {name: demo_training.load(args.work / name)[1] for name in ("vae", "decoder", "clip", "dit")}
    parts = demo_export.Parts(
        vae=loaded["vae"] | {"decoder": loaded["decoder"]},
        dit=loaded["dit"],
        clips={"clip": loaded["clip"]},
        tokenizers=args.work,
        latents=json.loads((args.work / "latents.json").read_text()),
        settings=SETTINGS,
    )
    demo_export.export(parts, args.out or args.work / "export", sizes)


def _limits(args: Arguments, stage: str) -> demo_training.Limits:
    return demo_training.Limits(args.steps or STEPS[stage], args.minutes)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
