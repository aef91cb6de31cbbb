"""Files that appear whole or not at all."""

import contextlib
import errno
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path whose `~` is the home folder; what no user has as a home stays."""
    return Path(os.path.expanduser(path))


def writable_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder, which exists and can be written afterwards.

    Raises:
      ValueError: if not.
    """
    if not str(folder):
        raise ValueError("the output folder has no name; '.' is the current one")
    folder = expanded(folder)
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


def save_array(path: Path, array: np.ndarray) -> None:
    """A `.npy` file, whatever the ending of the path."""
    with path.open("wb") as file:
        np.save(file, array)


def brief(text: str, longest: int = 200) -> str:
    """For an error: what a damaged file says may be of any length."""
    return text if len(text) <= longest else f"{text[:longest]}..."
