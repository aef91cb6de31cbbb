"""What a search gains on the demo: a picture of it, and curves against best-of-N at the same budget.

`python benchmarks/effect.py` writes, under `benchmarks/results/` unless `--out` says otherwise:

    effect.png   three prompts, the same seed, budgets 0 / 10 / 30 / 50 side by side with their scores
    curve.png    mean reward, and accuracy by the judge of `examples/scenes.py`, over the budget
    effect.json  the numbers of both

The judge reads pixels and never drives the search: the reward of the search is the demo's own CLIP.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
import tyro
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import common
import scenes

import ses_jax
from ses_jax.engine.files import write
from ses_jax.engine.result import to_image
from ses_jax.engine.runner import search_prompts
from ses_jax.engine.tasks import base_noise, prompt_keys

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURE_PROMPTS = (
    "a red circle left of a blue square on a white background",
    "a small yellow triangle inside a large purple circle on a black background",
    "a green square above an orange diamond on a gray background",
)
BACKGROUND, INK, SCALE, TEXT = (255, 255, 255), (30, 30, 30), 3, 34


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measures what a search gains on the demo checkpoint.

    Attributes:
      prompts: how many evaluation prompts the curves average over.
      budgets: the budgets of the curves.
      pictures: how many prompts the picture shows.
      picture_budgets: those of the picture; 0 is the image without a search.
      prompt_seed: of the evaluation prompts; 2024 are those that the demo's defaults were chosen on.
      seed: of the noise.
      model: the checkpoint; its images must be those that `examples/scenes.py` can judge.
      out: folder for the results.
    """

    prompts: int = 50
    budgets: tuple[int, ...] = (1, 10, 20, 30, 40, 50)
    pictures: int = len(PICTURE_PROMPTS)
    picture_budgets: tuple[int, ...] = (0, 10, 30, 50)
    prompt_seed: int = 2024
    seed: int = 0
    model: str = "demo"
    out: Path = common.RESULTS


def main(args: Arguments) -> None:
    pipeline = ses_jax.load_pipeline(args.model)
    reward = ses_jax.load_reward("clip", source=pipeline.folder / "clip")
    args.out.mkdir(parents=True, exist_ok=True)

    shown = PICTURE_PROMPTS[: args.pictures]
    rows = [list(picture_row(pipeline, reward, prompt, args)) for prompt in shown]
    sheet = contact_sheet(rows, args.picture_budgets)
    write(args.out / "effect.png", lambda path: sheet.save(path, format="PNG"))

    cases = scenes.evaluation_prompts(args.prompts, seed=args.prompt_seed)
    methods = {"search": searched, "best of N": best_of}
    curves = {
        name: curve([list(method(pipeline, reward, case, i, args)) for i, case in enumerate(cases)], args.budgets)
        for name, method in methods.items()
    }
    write(args.out / "curve.png", lambda path: plot(curves, args.budgets).savefig(path, format="png", dpi=130))
    picture = [{"prompt": p, "scores": [score for _, score in row]} for p, row in zip(shown, rows, strict=True)]
    arguments = {name: value for name, value in dataclasses.asdict(args).items() if name != "out"}
    path = common.save("effect", {"arguments": arguments, "curves": curves, "picture": picture}, args.out)
    report(curves, args.budgets)
    print(path)


def picture_row(pipeline: Any, reward: Any, prompt: str, args: Arguments) -> Iterator[tuple[Image.Image, float]]:
    """Final image and preview reward at each of the picture's budgets; budget 0 is the unsearched image."""
    settings = {"model": pipeline, "reward": reward, "seed": args.seed, "progress": False}
    for budget in args.picture_budgets:
        result = ses_jax.search(prompt, budget=max(budget, 1), **settings)
        yield result.image, result.score


def searched(pipeline: Any, reward: Any, case: tuple, index: int, args: Arguments) -> Iterator[dict[str, float]]:
    """Measures of the search's final image at each budget."""
    scene, prompt = case
    for budget in args.budgets:
        config = ses_jax.SearchConfig(budget=budget, seed=args.seed).resolve(pipeline)
        (result,) = search_prompts(pipeline, reward, config, [prompt], indices=[index])
        yield measures(scene, np.asarray(result.image), result.score, result.final_score)


