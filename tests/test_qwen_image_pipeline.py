"""Qwen-Image from prompt to image against diffusers, on tiny random checkpoints in the published layout."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import oracle_qwen_image as oracle
import pytest
from adapted import assert_an_adapter_in_eight_bits
from parity import (
    assert_a_search_previews_what_is_generated,
    assert_an_export_gives_the_same_image,
    assert_bfloat16_stays_close,
    assert_rows_are_alone,
    assert_same_images,
    pair,
    with_quick,
)

import ses_jax
from ses_jax.cli import convert
from ses_jax.convert import files
from ses_jax.loading import partition
from ses_jax.pipelines import base, qwen_image
from ses_jax.pipelines import registry as pipelines
from ses_jax.searchers import wavelet

LONG = "a very detailed painting of " + "many " * 300  # more tokens than are kept, and than the reference reads
VARIANTS = {
    # Two of the autoencoder's four levels, so images of a quarter of the side.
    "default": oracle.Sizes(vae_mult=(1, 2), vae_blocks=1),
    "other widths": oracle.Sizes(
        layers=3,
        heads=2,
        axes_dims=(8, 4, 4),
        text_width=48,
        text_layers=2,
        text_heads=6,
        text_kv_heads=3,
        vae_width=4,
        vae_mult=(1, 3, 2, 2),
        vae_blocks=1,
    ),
}


@functools.cache
def tiny(name, root):
    """The oracle and our pipeline, from the same folder; the second variant with a sharded transformer."""
    shard_size = None if name == "default" else "100KB"
    return pair(oracle.pipeline(VARIANTS[name], seed=1), root / name, shard_size=shard_size)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("qwen_image")


@pytest.fixture
def pipeline(root):
    return tiny("default", root)[1]


def arguments(reference, noise, guidance, negatives):
    """The reference's own arguments; its own default negative prompt is none at all."""
    return {
        "true_cfg_scale": guidance,
        "negative_prompt": negatives or [" "] * len(noise),
        "latents": reference._pack_latents(noise, *noise.shape),
    }


@pytest.fixture
def other(root):
    """Ours of a checkpoint with the published levels."""
    return tiny("other widths", root)[1]


UNICODE = ("\u732b \U0001f431 caf\u00e9 {0}", "a somewhat longer prompt, whose rows are not those of the other")
# Variant, prompts, size, guidance, negative prompt, steps.
CASES = {
    "guided": ("default", ["a cat"], (8, 12), 4.0, None, 2),
    "empty, off": ("default", [""], (12, 20), 1.0, None, 8),
    "unicode batch": ("other widths", UNICODE, (80, 48), 4.0, None, 2),
    "too long": ("default", [LONG, "two dogs"], (8, 12), 2.5, "ugly, blurry", 2),
    "even batch, off": ("other widths", ["two cats", "one dogs"], (32, 32), 1.0, None, 3),
}


@pytest.mark.parametrize("case", with_quick(CASES, "even batch, off"))
def test_prompt_to_image(root, case):
    name, prompts, size, guidance, negative, steps = CASES[case]
    settings = {"size": size, "guidance": guidance, "negative": negative, "steps": steps}
    assert_same_images(tiny(name, root), prompts, arguments, **settings)


def test_an_exported_noise_gives_the_same_image_in_diffusers(root, tmp_path):
    assert_an_export_gives_the_same_image(tiny("default", root), tmp_path, size=(8, 12), steps=2)


def test_padding_to_a_larger_bucket_changes_nothing(pipeline):
    """A short prompt next to a long one runs in the long one's bucket, with the same image as alone."""
    assert_rows_are_alone(pipeline, ["a cat", LONG], (0,), size=(8, 12))


