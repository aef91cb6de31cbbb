"""Weights in eight bits: how far they are off, the same networks, and the same from every kind of folder."""

import functools
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
import toy
from adapted import assert_a_search_with_an_adapter_in_eight_bits
from hypothesis import given
from hypothesis import strategies as st
from jax.interpreters import partial_eval
from jax.sharding import PartitionSpec as P

import ses_jax
from ses_jax import cli
from ses_jax.convert import blip as blip_tables
from ses_jax.convert import engine, matching
from ses_jax.convert.engine import ConversionError, Header, Weights
from ses_jax.convert.table import Table, linear
from ses_jax.engine import identity, models, resume
from ses_jax.engine.config import SearchConfig
from ses_jax.loading import hub, partition, rows
from ses_jax.models import blip, clip, layers, quantized
from ses_jax.pipelines import registry
from ses_jax.planner import footprint, need
from ses_jax.planner.need import Machine
from ses_jax.planner.workload import Work, clip_scorer
from ses_jax.rewards import scorers

KINDS = ("int8", "fp8")
FAMILIES = [
    "Tongyi-MAI/Z-Image-Turbo",
    "black-forest-labs/FLUX.1-dev",
    "black-forest-labs/FLUX.2-klein-base-4B",
    "Qwen/Qwen-Image",
]


# Single kernels.


@given(st.sampled_from(KINDS), st.integers(0, 999), st.sampled_from([1e-42, 1e-6, 1.0, 1e30]), st.booleans())
def test_each_weight_is_the_nearest_that_eight_bits_have(kind, seed, size, transposed):
    rng = np.random.default_rng(seed)
    kernel = (rng.standard_normal((70, 5)) * size).astype(np.float32)
    kernel[:, 2] = 0
    kernel[0, 3] *= 100  # an outlier
    kernel = kernel if transposed else np.asfortranarray(kernel)
    stored = quantized.quantize(kernel, kind)
    assert stored.values.dtype == quantized.KINDS[kind].dtype
    assert (stored.scale > 0).all()
    off = np.abs(quantized.dequantize(stored).astype(np.float64) - kernel)
    if kind == "int8":
        assert (off <= 0.5001 * stored.scale).all()
        assert np.abs(stored.values).max() <= 127
    else:  # half a step of three bits, or below the smallest normal number half of its steps
        assert (off <= np.maximum(np.abs(kernel) / 16 * 1.0001, stored.scale * 2.0**-10 * 1.0001)).all()
    assert not quantized.dequantize(stored)[:, 2].any()


