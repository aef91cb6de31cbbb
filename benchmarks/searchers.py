"""Methods side by side on the demo: the same prompts, the same base noise, as many network evaluations.

`python benchmarks/searchers.py` prints tables and writes, under `benchmarks/results/` unless `--out` says otherwise:

    searchers_hard.json   of each method, seed and prompt, at each budget of network evaluations: the reward of the
                          best preview, and of the final image what a CLIP says that was trained apart and what the
                          judge of `examples/demo/judge.py` says, which reads pixels; both drive nothing
    searchers_hard.png    their means over the budget

and the like for other tiers. A method is a searcher, or a searcher and looks, such as "best-of-n+half:0.3". Methods and
seeds that the file has already are not run again; those that an interrupted run began, it goes on with.
"""

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import common
from demo import captions, judge

import ses_jax
from ses_jax.engine.files import write

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Rows = Mapping[str, Mapping[str, Sequence[Mapping[str, Sequence[float]]]]]  # by method and seed, one a prompt
HELD_OUT = "held-out reward"
COLUMNS = ("reward", "final reward", HELD_OUT, "all correct", "checks correct", "low band")
SHOWN = ("reward", HELD_OUT, "all correct", "low band")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compares methods on the demo checkpoint.

    Attributes:
      methods: searchers as `search` takes them; after a "+" the fidelity.
      against: the one that the others' differences are to.
      nfe: budgets in network evaluations, rising.
      prompts: how many evaluation prompts.
      tier: of their difficulty; None is all in turn.
      prompt_seed: of the prompts; 2024 are those that the demo's defaults were chosen on.
      seeds: of the noise.
      at_once: prompts in a batch.
      preview_steps, steps: of previews and of final images; by default the demo's.
      model: the checkpoint.
      out: folder for the results.
    """

    methods: tuple[str, ...] = ("best-of-n", "ses", "ses,explore=20", "zero-order", "gradient", "best-of-n+half:0.3")
    against: str = "best-of-n"
    nfe: tuple[int, ...] = (100, 250, 500, 1500)
    prompts: int = 100
    tier: Literal["easy", "medium", "hard"] | None = "hard"
    prompt_seed: int = 7
    seeds: tuple[int, ...] = (0, 1, 2)
    at_once: int = 10
    preview_steps: int | None = None
    steps: int | None = None
    model: str = "demo"
    out: Path = common.RESULTS


def main(args: Arguments) -> None:
    cases = captions.evaluation_prompts(args.prompts, args.tier, args.prompt_seed)
    pipeline = ses_jax.load_pipeline(args.model)
    rows = done(args)
    for seed in args.seeds:
        for method in dict.fromkeys((args.against, *args.methods)):
            if str(seed) not in rows.setdefault(method, {}):
                begun = begun_in(args, method, seed)
                rows[method][str(seed)] = searched(pipeline, cases, method, seed, args)
                common.save(name(args), {"arguments": arguments(args), "rows": rows}, args.out)
                shutil.rmtree(begun)
    figure = plot(rows, args)
    write(args.out / f"{name(args)}.png", lambda path: figure.savefig(path, format="png", dpi=130))
    print("\n".join(line for place in range(len(args.nfe)) for line in table(rows, place, args)))


def name(args: Arguments) -> str:
    """Of the files, without a suffix."""
    return f"searchers_{args.tier or 'all'}"


def arguments(args: Arguments) -> dict[str, Any]:
    """What rows of one file have in common."""
    chosen = {name: getattr(args, name) for name in ("prompts", "tier", "prompt_seed")} | {"nfe": list(args.nfe)}
    return chosen | steps(args)


def steps(args: Arguments) -> dict[str, int]:
    """Those that are not the demo's."""
    return {name: value for name in ("preview_steps", "steps") if (value := getattr(args, name)) is not None}


def done(args: Arguments) -> dict[str, dict[str, Any]]:
    """The rows that are there already."""
    path = args.out / f"{name(args)}.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    return saved["rows"] if saved.get("arguments") == arguments(args) else {}


def begun_in(args: Arguments, method: str, seed: int) -> Path:
    """Folder of what is not finished yet; another one for other prompts and budgets."""
    told = "-".join(str(value) for value in (name(args), method, seed, *arguments(args).values()))
    return args.out / "begun" / re.sub(r"[^\w+.=-]+", "_", told)


