"""Quantised files as they are published: in every dialect the tensors that a second decoder, written here, gives."""

import builtins
import json
import re
import struct

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils
from layouts import assert_bit_equal

import ses_jax
from ses_jax.convert import dialects, engine, matching, t5
from ses_jax.convert.engine import ConversionError, Header, Weights
from ses_jax.convert.table import Table, fused, joined, linear, norm
from ses_jax.engine import models
from ses_jax.loading import hub, network
from ses_jax.models import quantized
from ses_jax.pipelines import z_image

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
NAMES = {
    np.dtype(kind): name
    for kind, name in (
        *((np.float32, "F32"), (np.float16, "F16"), (ml_dtypes.bfloat16, "BF16")),
        *((E4M3, "F8_E4M3"), (E5M2, "F8_E5M2"), (np.uint8, "U8"), (np.int8, "I8"), (np.uint32, "U32")),
    )
}
# Stacked rows, rows of one tensor in three leaves, columns of one in two.
TABLE = Table(
    (
        *linear("blocks.{i}.up", "blocks/up"),
        *fused("qkv", ["q", "k", "v"]),
        *joined("out", ["a", "b"]),
        *norm("norm", "norm"),
    )
)
SHAPES = {
    "blocks": {"up": {"kernel": (2, 256, 6), "bias": (2, 6)}},
    **{name: {"kernel": (256, size)} for name, size in {"q": 4, "k": 2, "v": 3}.items()},
    **{name: {"kernel": (size, 5)} for name, size in {"a": 128, "b": 128}.items()},
    "norm": {"scale": (7,)},
}
ABSTRACT = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
)
PUBLISHED = {slot.name: slot.shape for slot in matching.layout(TABLE, ABSTRACT)}
MATRICES = [name for name, shape in PUBLISHED.items() if len(shape) == 2]


def write(path, tensors, metadata=None):
    """A safetensors file, by the format's own description."""
    header, data = {"__metadata__": metadata or {}}, b""
    for name, array in tensors.items():
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def as_bytes(value):
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def load(weights):
    return engine.load(matching.plan(TABLE, ABSTRACT, weights.headers), ABSTRACT, weights, dtype=jnp.float32)


def assert_loads(weights, expected):
    """A file's params are bit for bit those of these published tensors, read without their parts."""
    headers = {name: Header(array.shape, "F32", "expected") for name, array in expected.items()}
    plain = load(Weights(headers, lambda name: np.asarray(expected[name], np.float32)))
    got = load(weights)
    assert jax.tree.structure(got) == jax.tree.structure(plain)
    jax.tree.map(np.testing.assert_array_equal, got, plain)


# Each makes of a random matrix `[rows, 256 or so]` the file's tensors, and what they stand for.


def scaled(suffix, shape, dtype=E4M3, **more):
    def encode(rng, name, matrix):
        layer = name.removesuffix(".weight")
        values = (20 * rng.standard_normal(matrix.shape)).astype(dtype)
        scale = rng.uniform(0.01, 0.1, shape(*matrix.shape)).astype(np.float32)
        whole = np.empty(matrix.shape, np.float32)
        for row in range(len(whole)):
            for column in range(whole.shape[1]):
                block = column * scale.shape[1] // whole.shape[1] if scale.ndim == 3 else 0
                own = scale.item() if scale.size == 1 else scale[row, block, 0] if scale.ndim == 3 else scale[row]
                whole[row, column] = np.float32(values[row, column]) * np.float32(np.squeeze(own))
        tensors = {name: values, layer + suffix: scale}
        return tensors | {layer + more_suffix: make() for more_suffix, make in more.get("beside", {}).items()}, whole

    return encode


def plain(dtype):
    return lambda rng, name, matrix: ({name: matrix.astype(dtype)}, matrix.astype(dtype).astype(np.float32))


