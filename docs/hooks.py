"""What the pages take from the code and the repository while they are built.

settings   `<!-- settings -->` becomes the table of what `search` takes, read from the code
rooms      `<!-- rooms -->` becomes what the packages of the project say of themselves
pictures   those in `benchmarks/results/` become files of the site
"""

import ast
import inspect
import json
import re
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

from docstrings import entries
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import ses_jax

# Inspecting them would run the shell.
for _name in ("ses_jax.__main__", "ses_jax.convert.__main__"):
    sys.modules[_name] = types.ModuleType(_name)

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "benchmarks" / "results"
# From the top; one that is not named here comes last.
ROOMS = ["batch", "planner", "engine", "searchers", "pipelines", "rewards", "loading", "convert", "models"]
# What the reference implementation calls them.
REFERENCE = {"budget": "ses_eval_budget", "preview_steps": "ses_inference_steps", "reward": "ses_reward_model"}
SEE = "see `SearchConfig`"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The measured pictures beside the pages."""
    for path in PICTURES.glob("**/*.png"):
        name = "_".join(path.relative_to(PICTURES).parts)
        files.append(File.generated(config, f"images/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What is made here in the place of its mark."""
    for mark, make in (("<!-- settings -->", settings_table), ("<!-- rooms -->", rooms)):
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
    """Name, default and meaning of each setting, as `search` itself documents it; the only place that gathers them.

    Raises:
      KeyError: for a setting that is described nowhere.
    """
    described = entries(ses_jax.SearchConfig.__doc__)
    own = entries(ses_jax.search.__doc__)
    described |= {name: text for name, text in own.items() if not text.startswith(SEE)}
    parameters = inspect.signature(ses_jax.search).parameters.values()
    return [
        (p.name, _default(p.default), _meaning(p.name, described[p.name]))
        for p in parameters
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]


def _default(value: Any) -> str:
    if value is None or value == ():
        return ""
    return f"`{json.dumps(value) if isinstance(value, str) else value}`"


def _meaning(name: str, text: str) -> str:
    text = text[0].upper() + text[1:].replace("|", "\\|")
    return f"{text} The reference's `{REFERENCE[name]}`." if name in REFERENCE else text
