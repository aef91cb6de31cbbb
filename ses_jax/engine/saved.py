"""Reading the folder of a result again, whatever has become of it meanwhile."""

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ses_jax.engine.cost import Cost, Spent
from ses_jax.exports.pictures import FORMATS

SUMMARY = "result.json"
PICTURES = ("best", "baseline")
SHOWN = 5  # of many names
SCORES = ("baseline_score", "score", "baseline_final_score", "final_score")
TIMINGS = ("encode", "search", "render", "images_per_second")


def read(folder: Path) -> dict[str, Any]:
    """The attributes of the `SearchResult` that was saved in a folder.

    Raises:
      FileNotFoundError: naming a file that is not there.
      ValueError: naming a file that is damaged, and what is wrong with it.
    """
    check_single(folder)
    summary = read_summary(folder / SUMMARY)
    scores = {name: math.nan if summary[name] is None else float(summary[name]) for name in SCORES}
    spent = {name: Spent(**values) for name, values in summary["cost"].items()}
    image, baseline = (_intact(picture(folder, name), _image) for name in PICTURES)
    return scores | {
        "prompt": summary["prompt"],
        "image": image,
        "baseline_image": baseline,
        "noise": read_noise(folder / "noise.npy"),
        "history": _intact(folder / "history.jsonl", _lines),
        "components": summary["components"],
        "config": summary["config"],
        "cost": Cost(**spent),
        "timings": summary["timings"],
        "interrupted": summary["interrupted"],
        "notes": tuple(summary.get("notes", ())),
    }


def check_single(folder: Path) -> None:
    """Raises FileNotFoundError, naming the folders of some results, for the folder of a list or a batch run."""
    if (folder / SUMMARY).exists() or not folder.is_dir():
        return
    if held := sorted(path.parent.name for path in folder.glob(f"*/{SUMMARY}")):
        names = ", ".join(held[:SHOWN]) + (", ..." if len(held) > SHOWN else "")
        raise FileNotFoundError(f"{folder} holds {len(held)} results, each in a folder of its own; give one: {names}")


def picture(folder: Path, name: str) -> Path:
    """The file of a picture in a folder, whatever its format; that of the first format where there is none."""
    files = [folder / f"{name}.{kind}" for kind in FORMATS]
    return next((file for file in files if file.is_file()), files[0])


def read_summary(path: Path, only: Collection[str] | None = None) -> dict[str, Any]:
    """The content of a `result.json`, checked as a whole or in some of its fields.

    Raises:
      OSError: if it can't be read.
      ValueError: naming it, and what is wrong with it.
    """
    summary = read_json(path)
    try:
        wrong = [name for name in only or _FIELDS if not _FIELDS[name](summary[name])]
    except KeyError as error:
        raise ValueError(f"{path} is no result of a search: it lacks {error}") from None
    if wrong:
        raise ValueError(f"{path} is no result of a search: {', '.join(wrong)} is of another kind")
    return summary


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      OSError: if it can't be read.
      ValueError: naming it, if it is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__}, not an object")
    return content


def read_noise(path: Path) -> np.ndarray:
    """The noise in a `noise.npy`, float32.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming it, if it is no array of numbers.
    """

    def array(path: Path) -> np.ndarray:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu" or not np.isfinite(found).all():
            raise ValueError("it holds no array of finite numbers")
        return found.astype(np.float32)

    return _intact(path, array)


def _intact(path: Path, reader: Callable[[Path], Any]) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return reader(path)
    except Exception as error:  # readers of images and arrays raise anything for damaged files
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None


def _image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image.copy()


def _lines(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no object")
    return rows


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _score(value: Any) -> bool:
    return value is None or _number(value)


def _mapping(value: Any, fine: Callable[[Any], bool] = lambda value: True) -> bool:
    return isinstance(value, Mapping) and all(map(fine, value.values()))


def _component(value: Any) -> bool:
    return _mapping(value, _score) and value.keys() >= set(SCORES)


def _timings(value: Any) -> bool:
    return (
        _mapping(value, _number)
        and value.get("search", 0) > 0
        and value.get("images_per_second", -1) >= 0  # 0 where all was scored before the call that rendered it
        and (value.keys() >= set(TIMINGS))
    )


def _cost(value: Any) -> bool:
    names = Spent.__dataclass_fields__.keys()
    return (
        _mapping(value, lambda spent: _mapping(spent, _score) and spent.keys() == names and _number(spent["seconds"]))
        and value.keys() == Cost.__dataclass_fields__.keys()
    )


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "prompt": lambda value: isinstance(value, str),
    **dict.fromkeys(SCORES, _score),
    "components": lambda value: _mapping(value, _component),
    "scored": lambda value: _number(value) and value > 0,
    "interrupted": lambda value: isinstance(value, bool),
    "cost": _cost,
    "timings": _timings,
    "config": _mapping,
}