def test_tokens_are_those_after_the_template_in_buckets(pipeline):
    tokens = pipeline.tokenize(["a cat", "b" * 400, "c" * 2000], guidance=1.0)
    assert tokens.positive.ids.shape == (3, 34 + 512)
    template = len(qwen_image.TEMPLATE.format("").encode())
    specials = sum(len(mark) - 1 for mark in ("<|im_start|>",) * 3 + ("<|im_end|>",) * 2)
    np.testing.assert_array_equal(tokens.positive.lengths, [template - specials - 34 + 5, 512, 512])
    assert tokens.negative is None
    short = pipeline.tokenize(["a cat"], guidance={"scale": 4.0})
    assert short.positive.ids.shape == short.negative.ids.shape == (1, 34 + 256)
    assert short.negative.lengths[0] == short.positive.lengths[0] - 4  # a space


def test_guidance_options(pipeline):
    with pytest.raises(ValueError, match="negative_prompt has no effect without guidance; pass guidance > 1"):
        pipeline.tokenize(["a"], guidance=1.0, negative_prompt="b")
    with pytest.raises(ValueError, match=r"unknown guidance options \['truncation'\]; Qwen-Image takes scale, rescale"):
        pipeline.tokenize(["a"], guidance={"truncation": 1.0})
    with pytest.raises(ValueError, match="1 negative prompts for 2 prompts; pass one, or one for each"):
        pipeline.tokenize(["a", "b"], negative_prompt=["c"])
    tokens = pipeline.tokenize(["a", "b"], guidance={"scale": 3.0, "rescale": False}, negative_prompt=["c", "d"])
    np.testing.assert_array_equal(tokens.guidance["scale"], [3, 3])
    np.testing.assert_array_equal(tokens.guidance["rescale"], [0, 0])
    assert not np.array_equal(*tokens.negative.ids)
    guided, plain = (pipeline.blank_tokens(2, 100, guidance=scale) for scale in (4.0, 1.0))
    assert guided.positive.ids.shape == guided.negative.ids.shape == (2, 34 + 128)
    assert plain.negative is None


def test_guide_formula():
    """Written a second time, cell by cell; the norm of a token is over its four cells with all their channels."""
    rng = np.random.default_rng(0)
    positive, negative = rng.standard_normal((2, 3, 4, 4, 6)).astype(np.float32)
    negative[2] = positive[2] = 0
    options = {"scale": [4.0, 4.0, 2.0], "rescale": [0.0, 1.0, 1.0]}
    guided = qwen_image.guide(
        jnp.asarray(positive), jnp.asarray(negative), {name: jnp.array(values) for name, values in options.items()}
    )
    for i, (scale, rescale) in enumerate(zip(*options.values(), strict=True)):
        expected = negative[i] + scale * (positive[i].astype(np.float64) - negative[i])
        for row in range(0, 4, 2):
            for column in range(0, 6, 2):
                token = np.s_[:, row : row + 2, column : column + 2]
                if rescale and np.any(expected[token]):
                    expected[token] *= np.linalg.norm(positive[i][token]) / np.linalg.norm(expected[token])
        np.testing.assert_allclose(guided[i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(1328, 1328), (1664, 928), (928, 1664), (1104, 1472), (1584, 1056), (64, 48)])
