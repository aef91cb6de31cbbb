"""Z-Image-Turbo after PickScore, 50 previews of 8 steps: `python examples/z_image_turbo.py --out hanfu`."""

import dataclasses
from pathlib import Path

import tyro

import ses_jax

PROMPT = (
    "A young woman in a red Hanfu with fine embroidery, a golden phoenix headdress and a round fan, a neon lightning "
    "bolt over her open palm, at night before a softly lit pagoda"
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Searches the noise for the prompt and saves the winner beside the image of the first noise.

    Attributes:
      prompt: what to draw.
      model: the checkpoint, a folder or a Hugging Face id.
      scorer: the same of the reward; None is the published one.
      budget: how many previews are scored.
      out: folder of the result.
    """

    prompt: str = PROMPT
    model: str = "Tongyi-MAI/Z-Image-Turbo"
    scorer: str | None = None
    budget: int = 50
    out: Path = Path("hanfu")


def main(args: Arguments) -> None:
    reward = ses_jax.load_reward("pick", source=args.scorer)
    result = ses_jax.search(
        args.prompt, model=args.model, reward=reward, budget=args.budget, preview_steps=8, out=args.out
    )
    print(f"PickScore {result.baseline_final_score:.4f} -> {result.final_score:.4f}, saved to {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
