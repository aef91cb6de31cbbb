"""Adapters, LoRA and its relatives: the grammar of their tensors' names, and the changes of weights that they make.

An adapter's file holds, for some layers of a network, tensors that a change of the layer's weight `[out, in]` or bias
`[out]` is made of:

    low rank  scale * up @ down, up [out, rank], down [rank, in]; with a bias, scale * bias
    LoKr      scale * kron(w1, w2), either of them perhaps a product of two
    LoHa      scale * (w1_a @ w1_b) * (w2_a @ w2_b)
    diff      the change itself

The scale is alpha / rank where the file says alpha; 0 stands for the rank. Files of peft say it in their metadata
instead. All is computed in float32. References: peft `LoraLayer`, ComfyUI `weight_adapter`, LyCORIS.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ses_jax.convert.engine import DTYPES, ConversionError, Header, Weights
from ses_jax.convert.names import BIAS, WEIGHT

LOW_RANK, DIFF = {"down", "up"}, {"diff"}
LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
LOKR = [
    first | second
    for first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
    for second in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
]
# What a name ends with, and what the tensor is.
ENDINGS = {
    **{f".lora_A{end}": "down" for end in (".weight", ".default.weight", "")},
    **{f".lora_B{end}": "up" for end in (".weight", ".default.weight", "")},
    **{f"{stem}{role}.weight": role for stem in (".lora_", ".lora.", "_lora.", ".") for role in ("down", "up")},
    **{f".lora_{role}.default.weight": role for role in ("down", "up")},
    **{f".lora_linear_layer.{role}.weight": role for role in ("down", "up")},
    **{f".lora_B{end}": "up_bias" for end in (".bias", ".default.bias")},
    **{f".{role}": role for role in ("alpha", "diff", "diff_b", *LOHA, *set().union(*LOKR))},
}
# Where peft puts the adapter's own name, which most often is "default".
OWN_NAME = re.compile(r"(.*\.lora_[AB])\.\w+\.(weight|bias)")
DORA = re.compile(r".*\.(dora_scale|lora_magnitude_vector(\.default)?(\.weight)?)")
NUMBERS = ("F64", "I64", "I32", "I16")  # in which an alpha may lie as well
# Ways in which peft begins an adapter by changing the weights that it stands beside.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Layer(NamedTuple):
    """What an adapter has for one layer.

    Attributes:
      name: of the layer, as the file has it.
      keys: names of tensors in the file, by what they are.
    """

    name: str
    keys: Mapping[str, str]


class Change(NamedTuple):
    """A change of one published tensor.

    Attributes:
      kind: "weight" or "bias".
      shape: of the published tensor.
      values: float32, of the part of it that a tuple of slices says, one a dimension.
      keys: names of the tensors that it is made of.
    """

    kind: str
    shape: tuple[int, ...]
    values: Callable[[tuple[slice, ...]], np.ndarray]
    keys: tuple[str, ...]


class Problem(NamedTuple):
    """What is wrong with a tensor of an adapter."""

    reason: str
    key: str


def layers(headers: Mapping[str, Header]) -> tuple[list[Layer], list[Problem]]:
    """The layers that an adapter's tensors belong to, and the tensors of no known meaning."""
    found: dict[str, dict[str, str]] = {}
    problems = []
    for key, header in headers.items():
        plain = OWN_NAME.sub(r"\1.default.\2", key)
        ending = max((end for end in ENDINGS if plain.endswith(end)), key=len, default=None)
        if DORA.fullmatch(key):
            problems.append(Problem("DoRA is not supported", key))
        elif ending is None:
            problems.append(Problem("unknown kind of tensor", key))
        elif header.dtype not in (*DTYPES, *(NUMBERS if ENDINGS[ending] == "alpha" else ())):
            problems.append(Problem(f"{header.dtype} is none of {', '.join(DTYPES)}", key))
        else:
            roles = found.setdefault(plain.removesuffix(ending), {})
            if roles.setdefault(ENDINGS[ending], key) != key:
                problems.append(Problem(f"means the same as {roles[ENDINGS[ending]]}", key))
    return [Layer(name, keys) for name, keys in found.items()], problems


def changes(layer: Layer, weights: Weights, said: Callable[[int], float] | None = None) -> list[Change]:
    """The changes of a layer's weight and bias.

    Args:
      layer: from `layers`.
      weights: the file's tensors.
      said: the scale that metadata gives for a rank; None if there is none.

    Raises:
      ValueError: for tensors that make no change together.
    """
    keys = layer.keys
    roles = keys.keys() - {"alpha", "diff_b", "up_bias"}
    complete = roles in (LOW_RANK, DIFF, LOHA, *LOKR) or (not roles and "diff_b" in keys)
    if not complete or ("up_bias" in keys and roles != LOW_RANK):
        raise ValueError("half of a change, or more than one kind of change")
    factors = Factors(
        {role: tuple(weights.headers[key].shape) for role, key in keys.items()},
        lambda role: _read(weights, keys[role]),
    )
    made, scale = [], 1.0
    if roles:
        shape, rank, values = _change_of_weight(roles, factors)
        scale = _scale(factors, rank, said)
        made.append(Change(WEIGHT, shape, _scaled(values, scale), tuple(keys[role] for role in sorted(roles))))
    for role, factor in (("up_bias", scale), ("diff_b", 1.0)):
        if role in keys:
            values = functools.partial(_part, factors.read, role)
            made.append(Change(BIAS, factors.shapes[role], _scaled(values, factor), (keys[role],)))
    return made


