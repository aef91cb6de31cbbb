"""Processes that tests start, forked from one that has the library imported, which takes as long as all the rest."""

import atexit
import itertools
import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import jax

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from kills import PRELOADED

NUMBERS = itertools.count()


class Started(NamedTuple):
    """A process, and where what it says goes, but for the suffix."""

    process: BaseProcess
    said: Path


def fork(out, target, arguments, environment=None):
    """Starts `target(arguments)`, whose value is the exit status, with variables set; the output goes beside `out`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    said = Path(f"{out}_{next(NUMBERS)}")
    process = context.Process(target=_forked, args=(str(said), target, arguments, environment or {}))
    process.start()
    return Started(process, said)


def _forked(said, target, arguments, environment):
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "error")):
        os.dup2(os.open(f"{said}.{name}", os.O_CREAT | os.O_WRONLY), stream.fileno())
    os.environ.update(environment)
    jax.config.update("jax_platforms", "cpu")
    status = target(arguments)
    atexit._run_exitfuncs()  # as a process does that is not forked
    sys.exit(status)


def finish(process, seconds=60):
    """Waits for a process.

    Returns:
      Its exit status, stdout and stderr.
    """
    process.process.join(seconds)
    return process.process.exitcode, *said_so_far(process.said)


def said_so_far(said):
    return tuple(Path(f"{said}.{name}").read_text() for name in ("out", "error"))
