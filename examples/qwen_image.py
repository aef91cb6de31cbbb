"""Qwen-Image after PickScore, true guidance of 4: `python examples/qwen_image.py --out springtime`."""

import dataclasses
from pathlib import Path

import tyro

import ses_jax

PROMPT = "Springtime in the style of Paul Delvaux"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Searches the noise for the prompt and saves the winner beside the image of the first noise.

    Attributes:
      prompt: what to draw.
      negative: what to steer away from.
      model: the checkpoint, a folder or a Hugging Face id.
      scorer: the same of the reward; None is the published one.
      budget: how many previews are scored.
      out: folder of the result.
    """

    prompt: str = PROMPT
    negative: str = " "
    model: str = "Qwen/Qwen-Image"
    scorer: str | None = None
    budget: int = 50
    out: Path = Path("springtime")


def main(args: Arguments) -> None:
    reward = ses_jax.load_reward("pick", source=args.scorer)
    result = ses_jax.search(
        args.prompt,
        model=args.model,
        reward=reward,
        budget=args.budget,
        preview_steps=10,
        guidance=4.0,
        negative_prompt=args.negative,
        out=args.out,
    )
    print(f"PickScore {result.baseline_final_score:.4f} -> {result.final_score:.4f}, saved to {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
