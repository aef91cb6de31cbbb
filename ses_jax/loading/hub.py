"""Where weights come from: the packaged demo, a folder on disk (published or converted), or the Hugging Face hub."""

import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp

from ses_jax.convert.engine import Edits, Placement, Weights
from ses_jax.convert.files import open_files, open_named, read_json
from ses_jax.convert.pickles import open_pickle
from ses_jax.convert.table import Component
from ses_jax.loading import formats, network
from ses_jax.loading.configs import read_config

__all__ = [
    "default_dtype",
    "load_component",
    "load_weights",
    "local",
    "on_host",
    "open_named",
    "open_source",
    "params_dtype",
    "read_config",
    "read_json",
    "resolve",
    "resolve_file",
    "resolve_weights",
    "settings",
    "told",
]

LOG = logging.getLogger("ses_jax")
DEMO = Path(__file__).parents[1] / "demo"
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md")
# A pipeline's own weights lie in subfolders; single files beside them hold the same weights in other layouts.
PIPELINE_WEIGHTS, NETWORK_WEIGHTS = "*/*.safetensors", "model*.safetensors"
USUAL_WEIGHTS = r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors"
DTYPES = ("bfloat16", "float16", "float32")
VARIANTS = ("*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*")  # the same weights again, at another precision


def resolve(source: str | Path, *, weights: str | tuple[str, ...] | None = None) -> Path:
    """The local folder of a checkpoint, downloaded first where it has to be.

    Args:
      source: "demo", a folder, or a Hugging Face id such as "Tongyi-MAI/Z-Image-Turbo" of a pipeline or of a single
        network; or a file beside a `model_index.json` or `config.json`, which stands for its folder: one of these, or
        weights of the usual name.
      weights: pattern or patterns of the weights to download; None is those of a pipeline or a network in
        safetensors, "" none.

    Raises:
      FileNotFoundError: if a folder, or the demo, is not there.
      ValueError: if the source is none of the three or can't be downloaded.
    """
    if not isinstance(source, str | Path):
        raise TypeError(f"{source!r} is neither a name, a folder nor a Hugging Face id")
    if source == "demo":
        return _existing(DEMO, "the demo checkpoint is not part of this installation")
    folder = Path(source).expanduser()
    if source and folder.is_dir():  # an empty string would be the current folder
        return folder
    if folder.is_file():
        return _folder_of(folder)
    if isinstance(source, Path) or str(source).startswith((".", "/", "~")) or "\\" in str(source):
        return _existing(folder, "no such checkpoint folder")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ValueError(
            f"unknown model {source!r}: expected 'demo', an existing folder, or a Hugging Face id 'organisation/name'"
        )
    return _download(source, weights)


def local(source: str | Path) -> Path | None:
    """The folder of a checkpoint that needs no download; None for what can only be a name of the hub.

    Raises:
      FileNotFoundError: for a path where no folder is.
      ValueError: for a file that stands for no checkpoint.
    """
    text = str(source)
    is_path = isinstance(source, Path) or text.startswith((".", "/", "~")) or "\\" in text
    named = source == "demo" or is_path or (text and Path(text).expanduser().exists())
    return resolve(source, weights="") if named else None


def resolve_weights(source: str | Path, *, weights: str | tuple[str, ...]) -> Path:
    """As `resolve`, for networks that are published as one file: a file in such a layout is taken as it is."""
    file = Path(source).expanduser()
    return file if file.is_file() and source != "demo" else resolve(source, weights=weights)


