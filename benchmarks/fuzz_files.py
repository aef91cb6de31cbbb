"""Small files of weights for `fuzz.py`, quantised in every dialect and adapters, and what may be wrong with them."""

import json
import random
from pathlib import Path
from typing import Any

import fuzz_values
import jax.numpy as jnp
import numpy as np

ROWS, COLUMNS = 8, 64
WIDTH, INNER = 192, 512  # of the demo's transformer
Tensors = dict[str, np.ndarray]
NAMES = {
    np.dtype(kind): name
    for kind, name in (
        *((np.float32, "F32"), (np.float16, "F16"), (jnp.bfloat16, "BF16"), (np.int64, "I64"), (np.int8, "I8")),
        *((np.uint8, "U8"), (jnp.float8_e4m3fn, "F8_E4M3"), (jnp.float8_e5m2, "F8_E5M2")),
    )
}
NOTES = (".comfy_quant", ".quant_state.bitsandbytes__nf4")


def quantised(rng: random.Random, file: Path) -> Path:
    """A quantised file that is fine, or is not."""
    tensors, metadata = rng.choice((_scaled, _scaled, _int8, _nf4, _nf4))(rng), {}
    if rng.random() < 0.3:
        said = {"layers": {"a": {"format": rng.choice(("float8_e4m3fn", "int8_tensorwise", "nvfp4"))}}}
        metadata = {"_quantization_metadata": json.dumps(said)}
    prefix = rng.choice(("", "", "model.diffusion_model."))
    tensors = {prefix + name: array for name, array in (tensors | {"norm.weight": np.ones(3, np.float32)}).items()}
    return _written(rng, file, tensors, metadata)


def adapter(rng: random.Random, file: Path) -> Path:
    """An adapter of a layer of the demo's transformer, in one of the ways to publish one, that is fine or is not."""
    rank, (layer, out) = 4, rng.choice((("layers.0.attention.to_q", WIDTH), ("layers.1.feed_forward.w1", INNER)))
    left, right = rng.choice((("lora_B.weight", "lora_A.weight"), ("lora_up.weight", "lora_down.weight")))
    prefix = rng.choice(("transformer.", "diffusion_model.", "lora_unet_", ""))
    name = prefix + (layer.replace(".", "_") if prefix == "lora_unet_" else layer)
    tensors = {
        f"{name}.{left}": np.ones((out, rank), np.float32),
        f"{name}.{right}": np.ones((rank, WIDTH), np.float32),
    }
    if rng.random() < 0.5:
        tensors[f"{name}.alpha"] = np.array(4, rng.choice((np.float32, np.int64, jnp.bfloat16)))
    if rng.random() < 0.3:
        tensors[f"{name}.{rng.choice(('dora_scale', 'diff', 'diff_b', 'bias', 'hada_w1_a', 'nothing'))}"] = np.ones(out)
    tensors = {key: array.astype(array.dtype if array.dtype in NAMES else np.float32) for key, array in tensors.items()}
    metadata = {}
    if rng.random() < 0.4:
        said = {"transformer.r": rank, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {}}
        metadata = {"lora_adapter_metadata": json.dumps(fuzz_values.damaged_json(rng, said))}
    return _written(rng, file, tensors, metadata)