def best_of(pipeline: Any, reward: Any, case: tuple, index: int, args: Arguments) -> Iterator[dict[str, float]]:
    """The same for the best of N independent noises, the search's own base first, scored by the same previews."""
    scene, prompt = case
    config = ses_jax.SearchConfig().resolve(pipeline)
    shape = pipeline.noise_shape(config.height, config.width)
    base_key, key = prompt_keys(args.seed, index)
    others = jax.random.normal(key, (max(args.budgets) - 1, *shape))
    noise = np.concatenate([base_noise(base_key, shape)[None], others])
    scores = np.concatenate(
        [render_and_score(pipeline, reward, prompt, part, config.preview_steps)[1] for part in split_in_tens(noise)]
    )
    best = np.array([scores[:budget].argmax() for budget in args.budgets])
    images, final = render_and_score(pipeline, reward, prompt, noise[best], config.steps)
    for i, image in zip(best, range(len(best)), strict=True):
        yield measures(scene, np.asarray(to_image(images[image])), float(scores[i]), float(final[image]))


def render_and_score(
    pipeline: Any, reward: Any, prompt: str, noise: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    prompts = [prompt] * len(noise)
    images = ses_jax.generate(pipeline, prompts, noise=noise, steps=steps)
    return np.asarray(images), reward(images, prompts)


def split_in_tens(noise: np.ndarray) -> Sequence[np.ndarray]:
    return [noise[i : i + 10] for i in range(0, len(noise), 10)]


def measures(scene: scenes.Scene, image: np.ndarray, score: float, final_score: float) -> dict[str, float]:
    verdict = scenes.verify(image, scene)
    return {
        "reward": score,
        "final reward": final_score,
        "all correct": float(verdict.correct),
        "checks correct": verdict.fraction,
    }


def curve(rows: Sequence[Sequence[dict[str, float]]], budgets: Sequence[int]) -> dict[str, list[float]]:
    """Means over prompts, and standard errors of the mean, a value a budget."""
    result = {}
    for name in rows[0][0]:
        values = np.array([[point[name] for point in row] for row in rows])
        result[name] = values.mean(axis=0).tolist()
        result[f"{name}, standard error"] = (values.std(axis=0, ddof=1) / len(rows) ** 0.5).tolist()
    return result


def contact_sheet(rows: Sequence[Sequence[tuple[Image.Image, float]]], budgets: Sequence[int]) -> Image.Image:
    """Prompts down, budgets across, each image with its budget and score."""
    width, height = (side * SCALE for side in rows[0][0][0].size)
    sheet = Image.new("RGB", (len(rows[0]) * (width + 8) + 8, len(rows) * (height + TEXT + 8) + 8), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for i, (row, prompt) in enumerate(zip(rows, PICTURE_PROMPTS[: len(rows)], strict=True)):
        top = 8 + i * (height + TEXT + 8)
        pen.text((8, top), prompt, fill=INK, font_size=14)
        for j, ((image, score), budget) in enumerate(zip(row, budgets, strict=True)):
            left = 8 + j * (width + 8)
            pen.text((left, top + 17), f"budget {budget}    reward {score:.2f}", fill=INK, font_size=12)
            sheet.paste(image.resize((width, height), Image.LANCZOS), (left, top + TEXT))
    return sheet


def plot(curves: dict[str, dict[str, list[float]]], budgets: Sequence[int]) -> plt.Figure:
    """Reward and accuracies over the budget, with standard errors."""
    names = ("reward", "checks correct", "all correct")
    figure, axes = plt.subplots(1, len(names), figsize=(11, 3.4), constrained_layout=True)
    for axis, name in zip(axes, names, strict=True):
        for method, values in curves.items():
            axis.errorbar(budgets, values[name], values[f"{name}, standard error"], label=method, capsize=2, marker="o")
        axis.set(xlabel="budget (scored previews)", title=f"{name}, mean over prompts")
        axis.grid(alpha=0.3)
    axes[0].legend()
    return figure


def report(curves: dict[str, dict[str, list[float]]], budgets: Sequence[int]) -> None:
    for method, values in curves.items():
        for name in ("reward", "final reward", "checks correct", "all correct"):
            print(f"{method:10} {name:15}", *(f"{b}: {v:.3f}  " for b, v in zip(budgets, values[name], strict=True)))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
