"""Tables of the Z-Image transformer: as diffusers `ZImageTransformer2DModel`, and under its authors' own names."""

from collections.abc import Callable, Mapping
from typing import Any

from ses_jax.convert.matching import Header
from ses_jax.convert.table import Component, Rule, SingleFile, Table, fused, linear, norm
from ses_jax.models import z_image


def table(config: Mapping[str, Any]) -> Table:
    """The table for a `config.json`; the patch size is part of two names."""
    patch = f"{z_image.Config.from_json(config).patch_size}-1"
    return _table(f"all_x_embedder.{patch}", f"all_final_layer.{patch}", _attention)


def original(config: Mapping[str, Any]) -> Table:
    """The authors' names, which adapters and single files use: queries, keys and values are one layer."""
    return _table("x_embedder", "final_layer", _original_attention)._replace(ignored=("norm_final.weight",))


def no_config(headers: Mapping[str, Header]) -> dict[str, Any]:
    """Raises ValueError: shapes do not say what a Z-Image is made of."""
    raise ValueError("a single file of Z-Image needs the config.json of its folder's transformer")


def _table(first: str, last: str, attention: Callable[[str], tuple[Rule, ...]]) -> Table:
    return Table(
        (
            *linear(first, "x_embedder"),
            *linear("t_embedder.mlp.0", "t_embedder/linear_1"),
            *linear("t_embedder.mlp.2", "t_embedder/linear_2"),
            *norm("cap_embedder.0", "cap_norm"),
            *linear("cap_embedder.1", "cap_embedder"),
            Rule("x_pad_token", "x_pad_token"),
            Rule("cap_pad_token", "cap_pad_token"),
            *_block("context_refiner", attention),
            *_block("noise_refiner", attention),
            *linear("noise_refiner.{i}.adaLN_modulation.0", "noise_refiner/modulation"),
            *_block("layers", attention),
            *linear("layers.{i}.adaLN_modulation.0", "layers/modulation"),
            *linear(f"{last}.adaLN_modulation.1", "final_layer/modulation"),
            *linear(f"{last}.linear", "final_layer/linear"),
        )
    )


def _block(name: str, attention: Callable[[str], tuple[Rule, ...]]) -> tuple[Rule, ...]:
    source = f"{name}.{{i}}"
    return (
        *attention(name),
        *linear(f"{source}.feed_forward.w1", f"{name}/feed_forward/w1", bias=False),
        *linear(f"{source}.feed_forward.w2", f"{name}/feed_forward/w2", bias=False),
        *linear(f"{source}.feed_forward.w3", f"{name}/feed_forward/w3", bias=False),
        *norm(f"{source}.attention_norm1", f"{name}/attention_norm1"),
        *norm(f"{source}.attention_norm2", f"{name}/attention_norm2"),
        *norm(f"{source}.ffn_norm1", f"{name}/ffn_norm1"),
        *norm(f"{source}.ffn_norm2", f"{name}/ffn_norm2"),
    )


def _attention(name: str) -> tuple[Rule, ...]:
    source, target = f"{name}.{{i}}.attention", f"{name}/attention"
    return (
        *(rule for n in ("to_q", "to_k", "to_v") for rule in linear(f"{source}.{n}", f"{target}/{n}", bias=False)),
        *linear(f"{source}.to_out.0", f"{target}/to_out", bias=False),
        *norm(f"{source}.norm_q", f"{target}/norm_q"),
        *norm(f"{source}.norm_k", f"{target}/norm_k"),
    )


def _original_attention(name: str) -> tuple[Rule, ...]:
    source, target = f"{name}.{{i}}.attention", f"{name}/attention"
    return (
        *fused(f"{source}.qkv", [f"{target}/to_{n}" for n in "qkv"]),
        *linear(f"{source}.out", f"{target}/to_out", bias=False),
        *norm(f"{source}.q_norm", f"{target}/norm_q"),
        *norm(f"{source}.k_norm", f"{target}/norm_k"),
    )


COMPONENT = Component(
    z_image.Config.from_json,
    z_image.init,
    table,
    single_file=SingleFile((), original, no_config),
    partition=z_image.PARTITION,
    quantized=z_image.QUANTIZED,
    turned=z_image.TURNED,
)
