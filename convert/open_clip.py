"""Table of CLIP with both towers as open_clip publishes it (HPSv2); the params are those of `convert/clip.py`."""

from ses_jax.convert.table import CONV, Component, Rule, Table, embedding, fused, linear, norm
from ses_jax.models import clip


def _layers(source: str, target: str) -> tuple[Rule, ...]:
    source, target = f"{source}transformer.resblocks.{{i}}", f"{target}/layers"
    projections = [f"{target}/{name}" for name in ("q_proj", "k_proj", "v_proj")]
    return (
        *norm(f"{source}.ln_1", f"{target}/layer_norm1", bias=True),
        *fused(f"{source}.attn.in_proj", projections, separator="_"),
        *linear(f"{source}.attn.out_proj", f"{target}/out_proj"),
        *norm(f"{source}.ln_2", f"{target}/layer_norm2", bias=True),
        *linear(f"{source}.mlp.c_fc", f"{target}/fc1"),
        *linear(f"{source}.mlp.c_proj", f"{target}/fc2"),
    )


TABLE = Table(
    rules=(
        *embedding("token_embedding", "text/token_embedding"),
        Rule("positional_embedding", "text/position_embedding"),
        *_layers("", "text"),
        *norm("ln_final", "text/final_layer_norm", bias=True),
        Rule("text_projection", "text_projection/kernel"),  # lies as ours do, unlike linear layers
        Rule("visual.class_embedding", "vision/class_embedding"),
        Rule("visual.conv1.weight", "vision/patch_embedding/kernel", CONV),
        Rule("visual.positional_embedding", "vision/position_embedding"),
        *norm("visual.ln_pre", "vision/pre_layrnorm", bias=True),
        *_layers("visual.", "vision"),
        *norm("visual.ln_post", "vision/post_layernorm", bias=True),
        Rule("visual.proj", "visual_projection/kernel"),
        Rule("logit_scale", "logit_scale"),
    ),
    ignored=("attn_mask",),  # a constant buffer that some files carry
    prefixes=("", "module."),
)

COMPONENT = Component(clip.Config.from_open_clip, clip.init, lambda config: TABLE, quantized=clip.QUANTIZED)
