"""Tables of T5's encoder: as transformers publishes it (`T5EncoderModel`), and by the names of llama.cpp (GGUF)."""

from collections.abc import Mapping
from typing import Any

from ses_jax.convert.matching import Header
from ses_jax.convert.table import Component, SingleFile, Table, embedding, linear, norm
from ses_jax.models import t5

ATTENTION, FEED_FORWARD = "encoder.block.{i}.layer.0", "encoder.block.{i}.layer.1"
BLOCK = "enc.blk.{i}"

TABLE = Table(
    rules=(
        *embedding("shared", "embed_tokens"),
        *embedding("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "relative_attention_bias"),
        *linear(f"{ATTENTION}.SelfAttention.q", "blocks/attention/q", bias=False),
        *linear(f"{ATTENTION}.SelfAttention.k", "blocks/attention/k", bias=False),
        *linear(f"{ATTENTION}.SelfAttention.v", "blocks/attention/v", bias=False),
        *linear(f"{ATTENTION}.SelfAttention.o", "blocks/attention/o", bias=False),
        *norm(f"{ATTENTION}.layer_norm", "blocks/attention_norm"),
        *linear(f"{FEED_FORWARD}.DenseReluDense.wi_0", "blocks/feed_forward/w1", bias=False),
        *linear(f"{FEED_FORWARD}.DenseReluDense.wi_1", "blocks/feed_forward/w3", bias=False),
        *linear(f"{FEED_FORWARD}.DenseReluDense.wo", "blocks/feed_forward/w2", bias=False),
        *norm(f"{FEED_FORWARD}.layer_norm", "blocks/ffn_norm"),
        *norm("encoder.final_layer_norm", "final_layer_norm"),
    ),
    # The same table again, which some files carry.
    ignored=("encoder.embed_tokens.weight",),
)
LLAMA_CPP = Table(
    (
        *embedding("token_embd", "embed_tokens"),
        *embedding("enc.blk.0.attn_rel_b", "relative_attention_bias"),
        *(rule for n in "qkvo" for rule in linear(f"{BLOCK}.attn_{n}", f"blocks/attention/{n}", bias=False)),
        *norm(f"{BLOCK}.attn_norm", "blocks/attention_norm"),
        *linear(f"{BLOCK}.ffn_gate", "blocks/feed_forward/w1", bias=False),
        *linear(f"{BLOCK}.ffn_up", "blocks/feed_forward/w3", bias=False),
        *linear(f"{BLOCK}.ffn_down", "blocks/feed_forward/w2", bias=False),
        *norm(f"{BLOCK}.ffn_norm", "blocks/ffn_norm"),
        *norm("enc.output_norm", "final_layer_norm"),
    )
)


def no_config(headers: Mapping[str, Header]) -> dict[str, Any]:
    """Raises ValueError: shapes do not say how many heads there are."""
    raise ValueError("a single file of T5 needs the config.json of its folder's text_encoder_2")


COMPONENT = Component(
    t5.Config.from_json,
    t5.init,
    lambda config: TABLE,
    single_file=SingleFile((), lambda config: LLAMA_CPP, no_config),
    stem="model",
    partition=t5.PARTITION,
    quantized=t5.QUANTIZED,
)