def resolve_file(source: str | Path, folder: Path) -> Path:
    """A file, or a folder, with one network's weights: in a checkpoint's folder, anywhere, or on the hub.

    Args:
      source: name in the folder, path, or "organisation/name/file", downloaded first where it has to be.
      folder: the checkpoint's.

    Raises:
      FileNotFoundError: if it is none of these.
      ValueError: if it can't be downloaded.
    """
    for path in (folder / source, Path(source).expanduser()):
        if path.exists():
            return path
    if isinstance(source, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+/\S+\.(gguf|safetensors)", source):
        raise FileNotFoundError(f"{source} is neither in {folder} nor a file, nor 'organisation/name/file' of the hub")
    organisation, name, file = source.split("/", 2)
    try:
        return Path(huggingface_hub.hf_hub_download(f"{organisation}/{name}", file))
    except (OSError, ValueError) as error:
        raise ValueError(f"{source!r} could not be fetched from the Hugging Face hub: {error}") from error


def open_source(path: Path, stems: Sequence[str]) -> Weights:
    """The tensors of a file, or of the one in a folder that has one of some names (see `open_named`)."""
    if path.is_file():
        return open_files([path]) if path.suffix == ".safetensors" else open_pickle(path)
    return open_named(path, stems)


def load_component(
    folder: Path,
    component: Component,
    *,
    dtype: Any = None,
    sharding: Placement | None = None,
    edits: Edits | None = None,
    quantize: str | None = None,
    file: Path | None = None,
) -> tuple[Any, Any]:
    """Config and params of one network, from its published or converted folder.

    Args:
      folder: the network's own folder, such as `checkpoint/transformer`.
      component: which network to expect.
      dtype: of the params; None is bfloat16 on GPU and TPU, float32 on CPU.
      sharding: `(path, shape)` of a leaf of the params to where it is placed, None being NumPy on the host; without it,
        the default device.
      edits: changes of pieces of leaves on their way, see `adapters`; None is none.
      quantize: "int8" or "fp8" puts the kernels that the component names into eight bits.
      file: with the weights, instead of the folder's, see `network.load`.

    Raises:
      FileNotFoundError: naming the file that is absent.
      ValueError: naming the file, and the tensors where there are any to name, if something does not fit.
    """
    how = {"sharding": sharding, "edits": edits, "quantize": quantize, "file": file}
    start = time.monotonic()
    loaded = network.load(folder, component, dtype=params_dtype(dtype), **how)
    params = formats.arranged(component.turned, loaded.params, give_up=True)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    LOG.info("loaded %s: %.2f GB in %.1f s", file or folder, size / 1e9, time.monotonic() - start)
    return loaded.config, params


def load_weights(
    weights: Weights,
    component: Component,
    json: Mapping[str, Any],
    *,
    dtype: Any = None,
    quantize: str | None = None,
) -> Any:
    """Params of one network from tensors that are opened already.

    Args:
      weights: its published tensors.
      component: which network to expect.
      json: content of its `config.json`.
      dtype: of the params; None is bfloat16 on GPU and TPU, float32 on CPU.
      quantize: as in `load_component`.

    Raises:
      ValueError: naming the tensors that do not fit.
    """
    return network.read(weights, component, json, dtype=params_dtype(dtype), quantize=quantize).params


def settings(folder: Path) -> dict[str, Any]:
    """What a checkpoint says about itself in its optional `ses_jax.json`; empty without the file."""
    file = folder / "ses_jax.json"
    return read_json(file) if file.exists() else {}


def on_host(path: str, shape: tuple[int, ...]) -> None:
    """A placement for `load_component` that leaves every leaf in host memory."""


def params_dtype(dtype: Any = None) -> Any:
    """A dtype that was asked for; None is the machine's own.

    Raises:
      ValueError: for one that params can't have.
    """
    try:
        found = jnp.dtype(default_dtype() if dtype is None else dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is no dtype of weights; choose {', '.join(DTYPES)}")
    return found


def default_dtype() -> Any:
    """The dtype of params where none is asked for: bfloat16 where the hardware is made for it, float32 on CPU."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def _folder_of(file: Path) -> Path:
    if not any((file.parent / name).is_file() for name in ("model_index.json", "config.json")):
        raise ValueError(
            f"{file} is a file without a model_index.json or config.json beside it; expected the checkpoint's folder"
        )
    if file.suffix != ".json" and not re.fullmatch(USUAL_WEIGHTS, file.name):
        raise ValueError(
            f"{file} is not what would be read: of its folder that is model.safetensors, or what lies in subfolders. "
            f"Name the folder {file.parent}; a pipeline takes such a file for one of its networks, as in "
            f"transformer={file.name}"
        )
    return file.parent


def told(source: str | Path) -> str:
    """A source in words that are the same wherever the demo is installed."""
    path = Path(source)
    return str("demo" / path.relative_to(DEMO)) if path.is_relative_to(DEMO) else str(source)


def _existing(folder: Path, complaint: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{complaint}: {folder}")
    return folder


def _download(source: str, weights: str | tuple[str, ...] | None) -> Path:
    try:
        folder = Path(_snapshot(source, SMALL_FILES))
        if weights is None:
            weights = PIPELINE_WEIGHTS if (folder / "model_index.json").is_file() else NETWORK_WEIGHTS
        return Path(_snapshot(source, weights)) if weights else folder
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source!r} is neither a folder nor could it be fetched from the Hugging Face hub: {error}. Check the "
            "name and the connection; gated models need `hf auth login`; HF_HUB_OFFLINE=1 uses the local cache only"
        ) from error


def _snapshot(source: str, files: str | tuple[str, ...]) -> str:
    return huggingface_hub.snapshot_download(source, allow_patterns=files, ignore_patterns=VARIANTS)
