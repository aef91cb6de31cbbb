"""The numbers behind the charts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

Row = Mapping[str, Any]


def expected_best(scores: Float[np.ndarray, " n"], counts: Sequence[int]) -> Float[np.ndarray, " k"]:
    """What the best of `count` of these scores is on average, drawn without replacement.

    The i-th smallest of n scores is the best of k drawn in C(i - 1, k - 1) of the C(n, k) cases.

    Args:
      scores: finite ones.
      counts: from 1 to n each.
    """
    ordered, total = np.sort(np.asarray(scores, np.float64)), len(scores)
    return np.array([ordered @ _shares(total, count) for count in counts])


def _shares(total: int, count: int) -> Float[np.ndarray, " n"]:
    """In which share of the draws each score is the best, by rank; in logarithms, as the numbers are large."""
    all_draws = _log_choose(total, count)
    return np.array([math.exp(_log_choose(i, count - 1) - all_draws) if i >= count - 1 else 0.0 for i in range(total)])


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def best_so_far(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """`(candidates, best score)` after each candidate, from the first finite one."""
    return [(row["index"] + 1.0, row["best"]) for row in rows if row["best"] is not None]


def best_of_n(rows: Sequence[Row], points: int = 60) -> list[tuple[float, float]]:
    """`(n, expected best of n)` of the scores of a search."""
    scores = np.array([row["score"] for row in rows if row["score"] is not None], np.float64)
    counts = sorted({round(x) for x in np.linspace(1, len(scores), min(points, len(scores)))})
    return [(float(n), float(y)) for n, y in zip(counts, expected_best(scores, counts), strict=True)]


def of_the_best(rows: Sequence[Row], part: str | None) -> list[tuple[float, float]]:
    """`(candidates, score of the best so far)` by one part, in standard deviations above the base noise.

    Args:
      rows: of the history.
      part: of the reward; None is the score that drives the search.
    """

    def value(row):
        found = row["score"] if part is None else row["components"][part]
        return math.nan if found is None else found

    values = np.array([value(row) for row in rows])
    spread = np.nanstd(values) if np.isfinite(values).any() else 0.0
    leader, points = None, []
    for row in rows:
        if row["score"] is not None and (leader is None or row["score"] > rows[leader]["score"]):
            leader = row["index"]
        if leader is not None and spread > 0 and math.isfinite(values[leader]):
            points.append((row["index"] + 1.0, float((values[leader] - values[0]) / spread)))
    return [point for point in points if math.isfinite(point[1])]


def drift(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """`(candidates, root mean square of the low band)`."""
    return [(row["index"] + 1.0, row["low_rms"]) for row in rows]
