"""A search's state on disk after every generation, so that a search that was killed goes on where it was.

    folder/search.json      what the search is
    folder/film.npz         what was seen of its generations
    folder/000012/          the state after 12 generations, and all scores so far (Orbax)

Everywhere a folder of None saves nothing.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from ses_jax.engine.files import write
from ses_jax.engine.program import Scored, State
from ses_jax.engine.watching import Shot
from ses_jax.loading import checkpoint

IDENTITY, FILM = "search.json", "film.npz"


def begin(folder: Path | None, identity: Mapping[str, Any]) -> None:
    """Makes a folder ready for a search, or for going on with the same one.

    Raises:
      ValueError: if it holds another search, naming what differs.
    """
    if folder is None:
        return
    file = folder / IDENTITY
    if file.exists():
        saved = json.loads(file.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(identity))
        differing = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        if differing:
            changes = ", ".join(f"{name} {saved.get(name)!r} -> {wanted.get(name)!r}" for name in differing)
            raise ValueError(f"{folder} holds an unfinished search with other settings ({changes}); remove it first")
    folder.mkdir(parents=True, exist_ok=True)
    write(file, lambda path: path.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8"))


def save(folder: Path | None, generations: int, state: State, parts: Sequence[Scored]) -> None:
    """Writes the state after so many generations with all their scores, then removes the one before."""
    if folder is None:
        return
    scored = jax.tree.map(lambda *column: np.concatenate(column, axis=1), *parts)
    scored = {name: column for name, column in scored._asdict().items() if column is not None}
    tree = {"state": jax.tree.leaves(jax.device_get(state)), "scored": scored}
    checkpoint.save(folder / f"{generations:06d}", tree)
    for old in _saved(folder)[:-1]:
        shutil.rmtree(old)


def load(folder: Path | None, initial: State) -> tuple[int, State, list[Scored]]:
    """What `save` wrote.

    Args:
      folder: of the search.
      initial: the state before the first generation.

    Returns:
      How many generations are done, the state after them (on the host), and what they scored.
    """
    saved = [] if folder is None or not folder.is_dir() else _saved(folder)
    if not saved:
        return 0, initial, []
    leaves = jax.tree.leaves(initial)
    tree = checkpoint.restore(saved[-1], checkpoint.metadata(saved[-1]))
    state = [np.asarray(x) for x, _ in zip(tree["state"], leaves, strict=True)]
    scored = Scored(**jax.tree.map(np.asarray, tree["scored"]))
    return int(saved[-1].name), jax.tree.unflatten(jax.tree.structure(initial), state), [scored]


def save_films(folder: Path | None, films: Sequence[Sequence[Shot]]) -> None:
    """Writes what was seen of the generations so far."""
    if folder is None:
        return
    facts = [[[shot.generation, shot.index, shot.best] for shot in film] for film in films]
    images = {
        f"{prompt}-{place}": np.asarray(shot.image)
        for prompt, film in enumerate(films)
        for place, shot in enumerate(film)
    }
    write(folder / FILM, lambda path: _save_arrays(path, images | {"facts": np.array(json.dumps(facts))}))


def load_films(folder: Path | None, prompts: int) -> list[list[Shot]]:
    """What `save_films` wrote, of as many prompts."""
    if folder is None or not (folder / FILM).exists():
        return [[] for _ in range(prompts)]
    with np.load(folder / FILM) as arrays:
        return [
            [Shot(*shot, Image.fromarray(arrays[f"{prompt}-{place}"])) for place, shot in enumerate(film)]
            for prompt, film in enumerate(json.loads(str(arrays["facts"])))
        ]


def _save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


def clear(folder: Path | None) -> None:
    """Removes a search that is finished and saved elsewhere."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _saved(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.isdigit())
