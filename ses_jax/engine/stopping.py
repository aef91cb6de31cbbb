"""Signals that end a search early: the first after the generation at hand, a second one at once."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

# Handlers that are replaced; a program's own are left alone.
DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
TERMINATED = 128 + signal.SIGTERM
# Seconds between two looks at whether a program has run; signals are noticed in between.
POLL = 0.002
MESSAGE = b"\nses-jax: %s: stopping after the generation at hand; once more stops at once\n"


class Stop:
    """Whether the work at hand was asked to stop, and by which signal."""

    def __init__(self):
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def terminated(self) -> bool:
        """Whether it was SIGTERM, after which a program has to end."""
        return self.signal == signal.SIGTERM

    def leave(self) -> None:
        """Ends the program as the signal asks for: KeyboardInterrupt, or SystemExit with the status 143."""
        if self.terminated:
            raise SystemExit(TERMINATED)
        raise KeyboardInterrupt


@contextlib.contextmanager
def noticed() -> Iterator[Stop]:
    """Within it the first SIGINT or SIGTERM is only noted down, and the next does what it does by default.

    Only the main thread can do so, and a program's own handlers stay.

    Yields:
      What was noted.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    replaced = [number for number, default in DEFAULTS.items() if signal.getsignal(number) is default]

    def restore() -> None:
        while replaced:
            number = replaced.pop()
            signal.signal(number, DEFAULTS[number])

    def note(number: int, _: object) -> None:
        stop.signal = signal.Signals(number)
        restore()
        with contextlib.suppress(OSError):
            os.write(2, MESSAGE % stop.signal.name.encode())  # not through a buffer, which this may have interrupted

    for number in replaced:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()


def waited_for(tree: Any) -> Any:
    """Arrays, once they are there; unlike in JAX's own waiting, signals are noticed meanwhile."""
    while not all(leaf.is_ready() for leaf in jax.tree.leaves(tree)):
        time.sleep(POLL)
    return tree
