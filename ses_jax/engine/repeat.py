"""What stands for a result elsewhere: the command and the call that repeat it, and the text in its pictures."""

import importlib.metadata
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ses_jax.engine.config import SearchConfig
from ses_jax.engine.files import expanded
from ses_jax.engine.saved import check_single, read_summary
from ses_jax.exports import pictures
from ses_jax.exports.pictures import Notes
from ses_jax.rewards.scorers import KINDS

Facts = Mapping[str, Any]
# What a result notes down of how its model differs from the published one, where it does.
CHANGES = ("lora", "schedule", "quantize", "files")
# How fast a search is and not what comes out; and a number of evaluations has become a budget.
_FREE = ("chunk", "nfe")


def facts(prompt: str, config: Facts, **more: Any) -> dict[str, Any]:
    """What a picture says of itself, as plain JSON values.

    Args:
      prompt: of the image.
      config: of its result.
      more: whatever else is to be known of it, such as scores.
    """
    kept = {name: value for name, value in config.items() if name not in _FREE}
    return {"prompt": prompt, **more, "config": kept, "versions": versions()}


def versions() -> dict[str, str]:
    """Of the packages that an image depends on."""
    return {name: _version(name) for name in ("ses_jax", "jax")}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout that was not installed
        return "unknown"


def notes(about: Facts) -> Notes:
    """The notes of a picture, from its `facts`."""
    return Notes(parameters(about), about)


def parameters(about: Facts) -> str:
    """The text that viewers know: the prompt, the negative prompt, and a line of settings."""
    config = about["config"]
    guidance = None if config.get("guidance") is None else json.dumps(config["guidance"])
    settings = {
        "Steps": config.get("steps"),
        "Sampler": "Euler",
        "CFG scale": guidance and guidance.replace('"', "").replace(",", ";"),
        "Seed": config.get("seed"),
        "Size": f"{config.get('width')}x{config.get('height')}",
        "Model": config.get("model"),
        "SES budget": config.get("budget"),
        "SES reward": config.get("reward"),
        "SES score": about.get("score"),
        "Version": f"ses_jax {about['versions'].get('ses_jax')}",
    }
    negative = config.get("negative_prompt")
    lines = [about["prompt"], *([] if negative is None else [f"Negative prompt: {negative}"])]
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None)])


def settings(config: Facts) -> dict[str, Any]:
    """Arguments of `search` that give a result again, but for the prompt and those that are the default anyway.

    A reward or searcher of the user's own is there by its name.
    """
    usual = SearchConfig().as_json()
    own = {name: config[name] for name in usual if name in config and name not in _FREE}
    weights = config.get("rewards") or ({config["reward"]: 1.0} if "reward" in config else {})
    driving = {name: weight for name, weight in weights.items() if weight}
    base = config.get("base_noise") or {}
    found = {
        "model": config.get("model", "demo"),
        "reward": next(iter(driving)) if len(driving) == 1 else driving,
        "report": [name for name, weight in weights.items() if not weight],
        "load": _load(config),
        "base_noise": base.get("file") or base.get("sha256"),
        "index": config.get("prompt_index", 0),
    }
    found = {name: value for name, value in found.items() if value}
    return found | {name: value for name, value in own.items() if value != usual[name]}


def _load(config: Facts) -> dict[str, Any]:
    """What the model was loaded with."""
    if "load" in config:
        return dict(config["load"])
    changes = {name: config[name] for name in CHANGES if name in config}
    return changes | dict(changes.pop("files", {}))


def python(prompt: str, config: Facts) -> str:
    """The call that gives a result again; functions of the user's own stand there by their name."""
    named = {name: _code(name, value) for name, value in settings(config).items()}
    arguments = [json.dumps(prompt, ensure_ascii=False), *(f"{name}={value}" for name, value in named.items())]
    return "ses_jax.search(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")"


def _code(name: str, value: Any) -> str:
    if name not in ("reward", "report"):
        return repr(value)
    if isinstance(value, str):
        return _reward_code(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_reward_code(part)}: {weight:g}" for part, weight in value.items()) + "}"
    return "[" + ", ".join(map(_reward_code, value)) + "]"


def _reward_code(name: str) -> str:
    return repr(name) if name in KINDS else name


def command(prompt: str, config: Facts) -> str:
    """The shell's command that gives a result again."""
    return shlex.join(["ses-jax", "search", prompt, *arguments(config)])


def arguments(config: Facts) -> list[str]:
    """The shell's options for `settings`; functions of the user's own are `MODULE:name`."""
    words = []
    for name, value in settings(config).items():
        if name == "load":
            words += _load_words(dict(value))
        elif isinstance(value, bool):
            words.append("--" + ("" if value else "no-") + name.replace("_", "-"))
        else:
            words += ["--" + name.replace("_", "-"), *_words(name, value)]
    return words


