"""Tables of the decoder-only text encoders: Qwen3, and the text sides of Qwen2.5-VL and Mistral3.

Releases of transformers save them under different prefixes, and vision-language models beside networks that are never
loaded here.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ses_jax.convert.matching import layout
from ses_jax.convert.table import Component, Rule, Table, embedding, linear, norm
from ses_jax.models import decoder_lm

# As published first, then as other releases save it.
PREFIXES = {"mistral": ("language_model.model.", "model.language_model.", "model.", "")}
OTHER_PREFIXES = ("model.", "model.language_model.", "language_model.model.", "")
UNLOADED = (
    *("lm_head.weight", "language_model.lm_head.weight"),
    *("visual.*", "model.visual.*"),
    *("vision_tower.*", "model.vision_tower.*"),
    *("multi_modal_projector.*", "model.multi_modal_projector.*"),
)


def component(*hidden_states: int) -> Component:
    """The text encoder that yields some of the reference's `hidden_states`; the layers above them are not loaded."""
    from_json = functools.partial(decoder_lm.Config.from_json, hidden_states=hidden_states)
    return Component(
        from_json,
        decoder_lm.init,
        lambda json: table(json, from_json(json)),
        stem="model",
        partition=decoder_lm.PARTITION,
        quantized=decoder_lm.QUANTIZED,
    )


def table(json: Mapping[str, Any], config: decoder_lm.Config) -> Table:
    """The table for those layers of a `config.json` that the config has."""
    text = decoder_lm.text_config(json)
    unloaded = [f"layers.{i}.*" for i in range(config.layers, text["num_hidden_layers"])]
    if not config.final_norm:
        unloaded.append("norm.weight")
    return Table(
        (*embedding("embed_tokens", "embed_tokens"), *_layer(config), *norm("norm", "norm")),
        ignored=(*unloaded, *UNLOADED),
        prefixes=PREFIXES.get(text["model_type"], OTHER_PREFIXES),
    )


def _layer(config: decoder_lm.Config) -> tuple[Rule, ...]:
    attention, mlp = "layers.{i}.self_attn", "layers.{i}.mlp"
    return (
        *norm("layers.{i}.input_layernorm", "layers/input_layernorm"),
        *linear(f"{attention}.q_proj", "layers/self_attn/q_proj", bias=config.qkv_bias),
        *linear(f"{attention}.k_proj", "layers/self_attn/k_proj", bias=config.qkv_bias),
        *linear(f"{attention}.v_proj", "layers/self_attn/v_proj", bias=config.qkv_bias),
        *linear(f"{attention}.o_proj", "layers/self_attn/o_proj", bias=False),
        *norm(f"{attention}.q_norm", "layers/self_attn/q_norm"),
        *norm(f"{attention}.k_norm", "layers/self_attn/k_norm"),
        *norm("layers.{i}.post_attention_layernorm", "layers/post_attention_layernorm"),
        *linear(f"{mlp}.gate_proj", "layers/mlp/w1", bias=False),
        *linear(f"{mlp}.up_proj", "layers/mlp/w3", bias=False),
        *linear(f"{mlp}.down_proj", "layers/mlp/w2", bias=False),
    )


def idle_layers(json: Mapping[str, Any], layers: int) -> Iterator[tuple[str, np.ndarray]]:
    """Published tensors of what lies above the first `layers` layers, doing nothing: for a checkpoint trained here.

    A published file has all layers of its `config.json`. Zero matrices make a layer the identity.
    """
    everything = decoder_lm.Config.from_json(json, hidden_states=(-1,))
    all_layers = table(json, everything)
    prefix = all_layers.prefixes[0]
    for slot in layout(all_layers, component(-1).abstract(everything), prefix):
        if slot.name == f"{prefix}norm.weight" or (slot.index is not None and slot.index >= layers):
            yield slot.name, np.full(slot.shape, len(slot.shape) == 1, np.float32)
