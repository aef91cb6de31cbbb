"""The folder that searches are saved to: what may be there already, what comes back from it, what goes.

OUT/best.png ... result.json    the result of one prompt
OUT/state.npz                   what a larger budget goes on from (`kept.py`)
OUT/preview.png                 the winner, with noise and history, until its image is there
OUT/candidates/                 previews and noise of all candidates, where they are wanted
OUT/000/, OUT/001/, ...         those of a list
OUT/unfinished/                 the same three, of a search that was to replace a result
OUT/.search/                    unfinished searches (`resume.py`)
"""

import contextlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ses_jax.engine import kept, repeat
from ses_jax.engine import resume as saved_search
from ses_jax.engine.files import brief, expanded, writable_folder
from ses_jax.engine.kept import Kept
from ses_jax.engine.placement import check_path
from ses_jax.engine.result import FILES, SearchResult, save_search
from ses_jax.engine.saved import read_json
from ses_jax.engine.watching import CANDIDATES

STATE, UNFINISHED = ".search", "unfinished"
BATCH = "run.json"
# What may differ between a result and the call that asks for it again.
FREE = ("chunk",)
# What a result says only where there is something to say.
NONE = {"base_noise": None, "load": {}} | dict.fromkeys(repeat.CHANGES)


class Output(NamedTuple):
    """Where the results of a call go.

    Attributes:
      folder: None saves nothing.
      listed: whether it is a list's, a subfolder a prompt.
      resume: whether what is there already is gone on from.
    """

    folder: Path | None
    listed: bool
    resume: bool

    def of(self, index: int) -> Path | None:
        """The folder of a prompt."""
        return self.folder / f"{index:03d}" if self.folder and self.listed else self.folder

    def state(self, start: int) -> Path | None:
        """Where the search of the prompts from `start` on is saved on its way, or where it is ended early."""
        return self.folder / STATE / f"{start:06d}" if self.folder else None

    def groups(self, count: int, at_once: int) -> list[range]:
        """Which of `count` prompts are searched at once; what is unfinished goes on with those that it began with."""
        groups, start, begun = [], 0, self._begun_at_once()
        while start < count:
            stop = min(count, start + begun.get(start, at_once), *(place for place in begun if place > start))
            groups.append(range(start, stop))
            start = stop
        return groups

    def _begun_at_once(self) -> dict[int, int]:
        """How many prompts the unfinished searches that are gone on from have, by the place of their first."""
        found = {}
        for folder in (self.folder / STATE).glob("[0-9]*") if self.folder and self.resume else ():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # there is none, or it is damaged
                found[int(folder.name)] = max(1, len(read_json(folder / saved_search.IDENTITY)["prompts"]))
        return found

    def finished(self, indices: Sequence[int], wanted: Sequence[Mapping[str, Any]]) -> list[SearchResult] | None:
        """The finished results of prompts, if all of them are there.

        Args:
          indices: of the prompts.
          wanted: of each, what its result must say of prompt and settings.

        Returns:
          None where one is not there, was interrupted, or had a smaller budget.

        Raises:
          ValueError: for the result of something else, naming what differs, or of a larger budget.
        """
        if self.folder is None or not self.resume:
            return None
        replaced = (self.state(indices[0]) / saved_search.IDENTITY).exists()
        found = [self._finished(index, facts, replaced) for index, facts in zip(indices, wanted, strict=True)]
        return None if None in found else found

    def _finished(self, index: int, wanted: Mapping[str, Any], replaced: bool) -> SearchResult | None:
        """The result of a prompt; `replaced` is whether there is an unfinished search that was to replace it."""
        try:
            result = SearchResult.load(self.of(index))
        except (OSError, ValueError):
            return None  # not there, or damaged: it is made again
        if result.interrupted:
            return None
        had, wanted = _comparable(result.config | {"prompt": result.prompt}), _comparable(wanted)
        differing = [name for name, value in wanted.items() if had.get(name, value) != value]
        if differing and replaced:
            return None
        if differing == ["budget"]:
            return _of_larger(self.of(index), had["budget"], wanted["budget"])
        if differing:
            changes = ", ".join(f"{name} {brief(repr(had[name]))} -> {brief(repr(wanted[name]))}" for name in differing)
            raise ValueError(
                f"{self.of(index)} holds a finished search with other settings ({changes}); choose another folder, or "
                "overwrite it with overwrite=True (--overwrite)"
            )
        return result

    def begun(self, indices: Sequence[int], identities: Sequence[Mapping[str, Any]]) -> Kept | None:
        """What the searches of prompts go on from, whose results are there with a smaller budget.

        Raises:
          ValueError: where more is scored already than the budget allows.
        """
        return kept.load([self.of(index) for index in indices], identities) if self.folder and self.resume else None

    def keep(self, index: int, *found: Any) -> Path:
        """Saves what a search found before its images are rendered, beside a result that it is to replace.

        Args:
          index: of the prompt.
          found: noise, history and preview of its winner, as `save_search` takes them.

        Returns:
          The folder that they are in; what else is in it when the result is saved stays with that.
        """
        folder = self.of(index)
        replaces = (folder / FILES[-1]).exists()
        folder = writable_folder(folder / UNFINISHED if replaces else folder)
        if replaces or not self.resume:  # another search's, and this one may keep none
            (folder / kept.STATE).unlink(missing_ok=True)
        save_search(folder, *found)
        return folder

    def clear_candidates(self, indices: Sequence[int]) -> None:
        """Removes the candidates of earlier searches of prompts, unless those may be gone on from."""
        if not self.resume:
            for index in indices:
                _remove_candidates(self.of(index))

    def save(self, results: Sequence[SearchResult], indices: Sequence[int], **how: Any) -> None:
        """Saves the results of prompts that were searched at once, and only then forgets the state they came from.

        Args:
          results: of the prompts.
          indices: of the prompts.
          how: as for `SearchResult.save`.
        """
        for result, index in zip(results, indices, strict=True):
            folder = result.save(self.of(index), **how)
            if (folder / UNFINISHED).is_dir() and not self.resume:
                (folder / kept.STATE).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.replace(folder / UNFINISHED / kept.STATE, folder / kept.STATE)
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        if not results[0].interrupted:
            self.forget(indices[0])

    def forget(self, start: int) -> None:
        """Removes the saved search of finished prompts."""
        saved_search.clear(self.state(start))
        if self.folder:
            with contextlib.suppress(OSError):  # there is none, or more in it
                (self.folder / STATE).rmdir()

    def clean(self, count: int) -> None:
        """Removes what an overwritten result of another shape left beside the new one."""
        if self.folder is None or self.resume:
            return
        shutil.rmtree(self.folder / STATE, ignore_errors=True)
        stale = [self.folder] if self.listed else []
        stale += [path for path in _numbered(self.folder) if not self.listed or int(path.name) >= count]
        for folder in stale:
            for name in (*FILES, kept.STATE):
                (folder / name).unlink(missing_ok=True)
            _remove_candidates(folder)
            if folder != self.folder and not any(folder.iterdir()):
                folder.rmdir()