def _load_words(load: dict[str, Any]) -> list[str]:
    """The options for what a model was loaded with; some have one of their own."""
    words = [f"--lora={source}={strength}" for source, strength in load.pop("lora", ())]
    words += [f"--schedule={name}={json.dumps(value)}" for name, value in load.pop("schedule", {}).items()]
    words += [f"--quantize={load.pop('quantize')}"] if "quantize" in load else []
    return words + (["--option", *(f"{name}={value}" for name, value in load.items())] if load else [])


def _words(name: str, value: Any) -> list[str]:
    if name == "report":
        return [_reward_word(part) for part in value]
    if name == "reward":
        parts = {value: 1} if isinstance(value, str) else value
        named = {_reward_word(part): weight for part, weight in parts.items()}
        return list(named) if len(named) == 1 else [",".join(f"{part}={weight:g}" for part, weight in named.items())]
    if name == "searcher" and isinstance(value, Mapping):
        rest = [f"{option}={chosen}" for option, chosen in value.items() if option != "name"]
        return [",".join([value["name"], *rest])]
    return [",".join(f"{key}={x}" for key, x in value.items()) if isinstance(value, Mapping) else str(value)]


def _reward_word(name: str) -> str:
    return name if name in KINDS else f"MODULE:{name}"


def read(path: str | Path) -> dict[str, Any]:
    """The `facts` of a picture, of a result's folder, or of its `result.json`.

    Raises:
      ValueError: for anything else.
      OSError: if there is no such file.
    """
    path = expanded(path)
    check_single(path)
    path = path / "result.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a picture of ses_jax, or the folder of a result")
    if path.suffix != ".json":
        return _checked(path, pictures.read(path).facts)
    try:
        summary = read_summary(path, only=("prompt", "config"))
    except ValueError as error:
        raise ValueError(f"{path} is not the result.json of a search: {error}") from error
    return _checked(path, facts(summary["prompt"], summary["config"], image="best", **_scores(summary)))


def _checked(path: Path, about: Any) -> dict[str, Any]:
    """Facts from a file, which anybody may have changed."""
    about = about if isinstance(about, Mapping) else {}
    config = about.get("config")
    fine = isinstance(about.get("prompt"), str) and isinstance(config, Mapping)
    fine = fine and isinstance(about.get("versions"), Mapping)
    mappings = ("load", "rewards", "base_noise")
    if not fine or not all(isinstance(config.get(name) or {}, Mapping) for name in mappings):
        raise ValueError(f"{path} says of itself what ses_jax did not write")
    return dict(about)


def _scores(summary: Facts) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name.endswith("score")}


def expand(words: Sequence[str]) -> list[str]:
    """A command line whose `--like FILE` is preceded by that file's settings; what else it says stands on top.

    A file that is not there stays for the command to complain of.

    Raises:
      ValueError: for a file that says nothing of settings, or was made with things that only its maker has.
    """
    words = list(words)
    for place, word in enumerate(words):
        name, _, value = word.partition("=")
        file = value or (words[place + 1] if place + 1 < len(words) else "")
        if name == "--like" and expanded(file).exists():
            return [words[0], *_repeatable(file, words), *words[1:]]
    return words


def _repeatable(file: str, words: Sequence[str]) -> list[str]:
    """The options for a file's settings, but for those that others of the command stand in the place of."""
    config = read(file)["config"]
    if "budget" not in config:
        raise ValueError(f"{file} was made without a search; its settings are not those of one")
    given = {word.partition("=")[0] for word in words}
    config = {name: value for name, value in config.items() if name != "prompt_index"}  # another prompt is another draw
    if "--nfe" in given:
        config.pop("budget")
    if "--base-noise" in given:
        config.pop("base_noise", None)
    if "load" in config:  # options that may be there several times would add up
        config["load"] = {name: value for name, value in config["load"].items() if f"--{name}" not in given}
    base = config.get("base_noise")
    if base and not (base.get("file") and Path(base["file"]).exists()):
        raise ValueError(f"{file} came from a noise that is not here; give it with --base-noise FILE")
    own = [name for name in config.get("rewards") or () if name not in KINDS]
    if own and "--reward" not in given:
        raise ValueError(f"{file} was made with a reward of its maker's own, {own[0]!r}; give --reward MODULE:{own[0]}")
    if own:
        config |= {"rewards": {name: weight for name, weight in config["rewards"].items() if not weight} | {"clip": 1}}
    return arguments(config)
