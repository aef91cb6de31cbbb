"""Adapters (LoRA and its relatives), merged into the weights of a pipeline's networks while these are loaded.

`plan_edits` checks every tensor of opened adapters against the networks, by the names of the conversion tables, and
says what `convert.engine.load` has to add where. No weights of the networks are read before.
"""

import functools
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ses_jax.convert import lora
from ses_jax.convert.engine import ConversionError, Edits, Slot, Weights
from ses_jax.convert.lora import Change, Layer, Problem
from ses_jax.convert.names import BIAS, WEIGHT, Vocabulary, vocabulary, window
from ses_jax.convert.table import Component
from ses_jax.loading.lora_files import PEFT_CONFIG, Adapter

LOG = logging.getLogger("ses_jax")

# What names of layers begin with, by network; the names themselves follow, dotted or with underscores.
PREFIXES = {
    "transformer": (
        *("transformer.", "diffusion_model.", "model.diffusion_model."),
        *("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_", ""),
    ),
    "text_encoder": ("text_encoder.", "lora_te1_", "lora_te_", "text_encoders.clip_l.transformer.", "clip_l."),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_", "lora_te3_", "text_encoders.t5xxl.transformer.", "t5."),
}
DUMP = "base_model.model."


class Addition(NamedTuple):
    """A change that one adapter makes to a piece of a leaf."""

    strength: float
    change: Change
    slot: Slot

    def values(self) -> np.ndarray:
        """In the leaf's own layout, float32."""
        return self.slot.transform.forward(np.float32(self.strength) * self.change.values(window(self.slot)))


def plan_edits(
    adapters: Sequence[Adapter], networks: Mapping[str, tuple[Component, Mapping[str, Any]]]
) -> dict[str, Edits]:
    """What has to be added to the networks' weights, by network.

    Args:
      adapters: in the order in which they are added.
      networks: by name, the component and the content of its `config.json`.

    Raises:
      ConversionError: naming every tensor of the adapters that does not fit, or that is not supported.
    """
    if not adapters:
        return {}
    words = {name: vocabulary(*networks[name]) for name in PREFIXES if name in networks}
    edits: dict[str, Any] = {name: defaultdict(list) for name in words}
    complaints = []
    for adapter in adapters:
        additions, problems = _match(adapter, words)
        complaints += [_complaint(adapter, problems)] if problems else []
        for (name, place), addition in additions.items():
            edits[name][place] += [addition] if adapter.strength else []
    if complaints:
        raise ConversionError("\n".join(complaints))
    return {
        name: {place: functools.partial(_add, tuple(added)) for place, added in of_network.items() if added}
        for name, of_network in edits.items()
    }


def _add(additions: Sequence[Addition], piece: np.ndarray) -> np.ndarray:
    for addition in additions:
        piece += addition.values()
    return piece


Place = tuple[str, tuple[str, int | None]]  # a network, and a piece of one of its leaves


def _match(adapter: Adapter, words: Mapping[str, Vocabulary]) -> tuple[dict[Place, Addition], list[Problem]]:
    """What an adapter adds where, and what is wrong with it."""
    layers, problems = lora.layers(adapter.weights.headers)
    problems += [
        Problem(refusal, PEFT_CONFIG) for refusal in map(lora.peft_refusal, adapter.configs.values()) if refusal
    ]
    additions: dict[Place, Addition] = {}
    unused: list[str] = []
    for layer in layers:
        try:
            of_layer = list(_additions(adapter, layer, words))
            unused += [] if of_layer else layer.keys.values()
            for place, addition in of_layer:
                if not _is_same(additions.setdefault(place, addition), addition):
                    raise ValueError(f"changes the same weights as {', '.join(additions[place].change.keys)}")
        except ValueError as error:
            problems += [Problem(str(error), key) for key in layer.keys.values()]
    if not additions and not problems:
        problems = [Problem("changes nothing in this model", key) for key in adapter.weights.headers]
    if unused and not problems:
        LOG.info("lora %s: without effect: %s", adapter.source, ", ".join(_collapsed(unused)))
    return additions, problems


def _additions(adapter: Adapter, layer: Layer, words: Mapping[str, Vocabulary]) -> Iterator[tuple[Place, Addition]]:
    """What one layer of an adapter adds; raises ValueError if it does not fit."""
    found = _find(layer.name, words)
    if found is None:
        if not _is_nothing(adapter.weights, layer):
            raise ValueError("no such layer in this model")
        return
    network, name = found
    config = adapter.configs.get(network, adapter.configs.get(""))
    said = None if config is None else functools.partial(lora.peft_scale, config, name)
    for change in lora.changes(layer, adapter.weights, said):
        slots = words[network].tensors.get((name, change.kind))
        if slots is None and words[network].ignored(name):
            continue
        if slots is None:
            raise ValueError(f"the layer has no {change.kind}")
        if slots[0].shape != change.shape:
            raise ValueError(f"wrong shape: of a change of {list(change.shape)}, the layer's is {list(slots[0].shape)}")
        for slot in slots:
            yield (network, (slot.target, slot.index)), Addition(adapter.strength, change, slot)


def _find(name: str, words: Mapping[str, Vocabulary]) -> tuple[str, str] | None:
    """The network that has a layer, and the layer's name without what tells the network."""
    name = name.removeprefix(DUMP)
    candidates = [
        (network, name.removeprefix(prefix))
        for network in words
        for prefix in PREFIXES[network]
        if name.startswith(prefix)
    ]
    for network, rest in candidates:
        if any((rest, kind) in words[network].tensors for kind in (WEIGHT, BIAS)):
            return network, rest
    return next(((network, rest) for network, rest in candidates if words[network].ignored(rest)), None)


def _is_nothing(weights: Weights, layer: Layer) -> bool:
    """Whether a layer's change is all zeros, as some programs write it for layers that they make up."""
    return layer.keys.keys() <= {"diff", "diff_b", "alpha"} and not any(
        np.any(np.asarray(weights.read(key), np.float32)) for role, key in layer.keys.items() if role != "alpha"
    )


def _is_same(one: Addition, other: Addition) -> bool:
    """Whether two additions to one piece are the same, as where a file has both a fused layer and its parts."""
    return one is other or np.allclose(one.values(), other.values(), rtol=1e-4, atol=1e-7)


def _complaint(adapter: Adapter, problems: Sequence[Problem]) -> str:
    by_reason = defaultdict(list)
    for problem in problems:
        by_reason[problem.reason].append(problem.key)
    made_for = f" (made for {adapter.made_for})" if adapter.made_for else ""
    lines = [f"  {reason}: {', '.join(_collapsed(keys))}" for reason, keys in by_reason.items()]
    return "\n".join([f"lora {adapter.source}{made_for} does not fit the model:", *lines])


def _collapsed(keys: Sequence[str]) -> list[str]:
    """Names, those that differ only in numbers as one: `blocks.[0-18].attn.qkv.lora_A.weight`."""
    groups = defaultdict(list)
    for key in keys:
        groups[re.sub(r"\d+", "#", key)].append([int(number) for number in re.findall(r"\d+", key)])
    return [
        "".join(word + span for word, span in zip(template.split("#"), [*_spans(rows), ""], strict=True))
        for template, rows in groups.items()
    ]


def _spans(rows: Sequence[Sequence[int]]) -> list[str]:
    return [_span(column) for column in zip(*rows, strict=True)]


def _span(numbers: Sequence[int]) -> str:
    found = sorted(set(numbers))
    if len(found) == 1:
        return str(found[0])
    return f"[{found[0]}-{found[-1]}]" if len(found) == found[-1] - found[0] + 1 else str(found).replace(" ", "")
