"""What a setting is: a field of a frozen dataclass that knows its kind, its bounds and how to describe itself.

The calls of the Python API, the options of the shell, the columns of prompt files and the tables of the docs follow
from these fields, so that a setting is added in one place.
"""

import dataclasses
import inspect
import json
import math
import numbers
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ses_jax.engine import fidelity
from ses_jax.exports.pictures import FORMATS
from ses_jax.searchers import registry

# What compiled programs count with.
COUNTS = 2**31
# Longer values are cut where messages show them.
SHOWN = 120
# Other libraries' words for settings, and ours.
FOREIGN = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "true_cfg_scale": 'guidance, as in {"scale": 3.5, "true_cfg": 4}',
    "generator": "seed, a whole number",
    "num_images_per_prompt": "a list of prompts, or budget",
    "max_sequence_length": "load",
    "output_dir": "out",
    "reward_model": "reward",
    "n_trials": "budget",
}


class Kind(NamedTuple):
    """A kind of values.

    Attributes:
      meaning: in messages, after "is not".
      check: from what a caller passes to the value; raises TypeError or ValueError for anything else.
      parse: the same from text, as tables and the shell have it.
      plain: from the value to plain JSON values.
    """

    meaning: str
    check: Callable[[Any], Any]
    parse: Callable[[str], Any]
    plain: Callable[[Any], Any] = lambda value: dict(value) if isinstance(value, Mapping) else value


def setting(
    default: Any,
    kind: Kind,
    doc: str,
    *,
    at_least: int | None = None,
    below: int | None = None,
    reference: str | None = None,
) -> Any:
    """A field of a dataclass of settings.

    Args:
      default: None is also taken where it is the default.
      kind: of its values.
      doc: what it means, in lower case, without a full stop.
      at_least, below: bounds of a number; whole numbers are below `COUNTS` where nothing else is said.
      reference: what the reference implementation calls it.
    """
    below = COUNTS if below is None and kind is WHOLE else below
    metadata = {"kind": kind, "doc": doc, "at_least": at_least, "below": below, "reference": reference}
    return dataclasses.field(default=default, metadata=metadata)


class Settings:
    """Base of the dataclasses of settings: their values are checked when one is made."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))

    def as_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {f.name: f.metadata["kind"].plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def described(group: type[Settings]) -> type[Settings]:
    """Decorates a dataclass of settings: its docstring goes on with its fields, those that it inherits too."""
    group.__no_type_check__ = True  # to type checkers at run time: wrong values get a message of their own
    if group.__doc__:  # Python may run without docstrings
        group.__doc__ += "\n\n    Attributes:\n" + _described(fields(group)) + "\n    "
    return group


def fields(*groups: type[Settings]) -> dict[str, dataclasses.Field]:
    """The settings of some dataclasses by name."""
    return {field.name: field for group in groups for field in dataclasses.fields(group)}


def read(field: dataclasses.Field, value: Any) -> Any:
    """A setting's value from a file, where numbers may be text.

    Raises:
      ValueError: naming setting and value.
    """
    try:
        return _checked(field, field.metadata["kind"].parse(value) if isinstance(value, str) else value)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _refusal(field, value) if not str(error).startswith(f"{field.name}=") else error from None


def takes(*groups: type[Settings], only: tuple[str, ...] | None = None) -> Callable[[Callable], Callable]:
    """Decorates a function whose `**settings` are the fields of some dataclasses: gives it their signature and docs.

    The line `{settings}` of its docstring becomes theirs.
    """

    def decorate(function):
        chosen = {name: field for name, field in fields(*groups).items() if only is None or name in only}
        own = inspect.signature(function)
        parameters = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters += [inspect.Parameter(n, keyword, default=f.default, annotation=f.type) for n, f in chosen.items()]
        function.__signature__ = own.replace(parameters=parameters)
        if function.__doc__:
            function.__doc__ = function.__doc__.replace("      {settings}", _described(chosen))
        return function

    return decorate


def gather(call: str, settings: Mapping[str, Any], *groups: type[Settings]) -> tuple[Any, ...]:
    """The dataclasses that a call's keyword arguments fill.

    Raises:
      TypeError: for a name that none of them has.
      ValueError: naming the setting that is wrong.
    """
    known = fields(*groups)
    for name in settings:
        if name in FOREIGN and name not in known:
            raise TypeError(f"{call}() got an unexpected argument {name!r}; here that is {FOREIGN[name]}")
        if name not in known:
            raise TypeError(f"{call}() got an unexpected argument {name!r}; settings are {', '.join(known)}")
    return tuple(group(**{n: v for n, v in settings.items() if n in fields(group)}) for group in groups)


def _described(chosen: Mapping[str, dataclasses.Field]) -> str:
    return "\n".join(f"      {name}: {field.metadata['doc']}." for name, field in chosen.items())


def _checked(field: dataclasses.Field, value: Any) -> Any:
    if value is None and field.default is None:
        return None
    try:
        value = field.metadata["kind"].check(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise (error if str(error).startswith(f"{field.name}=") else _refusal(field, value)) from None
    least, below = field.metadata["at_least"], field.metadata["below"]
    if least is not None and value < least:
        raise ValueError(f"{field.name}={shown(value)} must be at least {least}")
    if below is not None and value >= below:
        raise ValueError(f"{field.name}={shown(value)} must be less than {below}")
    return value


def check_text(text: str) -> str:
    """A text as it is; raises ValueError for one with half a character, which no file or tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text {shown(text)} is not Unicode: {error.reason} at character {error.start}") from None
    return text


def shown(value: Any) -> str:
    """A value for a message, in one short line."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of a user's object, or a number with more digits than Python writes
        text = f"<{type(value).__name__}>"
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _refusal(field: dataclasses.Field, value: Any) -> ValueError:
    return ValueError(f"{field.name}={shown(value)} is not {field.metadata['kind'].meaning}")


def _whole(value: Any) -> int:
    if isinstance(value, bool | str):
        raise TypeError
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral) and float(value).is_integer():
        return int(value)
    return operator.index(value)


def _whole_text(text: str) -> int:
    """Tables that once were arrays of floats write 512 as 512.0; long seeds don't fit a float."""
    return int(text) if text.strip().lstrip("+-").isdecimal() else _whole(float(text))


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # half a character is no text
    return value


def _picture(value: Any) -> str:
    if value not in FORMATS:
        raise ValueError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool | str) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _guidance(value: Any) -> Any:
    return {_text(name): _number(x) for name, x in value.items()} if isinstance(value, Mapping) else _number(value)


def _guidance_text(text: str) -> Any:
    if text.lstrip().startswith("{"):
        return json.loads(text)
    if "=" not in text:
        return float(text)
    return {name.strip(): float(value) for name, value in (part.split("=") for part in text.split(","))}


WHOLE = Kind("a whole number", _whole, _whole_text)
TRUTHS = {"true": True, "1": True, "false": False, "0": False}
TRUTH = Kind("true or false", _truth, lambda text: TRUTHS[text.strip().lower()])
TEXT = Kind("text", _text, _text)
GUIDANCE = Kind("a number, or options such as scale=3.5,true_cfg=4", _guidance, _guidance_text)
SEARCHER = Kind("a searcher", registry.load, registry.load, registry.describe)
FIDELITY = Kind(fidelity.FORMS, fidelity.load, fidelity.load, fidelity.describe)
PICTURE = Kind("one of png, jpeg and webp", _picture, _picture)
ANY = Kind("anything", lambda value: value, lambda text: text)
