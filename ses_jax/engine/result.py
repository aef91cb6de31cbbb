"""What a search returns, and the folder it is saved to."""

import contextlib
import dataclasses
import json
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ses_jax.engine.cost import Cost


@dataclasses.dataclass(frozen=True, eq=False)
class SearchResult:
    """The outcome of one search.

    Attributes:
      prompt: what was asked for.
      image: the winner, rendered with all steps.
      noise: float32 `[C, h, w]`, the winner's initial noise.
      score: reward of the winner's preview, the best of `history`.
      final_score: reward of `image` before rounding to 8 bits.
      baseline_image, baseline_score, baseline_final_score: the same for the unsearched noise of the same seed;
        `baseline_score` is row 0 of `history`.
      components: where the reward has several parts, or others are reported, each part's own score, baseline_score,
        final_score and baseline_final_score, by its name.
      history: one plain dict a candidate, in the order they were scored: index, generation, score (None if it was not
        finite, or where a look stopped it), best (so far), low_rms (root mean square of the low band; 1 for fresh
        noise), components, the parts' own scores, where there are several, and looks, what each look said of it, where
        there are any.
      config: the settings of the search, all defaults filled in.
      cost: network evaluations, FLOPs and seconds: `search` of the candidates, `finals` of winner and base.
      timings: seconds of each phase, and images per second of the search.
      interrupted: whether the search was stopped before its budget was spent.
    """

    prompt: str
    image: Image.Image
    noise: np.ndarray
    score: float
    final_score: float
    baseline_image: Image.Image
    baseline_score: float
    baseline_final_score: float
    components: dict[str, dict[str, float | None]]
    history: list[dict[str, Any]]
    config: dict[str, Any]
    cost: Cost
    timings: dict[str, float]
    interrupted: bool = False

    def summary(self) -> dict[str, Any]:
        """Everything but images, noise and history, as plain JSON values; a score that is not finite is None."""
        names = ("score", "final_score", "baseline_score", "baseline_final_score")
        values = {name: getattr(self, name) for name in names}
        return {
            "prompt": self.prompt,
            **{name: value if math.isfinite(value) else None for name, value in values.items()},
            "components": self.components,
            "scored": len(self.history),
            "interrupted": self.interrupted,
            "cost": self.cost.as_json(),
            "timings": self.timings,
            "config": self.config,
        }

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `best.png`, `baseline.png`, `noise.npy`, `history.jsonl` and `result.json`.

        Each file appears whole or not at all, `result.json` last.

        Raises:
          ValueError: if the folder cannot be written.
        """
        folder = writable_folder(folder)
        write(folder / "best.png", lambda path: self.image.save(path, format="PNG"))
        write(folder / "baseline.png", lambda path: self.baseline_image.save(path, format="PNG"))
        write(folder / "noise.npy", lambda path: _save_array(path, self.noise))
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        write(folder / "history.jsonl", lambda path: path.write_text(lines, encoding="utf-8"))
        text = json.dumps(self.summary(), indent=2, ensure_ascii=False) + "\n"
        write(folder / "result.json", lambda path: path.write_text(text, encoding="utf-8"))
        return folder


def to_image(pixels: np.ndarray) -> Image.Image:
    """An 8-bit image of `[H, W, 3]` in [0, 1]."""
    return Image.fromarray(np.round(np.clip(np.asarray(pixels, np.float32), 0, 1) * 255).astype(np.uint8))


def writable_folder(folder: str | os.PathLike[str]) -> Path:
    """Makes sure that `folder` exists and can be written.

    Raises:
      ValueError: if not.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output folder {folder} is not writable: {error.strerror or error}") from error
    return folder


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Runs `writer(temporary path)` and renames its file to `path`, so that no reader ever sees half a file."""
    with _temporary(path) as temporary:
        writer(temporary)
        os.replace(temporary, path)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    # Not the process id, which several machines or containers with one file system may share.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)
