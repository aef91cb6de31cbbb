"""Model FLOPs of a function: what its matrix products and convolutions cost, read from its jaxpr.

Nothing is compiled or allocated, and functions are traced as for a CPU, so the count is the same on every device,
whatever kernels run there. By convention a multiply-add is two operations, element-wise work is left out, and causal
attention counts as if nothing were masked.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from ses_jax.loading import partition

# cuDNN's fused attention, as `jax.nn.dot_product_attention` binds it: queries [B, T, N, D], keys [B, S, K, D].
FUSED_ATTENTION = ("dot_product_attention_fwd", "dot_product_attention_fwd_wrapper")


def count(function: Callable[..., Any], *args: Any) -> int:
    """Model FLOPs of one call of a function.

    Args:
      function: anything JAX can trace.
      args: its arguments; arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: where products happen in a loop of unknown length, a Pallas kernel or a `shard_map`.
    """
    with partition.compiled_for_none():
        return count_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


@functools.lru_cache(maxsize=64)
def count_jaxpr(jaxpr: core.Jaxpr) -> int:
    """Model FLOPs of a jaxpr that is at hand already; every search asks for the same few."""
    return _sum(jaxpr)


def _sum(jaxpr: core.Jaxpr) -> int:
    return sum(map(_equation, jaxpr.eqns))


def inner_jaxprs(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The jaxprs that an equation calls: the bodies of loops, the branches of conditions, functions."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = item.jaxpr if isinstance(item, core.ClosedJaxpr) else item
            if isinstance(inner, core.Jaxpr):
                yield inner


def _equation(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _product(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name in FUSED_ATTENTION:
        return _attention(equation)
    inner = [_sum(jaxpr) for jaxpr in inner_jaxprs(equation)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "cond":
        return max(inner)
    if name in ("while", "pallas_call", "shard_map") and sum(inner):
        raise ValueError(f"cannot count the FLOPs of a {name}: how often its products run is not in the jaxpr")
    return sum(inner)


def _product(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * equation.outvars[0].aval.size * depth


def _convolution(equation: core.JaxprEqn) -> int:
    """Every output element is a product over the window and the input channels of its group."""
    kernel = equation.invars[1].aval.shape
    outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * equation.outvars[0].aval.size * (math.prod(kernel) // outputs)


def _attention(equation: core.JaxprEqn) -> int:
    batch, queries, heads, dim = equation.invars[0].aval.shape
    keys = equation.invars[1].aval.shape[1]
    return 4 * batch * heads * queries * keys * dim