def bnb_int8(rng, name, matrix):
    values, largest = rng.integers(-127, 128, matrix.shape).astype(np.int8), rng.uniform(0.5, 2, len(matrix))
    largest = largest.astype(np.float32)
    layer = name.removesuffix(".weight")
    whole = values.astype(np.float32) * (largest * np.float32(1 / 127))[:, None]
    return {name: values, f"{layer}.SCB": largest, f"{layer}.weight_format": np.uint8(0)[None]}, whole


def nf4(nested):
    def encode(rng, name, matrix):
        count, levels = matrix.size, np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
        packed = rng.integers(0, 256, (count // 2, 1)).astype(np.uint8)
        state = {"quant_type": "nf4", "blocksize": 64, "shape": list(matrix.shape), "dtype": "bfloat16"}
        tensors = {name: packed, f"{name}.quant_map": levels}
        absmax = rng.uniform(0.5, 2, count // 64).astype(np.float32)
        if nested:
            table, codes = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32), rng.integers(0, 256, len(absmax))
            blocks = rng.uniform(0.5, 2, -(-len(absmax) // 4)).astype(np.float32)  # 4 to a block, 256 in real files
            state |= {"nested_blocksize": 4, "nested_offset": 0.25, "nested_dtype": "float32"}
            absmax = np.array([table[c] * blocks[i // 4] + np.float32(0.25) for i, c in enumerate(codes)], np.float32)
            tensors |= {f"{name}.absmax": codes.astype(np.uint8), f"{name}.nested_quant_map": table}
            tensors |= {f"{name}.nested_absmax": blocks}
        else:
            tensors |= {f"{name}.absmax": absmax}
        nibbles = [nibble for byte in packed[:, 0] for nibble in (byte // 16, byte % 16)]
        whole = np.array([levels[n] * absmax[i // 64] for i, n in enumerate(nibbles)], np.float32)
        tensors |= {f"{name}.quant_state.bitsandbytes__nf4": as_bytes(state)}
        return tensors, whole.reshape(matrix.shape)

    return encode


def comfy(form):
    return {"beside": {".comfy_quant": lambda: as_bytes({"format": form}), ".input_scale": lambda: np.float32(1)}}


DIALECTS = {
    "plain fp8": plain(E4M3),
    "plain e5m2": plain(E5M2),
    "comfy old": scaled(".scale_weight", lambda o, i: (), beside={".scale_input": lambda: np.float32([3])}),
    "musubi one": scaled(".scale_weight", lambda o, i: (1,)),
    "musubi rows": scaled(".scale_weight", lambda o, i: (o, 1)),
    "musubi blocks": scaled(".scale_weight", lambda o, i: (o, i // 64, 1)),
    "comfy new": scaled(".weight_scale", lambda o, i: (), **comfy("float8_e4m3fn")),
    "comfy int8": scaled(".weight_scale", lambda o, i: (o, 1), np.int8, **comfy("int8_tensorwise")),
    "bfl rows": scaled(".weight_scale", lambda o, i: (o,), beside={".input_scale": lambda: np.float32(1)}),
    "bnb int8": bnb_int8,
    "bnb nf4": nf4(nested=False),
    "bnb nf4 nested": nf4(nested=True),
}


def content(encode, seed=0):
    """A file's tensors, and what they stand for."""
    rng = np.random.default_rng(seed)
    tensors, expected = {}, {}
    for name, shape in PUBLISHED.items():
        array = rng.standard_normal(shape).astype(np.float32)
        tensors[name] = expected[name] = array
        if name in MATRICES:
            made, expected[name] = encode(rng, name, array)
            tensors |= made
    return tensors, expected


@pytest.mark.parametrize("dialect", DIALECTS)
def test_safetensors(dialect, tmp_path):
    tensors, expected = content(DIALECTS[dialect])
    if dialect in ("comfy old", "plain fp8"):  # everything behind a prefix, among what is not the transformer's
        tensors = {f"model.diffusion_model.{name}": array for name, array in tensors.items()}
        tensors |= {"vae.conv.weight": np.zeros(3, np.float32)}
        tensors |= {"model.diffusion_model.scaled_fp8": np.zeros(2, E4M3)} if dialect == "comfy old" else {}
    metadata = {"_quantization_metadata": json.dumps({"layers": {"qkv": {"format": "float8_e4m3fn"}}})}
    file = write(tmp_path / "it.safetensors", tensors, metadata if dialect == "bfl rows" else None)
    assert_loads(dialects.without_prefix(dialects.open_file(file)), expected)


def test_norms_and_biases_in_float8_are_read_too(tmp_path):
    tensors, _ = content(plain(E4M3))
    tensors = {name: array.astype(E4M3) for name, array in tensors.items()}
    file = write(tmp_path / "it.safetensors", tensors)
    assert_loads(dialects.open_file(file), {name: array.astype(np.float32) for name, array in tensors.items()})


def test_a_tokenizer_among_the_tensors_is_not_taken_for_one(tmp_path):
    tensors, _ = content(plain(ml_dtypes.bfloat16))
    file = write(tmp_path / "it.safetensors", tensors | {"tekken_model": np.zeros(9, np.uint8)})
    assert_loads(dialects.open_file(file), {name: array.astype(np.float32) for name, array in tensors.items()})


def test_files_that_are_not_quantised_are_left_alone(tmp_path):
    tensors, _ = content(plain(ml_dtypes.bfloat16))
    weights = hub.open_files([write(tmp_path / "it.safetensors", tensors)])
    assert dialects.logical(weights) is weights


# GGUF.


def test_t5_by_the_names_of_llama_cpp(tmp_path):
    """Which the package maps from those of transformers."""
    small = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16, "vocab_size": 64}
    torch.manual_seed(0)
    reference = transformers.T5EncoderModel(transformers.T5Config(**small, feed_forward_proj="gated-gelu"))
    reference.save_pretrained(tmp_path / "t5")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, small["num_layers"])
    state = {name: x.numpy() for name, x in reference.state_dict().items() if "embed_tokens" not in name}
    mapped = {names.get_name(name, (".weight",)): x for name, x in state.items()}
    exact = network.load(tmp_path / "t5", t5.COMPONENT).params
    file = write_gguf(tmp_path / "whole.gguf", mapped, architecture="t5encoder")
    assert_bit_equal(network.load(tmp_path / "t5", t5.COMPONENT, file=file).params, exact)
    kind = gguf.GGMLQuantizationType.Q8_0
    file = write_gguf(tmp_path / "Q8_0.gguf", mapped, kind, architecture="t5encoder")
    rounded = network.load(tmp_path / "t5", t5.COMPONENT, file=file, dtype=jnp.float32).params
    largest = max(np.abs(x).max() for x in state.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=largest / 127), rounded, exact)


def write_gguf(path, tensors, kind=None, architecture="flux"):
    """Matrices in a kind of quantisation, all else in float32; a kind that can't be encoded comes as bytes."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, array in tensors.items():
        if array.dtype == np.uint8:
            writer.add_tensor(name, array, raw_dtype=kind)
        elif kind is None or array.ndim != 2 or array.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def q8_0(rng, name, matrix):
    """Of 32 values: a scale in half precision, and eight bits each."""
    blocks = matrix.reshape(-1, 32)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float32)
    return {name: matrix}, (np.round(blocks / scale) * scale.astype(np.float16).astype(np.float32)).reshape(
        matrix.shape
    )


def q6_k(rng, name, matrix):
    """Of 256 values: 4 lower bits, 2 upper bits, 16 scales in int8, and a scale of all in half precision."""
    rows, count = len(matrix), matrix.shape[1] // 256
    data, whole = np.empty((rows, count * 210), np.uint8), np.empty((rows, count, 256), np.float32)
    for row in range(rows):
        for block in range(count):
            low, high = rng.integers(0, 256, 128), rng.integers(0, 256, 64)
            scales, d = rng.integers(-60, 60, 16), np.float16(rng.uniform(0.001, 0.01))
            raw = low.astype(np.uint8).tobytes() + high.astype(np.uint8).tobytes()
            raw += scales.astype(np.int8).tobytes() + d.tobytes()
            data[row, block * 210 : (block + 1) * 210] = np.frombuffer(raw, np.uint8)
            for half in range(2):
                for place in range(128):
                    quarter, column = divmod(place, 32)
                    byte = low[64 * half + 32 * (quarter % 2) + column]
                    four = byte % 16 if quarter < 2 else byte // 16
                    two = high[32 * half + column] // 4**quarter % 4
                    scale = np.float32(d) * np.float32(scales[8 * half + place // 16])
                    whole[row, block, 128 * half + place] = scale * np.float32(four + 16 * two - 32)
    return {name: data}, whole.reshape(matrix.shape)


GGUF = {
    "F32": (plain(np.float32), None),
    "F16": (plain(np.float16), None),
    "BF16": (lambda rng, name, matrix: ({name: matrix}, plain(ml_dtypes.bfloat16)(rng, name, matrix)[1]), "BF16"),
    "Q8_0": (q8_0, "Q8_0"),
    "Q6_K": (q6_k, "Q6_K"),
}


@pytest.mark.parametrize("kind", GGUF)
def test_gguf(kind, tmp_path):
    encode, quantization = GGUF[kind]
    tensors, expected = content(encode)
    quantization = quantization and gguf.GGMLQuantizationType[quantization]
    file = write_gguf(tmp_path / "it.gguf", tensors, quantization)
    weights = dialects.open_file(file)
    assert {header.dtype for header in weights.headers.values()} <= {"F32", "BF16" if quantization else kind}
    assert_loads(weights, expected)


def test_a_gguf_of_four_bits_is_what_its_package_says(tmp_path):
    tensors, _ = content(plain(np.float32))
    file = write_gguf(tmp_path / "it.gguf", tensors, gguf.GGMLQuantizationType.Q4_0)
    reader = {t.name: t for t in gguf.GGUFReader(file).tensors}
    expected = {
        name: gguf.quants.dequantize(reader[name].data, reader[name].tensor_type).reshape(array.shape)
        for name, array in tensors.items()
    }
    assert np.abs(expected["qkv.weight"] - tensors["qkv.weight"]).max() < 0.5
    assert_loads(dialects.open_file(file), expected)


def test_comfys_formats_may_be_named_without_an_object(tmp_path):
    tensors, expected = content(DIALECTS["bfl rows"])
    metadata = {"_quantization_metadata": json.dumps({"layers": {"qkv": "float8_e4m3fn"}})}
    assert_loads(dialects.open_file(write(tmp_path / "it.safetensors", tensors, metadata)), expected)


# What is not read.

REFUSALS = {
    "NVFP4": ({"a.weight": np.zeros((2, 2), np.uint8), "a.weight_scale_2": np.float32(1)}, "has NVFP4"),
    "torchao": ({"a._weight_qdata": np.zeros((2, 2), np.int8)}, "has torchao's packing"),
    "nunchaku": ({"a.wscales": np.zeros(2, np.int8)}, r"has nunchaku's packing \(SVDQuant\)"),
    "MLX": (
        {"a.weight": np.zeros((2, 2), np.uint32), "a.scales": np.ones((2, 1), ml_dtypes.bfloat16)},
        "has packing as of MLX, GPTQ or AWQ",
    ),
    "fp4": ({"a.weight.quant_state.bitsandbytes__fp4": np.zeros(2, np.uint8)}, "has bitsandbytes' fp4"),
    "mxfp8": (
        {"a.weight": np.zeros((2, 2), E4M3), "a.comfy_quant": as_bytes({"format": "mxfp8"})},
        "a in .*is quantised as 'mxfp8'",
    ),
    "convrot": (
        {"a.weight": np.zeros((2, 2), np.int8), "a.comfy_quant": as_bytes({"format": "int8_tensorwise", "convrot": 1})},
        "as 'int8_tensorwise with convrot'",
    ),
    "int8 alone": ({"a.weight": np.zeros((2, 2), np.int8)}, "a.weight in .* is I8 without a scale"),
    "bytes": ({"a.weight": np.zeros((2, 2), np.uint8)}, "a.weight in .* is U8 without a scale"),
    "scales": (
        {"a.weight": np.zeros((4, 4), E4M3), "a.weight_scale": np.zeros((2, 2), np.float32)},
        re.escape("F8_E4M3 [4, 4] with scales [2, 2]"),
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_other_packings_are_refused_by_name(case, tmp_path):
    tensors, complaint = REFUSALS[case]
    with pytest.raises(ConversionError, match=complaint):
        dialects.open_file(write(tmp_path / "it.safetensors", tensors))


def nf4_of(state, **sizes):
    """A layer of 4 times 4 in nf4; parts of size 0 are absent."""
    made = {"absmax": 1, "quant_map": 16, "quant_state.bitsandbytes__nf4": state, **sizes}
    parts = {n: x if isinstance(x, np.ndarray) else np.zeros(x, np.float32) for n, x in made.items()}
    return {"a.weight": np.zeros((8, 1), np.uint8)} | {f"a.weight.{n}": x for n, x in parts.items() if x.size}


NF4_STATE = {"shape": [4, 4], "blocksize": 64}


def nested_nf4(changed=None, **parts):
    """Such a layer whose largest values are quantised themselves."""
    state = NF4_STATE | {"nested_offset": 0.25, "nested_blocksize": 256} | (changed or {})
    nested = {"absmax": np.zeros(1, np.uint8), "nested_quant_map": 256, "nested_absmax": 1}
    return nf4_of(as_bytes(state), **nested | parts)


DAMAGE = {
    "comfy's metadata": ({}, "{", "_quantization_metadata of .*it.safetensors is not a JSON object"),
    "a list": ({}, "[]", "_quantization_metadata of .*it.safetensors is not a JSON object"),
    "layers": ({}, '{"layers": []}', "layers is no JSON object"),
    "comfy_quant": ({"a.comfy_quant": as_bytes("x")}, "{}", "comfy_quant of a in .*it.safetensors is not a JSON obj"),
    "a state": (nf4_of(np.frombuffer(b"\xff\xfe", np.uint8)), "{}", r"bitsandbytes__nf4 in .* is not a JSON object"),
    "no blocks": (nf4_of(as_bytes({"shape": [4, 4]})), "{}", r"a.weight in .* do not make a tensor in nf4"),
    "a shape": (nf4_of(as_bytes(NF4_STATE | {"shape": [4, 40]})), "{}", "do not make a tensor in nf4"),
    "no absmax": (nf4_of(as_bytes(NF4_STATE), absmax=0), "{}", "do not make a tensor in nf4"),
    "a short map": (nf4_of(as_bytes(NF4_STATE), quant_map=8), "{}", "do not make a tensor in nf4"),
    "no number": (nested_nf4({"nested_offset": "x"}), "{}", "do not make a tensor in nf4"),
    "too large a number": (nested_nf4({"nested_offset": 1e300}), "{}", "do not make a tensor in nf4"),
    "no places": (nested_nf4(absmax=np.ones(1, np.float32)), "{}", "do not make a tensor in nf4"),
    "nothing nested": (nf4_of(as_bytes(NF4_STATE | {"nested_offset": 0.1})), "{}", "do not make a tensor in nf4"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_a_file_says_of_its_packing_may_be_damaged(case, tmp_path):
    tensors, metadata, complaint = DAMAGE[case]
    tensors = {"b.weight": np.zeros((2, 2), E4M3), **tensors}
    file = write(tmp_path / "it.safetensors", tensors, {"_quantization_metadata": metadata})
    with pytest.raises(ConversionError, match=complaint):
        dialects.open_file(file)


def test_tables_of_four_bits_may_have_two_axes(tmp_path):
    tensors, expected = content(nf4(nested=True))
    tables = (".quant_map", ".nested_quant_map", ".nested_absmax", ".absmax")
    tensors = {name: array[None] if name.endswith(tables) else array for name, array in tensors.items()}
    assert_loads(dialects.open_file(write(tmp_path / "it.safetensors", tensors)), expected)


def test_a_scale_without_its_tensor_is_not_forgotten(tmp_path):
    tensors, _ = content(DIALECTS["bfl rows"])
    file = write(tmp_path / "it.safetensors", tensors | {"other.weight_scale": np.float32(1)})
    with pytest.raises(ConversionError, match=r"unexpected: other\.weight_scale"):
        load(dialects.open_file(file))


def test_files_that_are_no_such_thing(tmp_path, monkeypatch):
    with pytest.raises(ConversionError, match=r"expected a \.safetensors or \.gguf file"):
        dialects.open_file(tmp_path / "it.ckpt")
    (tmp_path / "it.gguf").write_bytes(b"GGUF then nothing of the kind")
    with pytest.raises(ConversionError, match=r"it\.gguf is truncated or corrupt"):
        dialects.open_file(tmp_path / "it.gguf")
    (tmp_path / "it.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ConversionError, match=r"it\.gguf is not the file itself but a pointer of Git LFS: `git lfs"):
        dialects.open_file(tmp_path / "it.gguf")
    file = write_gguf(tmp_path / "text.gguf", {"a.weight": np.zeros((2, 32), np.float32)}, architecture="qwen3")
    with pytest.raises(ConversionError, match=r"is a language model \(qwen3\)"):
        dialects.open_file(file)
    file.write_bytes(file.read_bytes().replace(b"qwen3", b"\xffwen3"))
    with pytest.raises(ConversionError, match=r"text\.gguf is truncated or corrupt"):
        dialects.open_file(file)

    def no_gguf(name, *args, real=builtins.__import__, **options):
        if name == "gguf":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", no_gguf)
    with pytest.raises(ValueError, match=r"pip install 'ses_jax\[gguf\]'"):
        dialects.open_file(file)


@pytest.mark.parametrize("kind", ["an array", "a string"])
def test_a_gguf_is_no_longer_than_its_file(kind, tmp_path):
    """Whatever it says: an array would be read for ever, and fill the memory."""
    many, types = 1 << 14, gguf.GGUFValueType
    content = {
        "an array": struct.pack("<IIQ", types.ARRAY, types.UINT8, many),
        "a string": struct.pack("<IQ", types.STRING, many) + b"ab",
    }[kind]
    name = b"general.architecture"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(name)) + name
    (tmp_path / "it.gguf").write_bytes(head + content)
    with pytest.raises(ConversionError, match=r"it\.gguf is truncated or corrupt: it ends too early"):
        dialects.open_file(tmp_path / "it.gguf")


# Whole pipelines.


@pytest.fixture(scope="module")
def demo():
    return ses_jax.load_pipeline("demo")


@pytest.fixture(scope="module")
def files(demo, tmp_path_factory):
    """The demo's transformer in both vocabularies, one as GGUF and one in scaled float8, and what they stand for."""
    folder, component = tmp_path_factory.mktemp("files"), z_image.COMPONENTS["transformer"]
    config = hub.read_json(hub.DEMO / "transformer" / "config.json")
    params = demo.params["transformer"]
    authors = dict(engine.export(component.single_file.table(config), params))
    write_gguf(folder / "Q8_0.gguf", authors, gguf.GGMLQuantizationType.Q8_0, "lumina2")
    tensors, stood_for = {}, {}
    for name, array in engine.export(component.table(config), params):
        tensors[name] = stood_for[name] = array
        if array.ndim == 2 and ".attention." in name:
            scale = np.abs(array).max() / np.float32(448)
            tensors[name] = (array / scale).astype(E4M3)
            tensors[name.removesuffix(".weight") + ".scale_weight"] = scale
            stood_for[name] = tensors[name].astype(np.float32) * scale
    write(folder / "fp8.safetensors", tensors)
    return folder, stood_for


def test_a_file_instead_of_the_folders_transformer(demo, files):
    """Names and layers of either vocabulary, and again in eight bits of our own."""
    folder, stood_for = files
    whole, other = demo.params["transformer"], ses_jax.load_pipeline("demo", transformer=str(folder / "Q8_0.gguf"))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(other.params["transformer"]), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=0.005 * np.abs(a).max())
    assert other.changes == {"files": {"transformer": str(folder / "Q8_0.gguf")}}
    models.forget()
    load = {"transformer": folder / "fp8.safetensors", "quantize": "int8"}
    small = models.find_pipeline("demo", **load)
    assert models.find_pipeline("demo", **load) is small
    to_q = small.params["transformer"]["layers"]["attention"]["to_q"]
    name = "layers.{}.attention.to_q.weight"
    expected = [quantized.quantize(stood_for[name.format(i)].T, "int8") for i in range(len(to_q["kernel"]))]
    np.testing.assert_array_equal(to_q["kernel"], np.stack([leaf.values for leaf in expected]))
    np.testing.assert_array_equal(to_q["kernel_scale"], np.stack([leaf.scale for leaf in expected]))
    (folder / "fp8.safetensors").touch()
    assert models.find_pipeline("demo", **load) is not small
    models.forget()


def test_a_gguf_of_a_program_in_cpp(demo, tmp_path):
    """Such programs leave out axes of one, and keep the prefix."""
    component, config = z_image.COMPONENTS["transformer"], hub.read_json(hub.DEMO / "transformer" / "config.json")
    params = demo.params["transformer"]
    tensors = dict(engine.export(component.single_file.table(config), params))
    assert tensors["x_pad_token"].shape == (1, tensors["x_pad_token"].size)
    tensors = {f"model.diffusion_model.{n}": x.reshape(-1) if "pad_token" in n else x for n, x in tensors.items()}
    file = write_gguf(tmp_path / "it.gguf", tensors, architecture="lumina2")
    loaded = network.load(hub.DEMO / "transformer", component, file=file, dtype=jnp.float32)
    assert_bit_equal(loaded.params, params)
    plain = write(tmp_path / "it.safetensors", tensors)
    with pytest.raises(ConversionError, match=r"wrong shape: x_pad_token in .*is \[\d+\], expected \[1, \d+\]"):
        network.load(hub.DEMO / "transformer", component, file=plain)


def test_the_authors_names_are_those_that_diffusers_converts(demo):
    component, config = z_image.COMPONENTS["transformer"], hub.read_json(hub.DEMO / "transformer" / "config.json")
    params = demo.params["transformer"]
    authors = engine.export(component.single_file.table(config), params, "model.diffusion_model.")
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in authors}
    tensors["model.diffusion_model.norm_final.weight"] = torch.zeros(192)
    converted = single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers(tensors)
    assert_bit_equal({n: t.numpy() for n, t in converted.items()}, dict(engine.export(component.table(config), params)))


def test_where_a_file_is_looked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_download", lambda *where: asked.append(where) or tmp_path / "x")
    (tmp_path / "mine.gguf").touch()
    assert hub.resolve_file("mine.gguf", tmp_path) == tmp_path / "mine.gguf"
    assert hub.resolve_file(str(tmp_path / "mine.gguf"), hub.DEMO) == tmp_path / "mine.gguf"
    assert hub.resolve_file("who/what-gguf/sub/it-Q8_0.gguf", tmp_path) == tmp_path / "x"
    assert asked == [("who/what-gguf", "sub/it-Q8_0.gguf")]
    with pytest.raises(FileNotFoundError, match=r"other\.gguf is neither in"):
        hub.resolve_file("other.gguf", tmp_path)
    with pytest.raises(ValueError, match="demo has no text_encoder_2; its networks: transformer"):
        ses_jax.load_pipeline("demo", text_encoder_2="it.gguf")
