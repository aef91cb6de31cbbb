"""What is said of files that can't be read."""

import json
from pathlib import Path
from typing import Any

from ses_jax.convert.matching import ConversionError

POINTER = b"version https://git-lfs"


def damaged(file: str | Path, error: Exception) -> ConversionError:
    """The error for a file that a reader gave up on."""
    if is_pointer(file):
        return ConversionError(f"{file} is not the file itself but a pointer of Git LFS: `git lfs pull` fetches files")
    return ConversionError(f"{file} is truncated or corrupt: {(str(error) or repr(error)).splitlines()[0]}")


def is_pointer(file: str | Path) -> bool:
    """Whether a file is what Git leaves in the place of a large one that it did not fetch."""
    try:
        with open(file, "rb") as opened:
            return opened.read(len(POINTER)) == POINTER
    except OSError:
        return False


def json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object that lies somewhere in a file.

    Raises:
      ConversionError: naming the place, if it is none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConversionError(f"{where} is not a JSON object")
    return found
