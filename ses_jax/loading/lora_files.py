"""Where adapters come from: a file, a folder that peft or diffusers wrote, or the Hugging Face hub."""

import contextlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub

from ses_jax.convert.damage import json_object
from ses_jax.convert.engine import Weights
from ses_jax.convert.files import open_files, read_json, read_metadata

Loras = str | Path | Mapping[str | Path, float] | Sequence[Any]

USUAL_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PEFT_CONFIG = "adapter_config.json"
PEFT_METADATA = "lora_adapter_metadata"
NETWORKS = ("transformer", "text_encoder", "text_encoder_2")  # in that metadata, as in a checkpoint


class Adapter(NamedTuple):
    """An opened adapter.

    Attributes:
      source: what the user named.
      strength: what its changes are multiplied by.
      weights: its tensors.
      configs: peft's config of it, by network; that of "" is for all.
      made_for: the architecture that its file names; "" for none.
    """

    source: str
    strength: float
    weights: Weights
    configs: Mapping[str, Mapping[str, Any]]
    made_for: str


def pairs(adapters: Any) -> tuple[tuple[str, float], ...]:
    """Sources and strengths, in the order in which they are added.

    Args:
      adapters: a mapping of sources to strengths, a sequence of such pairs, or of sources, whose strength is 1, or one
        source.

    Raises:
      ValueError: for anything else, and for a strength that is not a finite number.
    """
    if adapters is None:
        return ()
    if isinstance(adapters, str | Path):
        adapters = [adapters]
    listed = adapters.items() if isinstance(adapters, Mapping) else adapters
    listed = listed if isinstance(listed, Iterable) else [listed]
    found = [(item, 1.0) if isinstance(item, str | Path) else item for item in listed]
    for item in found:
        if not _is_pair(item):
            raise ValueError(f"lora={item!r} is not a path or Hugging Face id with a strength, as in {{'path': 0.8}}")
    return tuple((str(source), float(strength)) for source, strength in found)


def open_adapters(adapters: Loras | None) -> list[Adapter]:
    """Finds adapters, downloaded first where they have to be, and opens them.

    Raises:
      FileNotFoundError: for a path that does not exist.
      ValueError: for a source that is no adapter, or holds several files, or one that is damaged.
    """
    return [_open(source, strength) for source, strength in pairs(adapters)]


def _is_pair(item: Any) -> bool:
    if not isinstance(item, Sequence) or len(item) != 2 or not isinstance(item[0], str | Path) or not item[0]:
        return False
    return isinstance(item[1], int | float) and not isinstance(item[1], bool) and math.isfinite(item[1])


def _open(source: str, strength: float) -> Adapter:
    file = _file_of(source)
    if file.suffix != ".safetensors":
        raise ValueError(f"lora {source}: {file.name} is no .safetensors file, which is the one form that is read")
    weights, metadata = open_files([file]), read_metadata(file)
    if not weights.headers:
        raise ValueError(f"lora {source}: {file} holds no tensors")
    return Adapter(source, strength, weights, _configs(file, metadata), metadata.get("modelspec.architecture", ""))


def _configs(file: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Peft's configs of an adapter: in the file, or beside one that peft wrote."""
    beside = file.parent / PEFT_CONFIG
    if file.name == USUAL_FILES[1] and beside.is_file():
        return {"": read_json(beside)}
    configs: dict[str, dict[str, Any]] = {}
    for key, value in json_object(metadata.get(PEFT_METADATA, "{}"), f"{PEFT_METADATA} of {file}").items():
        network, _, entry = key.partition(".")
        network, entry = (network, entry) if network in NETWORKS else ("", key)
        configs.setdefault(network, {})[entry] = value
    return configs


def _file_of(source: str) -> Path:
    """The local file of an adapter."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return path / _chosen(source, [file.name for file in path.glob("*.safetensors")])
    named = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:[:/](.+))?", source)
    if named is None or source.startswith((".", "/", "~")) or (named[2] is None and path.suffix == ".safetensors"):
        raise FileNotFoundError(f"lora {source}: no such file or folder")
    return _download(source, named[1], named[2])


def _download(source: str, repository: str, name: str | None) -> Path:
    try:
        names = [] if name else huggingface_hub.list_repo_files(repository)
        name = name or _chosen(source, [each for each in names if each.endswith(".safetensors")])
        if name.endswith(USUAL_FILES[1]):  # its scale stands beside it
            with contextlib.suppress(huggingface_hub.errors.EntryNotFoundError):
                huggingface_hub.hf_hub_download(repository, name.replace(USUAL_FILES[1], PEFT_CONFIG))
        return Path(huggingface_hub.hf_hub_download(repository, name))
    except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ValueError(
            f"lora {source!r} is neither a file nor could it be fetched from the Hugging Face hub: {error}. Check the "
            "name and the connection; HF_HUB_OFFLINE=1 needs the file named, as in organisation/name:file.safetensors"
        ) from error


def _chosen(source: str, names: Sequence[str]) -> str:
    """The one adapter among the files of a folder or repository."""
    usual = [name for name in USUAL_FILES if name in names]
    if len(names) == 1 or usual:
        return (usual or names)[0]
    if not names:
        raise ValueError(f"lora {source}: no .safetensors file in it")
    listed = ", ".join(sorted(names)[:20])
    raise ValueError(f"lora {source} holds {len(names)} files; name one, as in {source}:{sorted(names)[0]} ({listed})")
