"""Table of the Qwen-Image transformer (published as diffusers `QwenImageTransformer2DModel`)."""

from ses_jax.convert.table import Component, Rule, Table, linear, norm
from ses_jax.models import qwen_image

SOURCE, TARGET = "transformer_blocks.{i}", "blocks"


def _stream(published: str, ours: str) -> tuple[Rule, ...]:
    """One stream's modulation and feed-forward."""
    return (
        *linear(f"{SOURCE}.{published}_mod.1", f"{TARGET}/{ours}_modulation/linear"),
        *linear(f"{SOURCE}.{published}_mlp.net.0.proj", f"{TARGET}/{ours}_mlp/linear_1"),
        *linear(f"{SOURCE}.{published}_mlp.net.2", f"{TARGET}/{ours}_mlp/linear_2"),
    )


def _attention() -> tuple[Rule, ...]:
    source, target = f"{SOURCE}.attn", f"{TARGET}/attention"
    projections = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    return (
        *(rule for name in projections for rule in linear(f"{source}.{name}", f"{target}/{name}")),
        *linear(f"{source}.to_out.0", f"{target}/to_out"),
        *(rule for name in norms for rule in norm(f"{source}.{name}", f"{target}/{name}")),
    )


TABLE = Table(
    (
        *linear("time_text_embed.timestep_embedder.linear_{n}", "time_embedder/linear_{n}"),
        *linear("img_in", "img_in"),
        *norm("txt_norm", "txt_norm"),
        *linear("txt_in", "txt_in"),
        *_stream("img", "image"),
        *_stream("txt", "text"),
        *_attention(),
        *linear("norm_out.linear", "output/norm_out/linear"),
        *linear("proj_out", "output/proj_out"),
    )
)

COMPONENT = Component(
    qwen_image.Config.from_json,
    qwen_image.init,
    lambda config: TABLE,
    partition=qwen_image.PARTITION,
    quantized=qwen_image.QUANTIZED,
    turned=qwen_image.TURNED,
)
