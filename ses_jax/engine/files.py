"""Files that appear whole or not at all."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


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


def save_array(path: Path, array: np.ndarray) -> None:
    """A `.npy` file, whatever the ending of the path."""
    with path.open("wb") as file:
        np.save(file, array)
