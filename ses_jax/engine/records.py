"""What a search notes down: plain JSON values, one row a candidate and one entry a part of the reward."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ses_jax.engine.generation import Scored

Row = dict[str, Any]


def history(names: Sequence[str], scored: Scored, scores: Float[np.ndarray, " n"], population: int) -> list[Row]:
    """A row a candidate, in the order they were scored.

    Args:
      names: of the reward's parts; their own scores are noted where there are several.
      scored: components `[n, parts]` and root mean squares `[n]` of all candidates.
      scores: `[n]`, what the components add up to.
      population: candidates a generation.
    """
    rows: list[Row] = []
    best = None
    for index, (score, components, low_rms) in enumerate(zip(scores, scored.components, scored.low_rms, strict=True)):
        finite = _finite(score)
        best = finite if best is None or (finite is not None and finite > best) else best
        row = {"index": index, "generation": index // population, "score": finite, "best": best}
        if len(names) > 1:
            row["components"] = {name: _finite(value) for name, value in zip(names, components, strict=True)}
        rows.append(row | {"low_rms": float(low_rms)})
    return rows


def part_scores(
    names: Sequence[str], rows: Sequence[Row], finals: Float[np.ndarray, "2 parts"]
) -> dict[str, dict[str, float | None]]:
    """By part, its scores of the winner and the base, previews and final renders; empty for a single part."""
    if len(names) == 1:
        return {}
    winner = next(row for row in rows if row["score"] == rows[-1]["best"])
    return {
        name: {
            "score": winner["components"][name],
            "baseline_score": rows[0]["components"][name],
            "final_score": _finite(finals[0, i]),
            "baseline_final_score": _finite(finals[1, i]),
        }
        for i, name in enumerate(names)
    }


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
