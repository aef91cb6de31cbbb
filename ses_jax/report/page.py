"""One search as a page: what it found, how it got there, what other rewards say, and how to do it again."""

import html as escaping
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from ses_jax.report import charts, curves, html
from ses_jax.report.charts import Line, Svg
from ses_jax.report.html import escape

SCRIPT = (
    "for(const s of document.querySelectorAll('.slider'))"
    "s.addEventListener('input',()=>s.previousElementSibling.style.setProperty('--at',s.value+'%'));"
    "for(const b of document.querySelectorAll('button'))b.addEventListener('click',()=>{"
    "const t=b.nextElementSibling,r=document.createRange();r.selectNodeContents(t);"
    "getSelection().removeAllRanges();getSelection().addRange(r);"
    "if(navigator.clipboard)navigator.clipboard.writeText(t.textContent);b.textContent='Copied'})"
)


class Shown(NamedTuple):
    """A preview of the film.

    Attributes:
      generation: from 0.
      best: whether it is the best of its generation, or the worst.
      score: of the candidate.
    """

    generation: int
    best: bool
    score: float | None
    image: Image.Image


class View(NamedTuple):
    """What a page shows.

    Attributes:
      summary: as `result.json` has it.
      history: as `history.jsonl` has it.
      image, baseline: the winner, and the image without a search.
      film: previews, generation after generation.
      command, python: which give the result again.
    """

    summary: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    image: Image.Image
    baseline: Image.Image
    film: Sequence[Shown]
    command: str
    python: str


def page(view: View, *, side: int | None = None) -> str:
    """The page, which holds all it needs; its two large images no larger than `side`."""
    summary = view.summary
    head = [f"<h1>{escape(summary['prompt'])}</h1>", _gain(summary), _model(summary)]
    body = [
        *head,
        '<div class="columns"><section>',
        _compare(view, side),
        "</section><section>",
        _curve(view),
        "</section></div>",
        _film(view.film),
        *_rewards(view),
        "<h2>Low band</h2>",
        '<p class="soft">Root mean square of each candidate\'s low band; 1 is that of fresh noise. A search that goes '
        "far from 1 makes images that the model was not trained for.</p>",
        charts.chart([Line("low band", curves.drift(view.history))], below="candidates").text,
        *_again(view),
        *_spent(summary),
    ]
    return html.document(f"{summary['prompt']} - ses_jax", body, SCRIPT)


def embedded(view: View, *, height: int = 720) -> str:
    """The page inside a frame, so that its style stays its own, with smaller images."""
    text = escaping.escape(page(view, side=512), quote=True)
    return f'<iframe srcdoc="{text}" style="width:100%;height:{height}px;border:1px solid #94a3b8"></iframe>'


def curve(view: View, *, standalone: bool = False) -> Svg:
    """The best score over candidates, beside best-of-N's."""
    rows = view.history
    lines = [Line("this search", curves.best_so_far(rows)), Line("best of N, expected", curves.best_of_n(rows))]
    starts = [row["index"] + 1.0 for row, before in zip(rows[1:], rows, strict=False) if _differ(row, before)]
    return charts.chart(lines, below="candidates", marks=starts, standalone=standalone)


