"""Lines as SVG: as wide as there is room, in the colours of the page around them."""

import html
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 22, 30
# Light and dark; lines take them in this order.
COLORS = (("#c2410c", "#fb923c"), ("#475569", "#94a3b8"), ("#0f766e", "#2dd4bf"), ("#7e22ce", "#c084fc"))
_ENTRIES = list(enumerate(COLORS))
STYLE = (
    ".chart{font:10px system-ui,sans-serif;width:100%;max-width:560px;height:auto}"
    ".chart text{fill:#475569}.chart .axis{stroke:#cbd5e1;stroke-width:.7}.chart path{fill:none;stroke-width:1.8}"
    ".chart .generation{stroke:#e2e8f0;stroke-width:.7;stroke-dasharray:2 2}"
    + "".join(f".chart .line{i}{{stroke:{light}}}.chart .name{i}{{fill:{light}}}" for i, (light, _) in _ENTRIES)
    + "@media(prefers-color-scheme:dark){.chart text{fill:#cbd5e1}.chart .axis{stroke:#475569}"
    + ".chart .generation{stroke:#334155}"
    + "".join(f".chart .line{i}{{stroke:{dark}}}.chart .name{i}{{fill:{dark}}}" for i, (_, dark) in _ENTRIES)
    + "}"
)

Points = Sequence[tuple[float, float]]


class Line(NamedTuple):
    """A line of a chart: its name, and `(x, y)` from left to right."""

    name: str
    points: Points


class Svg(NamedTuple):
    """A picture that notebooks show."""

    text: str

    def _repr_svg_(self) -> str:
        return self.text

    def save(self, path: str | Path) -> None:
        """Writes the file."""
        Path(os.path.expanduser(path)).write_text(self.text, encoding="utf-8")


class Box(NamedTuple):
    """What a chart shows: the ranges of its axes."""

    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, x: float) -> float:
        """Where a value lies on the page."""
        return LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def down(self, y: float) -> float:
        """Where a value lies on the page."""
        return HEIGHT - BOTTOM - (y - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)


def chart(lines: Sequence[Line], *, below: str, marks: Sequence[float] = (), standalone: bool = False) -> Svg:
    """Lines over one axis.

    Args:
      lines: those without points are left out; four at most have colours of their own.
      below: what the axis below counts.
      marks: where generations begin.
      standalone: whether the colours come with the picture and not with a page around it.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return Svg("")
    box = _box([point for line in lines for point in line.points])
    names = [_name(i, line.name, len(lines)) for i, line in enumerate(lines)]
    parts = [*(_mark(box, x) for x in marks), _axes(box, below), *names]
    parts += [_path(box, i, line.points) for i, line in enumerate(lines)]
    style = f"<style>{STYLE}</style>" if standalone else ""
    label = html.escape(", ".join(line.name for line in lines), quote=True)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
    return Svg(f'{head} aria-label="{label}">{style}{"".join(parts)}</svg>')


def _box(points: Points) -> Box:
    def span(values):
        low, high = min(values), max(values)
        room = (high - low) * 0.06 or max(abs(high) * 0.05, 1e-3)
        return low - room, high + room

    xs = [x for x, _ in points]
    return Box((min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1), span([y for _, y in points]))


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers in a range, about so many."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _axes(box: Box, below: str) -> str:
    parts = []
    for y in ticks(*box.y, 4):
        parts.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{box.down(y):.1f}" y2="{box.down(y):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 4}" y="{box.down(y) + 3:.1f}" text-anchor="end">{y:.6g}</text>')
    for x in (x for x in ticks(*box.x, 5) if x == int(x)):
        parts.append(f'<text x="{box.across(x):.1f}" y="{HEIGHT - BOTTOM + 12}" text-anchor="middle">{x:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    return "".join(parts) + f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{html.escape(below)}</text>'


def _mark(box: Box, x: float) -> str:
    at = box.across(x)
    return f'<line class="generation" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'


def _name(place: int, name: str, count: int) -> str:
    room = (WIDTH - LEFT - RIGHT) / count
    letters = int(room / 5.2)  # of a width that most letters don't exceed
    short = name if len(name) <= letters else name[: letters - 1] + "…"
    kind = f"name{place % len(COLORS)}"
    return f'<text class="{kind}" x="{LEFT + place * room:.1f}" y="12">{html.escape(short)}</text>'


def _path(box: Box, place: int, points: Points) -> str:
    steps = " ".join(f"{box.across(x):.1f},{box.down(y):.1f}" for x, y in points)
    if len(points) == 1:
        steps += f" {box.across(points[0][0]) + 3:.1f},{box.down(points[0][1]):.1f}"
    return f'<path class="line{place % len(COLORS)}" d="M{steps}"/>'
