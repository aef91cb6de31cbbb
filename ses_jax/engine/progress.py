"""The progress of a search: a bar on a terminal, a line that changes in a notebook, a line a generation in logs."""

import contextlib
import datetime
import html
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# Columns that a terminal has for everything there is to show.
WIDE = 80


class Work(NamedTuple):
    """What a search has before it.

    Attributes:
      title: the prompt, or what stands for several.
      budget: candidates of all prompts.
      generations: how many.
      finals: what the final renders take, in generations.
    """

    title: str
    budget: int
    generations: int
    finals: float = 0.0


class Step(NamedTuple):
    """A generation that is done.

    Attributes:
      generation: from 0.
      scored: candidates so far.
      best: score so far.
      rate: images per second.
      left: seconds that the rest takes, final renders and their compilation included.
      rough: whether that is no more than a bound, before the time of compilation is known.
    """

    generation: int
    scored: int
    best: float
    rate: float
    left: float
    rough: bool = False

    def __str__(self) -> str:
        return f"best {self.best:.4f}  {self.rate:.1f} images/s"

    @property
    def remaining(self) -> str:
        """How long it still takes, for people."""
        return f"{'at most' if self.rough else 'about'} {_clock(self.left)} left"


Report = Callable[[Step], None]


def seconds_left(durations: Sequence[float], generations: int, finals: float) -> float:
    """What is left of a search, from the seconds of its generations so far, `generations` in all.

    The first one compiles, and so does the final render, of the same networks: what the first took longer is expected
    once more. With only the first done, the others are expected to take as long.
    """
    latest = durations[-1]
    compilation = max(0.0, durations[0] - latest)
    return (generations - len(durations) + finals) * latest + (compilation if finals else 0.0)


@contextlib.contextmanager
def progress_bar(work: Work, *, enabled: bool = True) -> Iterator[Report]:
    """Shows how far a search is, on stderr.

    Yields:
      A function to be called after each generation.
    """
    console = Console(stderr=True)
    if not enabled:
        yield lambda step: None
    elif notebook := _notebook():
        yield _redrawn(work, notebook)
    elif not console.is_terminal:
        yield _lines(work)
    else:
        with _bar(work, console) as report:
            yield report


@contextlib.contextmanager
def waiting(what: str, *, enabled: bool = True) -> Iterator[None]:
    """Says on a terminal what takes its time, and takes that away again; elsewhere nothing."""
    console = Console(stderr=True)
    if enabled and console.is_terminal and _notebook() is None:
        with console.status(escape(what)):
            yield
    else:
        yield


@contextlib.contextmanager
def _bar(work: Work, console: Console) -> Iterator[Report]:
    """A bar under a line with the prompt, which may be long."""
    console.print(work.title, markup=False, highlight=False)
    wide = console.width >= WIDE
    status, left = TextColumn("{task.fields[status]}"), TextColumn("{task.fields[left]}")
    columns = (MofNCompleteColumn(), status, left)
    columns = (BarColumn(bar_width=None), *columns[:2], TimeElapsedColumn(), left) if wide else columns
    with Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task("", total=work.budget, status="compiling", left="")

        def report(step: Step) -> None:
            status = str(step) if wide else f"best {step.best:.4f}"
            bar.update(task, completed=step.scored, status=status, left=step.remaining)

        yield report


def _lines(work: Work) -> Report:
    """A line a generation, without any control character."""
    start = time.monotonic()
    print(f"{' '.join(work.title.split())}: {work.budget} candidates; compiling", file=sys.stderr, flush=True)

    def report(step: Step) -> None:
        print(_line(work, step, start), file=sys.stderr, flush=True)

    return report


def _line(work: Work, step: Step, start: float) -> str:
    done = f"generation {step.generation + 1}/{work.generations}  {step.scored}/{work.budget} candidates"
    return f"{done}  {step}  {_clock(time.monotonic() - start)} elapsed, {step.remaining}"


def _redrawn(work: Work, display: Callable[..., Any]) -> Report:
    """One place of a notebook's output that each generation replaces."""
    start, title = time.monotonic(), html.escape(work.title)
    shown = display(_Html(f"{title}<br>{work.budget} candidates; compiling"), display_id=True)

    def report(step: Step) -> None:
        bar = f'<progress max="{work.budget}" value="{step.scored}" style="width:20em"></progress>'
        shown.update(_Html(f"{title}<br>{bar} {_line(work, step, start)}"))

    return report


class _Html(NamedTuple):
    """What notebooks show as HTML."""

    text: str

    def _repr_html_(self) -> str:
        return self.text


def _notebook() -> Callable[..., Any] | None:
    """The function that shows things in a notebook; None where this is none."""
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython
    from IPython.display import display

    return display if type(get_ipython()).__name__ == "ZMQInteractiveShell" else None


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
