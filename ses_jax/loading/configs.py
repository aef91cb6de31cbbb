"""What a network's `config.json` says, and where it lies: its weights may be a single file that has none.

Such a file stands in the checkpoint's root, beside the network's folder, and has names of its own.
"""

from collections.abc import Callable, Mapping
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
        return _single_file_config(file, dialects.open_file(file), folder, component)
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


def table_of(weights: Weights, component: Component, json: Mapping[str, Any]) -> Callable[[Any], Table]:
    """Of the tables of a network's two published forms, the one that has more of the tensors' names."""
    if component.single_file is None:
        return component.table
    shapes = abstract(component, made_of(component, json))

    def known(table):
        return sum(name in weights.headers for name in {slot.name for slot in matching.layout(table(json), shapes)})

    return max(component.table, component.single_file.table, key=known)


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
