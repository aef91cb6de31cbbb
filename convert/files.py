"""Reading and writing the published files: safetensors, in one file or in shards with an index, and JSON.

Files of torch are read as well (`pickles.py`), never written.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from ses_jax.convert import arrays
from ses_jax.convert.damage import damaged
from ses_jax.convert.engine import ConversionError, Header, Weights
from ses_jax.convert.pickles import open_pickle

SHARD_BYTES = 4 << 30
PICKLES = (".pt", ".pth")
INDEX = ".safetensors.index.json"
FLOAT8 = {"F8_E4M3": np.dtype(jnp.float8_e4m3fn), "F8_E5M2": np.dtype(jnp.float8_e5m2)}
# What safetensors' names of dtypes stand for.
STORED = FLOAT8 | {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "BOOL": np.dtype(bool),
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)},
}


class Tensor(NamedTuple):
    """Where a tensor lies: from which byte of which file on, and as what."""

    file: str
    start: int
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the file, if it isn't a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def open_weights(folder: Path, stem: str) -> Weights:
    """The published tensors of one network's folder; data is read when asked for.

    Args:
      folder: holds `{stem}.safetensors`, or shards and `{stem}.safetensors.index.json`.
      stem: name of the weights file.

    Raises:
      FileNotFoundError: if there are no such files, or a shard is absent.
      ConversionError: naming a file that is truncated or corrupt, or an index that its shards don't agree with.
    """
    index = folder / f"{stem}{INDEX}"
    if index.is_file():
        return _open_sharded(index)
    file = folder / f"{stem}.safetensors"
    if not file.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"no weights in {folder}: expected {stem}.safetensors or {stem}{INDEX}, found {found}")
    return open_files([file])


def open_named(folder: Path, stems: Sequence[str]) -> Weights:
    """The tensors of the first file there is with one of some names, as safetensors or as torch writes them.

    Args:
      folder: holds `{stem}.safetensors`, `{stem}.pt` or `{stem}.pth` for one of the stems.
      stems: names without suffix, the preferred one first.

    Raises:
      FileNotFoundError: naming what was expected and what is there.
      ConversionError: naming a file that is corrupt, or that holds more than tensors.
    """
    for file in (folder / f"{stem}{suffix}" for stem in stems for suffix in (".safetensors", *PICKLES)):
        if file.is_file():
            return open_pickle(file) if file.suffix in PICKLES else open_files([file])
    found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    expected = " or ".join(f"{stem}.safetensors, .pt or .pth" for stem in stems)
    raise FileNotFoundError(f"no weights in {folder}: expected {expected}, found {found}")


def open_files(files: Iterable[Path]) -> Weights:
    """The tensors of some safetensors files together.

    Raises:
      ConversionError: naming a file that is truncated or corrupt, or a tensor that is in two files.
    """
    headers, found = {}, {}
    for file in files:
        for name, tensor in _tensors(file).items():
            if name in headers:
                raise ConversionError(f"{name} is both in {headers[name].file} and in {file}")
            headers[name], found[name] = Header(tensor.shape, tensor.dtype, str(file)), tensor

    def read(name, index=None):
        return _read(found[name], name, index)

    return Weights(headers, read, read_part=read)


def read_metadata(file: Path) -> dict[str, str]:
    """The text that stands in a safetensors file's header beside its tensors.

    Raises:
      ConversionError: naming a file that is truncated or corrupt.
    """
    try:
        with safetensors.safe_open(os.fspath(file), "numpy") as opened:
            return opened.metadata() or {}
    except safetensors.SafetensorError as error:
        raise damaged(file, error) from error


def write_weights(
    folder: Path, stem: str, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes tensors as `{stem}.safetensors`, or as shards with an index where they are larger than one shard.

    Files appear under their names only when all are complete. The host holds one shard at a time.

    Raises:
      OSError: naming the folder, where the disk is full, or may not be written to.
    """
    parts, weight_map, total = [], {}, 0
    try:
        for shard in _shards(tensors, shard_bytes):
            parts.append(folder / f".{stem}-{len(parts)}.partial")
            safetensors.numpy.save_file(shard, parts[-1], metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, len(parts))
            total += sum(array.nbytes for array in shard.values())
        names = [_shard_name(stem, number, len(parts)) for number in range(1, len(parts) + 1)]
        for part, name in zip(parts, names, strict=True):
            part.chmod(0o644)  # the writer leaves files that only their owner can read
            part.rename(folder / name)
    except safetensors.SafetensorError as error:
        raise OSError(f"cannot write {stem}.safetensors to {folder}: {error}") from error
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    if len(names) > 1:
        files = {name: names[number - 1] for name, number in weight_map.items()}
        write_json(folder / f"{stem}{INDEX}", {"metadata": {"total_size": total}, "weight_map": files})


def _open_sharded(index: Path) -> Weights:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_name, weight_map.values())):
        raise ConversionError(f"{index} has no weight_map of names of files beside it")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise FileNotFoundError(f"{index} names files that do not exist: {', '.join(absent)}")
    weights = open_files(files)
    wrong = {
        name for name in weight_map.keys() | weights.headers.keys() if not _agree(index, weight_map, weights, name)
    }
    if wrong:
        raise ConversionError(f"{index} and its files disagree about where these are: {', '.join(sorted(wrong)[:20])}")
    return weights


def _agree(index: Path, weight_map: Mapping[str, str], weights: Weights, name: str) -> bool:
    header = weights.headers.get(name)
    return header is not None and name in weight_map and header.file == str(index.parent / weight_map[name])


def _is_name(name: object) -> bool:
    """Whether it is the name of a file in the same folder: an index leads nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _tensors(file: Path) -> dict[str, Tensor]:
    """What a file says about its tensors; the package's reader checks that, also against the file's size."""
    try:
        with safetensors.safe_open(os.fspath(file), "numpy"), open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
    except (safetensors.SafetensorError, ValueError, OverflowError) as error:
        raise damaged(file, error) from error
    header.pop("__metadata__", None)
    return {
        name: Tensor(str(file), 8 + size + said["data_offsets"][0], tuple(said["shape"]), said["dtype"])
        for name, said in header.items()
    }


def _read(tensor: Tensor, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
    """One tensor or part of it, of which rows alone are read. What would be read through a mapping stays in memory."""
    if tensor.dtype not in STORED:
        raise ConversionError(f"{name} in {tensor.file} is {tensor.dtype}, which is not read")
    if index is None or len(index) > 1 or index[0].step not in (None, 1):
        whole = arrays.read(tensor.file, tensor.start, tensor.shape, STORED[tensor.dtype])
        return whole if index is None else whole[index]
    first, last, _ = index[0].indices(tensor.shape[0])
    row = math.prod(tensor.shape[1:]) * STORED[tensor.dtype].itemsize
    shape = (max(last - first, 0), *tensor.shape[1:])
    return arrays.read(tensor.file, tensor.start + first * row, shape, STORED[tensor.dtype])


def _shards(tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    """Groups tensors in order; a group is larger than `shard_bytes` only if one tensor is."""
    shard, size = {}, 0
    for name, array in tensors:
        if shard and size + array.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        # The writer takes the memory as it lies, so the order of the elements has to be C's.
        shard[name] = np.ascontiguousarray(array).reshape(array.shape)
        size += array.nbytes
    yield shard


def _shard_name(stem: str, number: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"
