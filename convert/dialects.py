"""Quantised files as they are published, read as the tensors that they stand for.

    scaled float8    X.weight in F8, with X.scale_weight (Comfy, musubi) or X.weight_scale (Comfy, BFL), or without:
                     one scale, one for each row, or one for each block of a row
    int8             X.weight in I8, with X.weight_scale, or with X.SCB, the largest of each row (bitsandbytes)
    nf4              X.weight in U8, two to a byte, with X.weight.absmax and more (bitsandbytes)
    GGUF             see `gguf.py`

Tensors come in float32 and count as bfloat16 where a file's own dtype is asked for. What is packed in any other way is
refused by name.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ses_jax.convert import arrays
from ses_jax.convert.damage import json_object
from ses_jax.convert.engine import DTYPES, ConversionError, Header, Weights
from ses_jax.convert.files import FLOAT8, open_files, read_metadata
from ses_jax.convert.gguf import open_gguf

Index = tuple[slice, ...] | None
Read = Callable[[Index], np.ndarray]

LOGICAL = "BF16"
# Files for Comfy may hold more than the transformer, whose names then begin with one of these.
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
SCALES = (".scale_weight", ".weight_scale")
UNUSED = (".scale_input", ".input_scale", ".comfy_quant", ".weight_format")  # of activations, and what a file says
MARKER = "scaled_fp8"
TOKENIZERS = ("tekken_model", "spiece_model", "tokenizer_json")  # which files for Comfy bring along, as bytes
COMFY = "_quantization_metadata"
COMFY_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
NF4 = ".quant_state.bitsandbytes__nf4"
NF4_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", NF4)
# Told by names that nothing else has.
REFUSED = {
    ".weight_scale_2": "NVFP4",
    "._weight_qdata": "torchao's packing",
    ".wscales": "nunchaku's packing (SVDQuant)",
    ".qweight": "packing as of nunchaku, GPTQ or AWQ",
    ".scales": "packing as of MLX, GPTQ or AWQ",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes' fp4",
}
INSTEAD = "expected scaled float8, int8, bitsandbytes' nf4 or GGUF"


class Tensor(NamedTuple):
    """A tensor that others in the file are needed for, and how it is read."""

    header: Header
    read: Read
    helpers: tuple[str, ...]


def open_file(file: Path) -> Weights:
    """The tensors of a file, safetensors or GGUF, quantised or not.

    Raises:
      ConversionError: naming the file, if it is corrupt or packed in a way that is not known.
      ValueError: naming the package that it takes, if that is not installed.
    """
    if file.suffix == ".gguf":
        return open_gguf(file)
    if file.suffix != ".safetensors":
        raise ConversionError(f"{file}: expected a .safetensors or .gguf file")
    return logical(open_files([file]))


def logical(weights: Weights) -> Weights:
    """The tensors that published ones stand for; weights of which none is quantised are given back as they are.

    Raises:
      ConversionError: naming file and tensor, for packings that are not known.
    """
    if all(header.dtype in DTYPES for header in weights.headers.values()):
        return weights
    _refuse(weights)
    headers = {name: header for name, header in weights.headers.items() if name not in TOKENIZERS}
    tensors = {name: found for name, header in headers.items() if (found := _tensor(weights, name, header))}
    helpers = {name for found in tensors.values() for name in found.helpers}
    kept = {
        name: tensors[name].header if name in tensors else header
        for name, header in headers.items()
        if name not in helpers and not name.endswith((*UNUSED, MARKER))
    }

    def read(name, index=None):
        if name in tensors:
            return tensors[name].read(index)
        return weights.read(name) if index is None else weights.read_part(name, index)

    return Weights(kept, read, read)


def without_prefix(weights: Weights) -> Weights:
    """The transformer's tensors of a file, their names without what files for Comfy put before them."""
    return below(weights, next((p for p in PREFIXES if any(name.startswith(p) for name in weights.headers)), ""))


def below(weights: Weights, prefix: str) -> Weights:
    """The tensors whose names begin with a prefix, without it."""
    headers = {n.removeprefix(prefix): header for n, header in weights.headers.items() if n.startswith(prefix)}
    return Weights(
        headers,
        lambda name: weights.read(prefix + name),
        weights.read_part and (lambda name, index: weights.read_part(prefix + name, index)),
    )


def _tensor(weights: Weights, name: str, header: Header) -> Tensor | None:
    """How a tensor is read that is not one by itself; None for all others."""
    layer, helped = name.removesuffix(".weight"), name.endswith(".weight")
    scale = next((layer + s for s in SCALES if helped and layer + s in weights.headers), None)
    if scale:
        return _scaled(weights, name, header, scale)
    if name.endswith((*SCALES, *NF4_PARTS, *UNUSED, MARKER, ".SCB")):
        return None
    if header.dtype in FLOAT8:
        return Tensor(header._replace(dtype=LOGICAL), lambda index: _values(weights, name, index), ())
    if header.dtype == "I8" and layer + ".SCB" in weights.headers:
        return _scaled(weights, name, header, layer + ".SCB", 1 / 127)
    if header.dtype == "U8" and name + NF4 in weights.headers:
        return _nf4(weights, name, header)
    if header.dtype in ("I8", "U8"):
        raise ConversionError(f"{name} in {header.file} is {header.dtype} without a scale that is known; {INSTEAD}")
    return None


