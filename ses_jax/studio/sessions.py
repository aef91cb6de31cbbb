"""A search in a thread of its own, which tells of every generation and can be stopped; nothing here knows of a page."""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ses_jax.engine.result import SearchResult
from ses_jax.engine.search import search

Search = Callable[..., SearchResult]


class Update(NamedTuple):
    """A generation that is done.

    Attributes:
      generation: from 0.
      image: the best preview so far.
      best: the best score of the generation.
    """

    generation: int
    image: Image.Image
    best: float


def run(
    prompt: str, settings: Mapping[str, Any], out: Path, stop: threading.Event, *, find: Search = search
) -> Iterator[Update | SearchResult]:
    """A search's updates, and at last its result, which is also saved.

    Args:
      prompt: what to search for.
      settings: of `search`.
      out: folder of the result.
      stop: ends the search after the generation at hand, with the best so far; set where nobody listens any more.
      find: the search.

    Raises:
      Exception: what the search raises.
    """
    told: queue.Queue = queue.Queue()

    def watch(generation, image, scores):
        finite = [score for score in scores if score == score]  # NaN is not
        told.put(Update(generation, image, max(finite, default=float("nan"))))
        return stop.is_set()

    def work():
        try:
            told.put(find(prompt, out=out, on_generation=watch, progress=False, **settings))
        except BaseException as error:  # also of a thread that is asked to exit: the page must not wait for ever
            told.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            news = told.get()
            if isinstance(news, BaseException):
                raise news
            yield news
            if not isinstance(news, Update):
                return
    finally:
        stop.set()


def in_turn(find: Search) -> Search:
    """The search, which waits until an earlier one is over, also one whose page was closed."""
    turn = threading.Lock()

    def found(*args: Any, **settings: Any) -> SearchResult:
        with turn:
            return find(*args, **settings)

    return found


def settings_of(model: str, reward: str, budget: int | float, seed: int | float) -> dict[str, Any]:
    """What the fields of the page mean; an empty reward is the model's own.

    Raises:
      ValueError: for weights that are no numbers.
    """
    named = {"model": model.strip() or "demo", "budget": int(budget), "seed": int(seed)}
    if not reward.strip():
        return named
    if "=" not in reward:
        return named | {"reward": reward.strip()}
    try:
        pairs = [part.split("=") for part in reward.split(",")]
        return named | {"reward": {name.strip(): float(weight) for name, weight in pairs}}
    except ValueError:
        raise ValueError(f"{reward!r} is neither a reward nor a mixture such as pick=1,hps=0.5") from None
