"""Tables of CLIP: both towers (published as transformers `CLIPModel`), and the text tower alone (`CLIPTextModel`)."""

from ses_jax.convert.table import CONV, Component, Rule, Table, embedding, linear, norm
from ses_jax.models import clip


def _layers(tower: str, target_tower: str) -> tuple[Rule, ...]:
    source, target = f"{tower}encoder.layers.{{i}}", f"{target_tower}layers"
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


def _text(tower: str = "", target: str = "") -> tuple[Rule, ...]:
    return (
        *embedding(f"{tower}embeddings.token_embedding", f"{target}token_embedding"),
        Rule(f"{tower}embeddings.position_embedding.weight", f"{target}position_embedding"),
        *_layers(tower, target),
        *norm(f"{tower}final_layer_norm", f"{target}final_layer_norm", bias=True),
    )


TABLE = Table(
    rules=(
        *_text("text_model.", "text/"),
        *linear("text_projection", "text_projection", bias=False),
        Rule("vision_model.embeddings.class_embedding", "vision/class_embedding"),
        Rule("vision_model.embeddings.patch_embedding.weight", "vision/patch_embedding/kernel", CONV),
        Rule("vision_model.embeddings.position_embedding.weight", "vision/position_embedding"),
        *norm("vision_model.pre_layrnorm", "vision/pre_layrnorm", bias=True),
        *_layers("vision_model.", "vision/"),
        *norm("vision_model.post_layernorm", "vision/post_layernorm", bias=True),
        *linear("visual_projection", "visual_projection", bias=False),
        Rule("logit_scale", "logit_scale"),
    ),
    # Constant buffers that older files carry.
    ignored=("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
)

# A file may be that of a whole CLIP: FLUX.1 reads the text's state before the projection.
TEXT_TABLE = Table(
    _text(),
    ignored=(
        *("embeddings.position_ids", "text_projection.weight", "logit_scale"),
        *("vision_model.*", "visual_projection.weight"),
    ),
    prefixes=("text_model.", ""),
)

COMPONENT = Component(clip.Config.from_json, clip.init, lambda config: TABLE, stem="model", quantized=clip.QUANTIZED)
TEXT_COMPONENT = Component(clip.TextConfig.from_json, clip.init_text, lambda config: TEXT_TABLE, stem="model")