def _scaled(weights: Weights, name: str, header: Header, scale_name: str, factor: float = 1.0) -> Tensor:
    """Values times scales: one, one a row, or one a block of a row, `[rows, blocks, 1]`."""
    shape, scales = header.shape, weights.headers[scale_name].shape
    blocks = len(scales) == 3 and scales[2] == 1 and scales[0] == shape[0] and shape[-1] % max(scales[1], 1) == 0
    rows = scales in (shape[:1], (*shape[:1], 1))
    if not (blocks or rows or math.prod(scales) == 1) or header.dtype not in (*FLOAT8, *DTYPES, "I8"):
        raise ConversionError(
            f"{name} in {header.file}: {header.dtype} {list(shape)} with scales {list(scales)}; {INSTEAD}"
        )

    def read(index):
        scale = np.asarray(weights.read(scale_name).astype(np.float32) * np.float32(factor))
        if blocks:
            values = _values(weights, name, None).reshape(shape[0], scales[1], -1)
            arrays.scale(values, scale)
            return values.reshape(shape)[(...,) if index is None else index]
        if rows:
            scale = scale.reshape(-1, *(1,) * (len(shape) - 1))
            scale = scale if index is None else scale[index[0]]
        else:
            scale = scale.reshape(())
        values = _values(weights, name, index)
        arrays.scale(values, scale)
        return values

    return Tensor(header._replace(dtype=LOGICAL), read, (scale_name,))


def _nf4(weights: Weights, name: str, header: Header) -> Tensor:
    """Bitsandbytes' four bits: an index into a table of 16, the first one in a byte's upper half."""
    state = _nf4_state(weights, name, header)
    shape, size = tuple(state["shape"]), state["blocksize"]
    helpers = tuple(name + part for part in NF4_PARTS if name + part in weights.headers)

    def read(index):
        table = weights.read(name + ".quant_map").astype(np.float32).reshape(-1)
        pairs = np.stack([table[np.arange(256) >> 4], table[np.arange(256) & 15]], axis=-1).view(np.uint64)[:, 0]
        values = arrays.look_up(pairs, weights.read(name).reshape(-1)).view(np.float32)[: math.prod(shape)]
        absmax, whole = _absmax(weights, name, state), len(values) // size
        arrays.scale(values[: whole * size].reshape(whole, size), absmax.reshape(-1, 1))
        values[whole * size :] *= absmax.reshape(-1)[whole:]
        return values.reshape(shape)[(...,) if index is None else index]

    return Tensor(Header(shape, LOGICAL, header.file), read, helpers)


def _nf4_state(weights: Weights, name: str, header: Header) -> Mapping[str, Any]:
    """What a tensor's four bits stand for; raises ConversionError where the tensors beside it do not go with that."""
    state = json_object(weights.read(name + NF4).tobytes(), f"{name}{NF4} in {header.file}")
    try:
        count = math.prod(state["shape"])
        blocks = -(-count // state["blocksize"])
        whole = all(isinstance(value, int) for value in (*state["shape"], state["blocksize"]))
        sizes = {"": -(-count // 2), ".quant_map": 16, ".absmax": blocks}
        nested = "nested_offset" in state
        if nested:
            sizes |= {".nested_quant_map": 256, ".nested_absmax": -(-blocks // state["nested_blocksize"])}
        fits = whole and all(math.prod(weights.headers[name + part].shape) == size for part, size in sizes.items())
        fits &= not nested or weights.headers[name + ".absmax"].dtype == "U8"
        fits &= abs(float(state.get("nested_offset", 0))) <= np.finfo(np.float32).max
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        fits = False
    if not fits:
        raise ConversionError(f"{name} in {header.file}: it and what stands beside it do not make a tensor in nf4")
    return state


def _absmax(weights: Weights, name: str, state: Mapping[str, Any]) -> np.ndarray:
    """The largest value of each block, which may be quantised itself."""
    absmax = weights.read(name + ".absmax")
    if "nested_offset" not in state:
        return absmax.astype(np.float32)
    table, largest = (weights.read(name + part).astype(np.float32) for part in (".nested_quant_map", ".nested_absmax"))
    blocks = np.repeat(largest, state["nested_blocksize"])[: absmax.size]
    return table.reshape(-1)[absmax.reshape(-1)] * blocks + np.float32(state["nested_offset"])


def _values(weights: Weights, name: str, index: Index) -> np.ndarray:
    """A tensor or a part of it in float32, an array of its own."""
    values = weights.read(name) if index is None else weights.read_part(name, index)
    if values.dtype.itemsize == 1 and values.ndim:
        return arrays.look_up(np.arange(256, dtype=np.uint8).view(values.dtype).astype(np.float32), values)
    return values.astype(np.float32)


def _refuse(weights: Weights) -> None:
    """Raises ConversionError for what is packed in a way that is known, and not covered."""
    for name, header in weights.headers.items():
        found = next((what for suffix, what in REFUSED.items() if name.endswith(suffix)), None)
        if found:
            raise ConversionError(f"{header.file} has {found} ({name}), which is not supported; {INSTEAD}")
    for layer, said in _comfy(weights):
        kind = said.get("format")
        if kind not in COMFY_FORMATS or said.get("convrot"):
            kind = f"{kind} with convrot" if said.get("convrot") else kind
            raise ConversionError(f"{layer} is quantised as {kind!r}, which is not supported; {INSTEAD}")


def _comfy(weights: Weights) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What files for Comfy say of their layers: in the header, or in a tensor of bytes each."""
    for file in sorted({header.file for header in weights.headers.values()}):
        said = json_object(read_metadata(Path(file)).get(COMFY, "{}"), f"{COMFY} of {file}").get("layers", {})
        if not isinstance(said, Mapping):
            raise ConversionError(f"{COMFY} of {file}: layers is no JSON object")
        for layer, facts in said.items():
            yield f"{layer} in {file}", facts if isinstance(facts, Mapping) else {"format": facts}
    for name, header in weights.headers.items():
        if name.endswith(".comfy_quant"):
            layer = f"{name.removesuffix('.comfy_quant')} in {header.file}"
            yield layer, json_object(weights.read(name).tobytes(), f"comfy_quant of {layer}")
