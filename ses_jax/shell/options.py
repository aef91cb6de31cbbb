"""The options of commands: made of the settings of the Python API, and turned back into its arguments."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from json import loads
from typing import Annotated, Any, Literal

import tyro

from ses_jax.engine.config import Placement, RenderConfig, RunConfig, SearchConfig
from ses_jax.engine.models import find_pipeline
from ses_jax.engine.settings import fields, gather, read
from ses_jax.planner.plan import PLANNED
from ses_jax.rewards.host import raised_by

Quantize = Literal["int8", "fp8"] | None

# How the shell says what Python says with values that are no text or number.
IN_THE_SHELL: dict[str, tuple[Any, Any, str]] = {
    "model": (str, "demo", '"demo", a folder, or a Hugging Face id'),
    "reward": (
        str | None,
        None,
        'a name such as "pick" (see `ses-jax models`), your own function "module:function", or a mixture of both such '
        'as "pick=1,hps=0.5"; the model\'s own by default',
    ),
    "report": (tuple[str, ...], (), "rewards that score every image without driving the search"),
    "guidance": (
        str | None,
        None,
        'guidance scale, in the model\'s own convention, or its own options such as "scale=3.5,true_cfg=4"',
    ),
    "searcher": (
        str,
        "ses",
        'what proposes candidates: "ses", "best-of-n", "zero-order" or "evosax", with options as in "ses,explore=20", '
        'or an object of your own "module:object"',
    ),
    "fidelity": (
        str,
        "full",
        'how candidates are scored: "full", by a preview each; "auto"; or by cheaper looks after which only the best '
        'go on, as in "half:0.3", "early3:0.5" or "half:0.5>early4:0.5"',
    ),
    "mesh": (str | None, None, 'devices to spread over, such as "data=4,model=2"'),
}
LOADING = {
    "offload_text_encoder": (
        bool,
        False,
        "keep weights in host memory, and the text encoders off the device while it makes images",
    ),
    "lora": (
        tyro.conf.UseAppendAction[tuple[str, ...]],
        (),
        "an adapter to merge into the weights, a file, folder or Hugging Face id with its strength, as in "
        '"style.safetensors=0.8"; may be given several times',
    ),
    "schedule": (
        tyro.conf.UseAppendAction[tuple[str, ...]],
        (),
        'an entry of the scheduler\'s config to override, as in "shift=3.0"; may be given several times',
    ),
    "quantize": (
        Quantize,
        None,
        "int8 or fp8: the large layers of transformer, text encoders and reward in eight bits, half their memory",
    ),
    "option": (tuple[str, ...], (), 'the model family\'s own options for loading, such as "band=unpacked"'),
}


def options(name: str, *groups: type, only: Sequence[str] | None = None) -> Any:
    """The options of a command, as a dataclass for tyro: those of settings, and what `load` stands for."""
    known = {
        field.name: IN_THE_SHELL.get(field.name, (field.type, field.default, field.metadata["doc"]))
        for field in fields(*groups).values()
        if only is None or field.name in only
    }
    known |= LOADING if known.pop("load", None) else {}
    described = (
        (field, Annotated[kind, tyro.conf.arg(help=f"{doc}.")], dataclasses.field(default=default))
        for field, (kind, default, doc) in known.items()
    )
    return dataclasses.make_dataclass(name, described, frozen=True)


SearchOptions = options("SearchOptions", RunConfig, SearchConfig, Placement)
RenderOptions = options("RenderOptions", RenderConfig, Placement)
PlanOptions = options("PlanOptions", SearchConfig, only=PLANNED)


def arguments(chosen: Any) -> dict[str, Any]:
    """The options of a command as arguments of the call that it stands for."""
    given = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)}
    if given["guidance"] is not None:
        given["guidance"] = read(fields(SearchConfig)["guidance"], given["guidance"])
    if "option" in given:
        given["load"] = parse_options(given.pop("option"))
        given["load"] |= {"offload_text_encoder": True} if given.pop("offload_text_encoder") else {}
        lora, schedule = (given.pop(name) for name in ("lora", "schedule"))
        given["load"] |= {"lora": tuple(map(parse_adapter, lora))} if lora else {}
        given["load"] |= {"schedule": parse_schedule(schedule)} if schedule else {}
        given["load"] |= {"quantize": kind} if (kind := given.pop("quantize")) else {}
    if given.get("reward") is not None:
        given["reward"] = parse_reward(given["reward"])
    if ":" in given.get("searcher", ""):
        given["searcher"] = parse_part(given["searcher"], "searcher")
    if "report" in given:
        given["report"] = {parse_part(name): 1.0 for name in given["report"]} or None
    return given


def rendered_with(model: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate`, with the defaults of the model that it has just loaded filled in, as JSON has them."""
    config, place = gather("generate", given, RenderConfig, Placement)
    pipeline = find_pipeline(model, place.mesh, **(place.load or {}))  # it is kept from that call
    return {**given, **config.with_defaults(pipeline).as_json()}


def parse_reward(text: str) -> Any:
    """`"pick"` and `"module:function"` as what they name; `"pick=1,module:function=0.5"` as a mapping to weights."""
    if "=" not in text:
        return parse_part(text)
    try:
        weights = [(name.strip(), float(weight)) for name, weight in (part.split("=") for part in text.split(","))]
    except ValueError:
        raise ValueError(f"--reward {text}: expected a name, or weights such as pick=1,hps=0.5") from None
    names = [name for name, _ in weights]
    if len(set(names)) < len(names):
        raise ValueError(f"--reward {text}: a name is there twice")
    return {parse_part(name): weight for name, weight in weights}


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """`["band=unpacked", "max_tokens=256"]` as a mapping; what looks like a whole number is one."""
    parsed = {}
    for option in options:
        name, separator, value = option.partition("=")
        if not separator:
            raise ValueError(f"--option {option}: expected NAME=VALUE")
        parsed[name] = int(value) if value.isdecimal() else value
    return parsed


def parse_adapter(text: str) -> tuple[str, float]:
    """`"PATH=0.8"` as source and strength; `"PATH"` has a strength of 1, also with = in it."""
    source, separator, strength = text.rpartition("=")
    try:
        return (source, float(strength)) if separator else (text, 1.0)
    except ValueError:
        return text, 1.0


def parse_schedule(entries: Sequence[str]) -> dict[str, Any]:
    """`["shift=3.0", "shift_terminal=null"]` as a mapping; values are JSON."""
    try:
        return {name.strip(): loads(value) for name, value in (entry.split("=") for entry in entries)}
    except ValueError:
        raise ValueError(f"--schedule {' '.join(entries)}: expected NAME=VALUE, such as shift=3.0") from None


def parse_part(name: str, kind: str = "reward") -> Any:
    """A name as it is; `"module:function"` as the function, modules of the current folder included."""
    if ":" not in name:
        return name
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        with raised_by(name):
            return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{kind} {name!r}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
