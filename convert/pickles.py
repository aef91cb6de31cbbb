"""Reading tensors from files that `torch.save` wrote, without running what is in them.

A pickle is a program, so only what a dictionary of tensors needs may be called: by torch's own restricted reader where
torch is installed, else by the one below, which knows the zip format that torch writes since 1.6.
"""

import collections
import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ses_jax.convert.damage import damaged, is_pointer
from ses_jax.convert.engine import ConversionError, Header, Weights

REMEDY = "convert the file to safetensors where you trust it"
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
TORCH_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}


def open_pickle(file: Path) -> Weights:
    """The tensors of a `.pt` or `.pth` file; those under `state_dict` where it has that entry.

    Raises:
      ConversionError: naming the file, and what in it is not a tensor, if it is corrupt or holds more than tensors.
    """
    try:
        import torch  # takes two seconds
    except ImportError:
        return _open(file)
    return _open_with(torch, file)


def _open_with(torch: Any, file: Path) -> Weights:
    """By torch's reader; zip files stay on disk until a tensor is read."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:  # its text recommends to run the file
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise _refusal(file, named[1]) from None
        if is_pointer(file):
            raise damaged(file, error) from None
        raise ConversionError(f"{file} is corrupt or holds more than tensors: torch refuses it; {REMEDY}") from None
    except Exception as error:  # torch raises anything from RuntimeError to KeyError for damaged files
        raise damaged(file, error) from error
    names = {getattr(torch, dtype): name for dtype, name in TORCH_DTYPES.items()}
    tensors = _state(file, content, torch.Tensor)
    hollow = [name for name, tensor in tensors.items() if not _has_numbers(torch, tensor)]
    if hollow:
        raise ConversionError(f"{file} holds tensors without plain numbers: {', '.join(hollow[:20])}")
    headers = {
        name: Header(tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype)), str(file))
        for name, tensor in tensors.items()
    }
    return Weights(headers, lambda name: _from_torch(torch, tensors[name]))


def _has_numbers(torch: Any, tensor: Any) -> bool:
    """Whether a tensor is an array: not sparse, quantised or of the meta device, and no larger than its file."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _from_torch(torch: Any, tensor: Any) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has no such type of its own
        return tensor.view(torch.int16).numpy().view(DTYPES["BF16"])
    return tensor.numpy()


def _open(file: Path) -> Weights:
    """By the reader below; tensors are read from the file when asked for."""
    try:
        with zipfile.ZipFile(file) as archive:
            folder = _folder(archive)
            if _entry(archive, f"{folder}/byteorder", b"little").strip() != b"little":
                raise ConversionError(f"{file} is big-endian; {REMEDY}")
            _check_bounds(archive, file)
            program = archive.read(f"{folder}/data.pkl")
            _check_memo(program)
            content = _Unpickler(io.BytesIO(program), file).load()
    except ConversionError:
        raise
    except zipfile.BadZipFile as error:
        if is_pointer(file):
            raise damaged(file, error) from error
        raise ConversionError(f"{file} is corrupt, or older than torch 1.6; {REMEDY} (or install torch)") from error
    except Exception as error:  # a damaged pickle raises anything
        raise damaged(file, error) from error
    tensors = _state(file, content, _Tensor)
    headers = {name: Header(tensor.shape, tensor.dtype, str(file)) for name, tensor in tensors.items()}
    return Weights(headers, lambda name: _read(file, folder, name, tensors[name]))


def _check_bounds(archive: zipfile.ZipFile, file: Path) -> None:
    """Raises ValueError for entries that unpack to more than the file: torch compresses nothing."""
    size = file.stat().st_size
    large = [entry.filename for entry in archive.infolist() if entry.file_size > size]
    if large:
        raise ValueError(f"{large[0]} would be larger than the file")


def _check_memo(program: bytes) -> None:
    """Raises ValueError for places in the pickle's memory that it has no use for: they would be allocated."""
    for operation, argument, _ in pickletools.genops(program):
        if "PUT" in operation.name and not 0 <= argument <= len(program):
            raise ValueError(f"it remembers something at place {argument}")


class _Storage(NamedTuple):
    """A block of memory in the file: its name, type and number of elements."""

    key: str
    dtype: str
    size: int


class _Tensor(NamedTuple):
    """A view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """Name of the type, as safetensors spells it."""
        return self.storage.dtype


class _Rebuild:
    """Stands for `torch._utils._rebuild_tensor_v2`; without attributes that a pickle could set."""

    __slots__ = ()

    def __call__(self, storage, offset, shape, stride, requires_grad=False, hooks=None, metadata=None):
        if not isinstance(storage, _Storage):
            raise TypeError(f"a tensor without storage: {storage!r}")
        view = _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))
        last = view.offset + sum((n - 1) * step for n, step in zip(view.shape, view.stride, strict=True))
        sane = view.offset >= 0 and min(view.shape, default=0) >= 0 and min(view.stride, default=0) >= 0
        if not sane or (0 not in view.shape and last >= storage.size) or math.prod(view.shape) > storage.size:
            raise ValueError(f"a tensor outside its storage: {view}")
        return view


class _Parameter:
    """Stands for `torch._utils._rebuild_parameter`."""

    __slots__ = ()

    def __call__(self, data, requires_grad=False, hooks=None):
        return data


ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(),
    ("torch._utils", "_rebuild_parameter"): _Parameter(),
    ("torch", "Size"): tuple,
} | {("torch", name): dtype for name, dtype in STORAGES.items()}


class _Unpickler(pickle.Unpickler):
    """Knows the names in `ALLOWED` and refuses every other, before anything is called."""

    def __init__(self, stream: Any, file: Path):
        super().__init__(stream)
        self.file = file

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise _refusal(self.file, f"{module}.{name}")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size = pid
        if kind != "storage" or dtype not in DTYPES or not re.fullmatch(r"\w+", key):
            raise ValueError(f"an unknown reference: {pid}")
        return _Storage(key, dtype, int(size))


def _read(file: Path, folder: str, name: str, tensor: _Tensor) -> np.ndarray:
    """One tensor; the archive checks its checksum."""
    dtype = DTYPES[tensor.dtype]
    try:
        with zipfile.ZipFile(file) as archive:
            memory = np.frombuffer(archive.read(f"{folder}/data/{tensor.storage.key}"), dtype, tensor.storage.size)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ConversionError(f"{name} in {file} cannot be read: {error}") from error
    strides = tuple(step * dtype.itemsize for step in tensor.stride)
    return np.lib.stride_tricks.as_strided(memory[tensor.offset :], tensor.shape, strides, writeable=False)


def _folder(archive: zipfile.ZipFile) -> str:
    """The one folder in the archive, named after the file as it was when it was written."""
    pickled = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickled) != 1:
        raise ValueError("there is no single data.pkl in it")
    return pickled[0].removesuffix("/data.pkl")


def _entry(archive: zipfile.ZipFile, name: str, default: bytes) -> bytes:
    return archive.read(name) if name in archive.namelist() else default


def _state(file: Path, content: Any, tensor: type | Callable) -> Mapping[str, Any]:
    """The dictionary of tensors in what was read."""
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping):
        raise ConversionError(f"{file} holds a {type(state).__name__}, not a dictionary of tensors; {REMEDY}")
    others = [str(name) for name, value in state.items() if not isinstance(value, tensor)]
    if others:
        raise ConversionError(f"{file} holds more than tensors: {', '.join(others[:20])}; {REMEDY}")
    return state


def _refusal(file: Path, name: str) -> ConversionError:
    return ConversionError(f"{file} asks to run {name} and is not read further, for safety; {REMEDY}")