def claim(out: Any, *, listed: bool, resume: bool, overwrite: Any) -> Output:
    """The output of a call, once it is clear that nothing is lost by it.

    Args:
      out: the folder; None saves nothing.
      listed: whether the results are those of a list.
      resume, overwrite: as for `search`.

    Raises:
      ValueError: for a folder that can't be written, that holds a batch run, or a result that is neither to be
        overwritten nor gone on from.
    """
    if not isinstance(overwrite, bool):
        raise ValueError(f"overwrite={overwrite!r} is not true or false")
    if resume and out is None:
        raise ValueError("resume needs out=, the folder that the search is saved in")
    if resume and overwrite:
        raise ValueError("resume goes on with what is in the folder, and overwrite begins anew; give one of them")
    if out is None:
        return Output(None, listed, False)
    folder = writable_folder(check_path(out, "out"))
    if (folder / BATCH).exists():
        raise ValueError(f"{folder} holds a batch run; choose another folder for a search")
    held = None if overwrite else _held(folder, other=listed if resume else None)
    if held is not None:
        remedy = "" if resume else " go on from it with resume=True (--resume),"
        raise ValueError(
            f"{folder} holds {held} already; choose another folder,{remedy} or replace it with overwrite=True "
            "(--overwrite)"
        )
    return Output(folder, listed, resume)


def run_folder(out: str | os.PathLike[str]) -> Path:
    """The folder of a batch run; raises ValueError for what is no path."""
    if not os.fspath(check_path(out, "out")):
        raise ValueError("out has no name; '.' is the current folder")
    return expanded(out)


def _held(folder: Path, other: bool | None) -> str | None:
    """What is in a folder that a search would replace; of the other shape only, where the shape is given."""
    single = next((name for name in FILES if (folder / name).exists()), None)
    many = next((path.name for path in _numbered(folder) if any((path / name).exists() for name in FILES)), None)
    if other is None and (folder / STATE).is_dir() and any((folder / STATE).iterdir()):
        return "an unfinished search"
    if single and other is not False:
        return f"a result ({single})"
    return f"the results of a list ({many})" if many and other is not True else None


def _of_larger(folder: Path, had: Any, wanted: int) -> None:
    """Raises ValueError unless the budget of a finished search is smaller than the one that is wanted."""
    if not isinstance(had, int) or had > wanted:
        raise ValueError(
            f"{folder} holds a finished search of budget={had}, now budget={wanted}; go on with a larger budget, or "
            "choose another folder for a smaller one, which is its beginning"
        )


def _comparable(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a result says of its settings, in a form that is equal where its images are."""
    facts = NONE | {name: value for name, value in facts.items() if name not in FREE}
    noise = facts["base_noise"]
    return facts | {"base_noise": noise["sha256"] if isinstance(noise, Mapping) else noise}


def _remove_candidates(folder: Path) -> None:
    """Removes what `watching.save_candidates` wrote, and nothing of the user's."""
    candidates = folder / CANDIDATES
    for path in candidates.iterdir() if candidates.is_dir() else ():
        if re.fullmatch(r"\d{5,}\.(png|npy)", path.name):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        candidates.rmdir()


def _numbered(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"\d{3,}", path.name) and path.is_dir())
