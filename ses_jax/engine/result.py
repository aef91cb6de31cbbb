"""What a search returns, and the folder it is saved to."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ses_jax.engine import saved
from ses_jax.engine.cost import Cost

# What `SearchResult.save` writes, the last one last.
FILES = ("best.png", "baseline.png", "noise.npy", "history.jsonl", "result.json")


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
      notes: calls of the user's reward that failed and were made again.
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
    notes: tuple[str, ...] = ()

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
        } | ({"notes": list(self.notes)} if self.notes else {})

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `best.png`, `baseline.png`, `noise.npy`, `history.jsonl` and `result.json`.

        Each file appears whole or not at all, `result.json` last.

        Raises:
          ValueError: if the folder cannot be written.
          OSError: naming the file that could not be, on a full disk; what was there before is whole.
        """
        folder = writable_folder(folder)
        text = json.dumps(self.summary(), indent=2, ensure_ascii=False) + "\n"
        writers = {
            "best.png": lambda path: self.image.save(path, format="PNG"),
            "baseline.png": lambda path: self.baseline_image.save(path, format="PNG"),
            **_search_writers(self.noise, self.history),
            "result.json": lambda path: path.write_text(text, encoding="utf-8"),
        }
        write_together({folder / name: writer for name, writer in writers.items()})
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "SearchResult":
        """The result that `save` wrote to a folder.

        Raises:
          FileNotFoundError: naming a file that is not there.
          ValueError: naming a file that is damaged.
        """
        return cls(**saved.read(Path(folder)))


def save_search(folder: Path, noise: np.ndarray, history: list[dict[str, Any]]) -> None:
    """Writes what a search found before its images are rendered: `noise.npy` and `history.jsonl`."""
    write_together({folder / name: writer for name, writer in _search_writers(noise, history).items()})


def _search_writers(noise: np.ndarray, history: list[dict[str, Any]]) -> dict[str, Callable[[Path], Any]]:
    lines = "".join(json.dumps(row) + "\n" for row in history)
    return {
        "noise.npy": lambda path: _save_array(path, noise),
        "history.jsonl": lambda path: path.write_text(lines, encoding="utf-8"),
    }


def to_image(pixels: np.ndarray) -> Image.Image:
    """An 8-bit image of `[H, W, 3]` in [0, 1]."""
    return Image.fromarray(np.round(np.clip(np.asarray(pixels, np.float32), 0, 1) * 255).astype(np.uint8))


def writable_folder(folder: str | os.PathLike[str]) -> Path:
    """Makes sure that `folder` exists and can be written.

    Raises:
      ValueError: if not.
    """
    if not str(folder):
        raise ValueError("the output folder has no name; '.' is the current one")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # the latter for names that no file can have
        raise ValueError(f"output folder {folder} is not writable: {getattr(error, 'strerror', 0) or error}") from error
    return folder


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Runs `writer(temporary path)` and renames its file to `path`, so that no reader ever sees half a file.

    What the file holds is on the disk before it has its name: a machine that goes down leaves no file of zeros.

    Raises:
      OSError: naming `path`.
    """
    write_together({path: writer})


def write_together(files: Mapping[Path, Callable[[Path], Any]]) -> None:
    """`write` for several files of a folder, of which none is renamed before all are written."""
    with contextlib.ExitStack() as temporaries:
        written = {}
        for path, writer in files.items():
            with naming(path):
                written[path] = temporaries.enter_context(_temporary(path))
                writer(written[path])
                _sync(written[path])
        for path, temporary in written.items():
            with naming(path):
                os.replace(temporary, path)
        for folder in {path.parent for path in files}:
            with contextlib.suppress(OSError):  # not every file system can
                _sync(folder)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the file system within name this path."""
    try:
        yield
    except OSError as error:
        text = error.strerror or " ".join(str(error).split())
        raise OSError(error.errno or errno.EIO, f"cannot write: {text}", str(path)) from error


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    # Not the process id, which several machines or containers with one file system may share.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):  # what went wrong before is what matters
            temporary.unlink(missing_ok=True)


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)
