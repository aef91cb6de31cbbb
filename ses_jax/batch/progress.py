"""The progress of a run over many prompts on the terminal or in a log, and its summary."""

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

Report = Callable[[str, bool], None]

# Seconds between two lines where there is no terminal to draw a bar on.
LINE_EVERY = 30.0


@contextlib.contextmanager
def batch_progress(total: int, *, enabled: bool = True) -> Iterator[Report]:
    """The progress of a run over `total` prompts: a bar with the time that is left, or a line now and then in a log.

    Yields:
      `report(what, failed)`, to be called after each prompt.
    """
    console = Console()
    if enabled and not console.is_terminal:
        yield _batch_lines(total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not enabled, speed_estimate_period=3600) as bar:
        task = bar.add_task("prompts", total=total, status="loading")
        failures = 0

        def report(what: str, failed: bool) -> None:
            nonlocal failures
            failures += failed
            bar.update(task, advance=1, status=(f"{failures} failed  " if failures else "") + what)

        yield report


def _batch_lines(total: int) -> Report:
    """Prints the first and the last prompt, and one every `LINE_EVERY` seconds; failures always."""
    start = printed = time.monotonic()
    done = failures = 0

    def report(what: str, failed: bool) -> None:
        nonlocal printed, done, failures
        done, failures = done + 1, failures + failed
        now = time.monotonic()
        if failed or done in (1, total) or now - printed >= LINE_EVERY:
            printed = now
            elapsed, left = ((now - start) * share for share in (1, (total - done) / done))
            times = " in ".join((f"{done}/{total} prompts", _seconds(elapsed)))
            print(f"{times}, {_seconds(left)} left, {failures} failed: {what}", flush=True)

    return report


def _seconds(value: float) -> str:
    return str(datetime.timedelta(seconds=round(value)))


def print_summary(summary: Mapping[str, Any]) -> None:
    """Prints what `summary.json` of a run holds, as a table."""
    table = Table("mean score", "unsearched", "searched", "gain")
    for title, scores in {"reward": summary["scores"], **summary["components"]}.items():
        for kind, columns in scores.items():
            table.add_row(f"{title}, {kind}", *(_with_error(columns[name]) for name in ("baseline", "search", "gain")))
    counts = ", ".join(f"{summary[name]} {name}" for name in ("finished", "failed", "unfinished"))
    rate = summary["images_per_second"]
    console = Console()
    console.print(table)
    console.print(f"{summary['prompts']} prompts: {counts}" + (f"; {rate:.2f} images/s" if rate else ""))


def _with_error(value: Mapping[str, float | None]) -> str:
    mean, error = value["mean"], value["standard_error"]
    return "-" if mean is None else f"{mean:.4f}" + ("" if error is None else f" ± {error:.4f}")
