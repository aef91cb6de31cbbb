"""What a search knew in the end, in a small file beside its result, so that a larger budget goes on from there.

    state.npz    what the search is; of its whole generations the state, all scores, and what was seen

A smaller budget is a prefix of a larger one but for a last generation that it did not fill: that one is made again.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ses_jax.engine import resume
from ses_jax.engine.files import write
from ses_jax.engine.program import Scored, State
from ses_jax.engine.watching import Shot

LOG = logging.getLogger("ses_jax")
STATE = "state.npz"
LARGEST = 2**25  # bytes a prompt: whole noises of a mixture take more than all the pictures do
PLAIN = "fiub"  # kinds of numbers that every reader of arrays knows


class Kept(NamedTuple):
    """Searches of P prompts after some whole generations.

    Attributes:
      generations: how many.
      leaves: of the `State`, `[P, ...]` each.
      scored: of their candidates, `[P, n, ...]`.
      films: each prompt's.
    """

    generations: int
    leaves: list[np.ndarray]
    scored: Scored
    films: list[list[Shot]]

    def of(self, prompt: int) -> "Kept":
        """That of one prompt."""
        leaves, scored = jax.tree.map(lambda x: x[prompt : prompt + 1], (self.leaves, self.scored))
        return Kept(self.generations, leaves, scored, [self.films[prompt]])


def make(last: tuple[int, State], population: int, scored: Scored, films: Sequence[Sequence[Shot]]) -> Kept | None:
    """What is kept of prompts.

    Args:
      last: how many whole generations there are, and the state after them.
      population: candidates of a generation.
      scored: of all candidates.
      films: each prompt's.

    Returns:
      None where there is nothing to go on from, or nothing that a small file can hold.
    """
    (generations, state), candidates = last, last[0] * population
    leaves = jax.tree.leaves(state)
    plain = all(isinstance(leaf.dtype, np.dtype) and leaf.dtype.kind in PLAIN for leaf in leaves)
    if not generations or not plain or sum(leaf.nbytes for leaf in leaves) > LARGEST * len(films):
        return None
    state = jax.tree.map(np.asarray, jax.device_get(state))
    if state.archive is not None:  # as far as it is filled
        state = state._replace(archive=jax.tree.map(lambda rows: rows[:, :candidates], state.archive))
    shots = [[shot for shot in film if shot.index < candidates] for film in films]
    scored = jax.tree.map(lambda column: np.asarray(column)[:, :candidates], scored)
    return Kept(generations, jax.tree.leaves(state), scored, shots)


def save(folder: Path, identity: Mapping[str, Any], kept: Kept | None) -> None:
    """Writes what is kept of one prompt; of None there is nothing to write.

    Raises:
      OSError: naming the file, if it can't be written.
    """
    if kept is None:
        return
    about = {"identity": identity, "generations": kept.generations, "leaves": len(kept.leaves)}
    arrays = {f"leaf-{place}": leaf for place, leaf in enumerate(kept.leaves)}
    arrays |= {name: column for name, column in kept.scored._asdict().items() if column is not None}
    arrays |= {"about": np.array(json.dumps(about))} | resume.film_arrays(kept.films)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / STATE, lambda path: resume.save_arrays(path, arrays, small=True))


def load(folders: Sequence[Path], identities: Sequence[Mapping[str, Any]]) -> Kept | None:
    """What is kept of prompts in the folders of their results.

    Args:
      folders: of the prompts.
      identities: what their searches are; a smaller budget than the one here is gone on from.

    Returns:
      None where that of a prompt is missing, damaged, or of another search.

    Raises:
      ValueError: where more is scored already than the budget allows.
    """
    found = [_load(folder / STATE, identity) for folder, identity in zip(folders, identities, strict=True)]
    same = len({one and (one.generations, len(one.leaves)) for one in found}) == 1
    if found[0] is None or not same:
        return None
    try:
        columns = zip(*((one.leaves, one.scored) for one in found), strict=True)
        leaves, scored = (jax.tree.map(lambda *x: np.concatenate(x), *column) for column in columns)
    except ValueError:  # of shapes that do not go together
        return None
    return Kept(found[0].generations, leaves, scored, [film for one in found for film in one.films])


def _load(file: Path, identity: Mapping[str, Any]) -> Kept | None:
    if not file.exists():
        return None
    try:
        saved, kept = _read(file)
    except Exception as error:  # readers of arrays raise anything for damaged files
        LOG.warning("%s is damaged (%s); the search begins anew", file, " ".join(str(error).split())[:200])
        return None
    if differing := resume.differing(saved, identity, free=("budget",)):
        LOG.warning("%s is of a search with other settings (%s); the search begins anew", file, differing)
        return None
    scored = kept.scored.components.shape[1]
    if scored > identity["budget"]:
        raise ValueError(
            f"{file.parent} holds a search of which {scored} candidates are scored, more than "
            f"budget={identity['budget']}; go on with a larger budget, or choose another folder"
        )
    return kept


def _read(file: Path) -> tuple[dict[str, Any], Kept]:
    with np.load(file, allow_pickle=False) as arrays:
        about = json.loads(str(arrays["about"]))
        leaves = [arrays[f"leaf-{place}"] for place in range(about["leaves"])]
        scored = Scored(**{name: arrays[name] for name in ("components", "low_rms", "looks") if name in arrays})
        films = resume.films_of(arrays)
        identity, generations = dict(about["identity"]), about["generations"]
    if not isinstance(generations, int) or generations < 1 or len(films) != 1 or scored.components.ndim != 3:
        raise ValueError("it is not the state of a search")
    return identity, Kept(generations, leaves, scored, films)


def begin(folder: Path | None, kept: Kept | None, initial: State) -> tuple[int, State, list[Scored], list[list[Shot]]]:
    """Where a search begins: where it was saved on its way, else at what is kept, else before the first generation.

    Args:
      folder: that it is saved to on its way; None saves nothing.
      kept: of a smaller budget.
      initial: the state before the first generation.

    Returns:
      How many generations are done, the state after them, what they scored, and what was seen.
    """
    prompts = jax.tree.leaves(initial)[0].shape[0]
    first, state, parts = resume.load(folder, initial)
    if first or kept is None:
        return first, state, parts, resume.load_films(folder, prompts, parts[0].components.shape[1] if parts else 0)
    try:
        leaves, scored = resume.checked(kept.leaves, kept.scored._asdict(), initial)
    except ValueError as error:
        LOG.warning("%s; the search begins anew", error)
        return 0, initial, [], [[] for _ in range(prompts)]
    return kept.generations, jax.tree.unflatten(jax.tree.structure(initial), leaves), [scored], kept.films