def gguf(rng: random.Random, file: Path) -> Path:
    """A GGUF file whose bytes may be damaged."""
    import gguf as package

    writer = package.GGUFWriter(file, rng.choice(("flux", "flux", "t5", "qwen_image")))
    matrix = np.linspace(-1, 1, ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS)
    kind = rng.choice((None, package.GGMLQuantizationType.Q8_0, package.GGMLQuantizationType.Q4_0))
    writer.add_tensor("a.weight", matrix if kind is None else package.quants.quantize(matrix, kind), raw_dtype=kind)
    writer.add_tensor("norm.weight", np.ones(3, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    file.write_bytes(fuzz_values.damaged_bytes(rng, file.read_bytes(), text=False))
    return file


def _scaled(rng: random.Random) -> Tensors:
    shape = rng.choice(((), (1,), (ROWS,), (ROWS, 1), (ROWS, 4, 1), (3,), (ROWS, 5, 1)))
    values = np.ones((ROWS, COLUMNS), rng.choice((jnp.float8_e4m3fn, jnp.float8_e5m2, np.int8, np.float32)))
    tensors = {"a.weight": values, rng.choice(("a.scale_weight", "a.weight_scale")): np.ones(shape, np.float32)}
    if rng.random() < 0.4:
        tensors["a.comfy_quant"] = _bytes({"format": "float8_e4m3fn"})
    return tensors | ({"a.input_scale": np.float32([1])} if rng.random() < 0.3 else {})


def _int8(rng: random.Random) -> Tensors:
    largest = np.ones(rng.choice((ROWS, ROWS, 3)), np.float32)
    return {"a.weight": np.ones((ROWS, COLUMNS), np.int8), "a.SCB": largest, "a.weight_format": np.uint8([0])}


def _nf4(rng: random.Random) -> Tensors:
    count, name = ROWS * COLUMNS, "a.weight"
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "shape": [ROWS, COLUMNS], "dtype": "bfloat16"}
    tensors = {name: np.zeros((count // 2, 1), np.uint8), f"{name}.quant_map": np.linspace(-1, 1, 16, dtype=np.float32)}
    if rng.random() < 0.5:
        state |= {"nested_blocksize": 4, "nested_offset": 0.25, "nested_dtype": "float32"}
        tensors |= {
            f"{name}.nested_quant_map": np.ones(256, np.float32),
            f"{name}.nested_absmax": np.ones(2, np.float32),
        }
    absmax = np.ones(count // 64, np.uint8 if "nested_offset" in state else np.float32)
    return tensors | {f"{name}.absmax": absmax, f"{name}.quant_state.bitsandbytes__nf4": _bytes(state)}


def _written(rng: random.Random, file: Path, tensors: Tensors, metadata: dict[str, str]) -> Path:
    """The tensors as a safetensors file, with something wrong in most of them."""
    kind = rng.random()
    if kind < 0.35:
        _change_one(rng, tensors)
    elif kind < 0.5:
        noted = [name for name in tensors if name.endswith(NOTES)]
        for name in noted:
            tensors[name] = _damaged_note(rng, tensors[name])
    elif kind < 0.6:
        metadata = {key: json.dumps(fuzz_values.damaged_json(rng, json.loads(text))) for key, text in metadata.items()}
    header, data = _parts(tensors, metadata)
    if 0.6 <= kind < 0.75:
        header = fuzz_values.damaged_json(rng, header)
    text = json.dumps(header).encode()
    whole = len(text).to_bytes(8, "little") + text + data
    file.write_bytes(fuzz_values.damaged_bytes(rng, whole) if kind > 0.85 else whole)
    return file


def _change_one(rng: random.Random, tensors: Tensors) -> None:
    """A tensor that is gone, or another one."""
    name = rng.choice(list(tensors))
    array = tensors.pop(name)
    kind = rng.random()
    if kind < 0.25:
        return
    if kind < 0.4:
        tensors[name + rng.choice((".x", ".weight", "_scale"))] = array
    elif kind < 0.6:
        tensors[name] = array.reshape(-1)[: rng.randrange(array.size + 1)]
    elif kind < 0.8:
        tensors[name] = array.reshape(rng.choice(((-1,), (1, -1), (-1, 1, 1))))
    elif kind < 0.9:
        tensors[name] = np.full_like(array, rng.choice((0, 3, 100)))
    else:
        tensors[name] = np.resize(array, array.shape).astype(rng.choice(list(NAMES)))


def _damaged_note(rng: random.Random, note: np.ndarray) -> np.ndarray:
    if rng.random() < 0.4:
        return np.frombuffer(fuzz_values.damaged_bytes(rng, note.tobytes()), np.uint8)
    return _bytes(fuzz_values.damaged_json(rng, json.loads(note.tobytes())))


def _parts(tensors: Tensors, metadata: dict[str, str]) -> tuple[dict[str, Any], bytes]:
    """Header and data of a file, by the format's own description."""
    header: dict[str, Any] = {"__metadata__": metadata}
    data = b""
    for name, array in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    return header, data


def _bytes(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)
