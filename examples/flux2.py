"""FLUX.2 after PickScore: `python examples/flux2.py --out lighthouse`, `--model black-forest-labs/FLUX.2-klein-4B`."""

import dataclasses
from pathlib import Path

import tyro

import ses_jax

PROMPT = "A lighthouse of stacked books on a cliff at dawn, gulls made of folded paper, gouache"


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
    model: str = "black-forest-labs/FLUX.2-dev"
    scorer: str | None = None
    budget: int = 50
    out: Path = Path("lighthouse")


def main(args: Arguments) -> None:
    # Transformer and text encoder of dev are too large to share a device.
    pipeline = ses_jax.load_pipeline(args.model, offload_text_encoder=True)
    reward = ses_jax.load_reward("pick", source=args.scorer)
    result = ses_jax.search(args.prompt, model=pipeline, reward=reward, budget=args.budget, out=args.out)
    print(f"PickScore {result.baseline_final_score:.4f} -> {result.final_score:.4f}, saved to {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
