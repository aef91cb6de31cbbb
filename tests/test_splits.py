"""Where a mesh splits the arrays of a program: as XLA's partitioner does, and what a device then holds."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ses_jax.loading import partition
from ses_jax.models.attention import attention
from ses_jax.planner import footprint

PARTS = 4


def heads(x, count=8):
    return x.reshape(*x.shape[:-1], count, -1)


def layers(x, up, down):
    """Of a feed-forward network, whose hidden channels are split; and those of each layer."""

    def layer(x, kernels):
        hidden = jnp.tanh(x @ kernels[0])
        return x + hidden @ kernels[1], hidden

    return jax.lax.scan(layer, x, (up, down))


def looped(x, w):
    return jax.lax.while_loop(lambda carry: carry[0] < 2, lambda carry: (carry[0] + 1, carry[1] * 2), (0, x @ w))[1]


def chosen(x, w):
    return jax.lax.cond(x[0, 0, 0] > 0, jnp.tanh, jnp.exp, x @ w)


HEADS = ((2, 6, 8, 8), 2)
# A function; of each argument the shape, and the axis that is split.
FUNCTIONS = {
    "outputs of a kernel": (lambda x, w: x @ w, ((2, 6, 16), None), ((16, 32), 1)),
    "inputs of a kernel": (lambda x, w: x @ w, ((2, 6, 16), 2), ((16, 32), 0)),
    "bias and activation": (lambda x, b: jax.nn.gelu(x + b), ((2, 6, 32), 2), ((32,), 0)),
    "heads": (heads, ((2, 6, 64), 2)),
    "heads as rows": (lambda x: heads(x).transpose(0, 2, 1, 3), ((2, 6, 64), 2)),
    "heads joined": (lambda x: x.reshape(2, 6, 64), HEADS),
    "an axis of its own": (lambda x: x[:, None], HEADS),
    "norm of each head": (lambda x: x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True)), HEADS),
    "sum over channels": (lambda x: x.sum(-1), HEADS),
    "sum over heads": (lambda x: x.sum(2), HEADS),
    "joined tokens": (lambda a, b: jnp.concatenate([a, b], 1), HEADS, ((2, 2, 8, 8), 2)),
    "stacked": (lambda a, b: jnp.stack([a, b], -1), HEADS, HEADS),
    "stacked in front": (lambda a, b: jnp.stack([a, b]), HEADS, HEADS),
    "taken apart": (lambda x: jnp.unstack(x, axis=1)[1], HEADS),
    "every other channel": (lambda x: x[..., ::2], HEADS),
    "some tokens": (lambda x: x[:, 2:], HEADS),
    "repeated": (lambda x: jnp.broadcast_to(x, (3, 32)), ((32,), 0)),
    "attention": (lambda q, k, v: heads(attention(q, k, v)), HEADS, HEADS, HEADS),
    "attention over shared keys": (
        lambda q, k, v: heads(attention(q, k, v)),
        HEADS,
        *[((2, 6, 4, 8), 2)] * 2,
    ),
    "layers": (layers, ((2, 6, 16), None), ((3, 16, 32), 2), ((3, 32, 16), 1)),
    "a loop": (looped, ((2, 6, 16), None), ((16, 32), 1)),
    "a choice": (chosen, ((2, 6, 16), None), ((16, 32), 1)),
    "images": (
        lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME"),
        ((1, 4, 8, 8), None),
        ((4, 4, 3, 3), None),
    ),
}


def traced(function, arguments):
    """The jaxpr, and the axes of its arguments."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in arguments]
    return jax.make_jaxpr(function)(*shapes).jaxpr, [axis for _, axis in arguments]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_the_partitioner_does(name):
    function, *arguments = FUNCTIONS[name]
    mesh = partition.parse_mesh(f"data=1,model={PARTS}", jax.devices()[:PARTS])
    split = [
        jax.ShapeDtypeStruct(
            shape,
            jnp.float32,
            sharding=NamedSharding(
                mesh, PartitionSpec(*("model" if place == axis else None for place in range(len(shape))))
            ),
        )
        for shape, axis in arguments
    ]
    given = jax.tree.leaves(jax.jit(function).lower(*split).compile().output_shardings)
    expected = [next((i for i, axis in enumerate(each.spec) if axis), None) for each in given]
    jaxpr, axes = traced(function, arguments)
    values = {var: footprint.Value(0, "argument", axis=axis) for var, axis in zip(jaxpr.invars, axes, strict=True)}
    assert footprint._peak(jaxpr, values, (), PARTS)[1] == expected


@pytest.mark.parametrize(
    ("name", "arrays", "parts"),
    [
        # 2 x 6 x 32 of the result, whole or split.
        ("outputs of a kernel", 2 * 6 * 32, 2 * 6 * 32 / PARTS),
        ("inputs of a kernel", 2 * 6 * 32, 2 * 6 * 32),
        # The carry, and hidden channels of three layers. In a layer first both kernels with its hidden channels; where
        # these are split, later those channels, the second kernel and the next carry, which is whole.
        ("layers", 192 + 3 * 384 + (2 * 512 + 384), 192 + 3 * 96 + (96 + 128 + 192)),
    ],
)
def test_what_a_device_holds(name, arrays, parts):
    function, *arguments = FUNCTIONS[name]
    jaxpr, axes = traced(function, arguments)
    whole, part = (footprint.temporary_bytes_of_jaxpr(jaxpr, axes, count) for count in (1, PARTS))
    assert whole == pytest.approx(footprint.SLACK * 4 * arrays, rel=0.02)
    assert part == pytest.approx(footprint.SLACK * 4 * parts, rel=0.02)
