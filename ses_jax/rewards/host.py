"""Calls of users' functions on the host: what they get, what they may return, and judges that are slow or fail."""

import contextlib
import contextvars
import inspect
import logging
import math
import numbers
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

LOG = logging.getLogger("ses_jax")
ORIGIN = "raised by the reward"
EXPECTED = "one number an image, as a list, an array or a tensor"

_NOTES: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("notes", default=None)


class Calls(NamedTuple):
    """How a function is called.

    Attributes:
      workers: calls at once; each gets its share of the images. The function must then be safe to call from threads.
      timeout: seconds a call may take; None is any. A call that takes longer counts as failed and is left behind.
      retries: how often a call that failed is made again.
    """

    workers: int = 1
    timeout: float | None = None
    retries: int = 0

    def check(self) -> "Calls":
        """These calls; raises ValueError naming what is wrong."""
        for name, least in (("workers", 1), ("retries", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number, at least {least}")
        timeout = self.timeout
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, numbers.Real)):
            raise ValueError(f"timeout={timeout!r} must be a number of seconds")
        if timeout is not None and not 0 < timeout < threading.TIMEOUT_MAX:
            raise ValueError(f"timeout={timeout!r} must be more than 0 seconds")
        return self


PLAIN = Calls()


@contextlib.contextmanager
def noting() -> Iterator[list[str]]:
    """Yields the list of the calls that failed and were made again in this thread meanwhile."""
    notes: list[str] = []
    token = _NOTES.set(notes)
    try:
        yield notes
    finally:
        _NOTES.reset(token)


@contextlib.contextmanager
def raised_by(name: str) -> Iterator[None]:
    """Errors within say that they came from this reward, and are what they were otherwise."""
    try:
        yield
    except Exception as error:
        if origin(error) is None:
            error.add_note(f"{ORIGIN} {name!r}")
        raise


def origin(error: BaseException) -> str | None:
    """What an error says of the reward that it came from; None if it did not come from one."""
    return next((note for note in getattr(error, "__notes__", ()) if note.startswith(ORIGIN)), None)


def scores(
    name: str, function: Callable[..., Any], calls: Calls, images: Any, prompts: Sequence[str]
) -> Float[np.ndarray, " b"]:
    """Scores of images by a function.

    Args:
      name: of the reward, for messages.
      function: `(images, prompts) -> [B]`; the images are float32 NumPy arrays of its own.
      calls: how it is called.
      images: `[B, H, W, 3]` in [0, 1].
      prompts: B of them.

    Raises:
      ValueError: for anything but one number an image. What the function raises comes through, with a note.
    """
    images, prompts = np.array(images, np.float32), list(prompts)
    pieces = [places for places in np.array_split(np.arange(len(prompts)), calls.workers) if len(places)]
    found: dict[int, np.ndarray] = {}
    for attempt in range(calls.retries + 1):
        waiting = [i for i in range(len(pieces)) if i not in found]
        starts = {i: _start(function, calls, images[pieces[i]], [prompts[k] for k in pieces[i]]) for i in waiting}
        for i, outcome in starts.items():
            try:
                with raised_by(name):
                    value = outcome()
            except Exception as error:
                if attempt == calls.retries:
                    raise
                _note(f"reward {name!r}, attempt {attempt + 1} of {calls.retries + 1}: {type(error).__name__}: {error}")
            else:
                found[i] = as_scores(name, value, len(pieces[i]))
    return np.concatenate([found[i] for i in range(len(pieces))]) if pieces else np.zeros(0, np.float32)


def as_scores(name: str, value: Any, count: int) -> Float[np.ndarray, " b"]:
    """What a function returned for `count` images as float32 `[count]`; raises ValueError saying what is expected."""
    if value is None:
        raise ValueError(f"reward {name!r} returned None; expected {EXPECTED}")
    if inspect.isawaitable(value):
        if inspect.iscoroutine(value):
            value.close()
        raise ValueError(f"reward {name!r} is asynchronous; return asyncio.run(...) of it: expected {EXPECTED}")
    try:
        array = _array(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # torch raises the last
        array = None
    if array is None or array.dtype.kind not in "fiub":
        raise ValueError(f"reward {name!r} returned a {type(value).__name__} of something else; expected {EXPECTED}")
    array = array.astype(np.float32)
    if array.shape != (count,) and not (array.shape == () and count == 1):
        raise ValueError(f"reward {name!r} returned shape {array.shape} for {count} images; expected {EXPECTED}")
    return array.reshape(count)


def _array(value: Any) -> np.ndarray:
    """Arrays and tensors of any library on any device, numbers, and sequences of these."""
    if hasattr(value, "detach"):  # torch's
        return value.detach().cpu().float().numpy()
    if isinstance(value, str | bytes | Mapping):
        raise TypeError
    if isinstance(value, np.ndarray | numbers.Number) or hasattr(value, "__array__"):
        array = np.asarray(value)
        return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
    return np.array([_array(item) for item in value])


def _start(function: Callable[..., Any], calls: Calls, images: np.ndarray, prompts: list[str]) -> Callable[[], Any]:
    """Begins a call, in a thread of its own where something is to be done meanwhile; gives what waits for its value."""
    if calls.workers == 1 and calls.timeout is None:
        return lambda: function(images, prompts)
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(images, prompts))
        except BaseException as error:
            future.set_exception(error)

    # Not a pool: it would wait at the program's end for calls that were left behind.
    threading.Thread(target=run, daemon=True).start()
    deadline = math.inf if calls.timeout is None else time.monotonic() + calls.timeout

    def outcome() -> Any:
        left = None if calls.timeout is None else max(deadline - time.monotonic(), 0)
        try:
            return future.result(left)
        except TimeoutError:
            if future.done():
                raise  # its own
            raise TimeoutError(f"no score after {calls.timeout:g} s") from None

    return outcome


def _note(text: str) -> None:
    LOG.warning("%s", text)
    notes = _NOTES.get()
    if notes is not None:
        notes.append(text)
