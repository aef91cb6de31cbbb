"""Tables of the FLUX.1 transformer: as diffusers `FluxTransformer2DModel`, and as its authors' single file.

The single file fuses queries, keys and values (single blocks also with the first layer of the feed-forward), and has
the shift of the last modulation before its scale.
"""

from collections.abc import Mapping
from typing import Any

from ses_jax.convert import mmdit
from ses_jax.convert.matching import Header
from ses_jax.convert.table import Component, Rule, SingleFile, Table, fused, joined, linear, norm, swapped
from ses_jax.models import flux1

TEXT_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
IMAGE_ATTENTION = ("to_q", "to_k", "to_v", "to_out")


def _double() -> tuple[Rule, ...]:
    source, target = "transformer_blocks.{i}", "double_blocks"
    projections = (*IMAGE_ATTENTION[:3], *TEXT_ATTENTION)
    norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    return (
        *linear(f"{source}.norm1.linear", f"{target}/image_modulation/linear"),
        *linear(f"{source}.norm1_context.linear", f"{target}/text_modulation/linear"),
        *(rule for n in projections for rule in linear(f"{source}.attn.{n}", f"{target}/attention/{n}")),
        *linear(f"{source}.attn.to_out.0", f"{target}/attention/to_out"),
        *(rule for n in norms for rule in norm(f"{source}.attn.{n}", f"{target}/attention/{n}")),
        *linear(f"{source}.ff.net.0.proj", f"{target}/image_mlp/linear_1"),
        *linear(f"{source}.ff.net.2", f"{target}/image_mlp/linear_2"),
        *linear(f"{source}.ff_context.net.0.proj", f"{target}/text_mlp/linear_1"),
        *linear(f"{source}.ff_context.net.2", f"{target}/text_mlp/linear_2"),
    )


def _single() -> tuple[Rule, ...]:
    source, target = "single_transformer_blocks.{i}", "single_blocks"
    return (
        *linear(f"{source}.norm.linear", f"{target}/modulation/linear"),
        *(rule for n in "qkv" for rule in linear(f"{source}.attn.to_{n}", f"{target}/attention/to_{n}")),
        *norm(f"{source}.attn.norm_q", f"{target}/attention/norm_q"),
        *norm(f"{source}.attn.norm_k", f"{target}/attention/norm_k"),
        *linear(f"{source}.proj_mlp", f"{target}/mlp_in"),
        *_single_output(f"{source}.proj_out"),
    )


def _single_output(source: str) -> tuple[Rule, ...]:
    """The last projection of a single block, in both layouts: of the attention's output, then of the feed-forward's."""
    attention, mlp = "single_blocks/attention/to_out", "single_blocks/mlp_out"
    return (*joined(source, [attention, mlp]), Rule(f"{source}.bias", f"{attention}/bias"))


TABLE = Table(
    (
        *linear("x_embedder", "x_embedder"),
        *linear("context_embedder", "context_embedder"),
        *linear("time_text_embed.timestep_embedder.linear_{n}", "condition/timestep_embedder/linear_{n}"),
        *linear("time_text_embed.guidance_embedder.linear_{n}", "condition/guidance_embedder/linear_{n}"),
        *linear("time_text_embed.text_embedder.linear_{n}", "pooled_embedder/linear_{n}"),
        *_double(),
        *_single(),
        *linear("norm_out.linear", "output/norm_out/linear"),
        *linear("proj_out", "output/proj_out"),
    )
)


def _original_stream(source: str, stream: str, attention: tuple[str, ...], norm_infix: str) -> tuple[Rule, ...]:
    """One stream of a double block; `attention` are the names of its projections: q, k, v, output."""
    source, target = f"double_blocks.{{i}}.{source}", "double_blocks/attention"
    return (
        *linear(f"{source}_mod.lin", f"double_blocks/{stream}_modulation/linear"),
        *fused(f"{source}_attn.qkv", [f"{target}/{n}" for n in attention[:3]]),
        *linear(f"{source}_attn.proj", f"{target}/{attention[3]}"),
        Rule(f"{source}_attn.norm.query_norm.scale", f"{target}/norm{norm_infix}_q/scale"),
        Rule(f"{source}_attn.norm.key_norm.scale", f"{target}/norm{norm_infix}_k/scale"),
        *linear(f"{source}_mlp.0", f"double_blocks/{stream}_mlp/linear_1"),
        *linear(f"{source}_mlp.2", f"double_blocks/{stream}_mlp/linear_2"),
    )


def _original_single() -> tuple[Rule, ...]:
    source, target = "single_blocks.{i}", "single_blocks"
    first = [*(f"{target}/attention/to_{n}" for n in "qkv"), f"{target}/mlp_in"]
    return (
        *linear(f"{source}.modulation.lin", f"{target}/modulation/linear"),
        *fused(f"{source}.linear1", first),
        Rule(f"{source}.norm.query_norm.scale", f"{target}/attention/norm_q/scale"),
        Rule(f"{source}.norm.key_norm.scale", f"{target}/attention/norm_k/scale"),
        *_single_output(f"{source}.linear2"),
    )


def _original_embedder(name: str, target: str) -> tuple[Rule, ...]:
    return (
        *linear(f"{name}.in_layer", f"{target}/linear_1"),
        *linear(f"{name}.out_layer", f"{target}/linear_2"),
    )


ORIGINAL = Table(
    (
        *linear("img_in", "x_embedder"),
        *linear("txt_in", "context_embedder"),
        *_original_embedder("time_in", "condition/timestep_embedder"),
        *_original_embedder("guidance_in", "condition/guidance_embedder"),
        *_original_embedder("vector_in", "pooled_embedder"),
        *_original_stream("img", "image", IMAGE_ATTENTION, ""),
        *_original_stream("txt", "text", TEXT_ATTENTION, "_added"),
        *_original_single(),
        *swapped("final_layer.adaLN_modulation.1", "output/norm_out/linear"),
        *linear("final_layer.linear", "output/proj_out"),
    )
)


# Layers as XLabs names them; the first of a single block is a part of `linear1`.
XLABS = Table(
    (
        *fused("double_blocks.{i}.processor.qkv_lora1", [f"double_blocks/attention/{n}" for n in IMAGE_ATTENTION[:3]]),
        *linear("double_blocks.{i}.processor.proj_lora1", "double_blocks/attention/to_out"),
        *fused("double_blocks.{i}.processor.qkv_lora2", [f"double_blocks/attention/{n}" for n in TEXT_ATTENTION[:3]]),
        *linear("double_blocks.{i}.processor.proj_lora2", "double_blocks/attention/to_add_out"),
        *fused("single_blocks.{i}.processor.qkv", [f"single_blocks/attention/to_{n}" for n in "qkv"]),
        *_single_output("single_blocks.{i}.processor.proj"),
    )
)


def original_config(headers: Mapping[str, Header]) -> dict[str, Any]:
    """The `config.json` of a single file, from the shapes of its tensors; errors are `mmdit.original_config`'s."""
    return {
        "_class_name": "FluxTransformer2DModel",
        **mmdit.original_config(headers, flux1.Config()),
        "pooled_projection_dim": headers["vector_in.in_layer.weight"].shape[1],
    }


COMPONENT = Component(
    flux1.Config.from_json,
    flux1.init,
    lambda config: TABLE,
    single_file=SingleFile(
        ("flux1-dev.safetensors", "flux1-schnell.safetensors"), lambda config: ORIGINAL, original_config
    ),
    aliases=lambda config: XLABS,
    partition=flux1.PARTITION,
    quantized=flux1.QUANTIZED,
    turned=flux1.TURNED,
)
