"""Pieces of pages: everything inside the file, for light and dark, for wide and narrow."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ses_jax.report.charts import STYLE as CHARTS

STYLE = (
    ":root{color-scheme:light dark;--ink:#0f172a;--soft:#475569;--page:#fff;--card:#f8fafc;--edge:#e2e8f0;"
    "--good:#15803d;--bad:#b91c1c;--link:#c2410c}"
    "@media(prefers-color-scheme:dark){:root{--ink:#e2e8f0;--soft:#94a3b8;--page:#0f172a;--card:#1e293b;--edge:#334155;"
    "--good:#4ade80;--bad:#f87171;--link:#fb923c}}"
    "*{box-sizing:border-box}body{margin:0 auto;padding:16px;max-width:1180px;background:var(--page);color:var(--ink);"
    "font:16px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}"
    "h1{font-size:1.35rem;margin:.2em 0}h2{font-size:1.05rem;margin:1.6em 0 .5em}p{margin:.4em 0}a{color:var(--link)}"
    ".soft{color:var(--soft);font-size:.9rem}.good{color:var(--good)}.bad{color:var(--bad)}"
    ".columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:16px 28px}"
    "table{border-collapse:collapse;font-size:.9rem;max-width:100%}th,td{text-align:right;padding:3px 10px 3px 0;"
    "border-bottom:1px solid var(--edge)}td+td{white-space:nowrap}th{overflow-wrap:normal}"
    "th:first-child,td:first-child{text-align:left;min-width:6em}.wide{overflow-x:auto}"
    ".compare{position:relative;max-width:560px;line-height:0;border:1px solid var(--edge)}.compare img{width:100%}"
    ".compare img+img{position:absolute;inset:0;clip-path:inset(0 0 0 var(--at,50%))}"
    ".compare i{position:absolute;top:0;bottom:0;left:var(--at,50%);border-left:2px solid #fff;"
    "mix-blend-mode:difference}"
    ".slider{width:100%;max-width:560px;margin:8px 0 0;display:block}.ends{display:flex;justify-content:space-between;"
    "gap:12px;max-width:560px}.tiny{image-rendering:pixelated}"
    ".film{display:flex;gap:10px;overflow-x:auto;padding-bottom:8px}.film figure{margin:0;flex:0 0 auto;width:104px}"
    ".film img{width:104px;display:block;border:1px solid var(--edge);margin-bottom:4px}"
    "figcaption{font-size:.75rem;color:var(--soft)}"
    "pre{background:var(--card);border:1px solid var(--edge);padding:10px;white-space:pre-wrap;font-size:.82rem;"
    "margin:0}"
    "button,input,select{font:inherit;font-size:.9rem}button{margin:6px 0}"
    ".cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr));gap:14px}"
    ".card{background:var(--card);border:1px solid var(--edge);padding:10px;min-width:0}"
    ".card .pair{display:grid;grid-template-columns:1fr 1fr;gap:6px}"
    ".card img{width:100%;aspect-ratio:1;object-fit:contain}"
    ".tools{display:flex;flex-wrap:wrap;gap:8px;margin:12px 0}.tools input{flex:1 1 180px;min-width:0}"
)


def document(title: str, body: Sequence[str], script: str = "") -> str:
    """A page that needs nothing else; what is no Unicode in what users wrote is a question mark there."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{CHARTS}</style>"
    )
    end = f"<script>{script}</script>" if script else ""
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}{end}</body></html>\n'
    return page.encode(errors="replace").decode()


def inline(image: Image.Image, side: int | None = None) -> str:
    """An image as the address of itself, WebP, no larger than `side`; small ones lose nothing."""
    image = image.copy()
    if side is not None:
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=90, lossless=max(image.size) <= 64, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture(image: Image.Image, words: str, side: int | None = None) -> str:
    """An `<img>`; few pixels stay squares where they are shown large."""
    kind = ' class="tiny"' if max(image.size) <= 128 else ""
    return f'<img{kind} src="{inline(image, side)}" alt="{escape(words)}">'


def escape(text: Any) -> str:
    """Text as it may stand anywhere in a page."""
    return html.escape(str(text), quote=True)


def number(value: float | None) -> str:
    """A score."""
    return "-" if value is None else f"{value:.4f}"


def change(before: float | None, after: float | None) -> str:
    """How much a score changed, in the colour of better or worse."""
    if before is None or after is None:
        return "-"
    kind = "good" if after > before else "bad" if after < before else "soft"
    return f'<span class="{kind}">{after - before:+.4f}</span>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of HTML under a row of text."""
    first = "".join(f"<th>{escape(name)}</th>" for name in head)
    rest = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{first}</tr>{rest}</table></div>'


def facts(pairs: Mapping[str, Any]) -> str:
    """Names and values, as a table."""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in pairs.items())
    return f'<div class="wide"><table>{rows}</table></div>'
