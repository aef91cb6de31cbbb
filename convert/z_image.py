"""Table of the Z-Image transformer (published as diffusers `ZImageTransformer2DModel`)."""

from collections.abc import Mapping
from typing import Any

from ses_jax.convert.table import Component, Rule, Table, linear, norm
from ses_jax.models import z_image


def table(config: Mapping[str, Any]) -> Table:
    """The table for a `config.json`; the patch size is part of two names."""
    patch = f"{z_image.Config.from_json(config).patch_size}-1"
    return Table(
        (
            *linear(f"all_x_embedder.{patch}", "x_embedder"),
            *linear("t_embedder.mlp.0", "t_embedder/linear_1"),
            *linear("t_embedder.mlp.2", "t_embedder/linear_2"),
            *norm("cap_embedder.0", "cap_norm"),
            *linear("cap_embedder.1", "cap_embedder"),
            Rule("x_pad_token", "x_pad_token"),
            Rule("cap_pad_token", "cap_pad_token"),
            *_block("context_refiner"),
            *_block("noise_refiner"),
            *linear("noise_refiner.{i}.adaLN_modulation.0", "noise_refiner/modulation"),
            *_block("layers"),
            *linear("layers.{i}.adaLN_modulation.0", "layers/modulation"),
            *linear(f"all_final_layer.{patch}.adaLN_modulation.1", "final_layer/modulation"),
            *linear(f"all_final_layer.{patch}.linear", "final_layer/linear"),
        )
    )


def _block(name: str) -> tuple[Rule, ...]:
    source = f"{name}.{{i}}"
    return (
        *linear(f"{source}.attention.to_q", f"{name}/attention/to_q", bias=False),
        *linear(f"{source}.attention.to_k", f"{name}/attention/to_k", bias=False),
        *linear(f"{source}.attention.to_v", f"{name}/attention/to_v", bias=False),
        *linear(f"{source}.attention.to_out.0", f"{name}/attention/to_out", bias=False),
        *norm(f"{source}.attention.norm_q", f"{name}/attention/norm_q"),
        *norm(f"{source}.attention.norm_k", f"{name}/attention/norm_k"),
        *linear(f"{source}.feed_forward.w1", f"{name}/feed_forward/w1", bias=False),
        *linear(f"{source}.feed_forward.w2", f"{name}/feed_forward/w2", bias=False),
        *linear(f"{source}.feed_forward.w3", f"{name}/feed_forward/w3", bias=False),
        *norm(f"{source}.attention_norm1", f"{name}/attention_norm1"),
        *norm(f"{source}.attention_norm2", f"{name}/attention_norm2"),
        *norm(f"{source}.ffn_norm1", f"{name}/ffn_norm1"),
        *norm(f"{source}.ffn_norm2", f"{name}/ffn_norm2"),
    )


COMPONENT = Component(
    z_image.Config.from_json, z_image.init, table, partition=z_image.PARTITION, quantized=z_image.QUANTIZED
)
