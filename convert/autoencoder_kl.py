"""Table of the 8x autoencoder (published as diffusers `AutoencoderKL`)."""

from ses_jax.convert.table import Component, Rule, Table, conv, linear, norm
from ses_jax.models import autoencoder_kl


def _resnet(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *norm(f"{source}.norm1", f"{target}/norm1", bias=True),
        *conv(f"{source}.conv1", f"{target}/conv1"),
        *norm(f"{source}.norm2", f"{target}/norm2", bias=True),
        *conv(f"{source}.conv2", f"{target}/conv2"),
        *conv(f"{source}.conv_shortcut", f"{target}/conv_shortcut"),
    )


def _ends(name: str) -> tuple[Rule, ...]:
    """What encoder and decoder have in common: first and last convolution and the middle block."""
    source, target = f"{name}.mid_block.attentions.0", f"{name}/mid/attention"
    return (
        *conv(f"{name}.conv_in", f"{name}/conv_in"),
        *_resnet(f"{name}.mid_block.resnets.{{r}}", f"{name}/mid/resnet_{{r}}"),
        *norm(f"{source}.group_norm", f"{target}/norm", bias=True),
        *linear(f"{source}.to_q", f"{target}/to_q"),
        *linear(f"{source}.to_k", f"{target}/to_k"),
        *linear(f"{source}.to_v", f"{target}/to_v"),
        *linear(f"{source}.to_out.0", f"{target}/to_out"),
        *norm(f"{name}.conv_norm_out", f"{name}/norm_out", bias=True),
        *conv(f"{name}.conv_out", f"{name}/conv_out"),
    )


TABLE = Table(
    (
        *_ends("encoder"),
        *_resnet("encoder.down_blocks.{b}.resnets.{r}", "encoder/down_{b}_resnet_{r}"),
        *conv("encoder.down_blocks.{b}.downsamplers.0.conv", "encoder/down_{b}_downsample"),
        *conv("quant_conv", "quant_conv"),
        *conv("post_quant_conv", "post_quant_conv"),
        *_ends("decoder"),
        *_resnet("decoder.up_blocks.{b}.resnets.{r}", "decoder/up_{b}_resnet_{r}"),
        *conv("decoder.up_blocks.{b}.upsamplers.0.conv", "decoder/up_{b}_upsample"),
    )
)

COMPONENT = Component(autoencoder_kl.Config.from_json, autoencoder_kl.init, lambda config: TABLE)
