"""Table of the decoder-only text encoders (published as transformers `Qwen3Model` or `Qwen3ForCausalLM`)."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ses_jax.convert.engine import layout
from ses_jax.convert.table import Component, Table, embedding, linear, norm
from ses_jax.models import decoder_lm


def component(hidden_state: int = -2) -> Component:
    """The text encoder that yields one of the reference's `hidden_states`; the layers above it are not loaded."""
    from_json = functools.partial(decoder_lm.Config.from_json, hidden_state=hidden_state)
    return Component(from_json, decoder_lm.init, lambda config: table(config, from_json(config).layers), stem="model")


def table(config: Mapping[str, Any], layers: int) -> Table:
    """The table for the first `layers` layers of a `config.json`."""
    unloaded = tuple(f"layers.{i}.*" for i in range(layers, config["num_hidden_layers"]))
    layer, attention, mlp = "layers.{i}", "layers.{i}.self_attn", "layers.{i}.mlp"
    return Table(
        rules=(
            *embedding("embed_tokens", "embed_tokens"),
            *norm(f"{layer}.input_layernorm", "layers/input_layernorm"),
            *linear(f"{attention}.q_proj", "layers/self_attn/q_proj", bias=False),
            *linear(f"{attention}.k_proj", "layers/self_attn/k_proj", bias=False),
            *linear(f"{attention}.v_proj", "layers/self_attn/v_proj", bias=False),
            *linear(f"{attention}.o_proj", "layers/self_attn/o_proj", bias=False),
            *norm(f"{attention}.q_norm", "layers/self_attn/q_norm"),
            *norm(f"{attention}.k_norm", "layers/self_attn/k_norm"),
            *norm(f"{layer}.post_attention_layernorm", "layers/post_attention_layernorm"),
            *linear(f"{mlp}.gate_proj", "layers/mlp/w1", bias=False),
            *linear(f"{mlp}.up_proj", "layers/mlp/w3", bias=False),
            *linear(f"{mlp}.down_proj", "layers/mlp/w2", bias=False),
        ),
        ignored=(*unloaded, "norm.weight", "lm_head.weight"),
        prefixes=("model.", ""),
    )


def idle_layers(config: Mapping[str, Any], layers: int) -> Iterator[tuple[str, np.ndarray]]:
    """Published tensors of what lies above the first `layers` layers, doing nothing: for a checkpoint trained here.

    A published file has all layers of its `config.json`. Zero matrices make a layer the identity.
    """
    total = config["num_hidden_layers"]
    everything = dataclasses.replace(decoder_lm.Config.from_json(config, hidden_state=0), layers=total)
    all_layers = table(config, total)
    prefix = all_layers.prefixes[0]
    for slot in layout(all_layers, component().abstract(everything), prefix):
        if slot.index is not None and slot.index >= layers:
            yield slot.name, np.full(slot.shape, len(slot.shape) == 1, np.float32)
    yield f"{prefix}norm.weight", np.ones(everything.hidden_size, np.float32)
