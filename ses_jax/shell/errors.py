"""What the shell says of errors: one line of what its user can mend, a traceback of what users' own code raised."""

import logging
import sys
import traceback
from typing import Any

from ses_jax.rewards.host import origin

# What threads that still read a damaged file say to the loop that has ended with the first error.
LATE = "Event loop is closed"


def tell(error: Exception, verbose: bool) -> int:
    """Says on stderr what went wrong, and returns the exit status."""
    where = origin(error)
    text = " ".join(str(error).split())
    if verbose or where is not None:
        traceback.print_exception(error)
    if where is not None:
        text = f"{where}: {type(error).__name__}: {text}"
    print(f"ses-jax: {text}", file=sys.stderr)
    return 2 if where is None else 1


def only_once() -> None:
    """For a process of the shell's own: an error that is told is not told again by the threads of the same reader."""
    sys.unraisablehook = _unraisable
    logging.getLogger("asyncio").addFilter(_told_already)


def print_anything() -> None:
    """For a process of the shell's own: a letter that a pipe's encoding lacks is a "?", and no error after the work."""
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def _unraisable(error: Any) -> None:
    if str(error.exc_value) != LATE:
        sys.__unraisablehook__(error)


def _told_already(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()
