"""Linear layers whose weights may lie in eight bits: `kernel` in int8 or float8, and `kernel_scale` beside it.

Weight-only, a float32 scale for each output: `kernel [.., in, out]` stands for `kernel * kernel_scale[.., None, :]`. A
layer casts its kernel where it uses it, so that no more than one layer is there in the activations' dtype.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float, Shaped

from ses_jax.models import target
from ses_jax.models.params import KERNEL, ZEROS, param

SUFFIX = "_scale"  # of the leaf beside a kernel
BAND = 64


class Kind(NamedTuple):
    """A dtype of eight bits, and the largest value of it that is used."""

    dtype: np.dtype
    largest: float


KINDS = {"int8": Kind(np.dtype(np.int8), 127.0), "fp8": Kind(np.dtype(jnp.float8_e4m3fn), 448.0)}


class Quantization(NamedTuple):
    """Which leaves of a network are quantised, and how.

    Attributes:
      kind: a name of `KINDS`.
      patterns: of the paths of kernels.
    """

    kind: str
    patterns: Sequence[str]

    def takes(self, path: str) -> bool:
        """Whether the leaf of that path is quantised."""
        return any(re.fullmatch(pattern, path) for pattern in self.patterns)


class Quantized(NamedTuple):
    """A kernel `[.., in, out]` in eight bits and its scales `[.., out]`, float32."""

    values: Any
    scale: Any


class Dense(nn.Module):
    """A linear layer, with weights in eight bits if its params have a `kernel_scale`; otherwise that of Flax.

    Attributes:
      features: of the output.
      use_bias: whether there is one.
      bias_apart: whether the bias is left to what follows, where that goes over every number anyway. As part of the
        product it costs nothing, but then a GPU copies the weights of a layer out of those of the stack.
      wide: whether float16 gives float32, for what is part of a sum that float16 may hold where it does not hold that.
      heads: into how many the output is split, `[.., heads, features / heads]`. On a TPU that is before the bias is
        added: it then has the product write heads as attention wants them, instead of laying them out anew twice.
        Elsewhere it is only before one that is apart: cuBLAS adds one of heads as a matrix, which is written first.
      of_heads: whether the input is `[.., heads, channels]` of all of which the output is made. On a TPU the product
        then sums over both, and reads heads as attention wrote them, instead of having them laid out anew first.
    """

    features: int
    use_bias: bool = True
    bias_apart: bool = False
    wide: bool = False
    heads: int | None = None
    of_heads: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-2] * x.shape[-1] if self.of_heads else x.shape[-1]
        kernel = param(self, "kernel", KERNEL, (width, self.features))
        bias = param(self, "bias", ZEROS, (self.features,)) if self.use_bias else None
        scale = self.get_variable("params", "kernel" + SUFFIX)
        sums = jnp.float32 if self.wide and x.dtype == jnp.float16 else None
        on_tpu = target.device().platform == "tpu"
        if self.of_heads and (scale is not None or not on_tpu):
            x = x.reshape(*x.shape[:-2], width)
        if scale is not None:
            return self._split(product(x, Quantized(kernel, scale), bias, sums))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=None)
        if self.of_heads and on_tpu:
            y = jnp.einsum("...nd,ndo->...o", x, kernel.reshape(*x.shape[-2:], -1), preferred_element_type=sums)
        else:
            y = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=sums)
        if bias is None:
            return self._split(y)
        if not self.bias_apart and not on_tpu:
            return self._split(y + bias)
        wide = jnp.float32 if self.bias_apart else y.dtype  # products take no sum in another dtype
        return (self._split(y).astype(wide) + self._split(bias).astype(wide)).astype(y.dtype)

    def _split(self, y: jax.Array) -> jax.Array:
        return y if self.heads is None else y.reshape(*y.shape[:-1], self.heads, -1)


def product(
    x: Float[Array, "*batch i"], weights: Quantized, bias: Float[Array, " o"] | None = None, dtype: Any = None
) -> Float[Array, "*batch o"]:
    """`x @ weights + bias` in `dtype`, by default that of `x`; scale and bias are applied in float32."""
    # Unscaled sums are hundreds of times larger than scaled ones, which float16 may not hold.
    sums = jnp.float32 if x.dtype == jnp.float16 else None
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    y = jax.lax.dot_general(x, weights.values.astype(x.dtype), axes, preferred_element_type=sums)
    y = y.astype(jnp.float32) * weights.scale
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(dtype or x.dtype)


def empty(shape: tuple[int, ...], kind: str) -> Quantized:
    """A kernel of that shape on the host, to be filled."""
    return Quantized(np.empty(shape, KINDS[kind].dtype), np.empty((*shape[:-2], shape[-1]), np.float32))


def quantize(values: Shaped[np.ndarray, "*rows i o"], kind: str) -> Quantized:
    """A kernel in eight bits; its scales are NaN or infinite where its values are.

    Args:
      values: `[.., in, out]`, in any dtype of floats.
      kind: a name of `KINDS`.
    """
    dtype, largest = KINDS[kind]
    out = empty(values.shape, kind)

    def fill(place):
        row, columns = place
        band = float32(values[(*row, slice(None), columns)])
        # Not zero for a row of zeros, nor for one that float32 can hardly hold.
        scale = np.maximum(np.abs(band).max(axis=0) / np.float32(largest), np.finfo(np.float32).tiny)
        # Divided so, no value is past the largest, where float8 would be NaN and int8 change sign.
        with np.errstate(invalid="ignore"):  # the scales tell
            band /= scale
            out.values[(*row, slice(None), columns)] = (np.rint(band, out=band) if kind == "int8" else band).astype(
                dtype
            )
        out.scale[(*row, columns)] = scale

    # Bands that fit the cache; NumPy lets threads work side by side.
    bands = [slice(start, start + BAND) for start in range(0, values.shape[-1], BAND)]
    with futures.ThreadPoolExecutor() as threads:
        list(threads.map(fill, itertools.product(np.ndindex(values.shape[:-2]), bands)))
    return out


def float32(values: np.ndarray) -> np.ndarray:
    """A copy in float32, on the host; of bfloat16 by its bits, which is much faster than by a cast."""
    if values.dtype == jnp.bfloat16:
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def dequantize(weights: Quantized) -> Float[np.ndarray, "*rows i o"]:
    """The kernel that eight bits stand for, float32."""
    return np.asarray(weights.values).astype(np.float32) * np.asarray(weights.scale)[..., None, :]


def map_kernels(tree: Any, rule: Quantization | None, function: Callable[[str, Any], Quantized]) -> Any:
    """A tree of dicts whose quantised kernels are replaced by kernel and scale, which `function(path, leaf)` makes."""
    if rule is None:
        return tree

    def leaf_of(key_path, leaf):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        return function(path, leaf) if rule.takes(path) else leaf

    return spread(jax.tree_util.tree_map_with_path(leaf_of, tree))


def spread(tree: Any) -> Any:
    """A tree of dicts in which each `Quantized` has become two leaves side by side."""
    if not isinstance(tree, Mapping):
        return tree
    out = {}
    for name, branch in tree.items():
        if isinstance(branch, Quantized):
            out |= {name: branch.values, name + SUFFIX: branch.scale}
        else:
            out[name] = spread(branch)
    return out


def paths(path: str) -> tuple[str, str]:
    """Of a quantised kernel, the paths of its two leaves."""
    return path, path + SUFFIX


def abstract(tree: Any, rule: Quantization | None) -> Any:
    """The shapes of a network's params, quantised as a rule says; None leaves them as they are."""

    def shapes(path, leaf):
        scale = (*leaf.shape[:-2], leaf.shape[-1])
        return Quantized(
            jax.ShapeDtypeStruct(leaf.shape, KINDS[rule.kind].dtype), jax.ShapeDtypeStruct(scale, jnp.float32)
        )

    return map_kernels(tree, rule, shapes)