def _differ(row: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    return row["generation"] != before["generation"]


def _gain(summary: Mapping[str, Any]) -> str:
    names = ("baseline_score", "score"), ("baseline_final_score", "final_score")
    pairs = [[summary[name] for name in pair] for pair in names]
    words = [
        f"{kind} {html.number(pair[0])} → {html.number(pair[1])} ({html.change(*pair)})"
        for kind, pair in zip(("preview", "final image"), pairs, strict=True)
    ]
    stopped = ' <span class="bad">Stopped before its budget was spent.</span>' if summary["interrupted"] else ""
    return f"<p>{escape(summary['config']['reward'])}: {'; '.join(words)}.{stopped}</p>"


def _model(summary: Mapping[str, Any]) -> str:
    config = summary["config"]
    size = f"{config['width']} x {config['height']}"
    words = f"{config['model']}, {size} pixels, {summary['scored']} candidates, seed {config['seed']}"
    return f'<p class="soft">{escape(words)}</p>'


def _compare(view: View, side: int | None) -> str:
    return (
        f'<div class="compare">{html.picture(view.baseline, "without a search", side)}'
        f"{html.picture(view.image, 'found by the search', side)}<i></i></div>"
        '<input class="slider" type="range" min="0" max="100" value="50" aria-label="compare">'
        '<div class="ends soft"><span>← without a search</span><span>found by the search →</span></div>'
    )


def _curve(view: View) -> str:
    return (
        f"{curve(view).text}"
        '<p class="soft">The best preview so far, a dashed line where a generation begins; and what the best of as '
        "many of the same scores would be on average, drawn in any order. A search that learns lies below it at "
        "first, as its better candidates come late.</p>"
    )


def _film(film: Sequence[Shown]) -> str:
    if not film:
        return ""
    strips = []
    for best, title in ((True, "best"), (False, "worst")):
        figures = [_figure(shown) for shown in film if shown.best == best]
        if figures:
            strips.append(
                f'<p class="soft">The {title} of each generation</p><div class="film">{"".join(figures)}</div>'
            )
    return f"<h2>Generations</h2>{''.join(strips)}"


def _figure(shown: Shown) -> str:
    words = f"generation {shown.generation + 1}"
    caption = f"<figcaption>{words}<br>{html.number(shown.score)}</figcaption>"
    return f"<figure>{html.picture(shown.image, words, 208)}{caption}</figure>"


def _rewards(view: View) -> list[str]:
    """Every part of the reward, and those that were only reported."""
    components, weights = view.summary["components"], view.summary["config"].get("rewards", {})
    if not components:
        return []
    rows = [[_part(name, weights.get(name, 0.0)), *_scores(scores)] for name, scores in components.items()]
    held = [name for name in components if not weights.get(name, 0.0)]
    lines = [Line("driving", curves.of_the_best(view.history, None))]
    lines += [Line(name, curves.of_the_best(view.history, name)) for name in held or components]
    head = ["reward", "preview before", "after", "gain", "final before", "after", "gain"]
    return [
        "<h2>Rewards</h2>",
        html.table(head, rows),
        *(_warning(name, components[name]) for name in held),
        charts.chart(lines, below="candidates").text,
        '<p class="soft">What the best so far scores, in standard deviations of all candidates above the base noise. '
        "Where the driving reward rises and others fall, the search has fooled it.</p>",
    ]


def _part(name: str, weight: float) -> str:
    return escape(f"{weight:g} x {name}" if weight else f"{name} (reported only)")


def _scores(scores: Mapping[str, float | None]) -> list[str]:
    cells = []
    for before, after in (("baseline_score", "score"), ("baseline_final_score", "final_score")):
        pair = scores[before], scores[after]
        cells += [html.number(pair[0]), html.number(pair[1]), html.change(*pair)]
    return cells


def _warning(name: str, scores: Mapping[str, float | None]) -> str:
    before, after = scores["baseline_final_score"], scores["final_score"]
    if before is None or after is None or after >= before:
        return ""
    return f'<p class="bad">{escape(name)}, which did not drive the search, finds the final image worse.</p>'


def _again(view: View) -> list[str]:
    parts = ["<h2>Do it again</h2>"]
    for title, text in (("Copy the command", view.command), ("Copy the Python", view.python)):
        parts.append(f"<button>{title}</button><pre>{escape(text)}</pre>")
    return parts


def _spent(summary: Mapping[str, Any]) -> list[str]:
    cost, timings = summary["cost"], summary["timings"]
    seconds = {name: f"{timings[name]:.2f} s" for name in ("encode", "search", "render") if name in timings}
    rows = [[escape(name), *(str(cost[part][name]) for part in ("search", "finals"))] for name in ("images", "nfe")]
    rows.append(["TFLOPs", *(_tera(cost[part]["flops"]) for part in ("search", "finals"))])
    rate = {"images per second": f"{timings['images_per_second']:.2f}"} if "images_per_second" in timings else {}
    tables = html.facts(seconds | rate), html.table(["", "candidates", "final images"], rows)
    return ["<h2>What it took</h2>", f'<div class="columns">{"".join(tables)}</div>']


def _tera(flops: int | None) -> str:
    return "-" if flops is None else f"{flops / 1e12:.3g}"
