"""Conversion: tables against the headers of published checkpoints, exact round trips, and every way to be wrong."""

import functools
import gzip
import json
import resource
import tracemalloc
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import safetensors.numpy

from ses_jax.cli import convert as main
from ses_jax.convert import (
    autoencoder_kl,
    autoencoder_kl_bn,
    clip,
    decoder_lm,
    engine,
    files,
    flux2,
    matching,
    open_clip,
    qwen_image,
    qwen_vae,
    z_image,
)
from ses_jax.convert.engine import ConversionError, Header, Weights
from ses_jax.convert.table import CONV, CONV3D, IDENTITY, LINEAR, Component, Rule, Table, fused, joined, linear
from ses_jax.loading import folder, network
from ses_jax.pipelines.registry import FAMILIES

pytestmark = pytest.mark.quick

QWEN3_4B = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
QWEN3_8B = QWEN3_4B | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
MISTRAL_SMALL = {
    "model_type": "mistral3",
    "text_config": {
        "model_type": "mistral",
        "num_hidden_layers": 40,
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000000.0,
    },
}
QWEN2_5_VL_7B = {
    "model_type": "qwen2_5_vl",
    "num_hidden_layers": 28,
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}


def clip_config(projection, text, vision):
    def tower(sizes):
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        return dict(zip(names, sizes, strict=True))

    return {
        "projection_dim": projection,
        "text_config": tower(text),
        "vision_config": tower(vision) | {"patch_size": 14},
    }


