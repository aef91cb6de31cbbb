"""Searchers side by side on the demo: the same prompts, the same base noise, as many network evaluations.

`python benchmarks/searchers.py` prints a table and writes `searchers.json`. For each searcher: the reward of the best
preview at each budget of evaluations, and what the judge of `examples/scenes.py`, which reads pixels and drives
nothing, says of the final image; both also as the mean paired difference to one of the searchers, with its standard
error. Searchers and seeds that the file has already are not run again.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import common
import scenes

import ses_jax

Rows = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]  # by searcher and seed, one row a prompt


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compares searchers on the demo checkpoint.

    Attributes:
      searchers: as `search` takes them.
      against: the one that the others' differences are to.
      nfe: budgets in network evaluations, by which the rewards are read; images are those of the largest.
      prompts: how many evaluation prompts.
      prompt_seed: of the prompts; 2024 are those that the demo's defaults were chosen on.
      seeds: of the noise.
      at_once: prompts in a batch.
      out: folder for the results.
    """

    searchers: tuple[str, ...] = ("best-of-n", "ses", "ses,explore=20", "zero-order", "gradient")
    against: str = "best-of-n"
    nfe: tuple[int, ...] = (240, 420, 600, 1020)
    prompts: int = 40
    prompt_seed: int = 7
    seeds: tuple[int, ...] = (0,)
    at_once: int = 10
    out: Path = common.RESULTS


def main(args: Arguments) -> None:
    cases = scenes.evaluation_prompts(args.prompts, seed=args.prompt_seed)
    pipeline = ses_jax.load_pipeline("demo")
    rows = done(args)
    for searcher in dict.fromkeys((args.against, *args.searchers)):
        for seed in args.seeds:
            if str(seed) not in rows.setdefault(searcher, {}):
                rows[searcher][str(seed)] = searched(pipeline, cases, searcher, seed, args)
                common.save("searchers", {"arguments": arguments(args), "rows": rows}, args.out)
    for line in table(rows, args):
        print(line)


def arguments(args: Arguments) -> dict[str, Any]:
    """What rows of one file have in common."""
    return {name: getattr(args, name) for name in ("prompts", "prompt_seed")} | {"nfe": list(args.nfe)}


def done(args: Arguments) -> dict[str, dict[str, Any]]:
    """The rows that are there already."""
    path = args.out / "searchers.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    return saved["rows"] if saved.get("arguments") == arguments(args) else {}


def searched(pipeline: Any, cases: Sequence[Any], searcher: str, seed: int, args: Arguments) -> list[dict[str, Any]]:
    """What each prompt's search came to."""
    settings = {"nfe": max(args.nfe), "seed": seed, "prompts_at_once": args.at_once, "progress": False}
    results = ses_jax.search([prompt for _, prompt in cases], model=pipeline, searcher=searcher, **settings)
    rows = []
    for (scene, _), result in zip(cases, results, strict=True):
        verdict = scenes.verify(np.asarray(result.image), scene)
        each = result.cost.search.nfe / len(result.history)
        rows.append(
            {
                "rewards": [result.history[int(nfe // each) - 1]["best"] for nfe in args.nfe],
                "final reward": result.final_score,
                "all correct": float(verdict.correct),
                "checks correct": verdict.fraction,
                "nfe": result.cost.search.nfe,
            }
        )
    return rows


def table(rows: Rows, args: Arguments) -> list[str]:
    """Markdown: means, and paired differences."""
    head = [f"reward at {nfe} NFE" for nfe in args.nfe] + ["final reward", "all correct", "checks correct"]
    lines = [f"| searcher | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    base = values(rows[args.against], args)
    for searcher in rows:
        found = values(rows[searcher], args)
        cells = [f"{mean:.3f}" for mean in found.mean(axis=0)]
        if searcher != args.against:
            cells = [f"{a} ({b})" for a, b in zip(cells, differences(found - base), strict=True)]
        lines.append(f"| `{searcher}` | {' | '.join(cells)} |")
    return lines


def values(by_seed: Mapping[str, Sequence[Mapping[str, Any]]], args: Arguments) -> np.ndarray:
    """`[seeds * prompts, columns]`."""
    rows = [row for seed in args.seeds for row in by_seed[str(seed)]]
    names = ("final reward", "all correct", "checks correct")
    return np.array([[*row["rewards"], *(row[name] for name in names)] for row in rows])


def differences(pairs: np.ndarray) -> list[str]:
    """Mean and standard error of each column."""
    errors = pairs.std(axis=0, ddof=1) / len(pairs) ** 0.5
    return [f"{mean:+.3f} ± {error:.3f}" for mean, error in zip(pairs.mean(axis=0), errors, strict=True)]


if __name__ == "__main__":
    main(tyro.cli(Arguments))
