"""Every network and reward at its published width, traced and lowered for the devices that it is meant for.

A CPU never sees what other devices' kernels refuse. Here programs are made for NVIDIA GPUs with cuDNN's own checks of
layouts and masks, which need neither the device nor its libraries, and for TPUs.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxprs import equations

from ses_jax.loading import partition
from ses_jax.models import blip, clip, layers, score_head, splash
from ses_jax.models.target import compiled_for, differentiated
from ses_jax.pipelines.registry import abstract_pipeline
from ses_jax.rewards import scorers
from ses_jax.rewards.preprocess import Preprocessor

KERNEL = "dot_product_attention_fwd"  # of cuDNN, in the names of its operations
GPU = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
TPU = types.SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")
# For each device, the platform that its programs are lowered for.
DEVICES = {"gpu": (GPU, "cuda"), "tpu": (TPU, "tpu")}
# Where cuDNN's kernel must not be taken, and where it is. On CPUs the other tests run everything.
TARGETS = [("gpu", jnp.float32), ("gpu", jnp.bfloat16), ("tpu", jnp.bfloat16)]
# One checkpoint of every network. The encoders of the others differ in sizes only.
MODELS = {
    "Tongyi-MAI/Z-Image": {},
    "black-forest-labs/FLUX.1-dev": {"true_cfg": 2.0},
    "black-forest-labs/FLUX.2-dev": {},
    "black-forest-labs/FLUX.2-klein-base-4B": {},
    "Qwen/Qwen-Image": {},
}
CLIP_L = {
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}
BERT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 30524,
    "max_position_embeddings": 512,
}
SIDE = 256  # of images, in pixels: kernels do not depend on it, constants in the program do


@pytest.fixture(autouse=True)
def _as_if_cudnn_were_here(monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)


def shapes(make, dtype):
    tree = jax.eval_shape(make)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)


_abstract = functools.cache(abstract_pipeline)  # takes longer than tracing it


@functools.cache
def of_pipeline(source, dtype):
    """`name: (function, arguments, whether its attention fits cuDNN)` of a model, two images at a time."""
    pipeline = _abstract(source)
    guidance = {"scale": pipeline.defaults.guidance, **MODELS[source]}
    tokens = pipeline.blank_tokens(2, 100, guidance=guidance)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), pipeline.params)
    condition = jax.eval_shape(pipeline.encode, params, tokens)
    latents = jax.ShapeDtypeStruct((2, *pipeline.noise_shape(SIDE, SIDE)), jnp.float32)
    sigma = jax.ShapeDtypeStruct((2,), jnp.float32)
    return {
        "encode": (pipeline.encode, (params, tokens), True),
        "velocity": (pipeline.velocity, (params, latents, sigma, condition), True),
        "decode": (pipeline.decode, (params, latents), False),  # one wide head
    }


@functools.cache
def of_rewards(dtype):
    images = jax.ShapeDtypeStruct((2, SIDE, SIDE, 3), jnp.float32)
    key = jax.random.key(0)
    programs = {}
    for name, config in (("H", clip.Config.from_open_clip({})), ("L", clip.Config.from_json(CLIP_L))):
        params = shapes(functools.partial(clip.init, key, config), dtype)
        text = jax.ShapeDtypeStruct((2, config.projection_dim), jnp.float32)
        ids = jax.ShapeDtypeStruct((2, config.max_length), jnp.int32)
        score = scorers.ImageScore(Preprocessor(), functools.partial(scorers.clip_score, config))
        programs[f"CLIP {name} text"] = (lambda p, i, c=config: clip.embed_text(p, c, i)), (params, ids), True
        programs[f"CLIP {name} score"] = score, (params, images, text), True
    config = blip.Config.from_json(BERT)
    params = {
        "blip": shapes(functools.partial(blip.init, key, config), dtype),
        "head": shapes(functools.partial(score_head.init, key, score_head.Config(768)), jnp.float32),
    }
    tokens = blip.Tokens(jax.ShapeDtypeStruct((2, 35), jnp.int32), jax.ShapeDtypeStruct((2, 35), bool))
    score = scorers.ImageScore(Preprocessor(half_to_even=True), functools.partial(scorers.image_reward, config))
    programs["ImageReward"] = score, (params, images, tokens), True
    return programs


def check(programs, device, dtype):
    target, platform = DEVICES[device]
    for name, (function, arguments, fits) in programs.items():

        def compiled(*arguments, function=function):
            with compiled_for(target):
                return function(*arguments)

        traced = jax.jit(compiled).trace(*arguments)
        fused = any(KERNEL in equation.primitive.name for equation in equations(traced.jaxpr))
        assert fused == (fits and device == "gpu" and dtype == jnp.bfloat16), name
        if dtype == jnp.bfloat16:
            traced.lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("source", MODELS)
def test_networks_on_gpus(source):
    check(of_pipeline(source, jnp.bfloat16), "gpu", jnp.bfloat16)


def test_a_network_in_float32_on_gpus():
    """All networks choose their kernels in one place."""
    check(of_pipeline("Tongyi-MAI/Z-Image", jnp.float32), "gpu", jnp.float32)


@pytest.mark.parametrize("source", MODELS)
def test_networks_on_tpus(source, monkeypatch):
    """Long sequences run in the splash kernel: these are short, so that programs are made quickly, and taken for long.

    Those of text are short; as plain attention they are lowered here, and so are the rewards.
    """
    monkeypatch.setattr(splash, "SHORTEST", 256)
    for name, (function, arguments, _) in of_pipeline(source, jnp.bfloat16).items():

        def compiled(*arguments, function=function):
            with compiled_for(TPU):
                return function(*arguments)

        traced = jax.jit(compiled).trace(*arguments)
        names = [equation.primitive.name for equation in equations(traced.jaxpr)]
        assert ("pallas_call" in names) == (name != "encode"), name
        assert not any(KERNEL in name for name in names)
        traced.lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_rewards(device, dtype):
    check(of_rewards(dtype), device, dtype)


# A family for each device; all others need the same kernels.
GRADIENTS = [("Tongyi-MAI/Z-Image", "gpu"), ("black-forest-labs/FLUX.1-dev", "tpu")]
MORE = [
    pytest.param(s, d, marks=pytest.mark.compilers) for s in MODELS for d in ("gpu", "tpu") if (s, d) not in GRADIENTS
]


@pytest.mark.parametrize(("source", "device"), [*GRADIENTS, *MORE])
def test_gradients_of_networks(source, device, monkeypatch):
    """With respect to latents; the kernels have derivatives, and TPUs' are those of the splash kernel."""
    monkeypatch.setattr(splash, "SHORTEST", 256)
    programs = of_pipeline(source, jnp.bfloat16)
    check_gradient("velocity", programs["velocity"], 1, device)
    check_gradient("decode", programs["decode"], 1, device)


