"""GGUF files of diffusion transformers and of T5's encoder, dequantised as they are read.

The package `gguf` does so (extra "gguf").
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from ses_jax.convert import arrays
from ses_jax.convert.damage import damaged
from ses_jax.convert.engine import ConversionError, Header, Weights

ROWS = 64
PLAIN = ("F32", "F16", "BF16")
RESHAPED = "comfy.gguf.orig_shape."  # where a tensor lies in another shape than it has
# They have names of llama.cpp's own, and some have other weights under them.
LANGUAGE_MODELS = ("t5", "llama", "mistral3", "qwen2", "qwen2vl", "qwen3", "qwen3vl", "clip")


def open_gguf(file: Path) -> Weights:
    """The tensors of a GGUF file, in the order of PyTorch's axes; those that are quantised count as bfloat16.

    Raises:
      ConversionError: naming the file, if it is corrupt, a language model, or has tensors that are not decoded.
      ValueError: if the package is not installed.
    """
    gguf = _package(file)
    try:
        reader = _reader(gguf, file)
        field = reader.get_field("general.architecture")
        architecture = field and field.contents()
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise damaged(file, error) from error
    if architecture in LANGUAGE_MODELS:
        raise ConversionError(
            f"{file} is a language model ({architecture}); of text encoders only T5's is read as GGUF"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    # Programs in C++ count no axes beyond the last one that is longer than one, which here is the first.
    headers = {name: Header(_shape(reader, t), _dtype(gguf, file, t), str(file), True) for name, t in tensors.items()}

    def read(name, index=None):
        tensor, shape = tensors[name], headers[name].shape
        rows = _rows(shape, index)
        if rows is not None and tensor.data.shape[0] == shape[0]:
            return _decoded(gguf, tensor.data[rows], tensor.tensor_type)
        values = _decoded(gguf, tensor.data, tensor.tensor_type).reshape(shape)
        return values if index is None else values[index]

    return Weights(headers, read, read)


def _decoded(gguf: ModuleType, data: np.ndarray, kind: Any) -> np.ndarray:
    """The values of a tensor; rows of what is quantised by threads side by side, float32."""
    if kind.name in PLAIN:
        return data.view(jnp.bfloat16) if kind.name == "BF16" else data
    if data.ndim == 1:
        return gguf.quants.dequantize(data, kind)
    count, size = gguf.GGML_QUANT_SIZES[kind]
    out = arrays.empty((*data.shape[:-1], data.shape[-1] // size * count), np.float32)

    def decode(start):
        band = slice(start, start + ROWS)
        out[band] = gguf.quants.dequantize(data[band], kind)

    arrays.in_threads(decode, range(0, len(data), ROWS), out.nbytes)
    return out


def _reader(gguf: ModuleType, file: Path) -> Any:
    """A reader that stops at the end of a file; the package's own goes on for as long as an array is said to be."""

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, **more):
            found = super()._get(offset, dtype, count, **more)
            if len(found) < count:
                raise IndexError("it ends too early")
            return found

    return Reader(file)


def _rows(shape: tuple[int, ...], index: Any) -> slice | None:
    """The rows of a matrix that are all of what is asked for; None where it is not rows."""
    return index[0] if index is not None and len(index) == 1 and len(shape) == 2 else None


def _shape(reader: Any, tensor: Any) -> tuple[int, ...]:
    original = reader.get_field(RESHAPED + tensor.name)
    return tuple(map(int, original.contents() if original else np.flip(tensor.shape)))


def _dtype(gguf: ModuleType, file: Path, tensor: Any) -> str:
    kind = tensor.tensor_type.name
    if kind not in PLAIN and tensor.tensor_type not in gguf.quants._type_traits:
        raise ConversionError(f"{tensor.name} in {file} is {kind}, which the package gguf does not decode")
    return kind if kind in PLAIN else "BF16"


def _package(file: Path) -> ModuleType:
    """The package is imported where it is needed, and nothing else needs it."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"{file} takes the package gguf: pip install 'ses_jax[gguf]'") from error
    return gguf
