"""Options that stand for others, before the command line is read."""

from collections.abc import Sequence

from ses_jax.engine import repeat

QUIET, VERBOSE = ("-q", "--quiet"), ("-v", "--verbose")


def expand(words: Sequence[str]) -> tuple[list[str], bool]:
    """The words that are read, and whether the user wants to see all that is said.

    `-q` is `--no-progress`; `--like FILE` is preceded by the settings of that file.

    Raises:
      ValueError: see `repeat.expand`.
    """
    verbose = any(word in VERBOSE for word in words)
    words = ["--no-progress" if word in QUIET else word for word in words if word not in VERBOSE]
    return repeat.expand(words), verbose