@pytest.mark.parametrize("name", ["CLIP H score", "ImageReward"])
def test_gradients_of_rewards(name):
    """With respect to pixels; where tokens are masked, cuDNN has derivatives for even lengths only."""
    check_gradient(name, of_rewards(jnp.bfloat16)[name], 1, "gpu")


def check_gradient(name, program, place, device):
    target, platform = DEVICES[device]
    function, arguments, fits = program

    def gradient(*arguments):
        def total(x):
            return function(*arguments[:place], x, *arguments[place + 1 :]).astype(jnp.float32).sum()

        with compiled_for(target), differentiated():
            return jax.grad(total)(arguments[place])

    traced = jax.jit(gradient).trace(*arguments)
    kernel = "dot_product_attention_bwd" if device == "gpu" else "pallas_call"
    fused = [equation for equation in equations(traced.jaxpr) if kernel in equation.primitive.name]
    assert bool(fused) == (fits or device == "tpu"), name
    traced.lower(lowering_platforms=(platform,))


@pytest.mark.parametrize(("device", "barriers"), [(TPU, 1), (GPU, 0)])
def test_a_gated_product_is_computed_once_on_a_tpu(device, barriers):
    """With the values and the derivatives that it has elsewhere, row by row too."""
    layer, x = layers.GatedMLP(24), jax.random.normal(jax.random.key(1), (3, 5, 8))
    params = layer.init(jax.random.key(0), x)

    def summed(params, x):
        return jnp.sin(layer.apply(params, x)).sum()

    def traced(params, x):
        with compiled_for(device):
            return summed(params, x)

    found = [e.primitive.name for e in equations(jax.make_jaxpr(traced)(params, x).jaxpr)]
    assert found.count("optimization_barrier") == barriers
    for transform in (jax.jit, lambda f: jax.grad(f, argnums=(0, 1)), lambda f: jax.vmap(f, in_axes=(None, 0))):
        ours, plain = transform(traced)(params, x), transform(summed)(params, x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, plain)


@pytest.mark.parametrize(("device", "constraints"), [(TPU, 1), (GPU, 0)])
def test_tokens_lie_channels_last_on_a_tpu(device, constraints):
    """With the same values, derivatives and rows: the layout is the compiler's business alone."""
    x = jax.random.normal(jax.random.key(1), (3, 5, 8))

    def constrained(x):
        with compiled_for(device):
            return jnp.sin(layers.channels_last(x)).sum()

    found = [e.primitive.name for e in equations(jax.make_jaxpr(constrained)(x).jaxpr)]
    assert found.count("layout_constraint") == constraints
    text = jax.jit(constrained).trace(x).lower(lowering_platforms=("tpu",)).as_text()
    assert ("LayoutConstraint" in text) == bool(constraints)
    for transform in (jax.jit, jax.grad, jax.vmap):
        np.testing.assert_array_equal(transform(constrained)(x), transform(lambda x: jnp.sin(x).sum())(x))


@pytest.mark.parametrize("rows", [8, 5])
def test_tokens_of_a_mesh_stay_where_they_are(monkeypatch, rows):
    """Their layout is asked for device by device; rows that do not divide over a mesh are left to the compiler."""
    mesh, divides = partition.parse_mesh("data=4,model=2"), rows % 4 == 0
    placed = NamedSharding(mesh, P("data") if divides else P())
    x = jax.device_put(jax.random.normal(jax.random.key(1), (rows, 5, 8)), placed)
    monkeypatch.setattr(layers.target, "device", lambda: TPU)

    def constrained(x):
        with compiled_for(mesh):
            return jnp.tanh(layers.channels_last(x))

    lowered = jax.jit(constrained).lower(x)
    compiled = lowered.compile()
    assert ("LayoutConstraint" in lowered.as_text()) == divides
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(compiled(x), jnp.tanh(x), rtol=1e-6)
