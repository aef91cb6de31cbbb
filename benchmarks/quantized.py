"""What weights in eight bits cost in quality, on the demo: the same prompts and noise with and without.

`python benchmarks/quantized.py` prints a table and writes `quantized.json`: how far the velocity is off (relative, at
several noise levels), the PSNR of images of the same noise, and what searches with the unquantised reward come to,
as paired differences with standard errors. Kinds that the file has already are not run again.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import common
from demo import captions, judge

import ses_jax

SIGMAS = (0.9, 0.5, 0.2)
REWARDS = ("preview reward", "final reward", "all correct")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compares kinds of eight bits with the demo's own float32.

    Attributes:
      kinds: as `load_pipeline` takes them.
      prompts: how many evaluation prompts.
      budget: of the searches.
      at_once: prompts in a batch.
      preview_steps, steps: of previews and of images; by default the demo's.
      model: the checkpoint.
      out: folder for the results.
    """

    kinds: tuple[str, ...] = ("int8", "fp8")
    prompts: int = 50
    budget: int = 10
    at_once: int = 10
    preview_steps: int | None = None
    steps: int | None = None
    model: str = "demo"
    out: Path = common.RESULTS


def main(args: Arguments) -> None:
    cases = captions.evaluation_prompts(args.prompts, seed=7)
    rows = done(args)
    exact = ses_jax.load_pipeline(args.model)
    for kind in ("float32", *args.kinds):
        if kind not in rows:
            pipeline = exact if kind == "float32" else ses_jax.load_pipeline(args.model, quantize=kind)
            rows[kind] = searched(pipeline, cases, args)
            if kind != "float32":
                rows[kind] |= compared(exact, pipeline, [prompt for _, prompt in cases], args.steps)
            common.save("quantized", {"arguments": arguments(args), "rows": rows}, args.out)
    for line in table(rows):
        print(line)


def arguments(args: Arguments) -> dict[str, Any]:
    """What rows of one file have in common."""
    return {name: getattr(args, name) for name in ("prompts", "budget", "preview_steps", "steps")}


def done(args: Arguments) -> dict[str, dict[str, Any]]:
    """The rows that are there already."""
    path = args.out / "quantized.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    return saved["rows"] if saved.get("arguments") == arguments(args) else {}


def searched(pipeline: Any, cases: Sequence[Any], args: Arguments) -> dict[str, Any]:
    """What each prompt's search came to, by name."""
    settings = {"budget": args.budget, "prompts_at_once": args.at_once, "progress": False}
    settings |= {"preview_steps": args.preview_steps, "steps": args.steps}
    results = ses_jax.search([prompt for _, prompt in cases], model=pipeline, **settings)
    correct = [
        judge.verify(np.asarray(result.image), scene).correct for (scene, _), result in zip(cases, results, strict=True)
    ]
    columns = [result.score for result in results], [result.final_score for result in results], map(float, correct)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(pipeline.params["transformer"]))
    return dict(zip(REWARDS, map(list, columns), strict=True)) | {"transformer bytes": weights}


def compared(exact: Any, pipeline: Any, prompts: Sequence[str], steps: int | None) -> dict[str, Any]:
    """By prompt, how far the velocity is off and how alike the images are."""
    images = [np.asarray(ses_jax.generate(p, prompts, steps=steps)) for p in (exact, pipeline)]
    error = np.square(images[0] - images[1]).mean(axis=(1, 2, 3))
    rng = np.random.default_rng(0)
    latents = jnp.float32(rng.standard_normal((len(prompts), *exact.noise_shape(*images[0].shape[1:3]))))
    tokens = exact.tokenize(list(prompts), guidance=exact.defaults.guidance)
    found = {f"velocity at {sigma}": [] for sigma in SIGMAS}
    velocities = {sigma: [velocity(p, tokens, latents, sigma) for p in (exact, pipeline)] for sigma in SIGMAS}
    for sigma, (whole, small) in velocities.items():
        found[f"velocity at {sigma}"] = (norms(small - whole) / norms(whole)).tolist()
    return found | {"PSNR": (-10 * np.log10(error)).tolist()}


def velocity(pipeline: Any, tokens: Any, latents: jax.Array, sigma: float) -> np.ndarray:
    """`[B, C, h, w]`."""
    condition = jax.jit(pipeline.encode)(pipeline.params, tokens)
    levels = jnp.full(len(latents), sigma)
    return np.asarray(jax.jit(pipeline.velocity)(pipeline.params, latents, levels, condition))


def norms(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x.reshape(len(x), -1), axis=1)


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Markdown: means and standard errors; rewards as differences to float32."""
    measures = [*(f"velocity at {sigma}" for sigma in SIGMAS), "PSNR"]
    lines = [f"| weights | {' | '.join([*measures, *REWARDS])} |", "|---" * (len(measures) + len(REWARDS) + 1) + "|"]
    base = rows["float32"]
    lines.append(f"| `float32` | {' | '.join(['', '', '', '', *(f'{np.mean(base[n]):.3f}' for n in REWARDS)])} |")
    for kind in [kind for kind in rows if kind != "float32"]:
        cells = [f"{np.mean(rows[kind][name]):.4g}" for name in measures]
        cells += [difference(np.subtract(rows[kind][name], base[name])) for name in REWARDS]
        lines.append(f"| `{kind}` | {' | '.join(cells)} |")
    return lines


def difference(pairs: np.ndarray) -> str:
    """Mean and standard error."""
    return f"{pairs.mean():+.3f} ± {pairs.std(ddof=1) / len(pairs) ** 0.5:.3f}"


if __name__ == "__main__":
    main(tyro.cli(Arguments))
