"""A search's state on disk after every generation, so that a search that was killed goes on where it was.

    folder/search.json      what the search is
    folder/film.npz         what was seen of its generations
    folder/000012/          the state after 12 generations, and all scores so far (Orbax)

Everywhere a folder of None saves nothing.
"""

import errno
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from ses_jax.engine.files import brief, write
from ses_jax.engine.program import Scored, State
from ses_jax.engine.saved import read_json
from ses_jax.engine.watching import Shot
from ses_jax.loading import checkpoint

LOG = logging.getLogger("ses_jax")
IDENTITY, FILM = "search.json", "film.npz"
FOREIGN = "the saved state is that of another search"


class OtherSearchError(ValueError):
    """A folder holds another search than the one that is to go on."""


def begin(folder: Path | None, identity: Mapping[str, Any]) -> None:
    """Makes a folder ready for a search, or for going on with the same one.

    Raises:
      OtherSearchError: if it holds another search, naming what differs.
    """
    if folder is None:
        return
    file = folder / IDENTITY
    saved = _identity(file)
    changes = "" if saved is None else differing(saved, identity)
    if changes and not _drop_partial(folder, saved, identity):
        raise OtherSearchError(f"{folder} holds an unfinished search with other settings ({changes}); remove it first")
    folder.mkdir(parents=True, exist_ok=True)
    write(file, lambda path: path.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8"))


def differing(saved: Mapping[str, Any], wanted: Mapping[str, Any], *, free: Sequence[str] = ()) -> str:
    """In what two searches differ, in words; empty if in nothing but what is `free`."""
    wanted = json.loads(json.dumps(wanted))
    names = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    sides = ((name, repr(saved.get(name)), repr(wanted.get(name))) for name in names if name not in free)
    return brief(", ".join(f"{brief(name)} {brief(before)} -> {brief(now)}" for name, before, now in sides), 2000)


def _drop_partial(folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a search may go on because its budget is larger now and nothing else is.

    A generation that the smaller budget did not fill goes: it is made again.
    """
    before, after, population = saved.get("budget"), wanted.get("budget"), saved.get("population")
    numbers = all(isinstance(number, int) for number in (before, after, population))
    if not numbers or before >= after or differing(saved, wanted, free=("budget",)):
        return False
    for path in _saved(folder):
        if int(path.name) * population > before:
            shutil.rmtree(path)
    return True


def _identity(file: Path) -> dict[str, Any] | None:
    """What a saved search is; None where there is none, or one that nobody can go on with."""
    try:
        return read_json(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        LOG.warning("%s; the search begins anew", error)
        clear(file.parent)
        return None


def save(folder: Path | None, generations: int, state: State, parts: Sequence[Scored]) -> None:
    """Writes the state after so many generations with all their scores, then removes the one before.

    Raises:
      OSError: naming the folder, if it can't be written.
    """
    if folder is None:
        return
    scored = jax.tree.map(lambda *column: np.concatenate(column, axis=1), *parts)
    scored = {name: column for name, column in scored._asdict().items() if column is not None}
    tree = {"state": jax.tree.leaves(jax.device_get(state)), "scored": scored}
    path = folder / f"{generations:06d}"
    try:
        checkpoint.save(path, tree)
    except Exception as error:  # the writer raises anything for a full disk
        reason = " ".join(str(error).split())[:200]
        raise OSError(getattr(error, "errno", None) or errno.EIO, f"cannot write: {reason}", str(path)) from error
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
    try:
        tree = checkpoint.restore(saved[-1], checkpoint.metadata(saved[-1]))
        state, scored = _checked(tree, initial)
    except ValueError as error:
        LOG.warning("%s; the search begins anew", error)
        shutil.rmtree(saved[-1])
        return load(folder, initial)
    return int(saved[-1].name), jax.tree.unflatten(jax.tree.structure(initial), state), [scored]


def _checked(tree: Any, initial: State) -> tuple[list[np.ndarray], Scored]:
    """`checked` of a tree that was read."""
    try:
        return checked(tree["state"], tree["scored"], initial)
    except (KeyError, TypeError):
        raise ValueError(FOREIGN) from None


def checked(state: Any, scored: Any, initial: State) -> tuple[list[np.ndarray], Scored]:
    """The leaves of a state, and the scores by their names, that were read.

    Returns:
      Both; what a mixture knows of candidates has room for as many as `initial` has.

    Raises:
      ValueError: where they do not fit the state before the first generation.
    """
    leaves = jax.tree.leaves(initial)
    try:
        rooms = [None] * len(jax.tree.leaves(initial[:2])) + jax.tree.leaves(initial.archive)
        state = [_grown(np.asarray(x), room) for x, room in zip(state, rooms, strict=True)]
        scored = Scored(**{name: np.asarray(x) for name, x in scored.items() if x is not None})
        fits = [x.shape == y.shape and x.dtype == y.dtype for x, y in zip(state, leaves, strict=True)]
        prompts, candidates = scored.components.shape[:2]
        columns = jax.tree.leaves(scored)
        fits += [x.shape[:2] == (prompts, candidates) and x.dtype == np.float32 for x in columns]
        if all(fits) and (prompts, candidates > 0) == (leaves[0].shape[0], True):
            return state, scored
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        pass
    raise ValueError(FOREIGN)


def _grown(rows: np.ndarray, room: Any) -> np.ndarray:
    """Rows `[P, n, ...]` at the beginning of a room `[P, m, ...]` for more of them."""
    if room is None or rows.shape[1] >= room.shape[1]:
        return rows
    grown = np.array(room)
    grown[:, : rows.shape[1]] = rows
    return grown


def save_films(folder: Path | None, films: Sequence[Sequence[Shot]]) -> None:
    """Writes what was seen of the generations so far."""
    if folder is None or not any(films):
        return
    write(folder / FILM, lambda path: save_arrays(path, film_arrays(films)))


def film_arrays(films: Sequence[Sequence[Shot]]) -> dict[str, np.ndarray]:
    """Films as arrays by name."""
    facts = [[[shot.generation, shot.index, shot.best] for shot in film] for film in films]
    images = {
        f"{prompt}-{place}": np.asarray(shot.image)
        for prompt, film in enumerate(films)
        for place, shot in enumerate(film)
    }
    return images | {"facts": np.array(json.dumps(facts))}


def load_films(folder: Path | None, prompts: int, candidates: int) -> list[list[Shot]]:
    """What `save_films` wrote, of as many prompts and of their first candidates; empty where that is damaged."""
    if folder is None or not (folder / FILM).exists():
        return [[] for _ in range(prompts)]
    try:
        films = _read_films(folder / FILM)
        if len(films) != prompts:
            raise ValueError(f"it is of {len(films)} prompts")
    except Exception as error:  # readers of arrays raise anything for damaged files
        LOG.warning("%s is damaged (%s); the report goes without", folder / FILM, " ".join(str(error).split())[:200])
        return [[] for _ in range(prompts)]
    # A search that was killed between film and state makes its last generation once more.
    return [[shot for shot in film if 0 <= shot.index < candidates] for film in films]


def _read_films(file: Path) -> list[list[Shot]]:
    with np.load(file, allow_pickle=False) as arrays:
        return films_of(arrays)


def films_of(arrays: Mapping[str, np.ndarray]) -> list[list[Shot]]:
    """What `film_arrays` made arrays of; raises anything where they are damaged."""
    return [
        [
            Shot(int(generation), int(index), bool(best), Image.fromarray(arrays[f"{prompt}-{place}"]))
            for place, (generation, index, best) in enumerate(film)
        ]
        for prompt, film in enumerate(json.loads(str(arrays["facts"])))
    ]


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], *, small: bool = False) -> None:
    """An `.npz` file, whatever the ending of the path; `small` compresses it."""
    with path.open("wb") as file:
        (np.savez_compressed if small else np.savez)(file, **arrays)


def clear(folder: Path | None) -> None:
    """Removes a search that is finished and saved elsewhere."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _saved(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.isascii() and path.name.isdecimal() and path.is_dir())
