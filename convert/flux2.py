"""Table of the FLUX.2 transformer (published as diffusers `Flux2Transformer2DModel`), and its text encoder."""

from collections.abc import Mapping
from typing import Any

from ses_jax.convert import decoder_lm as text_tables
from ses_jax.convert.table import Component, Rule, Table, fused, joined, linear, norm
from ses_jax.models import decoder_lm, flux2

DUAL, SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"

# What a single block's first and last layer, published as one each, are made of.
SINGLE_IN = [f"single_blocks/{name}" for name in ("to_q", "to_k", "to_v", "mlp/w1", "mlp/w3")]
SINGLE_OUT = ["single_blocks/to_out", "single_blocks/mlp/w2"]


def _linear(source: str, target: str) -> tuple[Rule, ...]:
    return linear(source, target, bias=False)


TABLE = Table(
    (
        *_linear("x_embedder", "x_embedder"),
        *_linear("context_embedder", "context_embedder"),
        *_linear("time_guidance_embed.timestep_embedder.linear_{n}", "condition/timestep_embedder/linear_{n}"),
        *_linear("time_guidance_embed.guidance_embedder.linear_{n}", "condition/guidance_embedder/linear_{n}"),
        *_linear("double_stream_modulation_img.linear", "image_modulation/linear"),
        *_linear("double_stream_modulation_txt.linear", "text_modulation/linear"),
        *_linear("single_stream_modulation.linear", "modulation/linear"),
        *(rule for n in "qkv" for rule in _linear(f"{DUAL}.attn.to_{n}", f"dual_blocks/attention/to_{n}")),
        *(rule for n in "qkv" for rule in _linear(f"{DUAL}.attn.add_{n}_proj", f"dual_blocks/attention/add_{n}_proj")),
        *_linear(f"{DUAL}.attn.to_out.0", "dual_blocks/attention/to_out"),
        *_linear(f"{DUAL}.attn.to_add_out", "dual_blocks/attention/to_add_out"),
        *(
            rule
            for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
            for rule in norm(f"{DUAL}.attn.{name}", f"dual_blocks/attention/{name}")
        ),
        *fused(f"{DUAL}.ff.linear_in", ["dual_blocks/image_mlp/w1", "dual_blocks/image_mlp/w3"]),
        *_linear(f"{DUAL}.ff.linear_out", "dual_blocks/image_mlp/w2"),
        *fused(f"{DUAL}.ff_context.linear_in", ["dual_blocks/text_mlp/w1", "dual_blocks/text_mlp/w3"]),
        *_linear(f"{DUAL}.ff_context.linear_out", "dual_blocks/text_mlp/w2"),
        *fused(f"{SINGLE}.attn.to_qkv_mlp_proj", SINGLE_IN),
        *joined(f"{SINGLE}.attn.to_out", SINGLE_OUT),
        *norm(f"{SINGLE}.attn.norm_q", "single_blocks/norm_q"),
        *norm(f"{SINGLE}.attn.norm_k", "single_blocks/norm_k"),
        *_linear("norm_out.linear", "output/norm_out/linear"),
        *_linear("proj_out", "output/proj_out"),
    )
)


def _text_config(config: Mapping[str, Any]) -> decoder_lm.Config:
    """States at a quarter, half and three quarters of the depth: 10, 20, 30 of Mistral's 40 layers, 9, 18, 27 of 36."""
    depth = decoder_lm.text_config(config)["num_hidden_layers"]
    return decoder_lm.Config.from_json(config, hidden_states=[depth * quarters // 4 for quarters in (1, 2, 3)])


COMPONENT = Component(flux2.Config.from_json, flux2.init, lambda config: TABLE, partition=flux2.PARTITION)
TEXT_ENCODER = Component(
    _text_config,
    decoder_lm.init,
    lambda config: text_tables.table(config, _text_config(config)),
    stem="model",
    partition=decoder_lm.PARTITION,
)
