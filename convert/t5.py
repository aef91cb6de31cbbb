"""Table of T5's encoder (published as transformers `T5EncoderModel`)."""

from ses_jax.convert.table import Component, Table, embedding, linear, norm
from ses_jax.models import t5

ATTENTION, FEED_FORWARD = "encoder.block.{i}.layer.0", "encoder.block.{i}.layer.1"

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

COMPONENT = Component(
    t5.Config.from_json, t5.init, lambda config: TABLE, stem="model", partition=t5.PARTITION, quantized=t5.QUANTIZED
)