CLIP_H = clip_config(1024, (1024, 24, 16, 4096), (1280, 32, 16, 5120))
CLIP_L = clip_config(768, (768, 12, 12, 3072), (1024, 24, 16, 4096))
KLEIN = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "guidance_embeds": False}
# Header, component, config.json and the number of tensors that aren't loaded.
PUBLISHED = {
    "z_image.transformer": (z_image.COMPONENT, {}, 0),
    "qwen3_4b.text_encoder": (decoder_lm.component(-2), QWEN3_4B, 12),
    "qwen3_8b.text_encoder": (decoder_lm.component(9, 18, 27), QWEN3_8B, 9 * 11 + 2),
    "mistral_small.text_encoder": (decoder_lm.component(10, 20, 30), MISTRAL_SMALL, 585 - 1 - 30 * 9),
    "qwen2_5_vl_7b.text_encoder": (decoder_lm.component(-1), QWEN2_5_VL_7B, 390 + 1),
    "qwen_image.transformer": (qwen_image.COMPONENT, {}, 0),
    "qwen_image.vae": (qwen_vae.COMPONENT, {}, 8),
    "flux1.vae": (autoencoder_kl.COMPONENT, {}, 0),
    "flux2_dev.transformer": (flux2.COMPONENT, {}, 0),
    "flux2_klein_4b.transformer": (flux2.COMPONENT, KLEIN | {"joint_attention_dim": 7680}, 0),
    "flux2_klein_9b.transformer": (
        flux2.COMPONENT,
        KLEIN | {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
        0,
    ),
    "flux2.vae": (autoencoder_kl_bn.COMPONENT, {}, 1),
    "clip_h14_hf.reward": (clip.COMPONENT, CLIP_H, 2),
    "clip_l14_hf.reward": (clip.COMPONENT, CLIP_L, 0),
    "hpsv2_open_clip_h14.reward": (open_clip.COMPONENT, {}, 0),
}


def published_header(name):
    path = Path(__file__).parent / "headers" / f"{name}.json.gz"
    shapes = json.loads(gzip.decompress(path.read_bytes()))
    return {tensor: Header(tuple(shape), "BF16", f"{name}.safetensors") for tensor, shape in shapes.items()}


@functools.cache
def abstract_params(name):
    component, config, _ = PUBLISHED[name]
    return component.abstract(component.from_json(config))


def plan_for(name, headers):
    component, config, _ = PUBLISHED[name]
    return matching.plan(component.table(config), abstract_params(name), headers)


@pytest.mark.parametrize("name", PUBLISHED)
def test_table_covers_a_whole_published_checkpoint(name):
    headers = published_header(name)
    plan = plan_for(name, headers)
    slots = [slot for group in plan.slots.values() for slot in group]
    tensors = {slot.name: slot.shape for slot in slots}  # several slots share a fused tensor
    assert sorted([*tensors, *plan.unused]) == sorted(headers)
    assert all(shape == headers[name].shape for name, shape in tensors.items())
    abstract = abstract_params(name)
    assert len(plan.slots) == len(jax.tree.leaves(abstract))
    assert sum(np.prod(shape) for shape in tensors.values()) == sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert len(plan.unused) == PUBLISHED[name][2]


@pytest.mark.parametrize("name", PUBLISHED)
def test_any_single_change_of_a_header_is_reported(name):
    headers = published_header(name)
    unused = set(plan_for(name, headers).unused)
    for tensor in list(headers)[:: max(1, len(headers) // 5)]:
        if tensor in unused:
            continue
        shape = headers[tensor].shape
        changed = headers[tensor]._replace(shape=(*shape[:-1], shape[-1] + 1) if shape else (1,))
        for headers_, complaint in (
            ({k: v for k, v in headers.items() if k != tensor}, f"missing: {tensor} "),
            (headers | {f"{tensor}.extra": headers[tensor]}, f"unexpected: {tensor}.extra in {name}.safetensors"),
            (headers | {tensor: changed}, f"wrong shape: {tensor} in {name}.safetensors"),
            (headers | {tensor: headers[tensor]._replace(dtype="F8_E4M3")}, f"wrong dtype: {tensor} "),
        ):
            with pytest.raises(ConversionError) as error:
                plan_for(name, headers_)
            assert complaint in str(error.value)
            assert len(str(error.value).splitlines()) == 2


def test_all_problems_come_in_one_error():
    headers = published_header("flux1.vae")
    del headers["decoder.conv_in.bias"]
    headers["decoder.conv_in.wieght"] = headers.pop("decoder.conv_in.weight")
    with pytest.raises(ConversionError) as error:
        plan_for("flux1.vae", headers)
    for complaint in (
        "missing: decoder.conv_in.bias",
        "missing: decoder.conv_in.weight",
        "unexpected: decoder.conv_in.w",
    ):
        assert complaint in str(error.value)
    with pytest.raises(ConversionError, match=r"and 224 more$"):
        plan_for("flux1.vae", {})


def test_open_clip_fills_the_same_params_as_transformers():
    """One network, two published layouts: every leaf has the same path and shape."""
    ours, theirs = abstract_params("hpsv2_open_clip_h14.reward"), abstract_params("clip_h14_hf.reward")
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert jax.tree.leaves(ours) == jax.tree.leaves(theirs)


def test_a_wrong_config_is_reported_by_layer():
    headers = published_header("qwen3_4b.text_encoder")
    component = decoder_lm.component(-2)
    for layers, complaint in (
        (35, "unexpected: model.layers.35."),
        (38, r"missing: model.layers.36.input_layernorm.weight"),
    ):
        config = QWEN3_4B | {"num_hidden_layers": layers}
        with pytest.raises(ConversionError, match=complaint):
            matching.plan(component.table(config), component.abstract(component.from_json(config)), headers)


def test_prefix_is_optional_but_all_or_nothing():
    headers = published_header("qwen3_4b.text_encoder")
    bare = {name.removeprefix("model."): header for name, header in headers.items()}
    assert plan_for("qwen3_4b.text_encoder", headers).prefix == "model."
    assert plan_for("qwen3_4b.text_encoder", bare).prefix == ""
    with_head = headers | {"lm_head.weight": headers["model.embed_tokens.weight"]}
    assert "lm_head.weight" in plan_for("qwen3_4b.text_encoder", with_head).unused
    mixed = dict(headers)
    mixed["layers.3.mlp.up_proj.weight"] = mixed.pop("model.layers.3.mlp.up_proj.weight")
    with pytest.raises(ConversionError, match=r"unexpected: layers.3.mlp.up_proj.weight"):
        plan_for("qwen3_4b.text_encoder", mixed)


@pytest.mark.parametrize(
    ("rules", "complaint"),
    [
        (
            (*linear("a", "a"), *linear("other.a", "a")),
            "a/kernel needs exactly one rule, has 2: a.weight -> a/kernel and",
        ),
        (linear("a", "a", bias=False), "a/bias needs exactly one rule, has 0"),
        ((*linear("a", "a"), *linear("a", "b")), "a.weight fills 2 leaves"),
        ((*linear("a.{i}.{j}", "a"), *linear("b", "b")), "stacks along more than one placeholder: i, j"),
    ],
)
def test_a_wrong_table_is_reported(rules, complaint):
    leaf = {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32), "bias": jax.ShapeDtypeStruct((3,), np.float32)}
    abstract = {"a": leaf} | ({"b": leaf} if any(rule.target.startswith("b") for rule in rules) else {})
    with pytest.raises(ConversionError) as error:
        matching.layout(Table(tuple(rules)), abstract)
    assert complaint in str(error.value)


def test_templates_match_whole_names_and_plain_numbers():
    table = Table((Rule("m.{a}.x", "m_{a}"),))
    assert matching.layout(table, {"m_12": jax.ShapeDtypeStruct((), np.float32)})[0].name == "m.12.x"
    for path in ("m_1x", "xm_1", "m_01", "m_"):
        with pytest.raises(ConversionError, match="has 0"):
            matching.layout(table, {path: jax.ShapeDtypeStruct((), np.float32)})


@pytest.mark.parametrize("shape", [(), (5,), (70, 130), (3, 3, 70, 130)])
@pytest.mark.parametrize("layers", [None, 3])
def test_any_rank_round_trips(shape, layers):
    """Stacked or not, from scalars to convolutions larger than the bands that are copied at a time."""
    transform = {2: LINEAR, 4: CONV}.get(len(shape), IDENTITY)
    table = Table((Rule("x.{i}" if layers else "x", "y", transform),))
    rng = np.random.default_rng(0)
    names = [f"x.{i}" for i in range(layers)] if layers else ["x"]
    published = {name: rng.standard_normal(transform.inverse(np.empty(shape)).shape, np.float32) for name in names}
    headers = {name: Header(array.shape, "F32", "file") for name, array in published.items()}
    abstract = {"y": jax.ShapeDtypeStruct((layers, *shape) if layers else shape, np.float32)}
    params = engine.load(matching.plan(table, abstract, headers), abstract, Weights(headers, published.__getitem__))
    np.testing.assert_array_equal(params["y"][0] if layers else params["y"], transform.forward(published[names[0]]))
    assert_bit_equal(dict(engine.export(table, params)), published)


@pytest.mark.parametrize("layers", [None, 3])
def test_fused_tensors_round_trip(layers):
    """Parts of different sizes, in an order that is not that of the leaves."""
    source = "x.{i}.qkv" if layers else "x.qkv"
    widths = {"v": 10, "q": 30, "k": 70}
    table = Table((*fused(source, list(widths)), *linear(source.replace("qkv", "out"), "out", bias=False)))
    rng = np.random.default_rng(0)
    published = {}
    for i in range(layers or 1):
        name = f"x.{i}." if layers else "x."
        published[f"{name}qkv.weight"] = rng.standard_normal((110, 80), np.float32)
        published[f"{name}qkv.bias"] = rng.standard_normal(110, np.float32)
        published[f"{name}out.weight"] = rng.standard_normal((5, 6), np.float32)
    headers = {name: Header(array.shape, "F32", "file") for name, array in published.items()}
    leaf = lambda *shape: jax.ShapeDtypeStruct((layers, *shape) if layers else shape, np.float32)  # noqa: E731
    abstract = {n: {"kernel": leaf(80, w), "bias": leaf(w)} for n, w in widths.items()} | {
        "out": {"kernel": leaf(6, 5)}
    }
    params = engine.load(matching.plan(table, abstract, headers), abstract, Weights(headers, published.__getitem__))
    last = f"x.{layers - 1}." if layers else "x."
    q = params["q"]["kernel"][-1] if layers else params["q"]["kernel"]
    np.testing.assert_array_equal(q, published[f"{last}qkv.weight"][10:40].T)
    assert_bit_equal(dict(engine.export(table, params)), published)

    def read_other(name):
        assert "qkv" not in name
        return published[name]

    in_parts = Weights(headers, read_other, lambda name, index: published[name][index])
    again = engine.load(matching.plan(table, abstract, headers), abstract, in_parts)
    assert_bit_equal(flat(again), flat(params))

    wrong = headers | {f"{last}qkv.weight": Header((111, 80), "F32", "file")}
    with pytest.raises(ConversionError) as error:
        matching.plan(table, abstract, wrong)
    assert str(error.value).splitlines()[1:] == [
        f"  wrong shape: {last}qkv.weight in file is [111, 80], expected [110, 80]"
    ]
    with pytest.raises(ConversionError, match=r"missing: .*qkv.bias \[110\], for"):
        matching.plan(table, abstract, {name: h for name, h in headers.items() if not name.endswith("qkv.bias")})


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [((0, 0), "is split into the parts 0, 0"), ((0, 2), "into the parts 0, 2"), ((0, None), "fills 2 leaves")],
)
def test_a_wrong_split_is_reported(parts, complaint):
    table = Table(tuple(Rule("x", name, part=part) for name, part in zip("ab", parts, strict=True)))
    leaves = {"a": jax.ShapeDtypeStruct((2, 3), np.float32), "b": jax.ShapeDtypeStruct((2, 3), np.float32)}
    with pytest.raises(ConversionError, match=complaint):
        matching.layout(table, leaves)
    narrow = leaves | {"b": jax.ShapeDtypeStruct((2, 4), np.float32)}
    with pytest.raises(ConversionError, match="do not fit together"):
        matching.layout(Table((Rule("x", "a", part=0), Rule("x", "b", part=1))), narrow)
    with pytest.raises(ConversionError, match="do not fit together"):
        matching.layout(Table((Rule("x", "a", part=0), Rule("x", "b", part=1, axis=1))), leaves)


@pytest.mark.parametrize("layers", [None, 3])
def test_tensors_that_are_joined_on_their_inputs_round_trip(layers):
    source = "x.{i}.out" if layers else "x.out"
    table = Table(joined(source, ["mlp", "attention"]))
    names = [source.format(i=i) + ".weight" for i in range(layers or 1)]
    rng = np.random.default_rng(0)
    published = {name: rng.standard_normal((8, 90), np.float32) for name in names}
    headers = {name: Header(array.shape, "F32", "file") for name, array in published.items()}
    shapes = {"attention": (20, 8), "mlp": (70, 8)}
    abstract = {
        name: {"kernel": jax.ShapeDtypeStruct((layers, *shape) if layers else shape, np.float32)}
        for name, shape in shapes.items()
    }
    params = engine.load(matching.plan(table, abstract, headers), abstract, Weights(headers, published.__getitem__))
    attention = params["attention"]["kernel"][-1] if layers else params["attention"]["kernel"]
    np.testing.assert_array_equal(attention, published[names[-1]][:, 70:].T)
    assert_bit_equal(dict(engine.export(table, params)), published)
    wrong = headers | {names[-1]: Header((8, 91), "F32", "file")}
    with pytest.raises(ConversionError, match=r"out.weight in file is \[8, 91\], expected \[8, 90\]"):
        matching.plan(table, abstract, wrong)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_part_of_a_tensor_is_read_from_a_file(tmp_path, dtype):
    tensor = np.arange(60).reshape(6, 10).astype(jnp.dtype(dtype))
    safetensors.numpy.save_file({"x": tensor}, tmp_path / "file.safetensors")
    weights = files.open_files([tmp_path / "file.safetensors"])
    for index in ((slice(1, 4),), (slice(None), slice(3, 9))):
        part = weights.read_part("x", index)
        assert part.dtype == tensor.dtype
        np.testing.assert_array_equal(part, tensor[index])


@pytest.mark.parametrize(
    ("transform", "shape"),
    [(IDENTITY, (120,)), (LINEAR, (10, 12)), (CONV, (2, 3, 4, 5)), (CONV3D, (2, 3, 4, 5, 1)),
     (qwen_vae.VIDEO_SCALE, (120, 1, 1, 1)), (qwen_vae.IMAGE_SCALE, (120, 1, 1))],
    ids=lambda x: getattr(x, "name", None),
)  # fmt: skip
def test_transforms_invert(transform, shape):
    x = np.arange(120).reshape(shape)
    np.testing.assert_array_equal(transform.inverse(transform.forward(x)), x)
    laid_out = transform.forward(x)
    np.testing.assert_array_equal(transform.forward(transform.inverse(laid_out)), laid_out)


# Small networks of the four kinds, and weights for them.

TINY = oracle.ZImageSizes(layers=3, refiner_layers=1, vae_widths=(4, 8), vae_layers=1, quant_convs=True)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A published pipeline with its own reward, as torch writes it."""
    root = tmp_path_factory.mktemp("tiny")
    oracle.z_image_pipeline(TINY).save_pretrained(root)
    oracle.save_clip(root / "clip", oracle.clip())
    (root / "ses_jax.json").write_text('{"level": 2}')
    return root


def components():
    return FAMILIES["ZImagePipeline"].COMPONENTS | {"clip": clip.COMPONENT}


def tensors_in(path, component):
    weights = files.open_weights(path, component.stem)
    return {name: weights.read(name) for name in weights.headers}


def assert_bit_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        a, b = np.asarray(left[name]), np.asarray(right[name])
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert a.tobytes() == b.tobytes(), name


def flat(params):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("transformer", "float32"), ("vae", "float32"), ("text_encoder", "bfloat16"), ("clip", "float16")],
)
def test_round_trips_are_bit_equal(tiny_folder, tmp_path, name, dtype):
    """Published -> params -> published in the file's dtype, then the same from shards, then through Orbax."""
    component = components()[name]
    source = {k: v.astype(jnp.dtype(dtype)) for k, v in tensors_in(tiny_folder / name, component).items()}
    config = files.read_json(tiny_folder / name / "config.json")

    def write(path, **options):
        path.mkdir()
        files.write_json(path / "config.json", config)
        files.write_weights(path, component.stem, source.items(), **options)
        return network.load(path, component)

    whole = write(tmp_path / "whole")
    assert {leaf.dtype for leaf in jax.tree.leaves(whole.params)} == {jnp.dtype(dtype)}
    network.save_published(tmp_path / "again", component, whole)
    assert_bit_equal(tensors_in(tmp_path / "again", component), source)

    sharded = write(tmp_path / "sharded", shard_bytes=20_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert not list((tmp_path / "sharded").glob(".*"))
    assert_bit_equal(flat(sharded.params), flat(whole.params))

    network.save_converted(tmp_path / "converted", sharded)
    restored = network.load(tmp_path / "converted", component)
    assert_bit_equal(flat(restored.params), flat(whole.params))
    network.save_published(tmp_path / "last", component, restored)
    assert_bit_equal(tensors_in(tmp_path / "last", component), source)


def test_loading_casts(tiny_folder):
    name, component = "text_encoder", components()["text_encoder"]
    exact = network.load(tiny_folder / name, component).params
    cast = network.load(tiny_folder / name, component, dtype=jnp.bfloat16).params
    assert_bit_equal(flat(cast), flat(jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)))


def test_loading_places_each_leaf(tiny_folder):
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    seen = {}

    def sharding(path, shape):
        seen[path] = shape
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model" if shape else None))

    params = network.load(tiny_folder / "vae", components()["vae"], sharding=sharding).params
    assert all(isinstance(leaf.sharding, jax.sharding.NamedSharding) for leaf in jax.tree.leaves(params))
    assert seen["decoder/conv_in/kernel"] == (3, 3, 16, 8)
    plain = network.load(tiny_folder / "vae", components()["vae"]).params
    assert_bit_equal(flat(params), flat(plain))


def test_export_of_own_params_fills_a_published_folder(tmp_path):
    """Params that were trained here, without the unused layer that the published layout asks for."""
    config = QWEN3_4B | {"num_hidden_layers": 3, "vocab_size": 8, "hidden_size": 6, "intermediate_size": 10}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    component = decoder_lm.component(-2)
    params = component.init(jax.random.key(0), component.from_json(config))
    network.export(tmp_path, component, config, params, unused=decoder_lm.idle_layers(config, layers=2))
    loaded = network.load(tmp_path, component)
    assert_bit_equal(flat(loaded.params), flat(params))
    assert loaded.prefix == "model."
    torch_names = oracle.transformers.Qwen3Model(oracle.Qwen3Config(**config)).state_dict()
    assert {f"model.{name}" for name in torch_names} == tensors_in(tmp_path, component).keys()


class CountingWeights:
    """Published tensors made on demand, counting how many are alive."""

    def __init__(self, headers):
        self.headers, self.alive, self.most, self.reads = headers, 0, 0, []

    def read(self, name):
        self.reads.append(name)
        array = np.full(self.headers[name].shape, len(self.reads) % 7, np.float32)
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(array, self._release)
        return array

    def _release(self):
        self.alive -= 1


def test_loading_reads_each_tensor_once_and_holds_one_leaf():
    layers, width = 12, 256
    abstract = {f"b{k}": {"kernel": jax.ShapeDtypeStruct((layers, width, width), np.float32)} for k in range(6)}
    table = Table(tuple(rule for k in range(6) for rule in linear(f"b{k}.{{i}}", f"b{k}", bias=False)))
    names = [f"b{k}.{i}.weight" for k in range(6) for i in range(layers)]
    source = CountingWeights({name: Header((width, width), "F32", "file") for name in names})
    plan = matching.plan(table, abstract, source.headers)
    params = []

    def to_device_and_forget(path, shape):
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])

    tracemalloc.start()
    params = engine.load(
        plan, abstract, Weights(source.headers, source.read), dtype=jnp.bfloat16, sharding=to_device_and_forget
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted(source.reads) == sorted(names)
    assert source.most <= 2  # the last one is released when the next one replaces it
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    leaf, tensor = total // 6, width * width * 4
    assert peak < total + leaf + 3 * tensor


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_not_finite_are_named(tiny_folder, tmp_path, value, dtype):
    component = components()["vae"]
    tensors = {k: v.astype(jnp.dtype(dtype)) for k, v in tensors_in(tiny_folder / "vae", component).items()}
    tensors["decoder.conv_out.weight"].flat[5] = value
    files.write_json(tmp_path / "config.json", files.read_json(tiny_folder / "vae" / "config.json"))
    files.write_weights(tmp_path, component.stem, tensors.items())
    with pytest.raises(ConversionError, match=r"decoder.conv_out.weight in .*\.safetensors has NaN or infinite"):
        network.load(tmp_path, component)


def test_overflow_in_a_cast_is_named(tiny_folder, tmp_path):
    component = components()["vae"]
    tensors = tensors_in(tiny_folder / "vae", component)
    tensors["decoder.conv_in.bias"][0] = 1e6
    files.write_json(tmp_path / "config.json", files.read_json(tiny_folder / "vae" / "config.json"))
    files.write_weights(tmp_path, component.stem, tensors.items())
    network.load(tmp_path, component, dtype=jnp.bfloat16)
    with pytest.raises(ConversionError, match=r"decoder.conv_in.bias .*\(as float16\)"):
        network.load(tmp_path, component, dtype=jnp.float16)


# Damaged files.


@pytest.fixture
def sharded(tmp_path):
    tensors = {f"t{i}": np.full((100,), i, np.float32) for i in range(5)}
    files.write_weights(tmp_path, "model", tensors.items(), shard_bytes=800)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    return tmp_path


def test_shards_come_with_an_index(sharded):
    index = files.read_json(sharded / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == 2000
    assert index["weight_map"]["t2"] == "model-00002-of-00003.safetensors"
    weights = files.open_weights(sharded, "model")
    assert [weights.read(f"t{i}")[0] for i in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("damage", ["truncate", "corrupt", "empty"])
def test_damaged_file_is_named(sharded, damage):
    file = sharded / "model-00002-of-00003.safetensors"
    content = file.read_bytes()
    file.write_bytes({"truncate": content[:-1], "corrupt": content[:9] + b"??" + content[11:], "empty": b""}[damage])
    with pytest.raises(ConversionError, match=r"model-00002-of-00003.safetensors is truncated or corrupt"):
        files.open_weights(sharded, "model")


def test_missing_shard_is_named(sharded):
    (sharded / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index.json names files that do not exist: model-00003-of-00003"):
        files.open_weights(sharded, "model")


@pytest.mark.parametrize(
    "change", [{"t9": "model-00001-of-00003.safetensors"}, {"t4": "model-00001-of-00003.safetensors"}]
)
def test_index_that_lies_is_reported(sharded, change):
    path = sharded / "model.safetensors.index.json"
    index = files.read_json(path)
    files.write_json(path, index | {"weight_map": index["weight_map"] | change})
    with pytest.raises(ConversionError, match=f"disagree about where these are: {next(iter(change))}"):
        files.open_weights(sharded, "model")


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}'])
def test_broken_index_is_named(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json"):
        files.open_weights(sharded, "model")


def test_tensor_in_two_shards_is_reported(sharded):
    safetensors.numpy.save_file({"t0": np.zeros(3)}, sharded / "model-00003-of-00003.safetensors")
    with pytest.raises(ConversionError, match=r"t0 is both in .*00001-of-00003.safetensors and in .*00003-of-00003"):
        files.open_weights(sharded, "model")


def test_no_weights_says_what_is_there(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"expected model.safetensors or .*, found pytorch_model.bin"):
        files.open_weights(tmp_path, "model")


def test_a_failed_write_leaves_nothing(tmp_path):
    def tensors():
        yield "a", np.zeros(10)
        yield "b", np.zeros(10)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        files.write_weights(tmp_path, "model", tensors(), shard_bytes=10)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    """A limit to the size of files has the same effect."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=rf"cannot write model\.safetensors to {tmp_path}: .*File too large"):
            files.write_weights(tmp_path, "model", [("a", np.zeros(10)), ("b", np.zeros(1000))], shard_bytes=10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_config_that_lacks_a_field_is_named(tiny_folder, tmp_path):
    config = files.read_json(tiny_folder / "text_encoder" / "config.json")
    del config["hidden_size"]
    files.write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match=r"config.json: lacks 'hidden_size'"):
        network.load(tmp_path, components()["text_encoder"])


# Whole folders, through the command.


def test_command_converts_and_exports_bit_equally(tiny_folder, tmp_path):
    main(str(tiny_folder), tmp_path / "converted")
    small = {"model_index.json", "ses_jax.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"}
    for name in small:
        assert (tmp_path / "converted" / name).read_bytes() == (tiny_folder / name).read_bytes()
    assert not list((tmp_path / "converted").rglob("*pytorch_model*"))
    assert (tmp_path / "converted" / "text_encoder" / "unused.safetensors").is_file()

    main(str(tmp_path / "converted"), tmp_path / "exported", export=True)
    for name, component in components().items():
        assert_bit_equal(tensors_in(tmp_path / "exported" / name, component), tensors_in(tiny_folder / name, component))

    def listing(root):
        return sorted(str(path.relative_to(root)) for path in root.rglob("*"))

    assert listing(tmp_path / "exported") == listing(tiny_folder)
    oracle.ZImagePipeline.from_pretrained(tmp_path / "exported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "exported"]


def test_command_without_unused_tensors_cannot_export(tiny_folder, tmp_path):
    main(str(tiny_folder), tmp_path / "small", dtype="bfloat16", drop_unused=True)
    assert not list((tmp_path / "small").rglob("unused*"))
    params = network.load(tmp_path / "small" / "text_encoder", components()["text_encoder"]).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"text_encoder: converted with --drop-unused, which left out layers.3."):
        main(str(tmp_path / "small"), tmp_path / "exported", export=True)
    assert not (tmp_path / "exported").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    # A second conversion remembers what the first one dropped.
    component = components()["text_encoder"]
    network.save_converted(tmp_path / "smaller", network.load(tmp_path / "small" / "text_encoder", component))
    with pytest.raises(ValueError, match="--drop-unused"):
        network.save_published(tmp_path / "out", component, network.load(tmp_path / "smaller", component))


def test_command_converts_a_bare_clip(tiny_folder, tmp_path):
    main(str(tiny_folder / "clip"), tmp_path / "clip")
    main(str(tmp_path / "clip"), tmp_path / "back", export=True)
    assert_bit_equal(tensors_in(tmp_path / "back", clip.COMPONENT), tensors_in(tiny_folder / "clip", clip.COMPONENT))
    assert (tmp_path / "clip" / "tokenizer.json").is_file()


def test_command_reads_a_read_only_folder(tiny_folder, tmp_path):
    tiny_folder.chmod(0o555)
    try:
        main(str(tiny_folder), tmp_path / "out")
    finally:
        tiny_folder.chmod(0o755)
    assert (tmp_path / "out").stat().st_mode & 0o200


def test_command_follows_folders_that_are_links(tiny_folder, tmp_path):
    """Of a checkpoint that shares its parts with another; a link back to the checkpoint itself is not followed."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in tiny_folder.iterdir():
        (linked / path.name).symlink_to(path)
    (linked / "itself").symlink_to(linked)
    main(str(linked), tmp_path / "converted")
    for name in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"):
        assert (tmp_path / "converted" / name).read_bytes() == (tiny_folder / name).read_bytes()
    assert not (tmp_path / "converted" / "itself").exists()
    assert not any(path.is_symlink() for path in (tmp_path / "converted").rglob("*"))


def test_command_refuses_what_it_does_not_know(tiny_folder, tmp_path):
    files.write_json(tmp_path / "model_index.json", {"_class_name": "OtherPipeline"})
    with pytest.raises(ValueError, match=r"pipeline class 'OtherPipeline' is not supported; known: .*ZImagePipeline"):
        main(str(tmp_path), tmp_path / "out")
    with pytest.raises(ValueError, match=r"model type 'qwen3' is not supported; expected a pipeline or 'clip'"):
        main(str(tiny_folder / "text_encoder"), tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists already"):
        main(str(tiny_folder), tmp_path / "out")


def test_failed_conversion_leaves_nothing(tiny_folder, tmp_path):
    broken = Component(z_image.COMPONENT.from_json, z_image.COMPONENT.init, lambda config: Table(()))
    with pytest.raises(ConversionError):
        folder.convert(tiny_folder, tmp_path / "out", {"vae": components()["vae"], "transformer": broken})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seen", ["by NumPy", "by a program", "on a mesh"])
def test_converted_params_that_are_not_finite_are_named(tiny_folder, tmp_path, monkeypatch, seen):
    """A CPU's are looked at by NumPy, a GPU's by one program for them all."""
    component = components()["vae"]
    loaded = network.load(tiny_folder / "vae", component)
    network.save_converted(tmp_path / "whole", loaded)
    loaded.params["decoder"]["conv_in"]["bias"] = loaded.params["decoder"]["conv_in"]["bias"].at[-1].set(jnp.nan)
    network.save_converted(tmp_path / "damaged", loaded)
    if seen == "by a program":
        monkeypatch.setattr(network, "_on_host", lambda leaf: leaf.ndim == 1 and len(leaf) > 8)
    split = jax.sharding.NamedSharding(jax.make_mesh((2,), ("x",)), jax.sharding.PartitionSpec("x"))
    place = {"sharding": lambda path, shape: split if shape[0] % 2 == 0 else None} if seen == "on a mesh" else {}
    network.load(tmp_path / "whole", component, **place)
    with pytest.raises(ConversionError, match=r"decoder/conv_in/bias in .*params has NaN"):
        network.load(tmp_path / "damaged", component, **place)
