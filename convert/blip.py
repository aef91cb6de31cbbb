"""Table of BLIP's image-grounded text encoder (published inside `ImageReward.pt`)."""

from ses_jax.convert.table import Component, Rule, Table, Transform, conv, embedding, fused, linear, norm
from ses_jax.models import blip

# A leading axis of one for each missing one: [1, 1, D] <-> [D], [1, N, D] <-> [N, D].
ONE = Transform("one", lambda x: x[0], lambda x: x[None])
ONE_ONE = Transform("one one", lambda x: x[0, 0], lambda x: x[None, None])


def _attention(source: str, target: str, name: str) -> tuple[Rule, ...]:
    return (
        *linear(f"{source}.self.query", f"{target}/{name}/q_proj"),
        *linear(f"{source}.self.key", f"{target}/{name}/k_proj"),
        *linear(f"{source}.self.value", f"{target}/{name}/v_proj"),
        *linear(f"{source}.output.dense", f"{target}/{name}/out_proj"),
        *norm(f"{source}.output.LayerNorm", f"{target}/{name}_norm", bias=True),
    )


def _table() -> Table:
    vision, block = "visual_encoder", "visual_encoder.blocks.{i}"
    text, layer = "text_encoder", "text_encoder.encoder.layer.{i}"
    return Table(
        rules=(
            Rule(f"{vision}.cls_token", "vision/class_embedding", ONE_ONE),
            Rule(f"{vision}.pos_embed", "vision/position_embedding", ONE),
            *conv(f"{vision}.patch_embed.proj", "vision/patch_embedding"),
            *norm(f"{block}.norm1", "vision/layers/layer_norm1", bias=True),
            *fused(f"{block}.attn.qkv", [f"vision/layers/{name}" for name in ("q_proj", "k_proj", "v_proj")]),
            *linear(f"{block}.attn.proj", "vision/layers/out_proj"),
            *norm(f"{block}.norm2", "vision/layers/layer_norm2", bias=True),
            *linear(f"{block}.mlp.fc1", "vision/layers/fc1"),
            *linear(f"{block}.mlp.fc2", "vision/layers/fc2"),
            *norm(f"{vision}.norm", "vision/norm", bias=True),
            *embedding(f"{text}.embeddings.word_embeddings", "text/word_embedding"),
            Rule(f"{text}.embeddings.position_embeddings.weight", "text/position_embedding"),
            *norm(f"{text}.embeddings.LayerNorm", "text/embedding_norm", bias=True),
            *_attention(f"{layer}.attention", "text/layers", "self"),
            *_attention(f"{layer}.crossattention", "text/layers", "cross"),
            *linear(f"{layer}.intermediate.dense", "text/layers/intermediate"),
            *linear(f"{layer}.output.dense", "text/layers/output"),
            *norm(f"{layer}.output.LayerNorm", "text/layers/output_norm", bias=True),
        ),
        # The projections of contrastive pre-training, a constant buffer, and ImageReward's head.
        ignored=("vision_proj.*", "text_proj.*", "text_encoder.embeddings.position_ids", "mlp.*"),
        prefixes=("blip.", ""),
    )


TABLE = _table()

COMPONENT = Component(blip.Config.from_json, blip.init, lambda config: TABLE, quantized=blip.QUANTIZED)
