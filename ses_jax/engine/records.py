"""What a search notes down: plain JSON values, one row a candidate and one entry a part of the reward."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ses_jax.engine.program import Program, Scored
from ses_jax.rewards import mixture

Row = dict[str, Any]


def history(names: Sequence[str], scored: Scored, scores: Float[np.ndarray, " n"], population: int) -> list[Row]:
    """A row a candidate, in the order they were scored.

    Args:
      names: of the reward's parts; their own scores are noted where there are several.
      scored: components `[n, parts]`, root mean squares `[n]` and, where there are some, looks `[n, looks]` of all
        candidates.
      scores: `[n]`, what the components add up to.
      population: candidates a generation.
    """
    rows: list[Row] = []
    best = None
    for index, (score, components, low_rms) in enumerate(zip(scores, *scored[:2], strict=True)):
        finite = _finite(score)
        best = finite if best is None or (finite is not None and finite > best) else best
        row = {"index": index, "generation": index // population, "score": finite, "best": best}
        if len(names) > 1:
            row["components"] = {name: _finite(value) for name, value in zip(names, components, strict=True)}
        rows.append(row | {"low_rms": float(low_rms)})
    if scored.looks is None:
        return rows
    return [row | {"looks": _looks(looks)} for row, looks in zip(rows, scored.looks, strict=True)]


def total(
    program: Program, components: Float[np.ndarray, "n parts"], population: Float[np.ndarray, "m parts"]
) -> Float[np.ndarray, " n"]:
    """Scores of components; in a standardised mixture as the whole population of the search has them in the end."""
    if not program.standardize:
        return np.asarray(mixture.plain_sum(components, program.weights))
    return np.asarray(mixture.standardized_sum(components, program.weights, population))


def _looks(looks: Float[np.ndarray, " looks"]) -> list[float | None]:
    """What those looks said that were taken; None for one that was not finite."""
    return [_finite(look) for look in looks if not math.isnan(look)]


def part_scores(
    names: Sequence[str], rows: Sequence[Row], finals: Float[np.ndarray, "2 parts"]
) -> dict[str, dict[str, float | None]]:
    """By part, its scores of the winner and the base, previews and final renders; empty for a single part."""
    if len(names) == 1:
        return {}
    best = winner(rows)
    return {
        name: {
            "score": best["components"][name],
            "baseline_score": rows[0]["components"][name],
            "final_score": _finite(finals[0, i]),
            "baseline_final_score": _finite(finals[1, i]),
        }
        for i, name in enumerate(names)
    }


def winner(rows: Sequence[Row]) -> Row:
    """The row of the candidate that is the best of all."""
    return next(row for row in rows if row["score"] == rows[-1]["best"])


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
