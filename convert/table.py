"""The words a conversion table is written in: how each published tensor becomes a leaf of the params.

A rule pairs two templates. A placeholder such as `{i}` stands for a number. One that is absent from the target means
that the published tensors `0, 1, 2, ...` are stacked along a leading axis of the target; one that is present renames.
Several rules with one source, numbered by `part`, split a tensor that is published in one piece along one of its axes:

    linear("layers.{i}.attention.to_q", "layers/attention/to_q")          one stacked kernel for all layers
    conv("decoder.up_blocks.{b}.resnets.{r}.conv1", "up_{b}_resnet_{r}/conv1")   one kernel each
    fused("layers.{i}.attn.qkv", ["layers/q", "layers/k", "layers/v"])           three kernels of one tensor
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from ses_jax.models.quantized import Quantization


class Transform(NamedTuple):
    """How one published tensor is laid out in our params, and back.

    Both directions only move elements (most are views), so that a round trip is bit-equal.
    """

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


def _pointwise(x: np.ndarray) -> np.ndarray:
    return x[:, :, 0, 0].transpose(1, 0)


def _pointwise_inverse(x: np.ndarray) -> np.ndarray:
    return x.transpose(1, 0)[:, :, None, None]


def _swap(x: np.ndarray) -> np.ndarray:
    return np.roll(x, len(x) // 2, axis=0)


IDENTITY = Transform("identity", lambda x: x, lambda x: x)
LINEAR = Transform("linear", lambda x: x.transpose(1, 0), lambda x: x.transpose(1, 0))  # [out, in] <-> [in, out]
CONV = Transform("conv", lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
# OIDHW <-> DHWIO
CONV3D = Transform("conv3d", lambda x: x.transpose(2, 3, 4, 1, 0), lambda x: x.transpose(4, 3, 0, 1, 2))
POINTWISE = Transform("pointwise", _pointwise, _pointwise_inverse)  # [out, in, 1, 1] <-> [in, out]
# The first and the second half of the outputs change places.
SWAPPED = Transform("swapped", _swap, _swap)
SWAPPED_LINEAR = Transform("swapped linear", lambda x: _swap(x).transpose(1, 0), lambda x: _swap(x.transpose(1, 0)))


class Rule(NamedTuple):
    """One correspondence between published tensors and leaves of the params.

    Attributes:
      source: template of published names, dotted.
      target: template of paths in the params, with slashes.
      transform: how the elements move.
      part: place among the rules that share the published tensor, from 0; None for a tensor of its own.
      axis: of the published tensor, along which the parts lie.
    """

    source: str
    target: str
    transform: Transform = IDENTITY
    part: int | None = None
    axis: int = 0


class Table(NamedTuple):
    """All rules of one network.

    Attributes:
      rules: every leaf of the params is the target of exactly one of them.
      ignored: templates of published names that this network does not load; `*` stands for anything.
      prefixes: what every name may begin with, the published form first; releases of transformers differ here.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)


