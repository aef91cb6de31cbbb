"""The progress of a search on the terminal."""

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

Report = Callable[[int, int, float, float], None]


@contextlib.contextmanager
def progress_bar(title: str, budget: int, *, enabled: bool = True) -> Iterator[Report]:
    """A progress bar over `budget` candidates.

    Yields:
      `report(scored, generation, best_score, images_per_second)`, to be called after each generation.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, disable=not enabled) as bar:
        task = bar.add_task(title if len(title) <= 40 else title[:37] + "...", total=budget, status="compiling")

        def report(scored: int, generation: int, best: float, rate: float) -> None:
            status = f"generation {generation}  best {best:.4f}  {rate:.1f} images/s"
            bar.update(task, completed=scored, status=status)

        yield report
