"""What a search returns, and the folder it is saved to."""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ses_jax.engine import repeat, saved
from ses_jax.engine.cost import Cost
from ses_jax.engine.files import expanded, save_array, writable_folder, write, write_together
from ses_jax.engine.settings import shown
from ses_jax.engine.watching import Shot
from ses_jax.exports import export, pictures
from ses_jax.report import grid, page
from ses_jax.report.charts import Svg

NOISE, HISTORY, REPORT, SUMMARY = "noise.npy", "history.jsonl", "report.html", saved.SUMMARY
# Of the winner, until its image is there.
PREVIEW = "preview.png"
# What `SearchResult.save` writes, the last one last; of the pictures, those of one format, and no preview.
IMAGES = tuple(f"{name}.{kind}" for kind in pictures.FORMATS for name in saved.PICTURES)
FILES = (*IMAGES, PREVIEW, NOISE, HISTORY, REPORT, SUMMARY)


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
      timings: seconds of each phase, and images per second of the search; of one that was continued, since then.
      interrupted: whether the search was stopped before its budget was spent.
      notes: calls of the user's reward that failed and were made again.
      film: the best and the worst preview of each generation, small; empty in a result that was loaded.
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
    film: Sequence[Shot] = ()

    def __repr__(self) -> str:
        """One line; what is in the attributes would be hundreds."""
        width, height = self.image.size
        return (
            f"SearchResult({shown(self.prompt)}: preview {self.baseline_score:.4f} -> {self.score:.4f}, final "
            f"{self.baseline_final_score:.4f} -> {self.final_score:.4f}, {len(self.history)} of "
            f"{self.config.get('budget')} candidates, {width} x {height} pixels)"
        )

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

    def save(self, folder: str | os.PathLike[str], *, image_format: str = "png", report: bool = True) -> Path:
        """Writes `best.png`, `baseline.png`, `noise.npy`, `history.jsonl`, `report.html` and `result.json`.

        Each file appears whole or not at all, `result.json` last. The pictures carry prompt, settings and versions.
        What an earlier result left there in other formats, or as a page, goes, and so does a `preview.png`.

        Args:
          folder: is made if it is not there.
          image_format: "png", "jpeg" or "webp", which is also the pictures' ending.
          report: whether to write `report.html`, a page for people.

        Raises:
          ValueError: if the folder cannot be written, and for another format.
          OSError: naming the file that could not be, on a full disk; what was there before is whole.
        """
        if image_format not in pictures.FORMATS:
            raise ValueError(f"image_format={image_format!r} is not one of {', '.join(pictures.FORMATS)}")
        folder = writable_folder(folder)
        text = json.dumps(self.summary(), indent=2, ensure_ascii=False) + "\n"
        writers = self._picture_writers(image_format) | _search_writers(self.noise, self.history)
        if report:
            shown = page.page(self._view())
            writers[REPORT] = lambda path: path.write_text(shown, encoding="utf-8")
        writers[SUMMARY] = lambda path: path.write_text(text, encoding="utf-8")
        write_together({folder / name: writer for name, writer in writers.items()})
        for name in FILES:
            if name not in writers:
                (folder / name).unlink(missing_ok=True)
        return folder

    def _picture_writers(self, kind: str) -> dict[str, Callable[[Path], Any]]:
        images = dict(zip(saved.PICTURES, (self.image, self.baseline_image), strict=True))
        return {
            f"{name}.{kind}": functools.partial(
                pictures.save, image=image, kind=kind, notes=repeat.notes(self.facts(name))
            )
            for name, image in images.items()
        }

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "SearchResult":
        """The result that `save` wrote to a folder; a file in it stands for the folder.

        Raises:
          FileNotFoundError: naming a file that is not there, and the subfolders where the results of a list are.
          ValueError: naming a file that is damaged.
        """
        folder = expanded(folder)
        return cls(**saved.read(folder.parent if folder.is_file() else folder))

    def facts(self, image: str) -> dict[str, Any]:
        """What the picture "best" or "baseline" says of itself, as plain JSON values."""
        before = "" if image == "best" else "baseline_"
        scores = {name: getattr(self, before + name) for name in ("score", "final_score")}
        scores = {name: value if math.isfinite(value) else None for name, value in scores.items()}
        return repeat.facts(self.prompt, self.config, image=image, **scores)

    def plot(self) -> Svg:
        """The best score over candidates, beside what best-of-N would make of the same scores: a chart of notebooks."""
        return page.curve(self._view(), standalone=True)

    def grid(self) -> Image.Image:
        """The best preview of each generation, and below it the worst.

        Raises:
          ValueError: where no previews were kept, as with `no_report`, and in a result that was loaded.
        """
        rows = [[shot.image for shot in self.film if shot.best == best] for best in (True, False)]
        return grid.grid([row for row in rows if row])

    def _repr_html_(self) -> str:
        """The report, for notebooks."""
        return page.embedded(self._view())

    def _view(self) -> page.View:
        """What the report shows."""
        scores = [row["score"] for row in self.history]
        film = [page.Shown(shot.generation, shot.best, scores[shot.index], shot.image) for shot in self.film]
        again = repeat.command(self.prompt, self.config), repeat.python(self.prompt, self.config)
        return page.View(self.summary(), self.history, self.image, self.baseline_image, film, *again)

    def export(self, to: str, folder: str | os.PathLike[str] | None = None) -> Path:
        """Writes the noise as another program takes it.

        Args:
          to: "diffusers", a file for `latents=` and a script that makes the image with it; or "comfyui", a `.latent`
            file, a custom node and a workflow.
          folder: to write to; `ses_diffusers` or `ses_comfyui` by default.

        Returns:
          The folder.

        Raises:
          ValueError: for another program, a model that other programs don't know, and a folder that cannot be written.
        """
        return export_noise(self.noise, self.summary(), to, folder)


def save_search(folder: Path, noise: np.ndarray, history: list[dict[str, Any]], preview: Image.Image | None) -> None:
    """Writes what a search found before its images are rendered: `noise.npy`, `history.jsonl` and `preview.png`."""
    writers = _search_writers(noise, history)
    if preview is not None:
        writers[PREVIEW] = functools.partial(preview.save, format="PNG")
    else:
        (folder / PREVIEW).unlink(missing_ok=True)
    write_together({folder / name: writer for name, writer in writers.items()})


def _search_writers(noise: np.ndarray, history: list[dict[str, Any]]) -> dict[str, Callable[[Path], Any]]:
    lines = "".join(json.dumps(row) + "\n" for row in history)
    return {
        NOISE: lambda path: save_array(path, noise),
        HISTORY: lambda path: path.write_text(lines, encoding="utf-8"),
    }


def export_noise(
    noise: np.ndarray, summary: Mapping[str, Any], to: str, folder: str | os.PathLike[str] | None = None
) -> Path:
    """As `SearchResult.export`, of a noise and what `result.json` says of it."""
    files = export.export(noise, summary["prompt"], summary["config"], to)
    folder = writable_folder(f"ses_{to}" if folder is None else folder)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write(folder / name, lambda path, content=content: path.write_bytes(content))
    return folder


def to_image(pixels: np.ndarray) -> Image.Image:
    """An 8-bit image of `[H, W, 3]` in [0, 1]."""
    return Image.fromarray(np.round(np.clip(np.asarray(pixels, np.float32), 0, 1) * 255).astype(np.uint8))