class SingleFile(NamedTuple):
    """The other form that a network is published in: one file in the checkpoint's root, under its authors' own names.

    Attributes:
      files: names that the file may have.
      table: content of `config.json` to the conversion table.
      config: headers of the file, by name of the tensor, to the content of a `config.json`, where there is none.
    """

    files: tuple[str, ...]
    table: Callable[[Mapping[str, Any]], Table]
    config: Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Component:
    """One network of a checkpoint folder: how its `config.json` and its weights are read.

    Attributes:
      from_json: content of `config.json` to the network's config.
      init: `(key, config) -> params`; only its shapes are used, and so no key is given.
      table: content of `config.json` to the conversion table.
      stem: name of the published weights file, without `.safetensors`.
      single_file: the other published form, which is read where the network's own folder has no weights.
      aliases: content of `config.json` to a table of names that only adapters use, of all or some of the params.
      partition: ordered pairs of a path pattern in the params and how a leaf of that path is split over a mesh; the
        whole network on every device unless said otherwise.
      quantized: patterns of the paths of kernels that may lie in eight bits.
      turned: patterns of the paths of kernels that a TPU holds with their inputs innermost.
    """

    from_json: Callable[[Mapping[str, Any]], Any]
    init: Callable[[jax.Array | None, Any], Any]
    table: Callable[[Mapping[str, Any]], Table]
    stem: str = "diffusion_pytorch_model"
    single_file: SingleFile | None = None
    aliases: Callable[[Mapping[str, Any]], Table] | None = None
    partition: Sequence[tuple[str, PartitionSpec]] = ((".*", PartitionSpec()),)
    quantized: Sequence[str] = ()
    turned: Sequence[str] = ()

    def abstract(self, config: Any) -> Any:
        """The params tree as shapes only; nothing is allocated."""
        return jax.tree.map(lambda leaf: leaf, _shapes(self.init, config))  # in containers of its own

    def quantization(self, kind: str | None) -> Quantization | None:
        """What is quantised where weights are asked for in a kind of eight bits; None is nothing."""
        return Quantization(kind, tuple(self.quantized)) if kind and self.quantized else None


@functools.lru_cache(maxsize=32)
def _shapes(init: Callable[[jax.Array | None, Any], Any], config: Any) -> Any:
    """Tracing a network takes longer than reading a small one's weights."""
    return jax.eval_shape(lambda: init(None, config))


def linear(source: str, target: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """A linear layer."""
    return _weighted(source, f"{target}/kernel", LINEAR) + _bias(source, target, bias)


def pointwise(source: str, target: str) -> tuple[Rule, ...]:
    """A linear layer published as a 1x1 convolution."""
    return _weighted(source, f"{target}/kernel", POINTWISE) + _bias(source, target, wanted=True)


def swapped(source: str, target: str) -> tuple[Rule, ...]:
    """A linear layer with the halves of its outputs in the other order."""
    return (
        Rule(f"{source}.weight", f"{target}/kernel", SWAPPED_LINEAR),
        Rule(f"{source}.bias", f"{target}/bias", SWAPPED),
    )


def fused(source: str, targets: Sequence[str], *, separator: str = ".") -> tuple[Rule, ...]:
    """Linear layers published as one, their outputs in the order of `targets`."""
    weights = (Rule(f"{source}{separator}weight", f"{t}/kernel", LINEAR, i) for i, t in enumerate(targets))
    biases = (Rule(f"{source}{separator}bias", f"{t}/bias", IDENTITY, i) for i, t in enumerate(targets))
    return (*weights, *biases)


def joined(source: str, targets: Sequence[str]) -> tuple[Rule, ...]:
    """Linear layers whose outputs are added, published as one, their inputs in the order of `targets`; no biases."""
    return tuple(Rule(f"{source}.weight", f"{t}/kernel", LINEAR, i, axis=1) for i, t in enumerate(targets))


def conv(source: str, target: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """A 2-D convolution."""
    return _weighted(source, f"{target}/kernel", CONV) + _bias(source, target, bias)


def conv3d(source: str, target: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """A 3-D convolution, time first."""
    return _weighted(source, f"{target}/kernel", CONV3D) + _bias(source, target, bias)


def norm(source: str, target: str, *, bias: bool = False) -> tuple[Rule, ...]:
    """A norm's scale, with `bias` also its shift."""
    return _weighted(source, f"{target}/scale", IDENTITY) + _bias(source, target, bias)


def embedding(source: str, target: str) -> tuple[Rule, ...]:
    """A table of token embeddings."""
    return _weighted(source, f"{target}/embedding", IDENTITY)


def _weighted(source: str, target: str, transform: Transform) -> tuple[Rule, ...]:
    return (Rule(f"{source}.weight", target, transform),)


def _bias(source: str, target: str, wanted: bool) -> tuple[Rule, ...]:
    return (Rule(f"{source}.bias", f"{target}/bias"),) if wanted else ()
