"""What the pages take from the code and the repository while they are built.

settings   `<!-- settings -->` becomes the table of what `search` takes, read from the code
searchers  `<!-- searchers -->` becomes the table of searchers' options, likewise
rooms      `<!-- rooms -->` becomes what the packages of the project say of themselves
compiled   `<!-- compiled -->` becomes the tables of `benchmarks/compiled.py`
pictures   those in `benchmarks/results/` become files of the site
"""

import ast
import dataclasses
import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from ses_jax.engine.config import Placement, RunConfig, SearchConfig
from ses_jax.engine.settings import fields
from ses_jax.searchers.registry import SEARCHERS

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "benchmarks" / "results"
# From the top; one that is not named here comes last.
ROOMS = [
    *("shell", "studio", "batch", "planner", "engine", "report", "exports"),
    *("searchers", "pipelines", "rewards", "loading", "convert", "models"),
]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The measured pictures beside the pages."""
    for path in PICTURES.glob("**/*.png"):
        name = "_".join(path.relative_to(PICTURES).parts)
        files.append(File.generated(config, f"images/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What is made here in the place of its mark."""
    for mark, make in MARKS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown


def rooms() -> str:
    """A chapter a package, from its docstring: what it is, and its modules."""
    found = {path.parent for path in ROOT.glob("ses_jax/*/__init__.py")} | {ROOT / "convert", ROOT / "models"}
    known = {name: place for place, name in enumerate(ROOMS)}
    ordered = sorted(found, key=lambda path: (known.get(path.name, len(ROOMS)), path.name))
    return "\n\n".join(_room(folder) for folder in ordered)


def _room(folder: Path) -> str:
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    parts = [_paragraph(part) for part in docstring.split("\n\n")]
    return "\n\n".join([f"### `{folder.relative_to(ROOT)}/`", *parts])


def _paragraph(text: str) -> str:
    """A docstring's paragraph: a drawing as it is, columns of names and texts as a list, prose as prose."""
    if text.startswith(" "):
        return f"```\n{textwrap.dedent(text)}\n```"
    if not re.search(r"^[\w, ]+ {2,}\S", text, re.MULTILINE):
        return text
    columns = (re.split(r" {2,}", line, maxsplit=1) for line in text.split("\n"))
    return "\n".join("- " + ": ".join([f"**{name}**", *what]) for name, *what in columns)


def settings_table() -> str:
    """Markdown table of everything that `search` takes by keyword."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    rows += [f"| `{name}` | {default} | {meaning} |" for name, default, meaning in settings()]
    return "\n".join(rows)


def settings() -> list[tuple[str, str, str]]:
    """Name, default and meaning of each setting, from the fields that define them."""
    known = fields(RunConfig, SearchConfig, Placement)
    return [(name, _default(field.default), _meaning(field)) for name, field in known.items()]


def searchers_table() -> str:
    """Markdown table of every searcher's options."""
    rows = ["| searcher | option | default | meaning |", "|---|---|---|---|"]
    for name, kind in SEARCHERS.items():
        for option in dataclasses.fields(kind):
            meaning = option.metadata["doc"][0].upper() + option.metadata["doc"][1:]
            rows.append(f"| `{name}` | `{option.name}` | `{str(option.default).lower()}` | {meaning}. |")
    return "\n".join(rows)


def compiled() -> str:
    """A table a kind and number of devices, from what their compilers said."""
    path = PICTURES / "compiled.json"
    entries = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.exists() else {}
    machines: dict[str, list[str]] = {}
    for key, entry in entries.items():
        model, machine = key.split(" on ")
        machines.setdefault(machine, []).append(
            f"| {model.rpartition('/')[2]} | {' | '.join(_compiled_cells(entry))} |"
        )
    return "\n\n".join("\n".join([f"**{machine}**\n", COMPILED, *rows]) for machine, rows in machines.items())


def _compiled_cells(entry: Mapping[str, Any]) -> list[str]:
    """Of one model on one machine."""
    if not entry.get("compiled"):
        return [entry.get("error", "does not fit").splitlines()[0][:80], *[""] * 6]
    found, programs = entry["compiled"], entry["compiled"]["programs"]
    moved = {kind: total for kind, total in programs["generation"]["collectives"].items() if total["bytes"]}
    seconds = programs["generation"]["seconds"]
    compiling = [program["compile_seconds"] for program in programs.values()]
    return [
        entry["mesh"] + (", offloaded" if entry["offload_text_encoder"] else ""),
        str(found["chunk"]),
        f"{max(found['encode_bytes'], found['search_bytes']) / 2**30:.1f}",
        " and ".join(f"{entry[name] / found[name] - 1:+.0%}" for name in ("encode_bytes", "search_bytes")),
        ", ".join(f"{total['count']} {kind}, {total['bytes'] / 2**30:.1f} GiB" for kind, total in moved.items()),
        "" if None in compiling else f"{sum(compiling):.0f}",
        "" if seconds is None else f"{seconds / entry['settings']['population']:.2g}",
    ]


def _default(value: Any) -> str:
    if value is None or value == ():
        return ""
    return f"`{json.dumps(value) if isinstance(value, str) else value}`"


def _meaning(field: Field) -> str:
    text, reference = field.metadata["doc"].replace("|", "\\|"), field.metadata["reference"]
    text = text[0].upper() + text[1:] + "."
    return f"{text} The reference's `{reference}`." if reference else text


COMPILED = """\
| model | mesh | candidates at a time | GiB on a device | the plan's bytes | collectives | s to compile | s each |
|---|---|---|---|---|---|---|---|"""
MARKS = {
    "<!-- settings -->": settings_table,
    "<!-- searchers -->": searchers_table,
    "<!-- rooms -->": rooms,
    "<!-- compiled -->": compiled,
}