def test_sigmas_equal_the_scheduler(root, size):
    reference, pipeline = tiny("other widths", root)
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    tokens = (size[0] // 16) * (size[1] // 16)
    mu = calculate_shift(tokens, 256, 8192, 0.5, 0.9)
    for steps in (2, 4, 10, 50):
        reference.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
        sigmas = pipeline.sigmas(steps, *size)
        np.testing.assert_array_equal(sigmas, reference.scheduler.sigmas.numpy())
        np.testing.assert_allclose(sigmas[[0, -2, -1]], [1, 0.02, 0], atol=1e-6)
    np.testing.assert_array_equal(pipeline.sigmas(1, *size), [1, 0])  # where the reference has a NaN


def test_defaults_and_sizes(other):
    pipeline, defaults = other, other.defaults
    assert (defaults.height, defaults.width, defaults.steps, defaults.guidance) == (1328, 1328, 50, 4.0)
    assert pipeline.size_multiple == 16
    assert pipeline.noise_shape(1664, 928) == (16, 208, 116)
    assert pipeline.text_params(pipeline.params).keys() == {"text_encoder"}
    assert pipeline.image_params(pipeline.params).keys() == {"transformer", "vae"}


@pytest.mark.parametrize("size", [(1328, 1328), (1664, 928), (1472, 1104), (1584, 1056)])
def test_native_sizes_allow_the_default_level(other, size):
    """Their latents don't divide by 16: 166 x 166, 208 x 116, 184 x 138, 198 x 132."""
    for height, width in (size, size[::-1]):
        assert ses_jax.SearchConfig(height=height, width=width).resolve(other).level == 4


def test_low_band_at_the_default_size(other):
    shape = other.noise_shape(1328, 1328)[1:]
    noise = np.random.default_rng(0).standard_normal((1, *shape), np.float32)
    low, high = jax.jit(lambda x: wavelet.split(x, level=4))(noise)
    assert low.shape == (1, 11, 11)
    back = jax.jit(lambda low, high: wavelet.merge(low, high, shape=shape))(low, high)
    np.testing.assert_allclose(back, noise, atol=1e-5)


def test_a_static_schedule_and_an_unknown_one():
    parts = base.Parts(Path("folder"), dict(qwen_image.CONFIGS), {}, {}, {"shift": 2.0})
    np.testing.assert_allclose(qwen_image.assemble(parts).sigmas(2, 64, 64), [1, 2 / 3, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="folder: schedules with time_shift_type are not supported"):
        qwen_image.assemble(parts._replace(scheduler=qwen_image.SCHEDULER | {"time_shift_type": "linear"}))


def test_bfloat16_weights_run_and_stay_close(pipeline):
    assert_bfloat16_stays_close(pipeline, (8, 12), timestep_rounding="reference")


def test_the_rounding_of_time_is_an_option(pipeline):
    """Its arithmetic is the transformers', and proved there."""
    for rounding in ("exact", "reference"):
        loaded = ses_jax.load_pipeline(str(pipeline.folder), timestep_rounding=rounding)
        assert loaded.velocity.args[0].timestep_rounding == rounding
    with pytest.raises(ValueError, match=r"unknown options \['rounding'\]; this family takes: timestep_rounding"):
        ses_jax.load_pipeline(str(pipeline.folder), rounding="exact")


def test_an_adapter_in_eight_bits(pipeline, tmp_path):
    assert_an_adapter_in_eight_bits(pipeline.folder, tmp_path)


def test_a_search_runs_and_its_preview_is_the_generated_one(pipeline):
    """On a grid that the low band does not divide, 4 x 6 at level 2, with guidance on."""
    result = assert_a_search_previews_what_is_generated(pipeline, size=(8, 12), level=2)
    assert result.config["guidance"] == 4.0


def test_a_mesh_changes_no_velocity_and_sums_four_times_a_block(pipeline):
    """Tokens of image and text are summed over devices after attention and after the feed-forward."""
    on_mesh = ses_jax.load_pipeline(str(pipeline.folder), mesh="data=2,model=4")
    condition = jax.jit(pipeline.encode)(pipeline.text_params(pipeline.params), pipeline.tokenize(["a cat", "dogs"]))
    noise = np.random.default_rng(0).standard_normal((2, *pipeline.noise_shape(8, 12)), np.float32)
    arguments = jnp.asarray(noise), jnp.float32([0.9, 0.3]), condition
    expected = jax.jit(pipeline.velocity)(pipeline.image_params(pipeline.params), *arguments)
    arguments = partition.replicate(on_mesh.mesh, arguments)
    compiled = jax.jit(on_mesh.velocity).lower(on_mesh.image_params(on_mesh.params), *arguments).compile()
    found = compiled(on_mesh.image_params(on_mesh.params), *arguments)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.std(expected))

    program = compiled.as_text()
    sums = re.findall(r"= (.*) all-reduce\(", program)
    assert sum(len(re.findall(r"\w+\[\d+,\d+,\d+\]", result)) for result in sums) == 4
    assert "all-to-all" not in program
    assert "collective-permute" not in program


@pytest.fixture(scope="module")
def published():
    return pipelines.abstract_pipeline("Qwen/Qwen-Image")


def test_published_sizes_and_how_they_split(published):
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in published.params.items()}
    assert counts["transformer"] == 20_430_401_088
    assert counts["text_encoder"] == 7_070_619_136
    mesh = partition.abstract_mesh("model=4")
    rules = {name: component.partition for name, component in qwen_image.COMPONENTS.items()}
    for name in ("transformer", "text_encoder"):
        each = partition.bytes_per_device(mesh, rules[name], published.params[name])
        assert each < 0.26 * 2 * counts[name]
    transformer = partition.shardings(mesh, rules, published.params)["transformer"]
    last = published.params["transformer"]["blocks"]["attention"]["to_out"]["kernel"]
    assert transformer["blocks"]["attention"]["to_out"]["kernel"].shard_shape(last.shape) == (60, 768, 3072)


