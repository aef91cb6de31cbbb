"""One process at a time in a folder: a lock that dies with its process."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def held(folder: Path | None, name: str = ".lock") -> Iterator[None]:
    """Holds a folder's lock; a file system without locks, or a folder of None, has none to hold.

    Raises:
      ValueError: if another process, or another thread of this one, holds it.
    """
    file = None if folder is None or fcntl is None else _locked(folder / name)
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                (folder / name).unlink()
            os.close(file)


def _locked(path: Path) -> int | None:
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None  # what is written next says what is wrong with the folder
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same(path, file):
                return file
        except OSError as error:
            os.close(file)
            if error.errno in HELD:
                raise ValueError(
                    f"{path.parent} is in use by another process; wait for it, or choose another"
                ) from None
            return None
        os.close(file)


def _same(path: Path, file: int) -> bool:
    """Whether the file that was locked is still the one of this name; who held it before may have removed it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
