"""Table of CLIP with both towers (published as transformers `CLIPModel`)."""

from ses_jax.convert.table import CONV, Component, Rule, Table, embedding, linear, norm
from ses_jax.models import clip


def _layers(name: str) -> tuple[Rule, ...]:
    source, target = f"{name}_model.encoder.layers.{{i}}", f"{name}/layers"
    return (
        *norm(f"{source}.layer_norm1", f"{target}/layer_norm1", bias=True),
        *linear(f"{source}.self_attn.q_proj", f"{target}/q_proj"),
        *linear(f"{source}.self_attn.k_proj", f"{target}/k_proj"),
        *linear(f"{source}.self_attn.v_proj", f"{target}/v_proj"),
        *linear(f"{source}.self_attn.out_proj", f"{target}/out_proj"),
        *norm(f"{source}.layer_norm2", f"{target}/layer_norm2", bias=True),
        *linear(f"{source}.mlp.fc1", f"{target}/fc1"),
        *linear(f"{source}.mlp.fc2", f"{target}/fc2"),
    )


TABLE = Table(
    rules=(
        *embedding("text_model.embeddings.token_embedding", "text/token_embedding"),
        Rule("text_model.embeddings.position_embedding.weight", "text/position_embedding"),
        *_layers("text"),
        *norm("text_model.final_layer_norm", "text/final_layer_norm", bias=True),
        *linear("text_projection", "text_projection", bias=False),
        Rule("vision_model.embeddings.class_embedding", "vision/class_embedding"),
        Rule("vision_model.embeddings.patch_embedding.weight", "vision/patch_embedding/kernel", CONV),
        Rule("vision_model.embeddings.position_embedding.weight", "vision/position_embedding"),
        *norm("vision_model.pre_layrnorm", "vision/pre_layrnorm", bias=True),
        *_layers("vision"),
        *norm("vision_model.post_layernorm", "vision/post_layernorm", bias=True),
        *linear("visual_projection", "visual_projection", bias=False),
        Rule("logit_scale", "logit_scale"),
    ),
    # Constant buffers that older files carry.
    ignored=("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
)

COMPONENT = Component(clip.Config.from_json, clip.init, lambda config: TABLE, stem="model")
