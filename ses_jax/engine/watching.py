"""What is seen of a search while it runs: the film of its generations, a caller's function, every candidate's files."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from ses_jax.engine import records
from ses_jax.engine.files import save_array, write
from ses_jax.engine.program import FILM, Program, Scored, Shown
from ses_jax.engine.settings import shown

CANDIDATES = "candidates"


@dataclasses.dataclass(frozen=True, eq=False)
class Shot:
    """A generation's best or worst preview.

    Attributes:
      generation: from 0.
      index: of the candidate, as in the history.
      best: whether it is the generation's best.
      image: at most 256 pixels wide and high.
    """

    generation: int
    index: int
    best: bool
    image: Image.Image


OnGeneration = Callable[[int, Image.Image, list[float]], Any]


def check_function(on_generation: Any) -> None:
    """Raises ValueError for what cannot be called after a generation, as far as its signature tells."""
    if on_generation is None:
        return
    if not callable(on_generation):
        raise ValueError(f"on_generation={shown(on_generation)} is not a function")
    try:
        signature = inspect.signature(on_generation)
    except (TypeError, ValueError):  # some of C have none
        return
    try:
        signature.bind(0, None, [])
    except TypeError as error:
        raise ValueError(
            f"on_generation={shown(on_generation)} cannot be called with (generation, best preview so far, scores): "
            f"{error}"
        ) from None


class Watch(NamedTuple):
    """What is done with candidates beside scoring them.

    Attributes:
      film: whether a film is kept.
      on_generation: `(generation, best preview so far, scores) -> whether to stop`, for a single prompt.
      folders: of the prompts' results, to save every preview and its noise in; None saves none.
    """

    film: bool = False
    on_generation: OnGeneration | None = None
    folders: Sequence[Path] | None = None

    @property
    def shown(self) -> Shown | None:
        """What the compiled generation is asked for."""
        if self.on_generation or self.folders:
            return Shown(None, noise=self.folders is not None)
        return FILM if self.film else None


NOTHING = Watch()


class Seen(NamedTuple):
    """A generation of one prompt.

    Attributes:
      generation: from 0.
      first: index of its first candidate.
      scores: of the candidates within the budget, -inf where there was no full preview.
      best: whether one of them is the best so far.
      previews: of 8 bits.
      noise: None where it is not asked for.
    """

    generation: int
    first: int
    scores: Float[np.ndarray, " n"]
    best: bool
    previews: UInt8[np.ndarray, "n h w 3"]
    noise: Float[np.ndarray, "n c h w"] | None


class Sight(NamedTuple):
    """What was seen so far: each prompt's film, the first prompt's best preview, and whether the caller has enough."""

    films: list[list[Shot]]
    best: Image.Image | None = None
    stop: bool = False


def numbers(scored: Scored) -> Scored:
    """A generation without what is shown of it."""
    return scored._replace(previews=None, noise=None)


def generation(program: Program, index: int, scored: tuple[Sequence[Scored], Scored], budget: int) -> list[Seen]:
    """A generation of each prompt; empty where nothing is shown.

    Args:
      program: of the search.
      index: of the generation.
      scored: the generations before it, and it.
      budget: candidates of the whole search.
    """
    earlier, shown = scored
    if shown.previews is None:
        return []
    first = index * program.problem.population
    count = min(shown.previews.shape[1], budget - first)
    parts = [part.components for part in (*earlier, shown)]
    totals = [records.total(program, one, one) for one in np.concatenate(parts, axis=1)[:, : first + count]]
    totals = np.where(np.isfinite(totals), totals, -np.inf)
    best = totals.argmax(axis=1) >= first
    noise = [None] * len(best) if shown.noise is None else shown.noise[:, :count]
    columns = totals[:, first:], best, shown.previews[:, :count], noise
    return [Seen(index, first, *one) for one in zip(*columns, strict=True)]


def recalled(program: Program, films: list[list[Shot]], earlier: Sequence[Scored]) -> Sight:
    """What was seen before a search goes on; the first prompt's best preview is that of its film, if there is one."""
    if not earlier:
        return Sight(films)
    components = np.concatenate([part.components[0] for part in earlier])
    totals = records.total(program, components, components)
    best = np.where(np.isfinite(totals), totals, -np.inf).argmax()
    return Sight(films, next((shot.image for shot in films[0] if shot.index == best), None))


def look(watch: Watch, sight: Sight, seen: Sequence[Seen]) -> Sight:
    """What was seen after one more generation; the caller's function is called, and candidates are saved."""
    if not seen:
        return sight
    for folder, one in zip(watch.folders or (), seen, strict=False):
        save_candidates(folder, one)
    films = [[*film, *shots(one)] for film, one in zip(sight.films, seen, strict=True)]
    first = seen[0]
    best = Image.fromarray(first.previews[first.scores.argmax()]) if first.best else sight.best
    scores = np.where(np.isfinite(first.scores), first.scores, np.nan).tolist()
    stop = bool(watch.on_generation and watch.on_generation(first.generation, best, scores))
    return Sight(films, best, stop)


def shots(seen: Seen) -> list[Shot]:
    """The best and the worst of a generation; one if there is one, none if no score is finite."""
    finite = [int(i) for i in np.argsort(-seen.scores, kind="stable") if np.isfinite(seen.scores[i])]
    chosen = [] if not finite else [finite[0], finite[-1]][: len(finite)]
    return [
        Shot(seen.generation, seen.first + i, best, _small(seen.previews[i]))
        for i, best in zip(chosen, (True, False), strict=False)
    ]


def preview(film: Sequence[Shot], index: int) -> Image.Image | None:
    """A candidate's preview; None where it was neither the best nor the worst when its generation was scored."""
    return next((shot.image for shot in film if shot.index == index), None)


def _small(pixels: UInt8[np.ndarray, "h w 3"]) -> Image.Image:
    image = Image.fromarray(pixels)
    image.thumbnail((FILM.side, FILM.side))
    return image


def save_candidates(folder: Path, seen: Seen) -> None:
    """Writes `candidates/INDEX.png` and `.npy` of those that have a full preview."""
    folder = folder / CANDIDATES
    folder.mkdir(parents=True, exist_ok=True)
    for offset, score in enumerate(seen.scores):
        name = folder / f"{seen.first + offset:05d}"
        if np.isfinite(score):
            image = Image.fromarray(seen.previews[offset])
            write(name.with_suffix(".png"), lambda path, image=image: image.save(path, format="PNG"))
            write(name.with_suffix(".npy"), lambda path, noise=seen.noise[offset]: save_array(path, noise))
