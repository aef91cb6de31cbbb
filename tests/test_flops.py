"""Model FLOPs against formulas, and against what was measured for the published models."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from ses_jax.engine import flops
from ses_jax.models import attention
from ses_jax.pipelines.registry import abstract_pipeline

# TFLOP at 1024 x 1024, batch 1: a forward with so many prompt tokens, how many forwards guidance takes, the decoder.
# The references as counted by torch's FlopCounterMode on the real configs (Z-Image by formula; Qwen's decoder as 2-D
# convolutions).
PUBLISHED = {
    "Tongyi-MAI/Z-Image-Turbo": (128, 56.6, 1, 10.47),
    "Tongyi-MAI/Z-Image": (128, 56.6, 2, 10.47),
    "black-forest-labs/FLUX.1-dev": (512, 74.4, 1, 10.47),
    "black-forest-labs/FLUX.1-schnell": (256, 69.5, 1, 10.47),
    "black-forest-labs/FLUX.2-dev": (512, 282.6, 1, 10.47),
    "black-forest-labs/FLUX.2-klein-4B": (512, 34.8, 1, 10.47),
    "Qwen/Qwen-Image": (64, 69.3, 2, 4.71),
}


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("equation", "shapes", "expected"),
    [
        ("ij,jk->ik", [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
        ("bij,bkj->bik", [(4, 3, 5), (4, 7, 5)], 2 * 4 * 3 * 5 * 7),
        ("ijk,kjl->il", [(3, 5, 2), (2, 5, 7)], 2 * 3 * 10 * 7),
        ("i,i->", [(9,), (9,)], 2 * 9),
    ],
)
def test_products(equation, shapes, expected):
    assert flops.count(functools.partial(jnp.einsum, equation), *(spec(*shape) for shape in shapes)) == expected


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions(groups, stride):
    """Two batches of 12 x 8 cells, 16 to 20 channels, windows of 3 x 5."""

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    outputs = 2 * (12 // stride) * (8 // stride) * 20
    expected = 2 * outputs * 3 * 5 * (16 // groups)
    assert flops.count(convolve, spec(2, 12, 8, 16), spec(3, 5, 16 // groups, 20)) == expected


def test_control_flow():
    square, product = spec(6, 6), 2 * 6**3

    def scanned(x, w):
        return jax.lax.scan(lambda c, row: (jax.lax.scan(lambda d, _: (d @ row, None), c, None, 3)[0], None), x, w)[0]

    def branches(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    @jax.custom_vjp
    def custom(x):
        return jax.checkpoint(lambda x: jax.jit(jnp.matmul)(x, x))(x)

    custom.defvjp(lambda x: (custom(x), x), lambda x, g: (g @ x @ x,))
    assert flops.count(scanned, square, spec(5, 6, 6)) == 15 * product
    assert flops.count(branches, square) == 2 * product
    assert flops.count(custom, square) == product
    assert flops.count(lambda x: jax.lax.map(lambda row: row @ row, x, batch_size=2), spec(5, 6, 6)) == 5 * product
    assert flops.count(lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x + 1, x), square) == 0
    with pytest.raises(ValueError, match="while"):
        flops.count(lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x), square)


def test_element_wise_work_is_left_out():
    assert flops.count(lambda x: jax.nn.softmax(jnp.exp(x) + x), spec(4, 4)) == 0


@pytest.mark.parametrize("score_bytes", [attention.SCORE_BYTES, 4 * 2 * 4 * 80 * 12], ids=["whole", "in blocks"])
def test_attention_counts_the_same_with_and_without_a_fused_kernel(score_bytes):
    q, k = spec(2, 48, 4, 64, dtype=jnp.bfloat16), spec(2, 80, 2, 64, dtype=jnp.bfloat16)
    expected = 2 * 2 * (2 * 48 * 4) * 80 * 64
    with mock.patch.object(attention, "SCORE_BYTES", score_bytes):
        assert flops.count(attention.attention, q, k, k) == expected
    fused = mock.patch.multiple(
        fused_attention_stablehlo, check_cudnn_version=lambda: 91000, is_cuda_compute_capability_equal=lambda _: False
    )
    with fused, mock.patch.object(attention, "_fits_cudnn", return_value=True):
        jaxpr = str(jax.make_jaxpr(lambda q, k, v: attention.attention(q, k, v))(q, k, k))
        assert "dot_product_attention_fwd" in jaxpr
        assert flops.count(lambda q, k, v: attention.attention(q, k, v), q, k, k) == expected


@pytest.mark.parametrize("source", PUBLISHED)
def test_published_models(source):
    tokens, forward, branches, decode = PUBLISHED[source]
    pipeline = abstract_pipeline(source)
    guidance = pipeline.defaults.guidance
    condition = jax.eval_shape(pipeline.encode, pipeline.params, pipeline.blank_tokens(1, tokens, guidance=guidance))
    latents = spec(1, *pipeline.noise_shape(1024, 1024))
    counted = flops.count(pipeline.velocity, pipeline.params, latents, spec(1), condition)
    np.testing.assert_allclose(counted / 1e12, branches * forward, rtol=0.003)
    np.testing.assert_allclose(flops.count(pipeline.decode, pipeline.params, latents) / 1e12, decode, rtol=0.003)


def test_a_batch_counts_as_its_images():
    pipeline = abstract_pipeline("Tongyi-MAI/Z-Image-Turbo")

    def of(count):
        latents = spec(count, *pipeline.noise_shape(256, 256))
        return flops.count(pipeline.decode, pipeline.params, latents)

    assert of(3) == 3 * of(1)
