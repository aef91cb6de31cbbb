"""How well cheaper looks at candidates rank them as their full previews do, and what they cost.

Every candidate of a prompt gets every look and the full preview. Results are saved after each prompt, and a run with
the same arguments goes on where it was.

    python benchmarks/fidelities.py --prompts 50 --noises 40
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import common
from demo import captions

import ses_jax
from ses_jax.engine import evaluations, fidelity
from ses_jax.engine.runner import search_prompts

NAME = "fidelities"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compares looks with full previews.

    Attributes:
      prompts: how many evaluation prompts.
      noises: independent candidates a prompt, at least 2.
      looks: in the order in which they are taken; early ones by rising steps.
      preview_steps: of a full preview; None is the model's own.
      kept: the share that goes on, for how often the best candidate is among them.
      tier: of the prompts' difficulty; None is all in turn.
      prompt_seed: of the evaluation prompts.
      seed: of the noise.
      model: the checkpoint.
      out: folder for the results.
    """

    prompts: int = 50
    noises: int = 40
    looks: tuple[str, ...] = ("half", "half4", "steps2", "steps4", "cached4", "early2", "early4", "early6")
    preview_steps: int | None = None
    kept: float = 0.3
    tier: Literal["easy", "medium", "hard"] | None = None
    prompt_seed: int = 2024
    seed: int = 0
    model: str = "demo"
    out: Path = common.RESULTS


def main(args: Arguments) -> None:
    pipeline = ses_jax.load_pipeline(args.model)
    reward = ses_jax.load_reward("clip", source=pipeline.folder / "clip")
    plan = ">".join(f"{look}:1" for look in args.looks)
    settings = {"budget": args.noises, "population": args.noises, "elites": 1, "preview_steps": args.preview_steps}
    config = ses_jax.SearchConfig(searcher="best-of-n", fidelity=plan, seed=args.seed, **settings).resolve(pipeline)
    arguments = {name: value for name, value in dataclasses.asdict(args).items() if name not in ("out", "prompts")}
    rows = begun(args.out / f"{NAME}.json", arguments)
    for index, (_, prompt) in enumerate(captions.evaluation_prompts(args.prompts, args.tier, args.prompt_seed)):
        if index < len(rows):
            continue
        (result,) = search_prompts(pipeline, reward, config, [prompt], indices=[index])
        scores = [[row["score"], *row["looks"]] for row in result.history]
        rows.append({"prompt": prompt, "scores": scores})
        measured = {"arguments": arguments, "looks": summary(pipeline, config, rows, args), "rows": rows}
        common.save(NAME, json.loads(json.dumps(measured)), args.out)
    for name, values in summary(pipeline, config, rows, args).items():
        print(f"{name:10}", "  ".join(f"{what} {value:.3f}" for what, value in values.items()))


def begun(path: Path, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run with the same arguments."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return found["rows"] if found.get("arguments") == json.loads(json.dumps(arguments)) else []


def summary(
    pipeline: Any, config: ses_jax.SearchConfig, rows: Sequence[dict[str, Any]], args: Arguments
) -> dict[str, dict[str, float]]:
    """By look: its cost as a share of a full preview's steps, and means over prompts with their standard errors."""
    tokens = pipeline.tokenize([rows[0]["prompt"]], guidance=config.guidance)
    half = evaluations.share_of_half(pipeline, tokens, config.height, config.width)
    scores = np.array([row["scores"] for row in rows], float)
    found = {}
    for place, look in enumerate(config.fidelity.looks, start=1):
        share = half if look.kind == fidelity.HALF else Fraction(1)
        pairs = [(of[:, 0], of[:, place]) for of in scores]
        kept = math.ceil(args.kept * args.noises)
        found[look.name] = {"cost": float(look.evaluations(config.preview_steps) * share / config.preview_steps)}
        found[look.name] |= averaged("rank correlation", [spearman(*pair) for pair in pairs])
        found[look.name] |= averaged("best kept", [best_kept(*pair, kept) for pair in pairs])
    return found


def averaged(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean and, of several values, its standard error."""
    error = {f"{name}, standard error": np.std(values, ddof=1) / len(values) ** 0.5} if len(values) > 1 else {}
    return {name: float(np.mean(values))} | {what: float(value) for what, value in error.items()}


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; equal scores stand in the order they come."""
    ranks = (np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (a, b))
    return float(np.corrcoef(*ranks)[0, 1])


def best_kept(full: np.ndarray, look: np.ndarray, kept: int) -> float:
    """Whether the best by full previews is among the best so many of a look."""
    return float(full.argmax() in np.argsort(-look, kind="stable")[:kept])


if __name__ == "__main__":
    main(tyro.cli(Arguments))
