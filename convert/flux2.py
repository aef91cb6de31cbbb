"""Tables of the FLUX.2 transformer: as diffusers `Flux2Transformer2DModel`, and as its authors' single file.

The single file fuses queries, keys and values of the dual blocks as well, and has the shift of the last modulation
before its scale. Also here: which states of its text encoder are wanted.
"""

from collections.abc import Mapping
from typing import Any

from ses_jax.convert import decoder_lm as text_tables
from ses_jax.convert import mmdit
from ses_jax.convert.matching import Header
from ses_jax.convert.table import Component, Rule, SingleFile, Table, fused, joined, linear, norm, swapped
from ses_jax.models import decoder_lm, flux2

DUAL, SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"

# What a single block's first and last layer, published as one each, are made of.
SINGLE_IN = [f"single_blocks/{name}" for name in (*(f"attention/to_{n}" for n in "qkv"), "mlp/w1", "mlp/w3")]
SINGLE_OUT = ["single_blocks/attention/to_out", "single_blocks/mlp/w2"]


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
        *norm(f"{SINGLE}.attn.norm_q", "single_blocks/attention/norm_q"),
        *norm(f"{SINGLE}.attn.norm_k", "single_blocks/attention/norm_k"),
        *_linear("norm_out.linear", "output/norm_out/linear"),
        *_linear("proj_out", "output/proj_out"),
    )
)


def _original_stream(source: str, stream: str, attention: tuple[str, ...], norm_infix: str) -> tuple[Rule, ...]:
    """One stream of a dual block; `attention` are the names of its projections: q, k, v, output."""
    source, target = f"double_blocks.{{i}}.{source}", "dual_blocks/attention"
    return (
        *fused(f"{source}_attn.qkv", [f"{target}/{name}" for name in attention[:3]]),
        *_linear(f"{source}_attn.proj", f"{target}/{attention[3]}"),
        Rule(f"{source}_attn.norm.query_norm.scale", f"{target}/norm{norm_infix}_q/scale"),
        Rule(f"{source}_attn.norm.key_norm.scale", f"{target}/norm{norm_infix}_k/scale"),
        *fused(f"{source}_mlp.0", [f"dual_blocks/{stream}_mlp/w1", f"dual_blocks/{stream}_mlp/w3"]),
        *_linear(f"{source}_mlp.2", f"dual_blocks/{stream}_mlp/w2"),
    )


ORIGINAL = Table(
    (
        *_linear("img_in", "x_embedder"),
        *_linear("txt_in", "context_embedder"),
        *_linear("time_in.in_layer", "condition/timestep_embedder/linear_1"),
        *_linear("time_in.out_layer", "condition/timestep_embedder/linear_2"),
        *_linear("guidance_in.in_layer", "condition/guidance_embedder/linear_1"),
        *_linear("guidance_in.out_layer", "condition/guidance_embedder/linear_2"),
        *_linear("double_stream_modulation_img.lin", "image_modulation/linear"),
        *_linear("double_stream_modulation_txt.lin", "text_modulation/linear"),
        *_linear("single_stream_modulation.lin", "modulation/linear"),
        *_original_stream("img", "image", ("to_q", "to_k", "to_v", "to_out"), ""),
        *_original_stream("txt", "text", ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), "_added"),
        *fused("single_blocks.{i}.linear1", SINGLE_IN),
        *joined("single_blocks.{i}.linear2", SINGLE_OUT),
        Rule("single_blocks.{i}.norm.query_norm.scale", "single_blocks/attention/norm_q/scale"),
        Rule("single_blocks.{i}.norm.key_norm.scale", "single_blocks/attention/norm_k/scale"),
        *swapped("final_layer.adaLN_modulation.1", "output/norm_out/linear"),
        *_linear("final_layer.linear", "output/proj_out"),
    )
)
SINGLE_FILES = ("flux2-dev", *(f"flux-2-klein-{name}" for name in ("4b", "9b", "base-4b", "base-9b")))


def original_config(headers: Mapping[str, Header]) -> dict[str, Any]:
    """The `config.json` of a single file, from the shapes of its tensors; errors are `mmdit.original_config`'s."""
    dim, mlp_dim = headers["double_blocks.0.img_mlp.2.weight"].shape
    return {
        "_class_name": "Flux2Transformer2DModel",
        **mmdit.original_config(headers, flux2.Config()),
        "mlp_ratio": mlp_dim / dim,
    }


def _text_config(config: Mapping[str, Any]) -> decoder_lm.Config:
    """States at a quarter, half and three quarters of the depth: 10, 20, 30 of Mistral's 40 layers, 9, 18, 27 of 36."""
    depth = decoder_lm.text_config(config)["num_hidden_layers"]
    return decoder_lm.Config.from_json(config, hidden_states=[depth * quarters // 4 for quarters in (1, 2, 3)])


COMPONENT = Component(
    flux2.Config.from_json,
    flux2.init,
    lambda config: TABLE,
    single_file=SingleFile(
        tuple(f"{name}.safetensors" for name in SINGLE_FILES), lambda config: ORIGINAL, original_config
    ),
    partition=flux2.PARTITION,
    quantized=flux2.QUANTIZED,
    turned=flux2.TURNED,
)
TEXT_ENCODER = Component(
    _text_config,
    decoder_lm.init,
    lambda config: text_tables.table(config, _text_config(config)),
    stem="model",
    partition=decoder_lm.PARTITION,
    quantized=decoder_lm.QUANTIZED,
)
