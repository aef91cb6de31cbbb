"""Options that stand for others, before the command line is read: -q, -v, --config, --like; and where prompts lie."""

import json
import sys
import tomllib
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import yaml

from ses_jax.batch.prompts import read_rows
from ses_jax.engine import repeat
from ses_jax.engine.files import expanded

QUIET, VERBOSE = ("-q", "--quiet"), ("-v", "--verbose")
# Options that are there once for each of their values.
REPEATED = ("lora", "schedule")
READERS = {".yaml": yaml.safe_load, ".yml": yaml.safe_load, ".json": json.loads, ".toml": tomllib.loads}


def expand(words: Sequence[str]) -> tuple[list[str], bool]:
    """The words that are read, and whether the user wants to see all that is said.

    `-q` is `--no-progress`; `--config FILE` and `--like FILE` are preceded by the options of that file. A file that is
    not there stays for the command to complain of.

    Raises:
      ValueError: for files that hold no such options; see `repeat.expand`.
    """
    verbose = any(word in VERBOSE for word in words)
    words = ["--no-progress" if word in QUIET else word for word in words if word not in VERBOSE]
    file = _value_of("--config", words)
    if file is not None and (file := expanded(file)).is_file():
        given = {word.partition("=")[0] for word in words}
        words = [words[0], *_options(file, given), *words[1:]]
    return repeat.expand(words), verbose


def _value_of(name: str, words: Sequence[str]) -> str | None:
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _options(path: Path, given: Set[str]) -> list[str]:
    """The options of a file, as words, but for those `given` that would add up."""
    check_config(path)
    try:
        options = READERS[path.suffix.lower()](path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(options, Mapping):
        raise ValueError(f"{path} must hold options by their names, got a {type(options).__name__}")
    options = {str(name).replace("_", "-"): value for name, value in options.items() if value is not None}
    chosen = {name: value for name, value in options.items() if name not in REPEATED or f"--{name}" not in given}
    return [word for name, value in chosen.items() for word in _words(name, value)]


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if name in REPEATED:
        pairs = (f"{key}={_plain(x)}" for key, x in value.items()) if isinstance(value, Mapping) else value
        return [f"--{name}={one}" for one in ([pairs] if isinstance(pairs, str) else pairs)]
    if isinstance(value, Mapping):  # guidance, or the weights of rewards
        value = ",".join(f"{key}={x}" for key, x in value.items())
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def check_config(path: Path | None) -> None:
    """Raises ValueError or OSError for what is no file of options."""
    if path is None:
        return
    path = expanded(path)
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path}: options are in a {', '.join(READERS)} file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")


def of_file(file: Path | None) -> list[str]:
    """The prompts of a file, or of stdin's lines for "-"; None has none.

    Raises:
      ValueError: for rows that cannot be used, and for those that have settings of their own.
    """
    if file is None:
        return []
    rows = read_rows([line for line in sys.stdin.read().split("\n") if line.strip()] if str(file) == "-" else file)
    wrong = next((row for row in rows if row.error or row.overrides), None)
    if wrong is not None:
        raise ValueError(f"{file}, row {wrong.index}: {wrong.error or 'has settings of its own; use ses-jax batch'}")
    return [row.prompt for row in rows]


def of_like(file: Path, prompts: Sequence[str], index: int | None) -> tuple[Sequence[str], int]:
    """The prompts and the number of the first; where there are none, that of an earlier search with its own draws.

    Its settings stand among the options already.
    """
    about = repeat.read(file)
    own = about["config"].get("prompt_index", 0)
    chosen = (prompts, 0) if prompts else ([about["prompt"]], own)
    return chosen if index is None else (chosen[0], index)
