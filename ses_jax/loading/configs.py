"""What a network's `config.json` says, and where it lies: its weights may be a single file that has none.

Such a file stands in the checkpoint's root, beside the network's folder, and has names of its own.
"""

import collections
import re
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from ses_jax.convert import dialects, matching
from ses_jax.convert.engine import ConversionError, Weights
from ses_jax.convert.files import open_files, read_json
from ses_jax.convert.table import Component, Table
from ses_jax.models.config import check

PARAMS = "params"  # of a converted folder


def config_of(folder: Path, component: Component, file: Path | None = None) -> dict[str, Any]:
    """Content of the `config.json` of a network that `load` would read; raises as it does. No weights are read."""
    if file:
        return _single_file_config(file, dialects.without_prefix(dialects.open_file(file)), folder, component)
    file = single_file(folder, component)
    if file:
        return _single_file_config(file, dialects.logical(open_files([file])), folder, component)
    return read_config(folder / "config.json", component)[0]


def read_config(file: Path, component: Component) -> tuple[dict[str, Any], Any]:
    """The content of a network's config file, and the config that it makes.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the file, if the network can't be made from it.
    """
    json = read_json(file)
    try:
        return json, made_of(component, json)
    except ConfigError as error:
        raise ValueError(f"{file}: {error}") from error


class ConfigError(ValueError):
    """A config that no network can be made from."""


def made_of(component: Component, json: Mapping[str, Any]) -> Any:
    """The config that a file's content makes; raises ValueError for content of another shape."""
    try:
        return check(component.from_json(json))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except KeyError as error:
        raise ConfigError(f"lacks {error}") from error
    except Exception as error:  # a text in the place of an object, a size of 0: whatever comes of it
        raise ConfigError(f"makes no network: {type(error).__name__}: {error}") from error


def abstract(component: Component, config: Any) -> Any:
    """The params as shapes; raises ConfigError where the config's numbers do not go together."""
    try:
        return component.abstract(config)
    except Exception as error:
        raise ConfigError(f"makes no network: {' '.join(str(error).split())[:200]}") from error


def single_file(folder: Path, component: Component) -> Path | None:
    """The file in the checkpoint's root that holds a network whose own folder has no weights, if there is one."""
    if component.single_file is None or (folder / PARAMS).is_dir() or any(folder.glob(f"{component.stem}*")):
        return None
    found = [folder.parent / name for name in component.single_file.files if (folder.parent / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} has no weights, and {' and '.join(map(str, found))} both could be its; keep one")
    return found[0] if found else None


def part_of(
    weights: Weights, component: Component, json: Mapping[str, Any]
) -> tuple[Weights, Callable[[Mapping[str, Any]], Table]]:
    """A network's tensors in a file, which may have others beside them, and the table that knows more of their names.

    Raises:
      ConversionError: for a file that holds the network twice.
    """
    shapes = abstract(component, made_of(component, json))
    tables = [component.table, *([component.single_file.table] if component.single_file else [])]
    found = [_where(weights, {slot.name for slot in matching.layout(table(json), shapes)}) for table in tables]
    (share, prefix), table = max(zip(found, tables, strict=True), key=lambda pair: pair[0][0])
    if share <= 0.5:  # of another network; as it is, it can be said what does not fit
        return dialects.without_prefix(weights), table
    own = max((each for each in table(json).prefixes if prefix.endswith(each)), key=len, default="")
    return dialects.below(weights, prefix.removesuffix(own)), table


def _where(weights: Weights, names: Set[str]) -> tuple[float, str]:
    """Which share of a network's tensors a file has, and what it puts before their names."""
    counts = collections.Counter(
        name[:start]
        for name in weights.headers
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", name)))
        if name[start:] in names
    )
    (prefix, count), (other, again) = [*counts.most_common(2), ("", 0), ("", 0)][:2]
    if count == again and 2 * count > len(names):
        file = next(iter(weights.headers.values())).file
        raise ConversionError(f"{file} holds the network twice, as {prefix or 'it is'} and as {other or 'it is'}")
    return count / len(names), prefix


def _single_file_config(file: Path, weights: Weights, folder: Path, component: Component) -> dict[str, Any]:
    """The content of the network's `config.json`, made up from the file's tensors where there is none."""
    if (folder / "config.json").is_file():
        return read_config(folder / "config.json", component)[0]
    if component.single_file is None:
        raise FileNotFoundError(f"{file} needs {folder / 'config.json'}, which does not exist")
    try:
        return component.single_file.config(weights.headers)
    except (KeyError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ConversionError(f"{file}: {reason}") from error