def searched(pipeline: Any, cases: Sequence[Any], method: str, seed: int, args: Arguments) -> list[dict[str, Any]]:
    """What each prompt's search came to, by budget: each budget goes on from the one before."""
    searcher, _, fidelity = method.partition("+")
    held_out = ses_jax.load_reward("clip", source=pipeline.folder / "held_out_clip", name=HELD_OUT)
    settings = {"searcher": searcher, "fidelity": fidelity or "full", "seed": seed, "report": [held_out], **steps(args)}
    prompts = [prompt for _, prompt in cases]
    begun, budgets = begun_in(args, method, seed), []
    for nfe in args.nfe:
        path = begun / f"{nfe}.json"
        if not path.exists():
            options = {"nfe": nfe, "prompts_at_once": args.at_once, "out": begun / "searches", "resume": True}
            results = ses_jax.search(prompts, model=pipeline, progress=False, **settings, **options)
            found = [measures(scene, result) for (scene, _), result in zip(cases, results, strict=True)]
            common.save(path.stem, {"rows": found}, begun)
        budgets.append(json.loads(path.read_text())["rows"])
    return [{column: [row[column] for row in rows] for column in rows[0]} for rows in zip(*budgets, strict=True)]


def measures(scene: Any, result: ses_jax.SearchResult) -> dict[str, float]:
    """Of one search."""
    verdict = judge.verify(np.asarray(result.image), scene)
    *_, held_out = result.components.values()
    best = max(result.history, key=lambda row: -np.inf if row["score"] is None else row["score"])
    return {
        "reward": round(result.score, 4),
        "final reward": round(result.final_score, 4),
        HELD_OUT: round(held_out["final_score"], 4),
        "all correct": float(verdict.correct),
        "checks correct": round(verdict.fraction, 4),
        "low band": round(best["low_rms"], 4),
        "nfe": result.cost.search.nfe,
    }


def table(rows: Rows, place: int, args: Arguments) -> list[str]:
    """Markdown: means at one of the budgets, and paired differences."""
    lines = [f"\n| at {args.nfe[place]} evaluations | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for method in rows:
        found, base = (values(rows[each], shared(rows, method, args))[..., place] for each in (method, args.against))
        cells = [f"{mean:.3f}" for mean in found.mean(axis=0)]
        if method != args.against:
            cells = [f"{a} ({b})" for a, b in zip(cells, differences(found - base), strict=True)]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return lines


def shared(rows: Rows, method: str, args: Arguments) -> list[str]:
    """The seeds that a method and the one it is compared with were both run with."""
    return [seed for seed in map(str, args.seeds) if seed in rows[method] and seed in rows[args.against]]


def values(by_seed: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[str]) -> np.ndarray:
    """`[seeds * prompts, columns, budgets]`."""
    rows = [row for seed in seeds for row in by_seed[seed]]
    return np.array([[row[column] for column in COLUMNS] for row in rows])


def differences(pairs: np.ndarray) -> list[str]:
    """Mean and standard error of each column."""
    return [
        f"{mean:+.3f} ± {error:.3f}" for mean, error in zip(pairs.mean(axis=0), standard_errors(pairs), strict=True)
    ]


def standard_errors(found: np.ndarray) -> np.ndarray:
    """Of the mean over the first axis."""
    return found.std(axis=0, ddof=1) / len(found) ** 0.5


def plot(rows: Rows, args: Arguments) -> plt.Figure:
    """Means of the columns over the budget, with standard errors."""
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(14, 3.6), constrained_layout=True)
    for method, by_seed in rows.items():
        found = values(by_seed, shared(rows, method, args))
        means, errors = found.mean(axis=0), standard_errors(found)
        for axis, column in zip(axes, SHOWN, strict=True):
            place = COLUMNS.index(column)
            axis.errorbar(args.nfe, means[place], errors[place], label=method, capsize=2, marker="o")
            axis.set(xlabel="network evaluations", xscale="log", title=f"{column}, mean over prompts")
            axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    return figure


if __name__ == "__main__":
    main(tyro.cli(Arguments))
