"""What a search gains on the demo, to the eye: `python benchmarks/effect.py`.

Writes, under `benchmarks/results/` unless `--out` says otherwise:

    effect.png   three prompts, the same seed, budgets 0 / 10 / 30 / 50 side by side with their scores
    effect.json  the scores

The numbers behind it, over many prompts and against other searchers, are those of `benchmarks/searchers.py`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import tyro
from PIL import Image, ImageDraw

import ses_jax
from ses_jax.engine.files import write

PROMPTS = (
    "two red stars above three blue squares on white",
    "a large striped yellow triangle left of a small dotted purple circle on pink",
    "a green cross, an orange diamond and a blue star from left to right on a gray background",
)
BACKGROUND, INK, SCALE, TEXT = (255, 255, 255), (30, 30, 30), 2, 34


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Shows what a search gains on the demo checkpoint.

    Attributes:
      prompts: how many of them.
      budgets: side by side; 0 is the image without a search.
      seed: of the noise.
      model: the checkpoint.
      out: folder for the results.
    """

    prompts: int = len(PROMPTS)
    budgets: tuple[int, ...] = (0, 10, 30, 50)
    seed: int = 0
    model: str = "demo"
    out: Path = common.RESULTS


def main(args: Arguments) -> None:
    pipeline = ses_jax.load_pipeline(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    shown = PROMPTS[: args.prompts]
    rows = [list(images(pipeline, prompt, args)) for prompt in shown]
    sheet = contact_sheet(rows, args.budgets)
    write(args.out / "effect.png", lambda path: sheet.save(path, format="PNG"))
    scores = [{"prompt": p, "scores": [score for _, score in row]} for p, row in zip(shown, rows, strict=True)]
    path = common.save("effect", {"budgets": list(args.budgets), "seed": args.seed, "prompts": scores}, args.out)
    for row in scores:
        print(row["prompt"], *(f"{b}: {score:.2f}" for b, score in zip(args.budgets, row["scores"], strict=True)))
    print(path)


def images(pipeline: Any, prompt: str, args: Arguments) -> Iterator[tuple[Image.Image, float]]:
    """Final image and preview reward at each of the budgets; budget 0 is the unsearched image."""
    for budget in args.budgets:
        result = ses_jax.search(prompt, model=pipeline, budget=max(budget, 1), seed=args.seed, progress=False)
        yield result.image, result.score


def contact_sheet(rows: Sequence[Sequence[tuple[Image.Image, float]]], budgets: Sequence[int]) -> Image.Image:
    """Prompts down, budgets across, each image with its budget and score."""
    width, height = (side * SCALE for side in rows[0][0][0].size)
    sheet = Image.new("RGB", (len(rows[0]) * (width + 8) + 8, len(rows) * (height + TEXT + 8) + 8), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for i, (row, prompt) in enumerate(zip(rows, PROMPTS[: len(rows)], strict=True)):
        top = 8 + i * (height + TEXT + 8)
        pen.text((8, top), prompt, fill=INK, font_size=14)
        for j, ((image, score), budget) in enumerate(zip(row, budgets, strict=True)):
            left = 8 + j * (width + 8)
            pen.text((left, top + 17), f"budget {budget}    reward {score:.2f}", fill=INK, font_size=12)
            sheet.paste(image.resize((width, height), Image.LANCZOS), (left, top + TEXT))
    return sheet


if __name__ == "__main__":
    main(tyro.cli(Arguments))
