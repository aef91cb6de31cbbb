"""A run over many prompts as a page: what it gained, what failed, and a card a prompt that leads to its own page."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from ses_jax.report import html
from ses_jax.report.html import escape

Outcome = Mapping[str, Any]
SCRIPT = (
    "const q=document.querySelector('#find'),w=document.querySelector('#which'),o=document.querySelector('#order'),"
    "b=document.querySelector('.cards'),c=[...b.children];"
    "const show=()=>{const t=q.value.toLowerCase();let n=0;for(const e of c){"
    "const ok=e.dataset.text.includes(t)&&(w.value=='all'||e.dataset.kind==w.value);e.hidden=!ok;n+=ok}"
    "document.querySelector('#shown').textContent=n+' of '+c.length};"
    "const sort=()=>{c.sort((x,y)=>(x.dataset.kind!='failed')-(y.dataset.kind!='failed')||"
    "(o.value=='index'?x.dataset.index-y.dataset.index:y.dataset[o.value]-x.dataset[o.value]));b.append(...c);show()};"
    "q.addEventListener('input',show);w.addEventListener('change',show);o.addEventListener('change',sort);show()"
)
KINDS = ("all", "better", "same", "worse", "failed")


def gallery(title: str, outcomes: Sequence[Outcome], summary: Mapping[str, Any], *, ending: str = "png") -> str:
    """The page. Pictures and pages of prompts are linked, so that it stays small.

    Args:
      title: of the run.
      outcomes: a line of `results.jsonl` each, perhaps with an `ending` of its own.
      summary: as `summary.json` has it.
      ending: of the pictures.
    """
    counts = ", ".join(f"{summary[name]} {name}" for name in ("prompts", "finished", "failed", "unfinished"))
    options = "".join(f"<option>{kind}</option>" for kind in KINDS)
    orders = "".join(f'<option value="{name}">by {name}</option>' for name in ("gain", "score", "index"))
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{counts}</p>',
        _means(summary),
        f'<div class="tools"><input id="find" type="search" placeholder="words of a prompt" aria-label="find">'
        f'<select id="which" aria-label="which">{options}</select>'
        f'<select id="order" aria-label="order">{orders}</select><span class="soft" id="shown"></span></div>',
        f'<div class="cards">{"".join(_card(outcome, ending) for outcome in in_order(outcomes))}</div>',
    ]
    return html.document(title, body, SCRIPT)


def in_order(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Failures first, then the largest gains."""
    return sorted(outcomes, key=lambda outcome: ("error" not in outcome, -(gain(outcome) or 0.0)))


def gain(outcome: Outcome) -> float | None:
    """By previews; None where a score is missing."""
    before, after = outcome.get("baseline_score"), outcome.get("score")
    return None if before is None or after is None else after - before


def _means(summary: Mapping[str, Any]) -> str:
    rows = []
    for name, scores in {"reward": summary["scores"], **summary["components"]}.items():
        for kind, columns in scores.items():
            cells = (_with_error(columns[column]) for column in ("baseline", "search", "gain"))
            rows.append([escape(f"{name}, {kind}"), *cells])
    return html.table(["mean ± standard error", "unsearched", "searched", "gain"], rows)


def _with_error(value: Mapping[str, float | None]) -> str:
    mean, error = value["mean"], value["standard_error"]
    return "-" if mean is None else f"{mean:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _card(outcome: Outcome, ending: str) -> str:
    prompt, name = escape(outcome["prompt"]), escape(outcome["id"])
    if "error" in outcome:
        inside = f'<p>{prompt}</p><p class="bad">{escape(outcome["error"])}</p>'
    else:
        inside = _linked(outcome, prompt, ending)
    data = {
        "text": f"{outcome['id']} {outcome['prompt']}".lower(),
        "kind": _kind(outcome),
        "index": outcome["index"],
        "gain": gain(outcome) or 0.0,
        "score": outcome.get("score") or 0.0,
    }
    marks = " ".join(f'data-{key}="{escape(value)}"' for key, value in data.items())
    return f'<article class="card" {marks}>{inside}<p class="soft">{name}</p></article>'


def _linked(outcome: Outcome, prompt: str, ending: str) -> str:
    folder, ending = quote(outcome["folder"]), outcome.get("ending", ending)
    images = "".join(
        f'<img loading="lazy" src="{folder}/{image}.{ending}" alt="{words}">'
        for image, words in (("baseline", "without a search"), ("best", "found"))
    )
    before, after = outcome["baseline_score"], outcome["score"]
    scores = f"{html.number(before)} → {html.number(after)} ({html.change(before, after)})"
    link = f'<a href="{folder}/report.html">{prompt}</a>'
    return f'<a href="{folder}/report.html" class="pair">{images}</a><p>{link}</p><p class="soft">{scores}</p>'


def _kind(outcome: Outcome) -> str:
    found = gain(outcome)
    if "error" in outcome:
        return "failed"
    return "same" if not found else "better" if found > 0 else "worse"