def cast(abstract: Any, dtype: Any) -> Any:
    """Params as shapes, with the dtypes that they are loaded in."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf_dtype(leaf.shape, dtype)), abstract)


def leaf_dtype(shape: tuple[int, ...], dtype: Any) -> Any:
    """The dtype of a leaf in params of some dtype: single numbers, such as the exponent of a scale, stay in float32."""
    return dtype if shape else jnp.float32


def dtype_of(params: Any) -> Any:
    """The dtype of params that are neither in eight bits nor single numbers; float32 where there are none."""
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.shape and not keeps_dtype(jax.tree_util.keystr(key_path, simple=True, separator="/"), leaf.dtype):
            return leaf.dtype
    return jnp.zeros(()).dtype


def keeps_dtype(path: str, dtype: Any) -> bool:
    """Whether a leaf has the dtype that it has whatever the other weights are stored in."""
    return path.endswith(f"kernel{SUFFIX}") or any(dtype == kind.dtype for kind in KINDS.values())


def kind_of(params: Any) -> str | None:
    """How params are quantised, a name of `KINDS`; None if they are not."""
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(params)}
    return next((name for name, kind in KINDS.items() if kind.dtype in dtypes), None)


def check_kind(kind: str | None) -> str | None:
    """The kind.

    Raises:
      ValueError: for one that is not known.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"quantize={kind!r} is no way to store weights; choose {' or '.join(KINDS)}")
    return kind
