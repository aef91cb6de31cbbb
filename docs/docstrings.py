"""Docstrings in which one line describes several names, as tables that have a line a name.

`height, width: of the image, in pixels.` describes two, and `wavelet: its name; level: how deep` as well. `SplitNames`
gives each its own line before the API pages are made; the settings table (`hooks.py`) reads the same entries.
"""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import griffe

SECTIONS = ("Args", "Attributes")
HEADER = re.compile(rf"^(?:{'|'.join(SECTIONS)}):\n((?:[ ]+.*\n|\n)*)", re.MULTILINE)
NAMES = r"\w+(?:, \w+)*"


class SplitNames(griffe.Extension):
    """Rewrites docstrings while griffe collects them."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = split_names(obj.docstring.value)


def split_names(docstring: str) -> str:
    """The docstring with an entry a name in its sections."""
    return HEADER.sub(_rewritten, docstring + "\n").rstrip("\n")


def entries(docstring: str | None) -> dict[str, str]:
    """What a docstring's sections say of each name."""
    bodies = HEADER.findall(inspect.cleandoc(docstring or "") + "\n")
    return {name: text for body in bodies for name, text in _entries(body)}


def _rewritten(match: re.Match[str]) -> str:
    header = match[0].split("\n", 1)[0]
    return "\n".join([header, *(f"    {name}: {text}" for name, text in _entries(match[1])), "", ""])


def _entries(body: str) -> Iterator[tuple[str, str]]:
    """Names and texts of one section; lines that are indented further belong to the entry before."""
    lines = inspect.cleandoc(body).split("\n")
    joined = re.sub(r"\s*\n[ ]+", " ", "\n".join(lines))
    for line in filter(None, joined.split("\n")):
        for entry in re.split(rf"; (?={NAMES}: )", line):
            names, _, text = entry.partition(": ")
            for name in re.sub(r" \(.*\)$", "", names).split(", "):  # types are in the signature
                yield name, text if text.endswith(".") else f"{text}."
