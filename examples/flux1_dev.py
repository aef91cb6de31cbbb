"""FLUX.1-dev after HPSv2, at budgets of 0, 10, 30 and 50 previews: `python examples/flux1_dev.py --out velazquez`."""

import dataclasses
from pathlib import Path

import tyro

import ses_jax

PROMPT = "A masterful painting of a young woman in the style of Diego Velazquez."


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Searches the noise for the prompt at growing budgets and saves each winner in a folder of its own.

    Attributes:
      prompt: what to draw.
      model: the checkpoint, a folder or a Hugging Face id.
      scorer: the same of the reward; None is the published one.
      budgets: how many previews are scored; a smaller budget is the beginning of a larger one.
      out: folder of the results.
    """

    prompt: str = PROMPT
    model: str = "black-forest-labs/FLUX.1-dev"
    scorer: str | None = None
    budgets: tuple[int, ...] = (10, 30, 50)
    out: Path = Path("velazquez")


def main(args: Arguments) -> None:
    pipeline, reward = ses_jax.load_pipeline(args.model), ses_jax.load_reward("hps", source=args.scorer)
    for i, budget in enumerate(args.budgets):
        out = args.out / f"{budget:03d}"
        result = ses_jax.search(
            args.prompt, model=pipeline, reward=reward, budget=budget, preview_steps=10, guidance=3.5, out=out
        )
        if i == 0:
            print(f"budget 0: HPSv2 {result.baseline_final_score:.4f}, saved to {out / 'baseline.png'}")
        print(f"budget {budget}: HPSv2 -> {result.final_score:.4f}, saved to {out}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