def test_rows_are_quantised_by_themselves_and_ties_go_to_even():
    kernel = np.array([[[127.0, -254.0], [2.5, 3.0]], [[0.0, 127.0], [0.0, -0.5]]], ml_dtypes.bfloat16)
    stored = quantized.quantize(kernel, "int8")
    np.testing.assert_array_equal(stored.scale[0], [1, 2])
    np.testing.assert_array_equal(stored.values, [[[127, -127], [2, 2]], [[0, 127], [0, 0]]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_in_eight_bits_is_one_of_the_weights_they_stand_for(kind, dtype):
    rng = np.random.default_rng(1)
    x = (40 * rng.standard_normal((6, 512))).astype(np.float32)  # float16 could not hold the sums of unscaled weights
    stored = quantized.quantize(rng.standard_normal((512, 16)).astype(np.float32) / 50, kind)
    bias = rng.standard_normal(16).astype(np.float32)
    params = {"kernel": stored.values, "kernel_scale": stored.scale, "bias": jnp.asarray(bias, dtype)}
    got = quantized.Dense(16).apply({"params": params}, jnp.asarray(x, dtype))
    exact = np.asarray(jnp.asarray(x, dtype)).astype(np.float64) @ quantized.dequantize(stored).astype(np.float64)
    assert got.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(got, exact + bias, rtol=2 * eps, atol=max(4 * eps, 1e-4))


# Whole networks.


@functools.cache
def shapes(source, kind=None):
    """A tiny family as shapes, float32 but for what is in eight bits."""
    with pytest.MonkeyPatch.context() as patch:
        tiny.publish(patch, source)
        return registry.abstract_pipeline(source, dtype=jnp.float32, quantize=kind)


def random_like(tree, seed=0):
    """Arrays that keep activations about as large as they are."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if leaf.dtype != jnp.float32:
            return jnp.full(leaf.shape, 32, leaf.dtype)
        return jnp.float32(rng.standard_normal(leaf.shape) / np.sqrt(leaf.shape[-2] if leaf.ndim > 1 else 4))

    return jax.tree.map(fill, tree)


def inputs(pipeline, params):
    """Shapes of what `velocity` takes besides the params."""
    condition = jax.eval_shape(pipeline.encode, pipeline.text_params(params), blank(pipeline))
    latents = jax.ShapeDtypeStruct((1, *pipeline.noise_shape(8, 8)), jnp.float32)
    return latents, jax.ShapeDtypeStruct((1,), jnp.float32), condition


def blank(pipeline):
    return pipeline.blank_tokens(1, 32, guidance=0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_bias_that_is_kept_apart_is_the_same_bias(dtype):
    rng = np.random.default_rng(0)
    x, kernel, bias = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((7, 16), (16, 24), (24,)))
    joined, apart = (
        quantized.Dense(24, bias_apart=apart).apply({"params": {"kernel": kernel, "bias": bias}}, x)
        for apart in (False, True)
    )
    assert apart.dtype == joined.dtype == dtype
    np.testing.assert_array_equal(apart, joined)
    without = quantized.Dense(24, use_bias=False, bias_apart=True).apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_array_equal((np.float32(without) + np.float32(bias)).astype(dtype), apart)


@pytest.mark.parametrize(("source", "kind"), list(zip(FAMILIES[:3], ("fp8", "int8", "int8"), strict=True)))
def test_a_transformer_is_that_of_the_weights_it_stands_for(source, kind):
    pipeline = shapes(source)
    rule = registry.FAMILIES[pipeline.family].COMPONENTS["transformer"].quantization(kind)
    exact = random_like(pipeline.params["transformer"])
    args = random_like(inputs(pipeline, pipeline.params), seed=1)

    def stored(path, leaf):
        return quantized.quantize(np.asarray(leaf), kind)

    def spread(path, leaf):
        return quantized.dequantize(quantized.quantize(np.asarray(leaf), kind)) if rule.takes(path) else leaf

    velocity = jax.jit(lambda transformer: pipeline.velocity({"transformer": transformer}, *args))
    ours = velocity(quantized.map_kernels(exact, rule, stored))
    expected, exact = velocity(with_paths(spread, exact)), velocity(exact)
    size = np.abs(expected).max()
    np.testing.assert_allclose(ours / size, expected / size, atol=5e-5)
    off = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    assert 1e-4 < off < 0.1  # rounded, and not far


def with_paths(function, tree):
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), tree
    )


def used(function, params, *args):
    """The paths of the params that a function looks at, traced."""
    jaxpr = jax.make_jaxpr(function)(params, *args).jaxpr
    _, found = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path) for (path, _), is_used in zip(leaves, found, strict=False) if is_used}


def scales_of(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {keys for path, _ in leaves if (keys := jax.tree_util.keystr(path)).endswith("['kernel_scale']")}


@pytest.mark.parametrize("source", FAMILIES)
def test_no_scale_is_forgotten(source):
    pipeline = shapes(source, "int8")
    assert quantized.kind_of(pipeline.params) == "int8"
    seen = used(pipeline.encode, pipeline.text_params(pipeline.params), blank(pipeline))
    image = pipeline.image_params(pipeline.params)
    seen |= used(pipeline.velocity, image, *inputs(pipeline, pipeline.params))
    assert len(scales_of(pipeline.params)) > 10
    assert scales_of(pipeline.params) <= seen


def test_no_scale_of_a_reward_is_forgotten():
    towers = {"hidden_size": 64, "intermediate_size": 128, "layers": 2, "heads": 2}
    config = blip.Config(blip.Bert(**towers), clip.Tower(**towers), image_size=32)
    component = blip_tables.COMPONENT
    params = quantized.abstract(component.abstract(config), component.quantization("fp8"))
    tokens = blip.Tokens(np.zeros((1, 5), np.int32), np.ones((1, 5), bool))
    assert len(scales_of(params)) == 6 + 10
    assert scales_of(params) <= used(functools.partial(_blip, config), params, jnp.zeros((1, 32, 32, 3)), tokens)
    scorer = clip_scorer(jnp.float32, "fp8")
    text = jax.eval_shape(scorer.embed_text, scorer.params, scorer.tokenize([""]))
    seen = used(scorer.embed_text, scorer.params, scorer.tokenize([""]))
    seen |= used(scorer.score, scorer.params, jnp.zeros((1, 32, 32, 3)), text)
    assert len(scales_of(scorer.params)) == 2 * 6
    assert scales_of(scorer.params) <= seen


def _blip(config, params, pixels, tokens):
    return blip.encode(params, config, pixels, tokens)


def test_only_one_layer_at_a_time_is_cast(optimized_programs):
    """By the compiled program less than two layers in the dtype of the activations; the planner counts one."""
    count, width = 12, 256
    leaf = {"kernel": jax.ShapeDtypeStruct((count, width, width), jnp.float32)}
    params = quantized.abstract(leaf, quantized.Quantization("int8", ("kernel",)))

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return quantized.Dense(width, use_bias=False, name="dense")(x), None

    def run(params, x):
        return layers.stack(Block, count)().apply({"params": {"dense": params}}, x)[0]

    x, one = jax.ShapeDtypeStruct((4, width), jnp.float32), 4 * width**2
    compiled = jax.jit(run).lower(params, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * one
    assert one < footprint.temporary_bytes(run, params, x) < 2 * one


# Loading.


def test_the_host_holds_no_more_than_one_tensor_as_it_was_published():
    """Of a stack of kernels in float32."""
    count, width = 16, 256
    table = Table(linear("blocks.{i}.a", "blocks/a", bias=False))
    abstract = {"blocks": {"a": {"kernel": jax.ShapeDtypeStruct((count, width, width), jnp.float32)}}}
    headers = {f"blocks.{i}.a.weight": Header((width, width), "F32", "file") for i in range(count)}
    weights = Weights(headers, lambda name: np.random.default_rng(0).standard_normal((width, width), np.float32))
    found = matching.plan(table, abstract, headers)
    rule = quantized.Quantization("int8", ("blocks/.*/kernel",))
    tracemalloc.start()
    params = engine.load(found, abstract, weights, sharding=hub.on_host, quantization=rule)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) == count * width * (width + 4)
    # The tensor, and of each of four bands, which threads may take at once, three quarters of a tensor.
    assert peak < count * width * (width + 4) + 4 * 4 * width**2 < count * 4 * width**2


@pytest.fixture(scope="module")
def exact():
    return ses_jax.load_pipeline("demo")


@pytest.fixture(scope="module")
def eight():
    return ses_jax.load_pipeline("demo", quantize="int8")


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_demo_in_eight_bits(exact, eight):
    """Blocks of transformer and text encoder, and nothing else."""
    assert (exact.changes, eight.changes) == ({}, {"quantize": "int8"})
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(eight.params)
        if leaf.dtype == jnp.int8
    }
    blocks = ("transformer/layers/", "transformer/noise_refiner/", "transformer/context_refiner/")
    assert {path.rpartition("/")[0].rpartition("/")[0] for path in found} == {
        *(f"{block}{part}" for block in blocks for part in ("attention", "feed_forward")),
        *(f"text_encoder/layers/{part}" for part in ("self_attn", "mlp")),
    }
    kernel, stored = (p.params["transformer"]["layers"]["feed_forward"]["w2"] for p in (exact, eight))
    scale = np.abs(kernel["kernel"]).max(axis=1) / 127
    np.testing.assert_allclose(stored["kernel_scale"], scale, rtol=1e-6)
    np.testing.assert_array_equal(stored["kernel"], np.rint(np.asarray(kernel["kernel"]) / scale[:, None, :]))
    assert_same(exact.params["vae"], eight.params["vae"])


def test_converted_folders(tmp_path, eight, capsys, monkeypatch):
    """Converted and then quantised by the layer, or once and reloaded as such: the same bits."""
    monkeypatch.setattr(rows, "LARGE", 0)
    assert cli.main(["convert", "demo", str(tmp_path / "whole")]) == 0
    assert cli.main(["convert", "demo", str(tmp_path / "small"), "--quantize", "int8"]) == 0
    component = registry.FAMILIES[eight.family].COMPONENTS["transformer"]
    assert rows.stored(tmp_path / "whole" / "transformer" / "params", "layers/feed_forward/w2/kernel") is not None
    _, params = hub.load_component(tmp_path / "whole" / "transformer", component, quantize="int8")
    assert_same(params, eight.params["transformer"])
    small = ses_jax.load_pipeline(str(tmp_path / "small"), dtype="bfloat16", offload_text_encoder=True)
    assert small.changes == {"quantize": "int8"}
    assert_same(small.params, with_paths(as_bfloat16, eight.params))
    with pytest.raises(ValueError, match=r"small/transformer is quantised already \(int8\)"):
        hub.load_component(tmp_path / "small" / "transformer", component, quantize="fp8")
    assert cli.main(["convert", str(tmp_path / "small"), str(tmp_path / "out"), "--export"]) == 2
    assert "the weights are quantised (int8)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def as_bfloat16(path, leaf):
    return leaf if quantized.keeps_dtype(path, leaf.dtype) else leaf.astype(jnp.bfloat16)


def test_what_is_refused(tmp_path, capsys):
    assert cli.main(["convert", "demo", str(tmp_path / "out"), "--export", "--quantize", "int8"]) == 2
    assert "cannot export to" in capsys.readouterr().err
    for call in (ses_jax.load_pipeline, ses_jax.load_reward, functools.partial(ses_jax.plan, FAMILIES[0])):
        with pytest.raises(ValueError, match="quantize='int4' is no way to store weights; choose int8 or fp8"):
            call(quantize="int4")


def test_tensors_that_are_not_finite_are_named():
    headers = {"a.weight": Header((2, 3), "F32", "the.file")}
    table = Table(linear("a", "a", bias=False))
    abstract = {"a": {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32)}}
    weights = Weights(headers, lambda name: np.array([[0, np.nan, 1], [1, 1, 1]], np.float32))
    rule = quantized.Quantization("int8", ("a/kernel",))
    with pytest.raises(ConversionError, match=r"a\.weight in the\.file has NaN"):
        engine.load(matching.plan(table, abstract, headers), abstract, weights, quantization=rule)


def test_scales_lie_where_the_outputs_of_their_kernels_do():
    mesh = partition.abstract_mesh("data=1,model=2")
    rules = ((r"in/kernel", P(None, None, "model")), (r"out/kernel", P(None, "model", None)), (r"one/kernel", P()))
    assert partition.sharding(mesh, rules, "in/kernel_scale", (3, 8)).spec == P(None, "model")
    assert partition.sharding(mesh, rules, "out/kernel_scale", (3, 8)).spec == P(None, None)
    assert partition.sharding(mesh, rules, "one/kernel_scale", (8,)).spec == P(None)


def test_a_mesh_and_an_offloaded_one_make_the_same_image(eight):
    how = {"steps": 1, "height": 32, "width": 32}
    images = [ses_jax.generate(eight, "a red circle", **how)]
    for options in ({"mesh": "data=4,model=2"}, {"offload_text_encoder": True}):
        pipeline = ses_jax.load_pipeline("demo", quantize="int8", **options)
        images.append(ses_jax.generate(pipeline, "a red circle", **how))
    np.testing.assert_allclose(images[1], images[0], atol=1e-4)
    np.testing.assert_array_equal(images[2], images[0])


# Searches.


def test_a_search_with_an_adapter(tmp_path, eight):
    """Of Z-Image, by the demo; FLUX.1's is with the adapters, and the other families' files compare the weights."""
    found = assert_a_search_with_an_adapter_in_eight_bits(hub.DEMO, tmp_path)
    settings = {name: found.config[name] for name in ("budget", "population", "elites", "level", "height", "width")}
    settings |= {"steps": 1, "preview_steps": 1, "progress": False, "reward": toy.brightness()}
    without = ses_jax.search("a red circle", model=eight, **settings)
    assert abs(without.baseline_score - found.baseline_score) > 0.002  # twenty times what is let pass


def test_searches_tell_weights_apart(tmp_path, exact, eight):
    reward = toy.brightness()
    identities = [identity.identity_of(p, reward, SearchConfig(budget=3), ["a"], [0]) for p in (exact, eight)]
    resume.begin(tmp_path, identities[0])
    with pytest.raises(ValueError, match="quantize None -> 'int8'"):
        resume.begin(tmp_path, identities[1])
    with pytest.raises(ValueError, match="has no effect on a loaded pipeline"):
        models.find_pipeline(exact, quantize="int8")


def test_named_rewards_are_quantised_with_the_model(monkeypatch):
    asked = []
    monkeypatch.setattr(scorers, "load_scorer", lambda kind, **options: asked.append(options["quantize"]) or None)
    monkeypatch.setattr(models.spec, "assemble", lambda spec, known: toy.brightness())
    models.forget()
    for load in ({"quantize": "int8"}, {}, {}):
        monkeypatch.setattr(models, "find_pipeline", lambda model, **options: toy.pipeline())
        models.load_models("demo", "pick", None, load)
    assert asked == ["int8", None]


# Plans.


def test_a_plan_counts_eight_bits():
    """FLUX.1 on a card of 16 GB."""
    machine, works = Machine("4080", "data=1,model=1", True, 0.4), []
    for kind in (None, "int8"):
        pipeline = registry.abstract_pipeline(FAMILIES[1], quantize=kind)
        works.append(Work(pipeline, SearchConfig().resolve(pipeline, blank(pipeline)), 128))
    whole, small = (need.weights_of(work, machine)["transformer"] for work in works)
    assert 0.5 < small / whole < 0.51
    assert 0.5 < footprint.size_of(works[1].scorer.params) / footprint.size_of(works[0].scorer.params) < 0.55
    room = [need.limit_bytes(machine) - need.lying(work, machine).search for work in works]
    assert room[0] < 0 < 2e9 < room[1]