@pytest.mark.parametrize("size", [(1328, 1328), (1664, 928)])
def test_published_model_at_its_native_sizes(published, size):
    """A preview of two candidates, abstractly: from tokens through the guided velocity to images."""
    shape = published.noise_shape(*size)
    assert shape == (16, size[0] // 8, size[1] // 8)
    tokens = published.blank_tokens(2, 40, guidance=4.0)
    condition = jax.eval_shape(published.encode, published.text_params(published.params), tokens)
    assert condition.positive.features.shape == condition.negative.features.shape == (2, 64, 3584)
    assert condition.positive.features.dtype == jnp.bfloat16
    params = published.image_params(published.params)
    latents = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    velocity = jax.eval_shape(published.velocity, params, latents, jax.ShapeDtypeStruct((2,), jnp.float32), condition)
    assert (velocity.shape, velocity.dtype) == (latents.shape, latents.dtype)
    images = jax.eval_shape(published.decode, params, latents)
    assert (images.shape, images.dtype) == ((2, *size, 3), jnp.dtype(jnp.float32))


def test_products_and_convolutions_run_in_the_dtype_of_the_weights(published):
    """Nothing in the blocks silently promotes bfloat16 to float32, and no convolution is three-dimensional."""
    params, latents = published.image_params(published.params), jax.ShapeDtypeStruct((2, 16, 8, 8), jnp.float32)
    condition = jax.eval_shape(published.encode, published.params, published.blank_tokens(2, 40, guidance=4.0))
    sigma = jax.ShapeDtypeStruct((2,), jnp.float32)
    products = jaxprs.products(jax.make_jaxpr(published.velocity)(params, latents, sigma, condition).jaxpr)
    convolutions = jaxprs.convolutions(jax.make_jaxpr(published.decode)(params, latents).jaxpr)
    assert len(products) >= 15
    assert len(convolutions) == 37
    for equation in [*products, *convolutions]:
        assert {operand.aval.dtype for operand in equation.invars} == {jnp.dtype(jnp.bfloat16)}, equation
    assert {equation.invars[1].aval.ndim for equation in convolutions} == {4}


def test_folder_converts_and_comes_back(root, pipeline, tmp_path):
    """The command, both ways: the same image from the converted folder, the published tensors bit for bit."""
    convert(str(pipeline.folder), tmp_path / "converted")
    convert(str(tmp_path / "converted"), tmp_path / "back", export=True)
    for name, component in qwen_image.COMPONENTS.items():
        ours, theirs = (
            files.open_weights(path / name, component.stem) for path in (tmp_path / "back", pipeline.folder)
        )
        assert ours.headers.keys() == theirs.headers.keys()
        for tensor in theirs.headers:
            np.testing.assert_array_equal(ours.read(tensor), theirs.read(tensor))
    again = ses_jax.load_pipeline(str(tmp_path / "converted"))
    jax.tree.map(np.testing.assert_array_equal, again.params, pipeline.params)
    np.testing.assert_array_equal(*(p.tokenize(["a cat"]).positive.ids for p in (again, pipeline)))
