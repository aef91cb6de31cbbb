"""Accuracy of a checkpoint on the demo's evaluation prompts, by the judge: `python examples/measure_demo.py`."""

import collections
import dataclasses

import numpy as np
import scenes
import tyro

import ses_jax

BATCH = 50


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Judges images of prompts with colour and shape combinations seen in training, and of held-out ones.

    Attributes:
      model: the checkpoint.
      prompts: how many of each kind.
      steps: of denoising; None for the checkpoint's own.
      guidance: None for the checkpoint's own.
      seed: of the noise.
    """

    model: str = "demo"
    prompts: int = 200
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0


def main(args: Arguments) -> None:
    pipeline = ses_jax.load_pipeline(args.model)
    for held_out in (False, True):
        verdicts = judge(pipeline, scenes.evaluation_prompts(args.prompts, held_out=held_out), args)
        shares = " ".join(f"{name} {share:.0%}" for name, share in check_shares(verdicts).items())
        everything, checks = (np.mean([getattr(v, name) for v in verdicts]) for name in ("correct", "fraction"))
        print(f"{'held out' if held_out else 'seen'}: all correct {everything:.1%}, checks {checks:.1%}; {shares}")


def judge(pipeline: ses_jax.Pipeline, cases: list[tuple[scenes.Scene, str]], args: Arguments) -> list[scenes.Verdict]:
    """One verdict a case, each on one image."""
    verdicts = []
    for start in range(0, len(cases), BATCH):
        part = cases[start : start + BATCH]
        options = {"seed": args.seed + start, "steps": args.steps, "guidance": args.guidance}
        images = np.asarray(ses_jax.generate(pipeline, [prompt for _, prompt in part], **options))
        pixels = np.round(images * 255).astype(np.uint8)
        verdicts += [scenes.verify(image, scene) for image, (scene, _) in zip(pixels, part, strict=True)]
    return verdicts


def check_shares(verdicts: list[scenes.Verdict]) -> dict[str, float]:
    """Share of fulfilled checks by kind, such as "shape" for "shape 0" and "shape 1"."""
    outcomes = collections.defaultdict(list)
    for verdict in verdicts:
        for name, passed in verdict.checks.items():
            outcomes[name.rstrip(" 0123456789")].append(passed)
    return {name: float(np.mean(passed)) for name, passed in outcomes.items()}


if __name__ == "__main__":
    main(tyro.cli(Arguments))
