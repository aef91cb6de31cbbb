"""Prompt files as rows of a batch run: `.txt`, `.csv`, `.tsv`, `.json` and `.jsonl`.

A row has a prompt, perhaps an `id`, overrides (columns named like a field of `SearchConfig`) and metadata (all other
columns, but for names of settings that hold for a whole run). The files of GenEval, DrawBench, PartiPrompts and HPD v2
are read as they are published. What is wrong with one row is noted in that row; only what makes the whole file
meaningless is an error.
"""

import codecs
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ses_jax.engine.config import Placement, RunConfig, SearchConfig
from ses_jax.engine.files import expanded
from ses_jax.engine.placement import check_path
from ses_jax.engine.settings import check_text, fields, read, shown

PROMPT_COLUMNS = ("prompt", "prompts")
# What a column of prompts is called elsewhere, where there is none of those.
OTHER_COLUMNS = ("text", "caption")
FORMATS = (".txt", ".csv", ".tsv", ".json", ".jsonl")
_MAX_NAME = 80  # bytes: four times as many are still a name
_MAX_DEPTH = 64
_SETTINGS = fields(SearchConfig)
_OF_RUN = fields(RunConfig, Placement)

Source = str | os.PathLike[str] | Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt of a run.

    Attributes:
      index: place in the file, from 0; it chooses the row's own random draws.
      id: its name in the results.
      prompt: what to search for; "" where the row has none.
      overrides: fields of `SearchConfig` that this row sets itself.
      metadata: all other columns, as they came.
      error: what is wrong with the row; None if nothing is.
    """

    index: int
    id: str
    prompt: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    error: str | None = None

    @functools.cached_property
    def folder(self) -> str:
        """The id as a folder name that is safe everywhere and hides no file of the run."""
        whole = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", self.id))
        name = whole.encode()[:_MAX_NAME].decode(errors="ignore")
        if name != whole:  # what is cut off is told apart by a hash
            name += "-" + hashlib.sha256(self.id.encode(errors="surrogatepass")).hexdigest()[:8]
        return re.sub(r"\.(jsonl?|html)$", r"_\1", name.strip(".")) or "_"

    def as_json(self) -> dict[str, Any]:
        """The fields as plain JSON values, but for what metadata may hold."""
        plain = {name: _SETTINGS[name].metadata["kind"].plain(value) for name, value in self.overrides.items()}
        return {field: getattr(self, field) for field in self.__dataclass_fields__} | {"overrides": plain}


def read_rows(prompts: Source, column: str | None = None) -> list[Row]:
    """Rows of a prompt file, or of a list of strings and mappings.

    Args:
      prompts: a path with one of the endings in `FORMATS`, UTF-8 or UTF-16; or a list. A `.txt` file has a prompt a
        line, and blank lines do not count. Tables need a column `prompt`, `prompts`, `text` or `caption`, and a `.csv`
        one may have semicolons for commas; empty cells count as absent. A `.json` file is a list. Rows without an `id`
        are named by their place, from "00000".
      column: the one that holds the prompts.

    Raises:
      OSError: if the file cannot be read.
      ValueError: for an unknown ending, a file without prompts, or two rows with the same id.
    """
    if isinstance(prompts, str | os.PathLike):
        path = expanded(check_path(prompts, "prompts"))
        if path.suffix.lower() not in FORMATS:
            raise ValueError(f"prompt file {path}: unknown ending {path.suffix!r}; known: {', '.join(FORMATS)}")
        records = _READERS[path.suffix.lower()](path, column)
        column = _prompt_column(path, records, column)
    elif isinstance(prompts, Iterable) and not isinstance(prompts, bytes | Mapping):
        path, records = None, list(prompts)
        column = column or next((name for name in OTHER_COLUMNS if _is_only(name, records)), None)
    else:
        raise ValueError(f"prompts={shown(prompts)} is neither a file nor a list of prompts")
    if not records:
        raise ValueError("no prompts: pass at least one" if path is None else f"prompt file {path} holds no prompts")
    rows = [_row(index, _named_prompt(record, column)) for index, record in enumerate(records)]
    _check_unique(rows)
    return rows


def _prompt_column(path: Path, records: Sequence[Any], column: str | None) -> str | None:
    """The column of the prompts where it has another name; None where it has not."""
    tables = [record for record in records if isinstance(record, Mapping)]
    names = list(dict.fromkeys(name for record in tables for name in record))
    if column is not None:
        if column not in names:
            raise ValueError(f"prompt file {path} has no column {column!r}; its columns are {', '.join(names)}")
        return column
    return next((name for name in names if name.strip().lower() in OTHER_COLUMNS and _is_only(name, tables)), None)


def _is_only(column: str, records: Sequence[Any]) -> bool:
    """Whether rows have such a column, and none of those that prompts usually are in."""
    names = {str(name).strip().lower() for record in records if isinstance(record, Mapping) for name in record}
    return column.strip().lower() in names and not names & set(PROMPT_COLUMNS)


def _named_prompt(record: Any, column: str | None) -> Any:
    """The record with its prompt under the usual name; a column that had that name keeps its content."""
    if column is None or not isinstance(record, Mapping) or column not in record:
        return record
    rest = {f"{name}_" if _column(name) in PROMPT_COLUMNS else name: value for name, value in record.items()}
    return {"prompt": record[column], **{name: value for name, value in rest.items() if name != column}}


def _read_text(path: Path) -> list[Any]:
    return [line.strip() for line in _decode(path).split("\n") if line.strip()]


def _read_table(path: Path, delimiter: str, column: str | None) -> list[Any]:
    text = _decode(path)
    first = text.split("\n", 1)[0]
    # Some programs write semicolons where the comma is the decimal sign.
    delimiter = ";" if delimiter == "," and ";" in first and "," not in first else delimiter
    rows = [cells for cells in _cells(text, delimiter) if cells]
    header = rows[0] if rows else []
    if isinstance(header, ValueError):
        raise ValueError(f"prompt file {path}: its first line: {header}")
    if column is None and not any(name.strip().lower() in (*PROMPT_COLUMNS, *OTHER_COLUMNS) for name in header):
        raise ValueError(
            f"prompt file {path} has no column 'prompt'; its first line is {shown(header)}; or name one with "
            "--prompt-column"
        )
    return [cells if isinstance(cells, ValueError) else _record(header, cells) for cells in rows[1:]]


def _cells(text: str, delimiter: str) -> Iterator[list[str] | ValueError]:
    """Rows of a table; one whose quotes do not fit takes none of the next rows with it."""
    lines = list(io.StringIO(text, newline=""))
    place = 0
    while place < len(lines):
        try:
            reader = csv.reader(itertools.islice(lines, place, None), delimiter=delimiter, strict=True)
            cells = next(reader)
            place += reader.line_num
        except csv.Error:
            cells = _lenient(lines[place], delimiter)
            place += 1
        yield cells


def _lenient(line: str, delimiter: str) -> list[str] | ValueError:
    """The row of a single line, which may hold quotes that quote nothing."""
    try:
        for strict in (True, False):
            try:
                return next(csv.reader([line], delimiter=delimiter, strict=strict))
            except csv.Error as error:
                if not strict or "end of data" in str(error):
                    raise
    except csv.Error as error:
        return ValueError(f"the row can't be read ({error}); a cell that begins with a quote must end with one")


def _record(header: Sequence[str], cells: Sequence[str]) -> Any:
    if len(cells) > len(header):
        return ValueError(f"{len(cells)} cells under {len(header)} columns; quote what holds a separator")
    return {name: cell for name, cell in zip(header, cells, strict=False) if cell}


def _read_json(path: Path) -> list[Any]:
    text = _decode(path)
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"prompt file {path} is no JSON: {_reason(error)}") from None
    if not isinstance(records, list):
        raise ValueError(f"prompt file {path} must hold a list, got a {type(records).__name__}")
    return records


def _read_json_lines(path: Path) -> list[Any]:
    return [_json_or_error(line) for line in _decode(path).split("\n") if line.strip()]


def _json_or_error(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"the line is no JSON: {_reason(error)}")


def _reason(error: Exception) -> str:
    return "it is nested too deep" if isinstance(error, RecursionError) else str(error)


def _decode(path: Path) -> str:
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not UTF-8 or UTF-16: {error.reason} at byte {error.start}") from error


_READERS: dict[str, Callable[[Path, str | None], list[Any]]] = {
    ".txt": lambda path, column: _read_text(path),
    ".csv": lambda path, column: _read_table(path, ",", column),
    ".tsv": lambda path, column: _read_table(path, "\t", column),
    ".json": lambda path, column: _read_json(path),
    ".jsonl": lambda path, column: _read_json_lines(path),
}


def _row(index: int, record: Any) -> Row:
    """The row of a record, its first error noted."""
    name = f"{index:05d}"
    if isinstance(record, ValueError):
        return Row(index, name, "", error=str(record))
    if isinstance(record, str):
        record = {"prompt": record}
    if not isinstance(record, Mapping):
        return Row(index, name, "", error=f"a row is a prompt or a mapping, got {shown(record)}")
    if (error := _unwritable(record)) is not None:
        return Row(index, name, "", error=error)
    columns = {_column(key): value for key, value in record.items() if value is not None}
    prompt = next((columns.pop(key) for key in PROMPT_COLUMNS if key in columns), "")
    name = str(columns.pop("id", name))
    overrides = {key: columns.pop(key) for key in _SETTINGS if key in columns}
    row = Row(index, name, prompt if isinstance(prompt, str) else "", metadata=columns)
    try:
        if not isinstance(prompt, str):
            raise ValueError(f"the prompt must be a string, got {shown(prompt)}")
        if not check_text(prompt).strip():
            raise ValueError("the prompt is empty")
        if (wrong := next((key for key in _OF_RUN if key in columns), None)) is not None:
            raise ValueError(f"column {wrong!r} is a setting of a whole run; set it there, or rename the column")
        return dataclasses.replace(
            row, overrides={key: read(_SETTINGS[key], value) for key, value in overrides.items()}
        )
    except ValueError as error:
        return dataclasses.replace(row, error=str(error), metadata=columns | overrides)


def _unwritable(record: Mapping[Any, Any]) -> str | None:
    """Why a row could not be written down as JSON."""
    if _too_deep(record):
        return f"the row is nested more than {_MAX_DEPTH} deep"
    try:
        json.dumps({str(name): value for name, value in record.items()}, default=str)
    except (TypeError, ValueError) as error:
        return f"the row can't be written as JSON: {error}"
    return None


def _too_deep(record: Any) -> bool:
    """Whether values lie in one another so deep that no reader or writer of JSON would follow."""
    level = [record]
    for _ in range(_MAX_DEPTH):
        inner = [value.values() if isinstance(value, Mapping) else value for value in level]
        level = [x for values in inner for x in values if isinstance(x, Mapping | list | tuple)]
        if not level:
            return False
    return True


def _column(name: Any) -> str:
    """The name of a column that means something here in lower case, any other as it is."""
    lower = str(name).strip().lower()
    return lower if lower in (*PROMPT_COLUMNS, "id", *_SETTINGS, *_OF_RUN) else str(name)


def _check_unique(rows: Sequence[Row]) -> None:
    seen: dict[str, Row] = {}
    for row in rows:
        # Some file systems take "A" and "a" for the same folder.
        other = seen.setdefault(row.folder.lower(), row)
        if other is not row:
            raise ValueError(
                f"rows {other.index} and {row.index} (the first is row 0) have the same id: "
                f"{other.id!r} and {row.id!r}, folder {row.folder!r}"
            )
