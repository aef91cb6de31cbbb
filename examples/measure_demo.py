"""What the demo's networks can do, by the judge: `python examples/measure_demo.py --model DIR`.

Prints, and writes as JSON where `--out` says so: pictures that the autoencoder keeps right; scenes that each CLIP ranks
above their edited siblings; images that are all right, by tier; and the share of hard prompts of which one noise of
many makes everything right, which is what there is for a search to find.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from demo import batches, captions, drawing, judge, probes, scenes
from demo.sizes import SIZES

import ses_jax

BATCH = 50


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measures a demo checkpoint against what it is meant to do.

    Attributes:
      model: the checkpoint.
      prompts: how many of each kind.
      searched: hard prompts that many noises are tried on.
      noises: how many, for each of them.
      steps: of denoising; None for the checkpoint's own.
      guidance: None for the checkpoint's own.
      seed: of noise and siblings.
      out: JSON file for the shares.
      sizes: "tiny" for a quick check of the machinery.
    """

    model: str = "demo"
    prompts: int = 100
    searched: int = 20
    noises: int = 200
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    out: Path | None = None
    sizes: str = "demo"


def main(args: Arguments) -> None:
    pipeline = ses_jax.load_pipeline(args.model)
    facts = {
        "reconstructions": reconstructions(pipeline, args),
        **{f"{name} pairs": pairs(pipeline.folder / name, args) for name in ("clip", "held_out_clip")},
        "accuracy": accuracy(pipeline, args),
        "best_of": best_of(pipeline, args),
    }
    print(json.dumps(facts, indent=2))
    if args.out:
        args.out.write_text(json.dumps(facts, indent=2) + "\n")


def reconstructions(pipeline: ses_jax.Pipeline, args: Arguments) -> dict[str, float]:
    """Share of hard scenes that are all right after the autoencoder, by size."""
    sizes = dataclasses.replace(SIZES[args.sizes], probe=args.prompts)
    return probes.rebuilder(sizes)(pipeline.params["vae"])


def pairs(folder: Path, args: Arguments) -> dict[str, float]:
    """Share of pairs of a hard scene's own picture and a sibling's in which the reward prefers the first."""
    reward, side = ses_jax.load_reward("clip", source=folder), SIZES[args.sizes].reward.image_size
    shares = {}
    for tier in probes.RANKED_TIERS:
        rng = np.random.default_rng(args.seed)
        families = [batches.family(rng, s) for s in scenes.evaluation_scenes(args.prompts, tier)]
        images = [drawing.picture(rng, member, side, side) for family in families for member in family]
        prompts = [caption for family in families for caption in [captions.caption(rng, family[0])] * len(family)]
        scored = [reward(np.stack(images[i]), prompts[i]) for i in _parts(len(images))]
        scores = np.concatenate(scored).reshape(len(families), -1)
        shares[tier] = float(np.mean(scores[:, :1] > scores[:, 1:]))
    return shares


def accuracy(pipeline: ses_jax.Pipeline, args: Arguments) -> dict[str, dict[str, float]]:
    """Images that are all right, and checks that are, by tier, for combinations seen in training and held out."""
    shares = {}
    for tier in scenes.TIERS:
        for held_out in (False, True):
            wanted = scenes.evaluation_scenes(args.prompts, tier, held_out)
            rng = np.random.default_rng(args.seed)
            verdicts = judged(pipeline, wanted, [captions.caption(rng, s) for s in wanted], args)
            shares[f"{tier}, held out" if held_out else tier] = {
                "correct": float(np.mean([v.correct for v in verdicts])),
                "checks": float(np.mean([v.fraction for v in verdicts])),
            }
    return shares


def best_of(pipeline: ses_jax.Pipeline, args: Arguments) -> dict[str, Any]:
    """For hard prompts: images that are all right, and prompts that have one among the first 10, 50, ... noises."""
    wanted = scenes.evaluation_scenes(args.searched, "hard", seed=args.seed + 1)
    rng = np.random.default_rng(args.seed + 1)
    correct = []
    for scene in wanted:
        repeated = [captions.caption(rng, scene)] * args.noises
        correct.append([v.correct for v in judged(pipeline, [scene] * args.noises, repeated, args)])
    found = np.array(correct)
    counts = [n for n in (10, 50, 200, 1000) if n < args.noises] + [args.noises]
    return {"one noise": float(found.mean())} | {f"best of {n}": float(found[:, :n].any(1).mean()) for n in counts}


def judged(
    pipeline: ses_jax.Pipeline, wanted: Sequence[scenes.Scene], prompts: Sequence[str], args: Arguments
) -> list[judge.Verdict]:
    """One verdict a prompt, each on one image of its own noise."""
    verdicts = []
    for i in _parts(len(prompts)):
        options = {"seed": args.seed + i.start, "steps": args.steps, "guidance": args.guidance}
        images = np.asarray(jax.device_get(ses_jax.generate(pipeline, prompts[i], **options)))
        verdicts += [judge.verify(image, scene) for image, scene in zip(images, wanted[i], strict=True)]
    return verdicts


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, start + BATCH) for start in range(0, count, BATCH))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