def peft_scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """The scale of a layer by peft's config of an adapter.

    Args:
      config: content of the adapter's config: `r`, `lora_alpha`, `alpha_pattern`, `use_rslora`, ...
      name: of the layer, dotted.
      rank: of the layer, whatever `r` and `rank_pattern` say.

    Raises:
      ValueError: for an alpha that is not a number.
    """
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise ValueError(f"alpha_pattern={patterns!r} is not an object")
    matched = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None)
    alpha = config.get("lora_alpha", 8) if matched is None else patterns[matched]
    if not isinstance(alpha, int | float):
        raise ValueError(f"lora_alpha={alpha!r} is not a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def peft_refusal(config: Mapping[str, Any]) -> str | None:
    """What peft's config of an adapter says that is not supported; None if nothing."""
    if config.get("use_dora"):
        return "DoRA is not supported"
    if config.get("peft_type", "LORA") != "LORA":
        return f"peft_type {config['peft_type']!r} is not supported"
    begun = str(config.get("init_lora_weights")).lower()
    if begun.startswith(CHANGED_BASE):
        return (
            f"init_lora_weights {begun!r} needs weights that the adapter's training changed; convert it to plain LoRA"
        )
    return None


class Factors(NamedTuple):
    """A layer's tensors by what they are: their shapes, and how one is read, as float32."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


Values = Callable[[tuple[slice, ...]], np.ndarray]


def _change_of_weight(roles: set[str], factors: Factors) -> tuple[tuple[int, ...], int | None, Values]:
    """Shape, rank (None where nothing has a low one) and values of a change, before it is scaled."""
    shapes, read = factors
    if roles == DIFF:
        return shapes["diff"], None, functools.partial(_part, read, "diff")
    if roles == LOW_RANK:
        shape, rank = _product_shape(shapes, "up", "down")
        return shape, rank, lambda index: read("up")[index[0]] @ read("down")[:, index[1]]
    kind, combine = ("hada", np.multiply) if roles == LOHA else ("lokr", np.kron)
    (shape_1, rank_1, first), (shape_2, rank_2, second) = (_factor(factors, f"{kind}_w{i}") for i in (1, 2))
    if kind == "hada" and shape_1 != shape_2:
        raise ValueError(f"factors {list(shape_1)} and {list(shape_2)} do not fit together")
    if kind == "hada":
        shape, rank = shape_1, rank_1
    else:
        shape, rank = tuple(a * b for a, b in zip(shape_1, shape_2, strict=True)), rank_2 or rank_1
    return shape, rank, lambda index: combine(first(), second())[index]


def _factor(factors: Factors, name: str) -> tuple[tuple[int, ...], int | None, Callable[[], np.ndarray]]:
    """One factor: a matrix, or the product of two."""
    shapes, read = factors
    if name in shapes:
        if len(shapes[name]) != 2:
            raise ValueError(f"{list(shapes[name])} is not the shape of a matrix")
        return shapes[name], None, lambda: read(name)
    shape, rank = _product_shape(shapes, f"{name}_a", f"{name}_b")
    return shape, rank, lambda: read(f"{name}_a") @ read(f"{name}_b")


def _product_shape(shapes: Mapping[str, tuple[int, ...]], left: str, right: str) -> tuple[tuple[int, int], int]:
    """Shape and rank of a product of two tensors."""
    pair = shapes[left], shapes[right]
    if [len(shape) for shape in pair] != [2, 2] or pair[0][1] != pair[1][0]:
        raise ValueError(f"{list(pair[0])} and {list(pair[1])} do not make a product")
    return (pair[0][0], pair[1][1]), pair[0][1]


def _scale(factors: Factors, rank: int | None, said: Callable[[int], float] | None) -> float:
    """What the change is multiplied by: what the file says, which must not contradict itself."""
    alpha = factors.read("alpha").ravel() if "alpha" in factors.shapes else np.zeros(1)
    if len(alpha) != 1:
        raise ValueError(f"alpha of shape {list(factors.shapes['alpha'])} is not one number")
    if rank is None:
        return 1.0
    own = float(alpha[0]) / rank if alpha[0] else None  # 0 stands for the rank
    other = said(rank) if said else None
    if None not in (own, other) and not math.isclose(own, other, rel_tol=1e-3):
        raise ValueError(f"alpha makes a scale of {own:g}, the metadata of {other:g}")
    return next((scale for scale in (own, other) if scale is not None), 1.0)


def _scaled(values: Values, scale: float) -> Values:
    return lambda index: values(index) * np.float32(scale)


def _part(read: Callable[[str], np.ndarray], role: str, index: tuple[slice, ...]) -> np.ndarray:
    return read(role)[index]


def _read(weights: Weights, key: str) -> np.ndarray:
    """A tensor in float32."""
    values = np.asarray(weights.read(key), np.float32)
    if not np.isfinite(values).all():
        raise ConversionError(f"{key} in {weights.headers[key].file} has NaN or infinite values")
    return values
