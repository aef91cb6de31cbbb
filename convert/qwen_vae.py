"""Table of Qwen-Image's autoencoder (published as diffusers `AutoencoderKLQwenImage`)."""

from ses_jax.convert.table import Component, Rule, Table, Transform, conv, conv3d
from ses_jax.models import qwen_vae

# Norms are published in the shape that broadcasts over their input: [C, 1, 1, 1] for video, [C, 1, 1] for images.
VIDEO_SCALE = Transform("video scale", lambda x: x[:, 0, 0, 0], lambda x: x[:, None, None, None])
IMAGE_SCALE = Transform("image scale", lambda x: x[:, 0, 0], lambda x: x[:, None, None])


def _norm(source: str, target: str, transform: Transform = VIDEO_SCALE) -> tuple[Rule, ...]:
    return (Rule(f"{source}.gamma", f"{target}/scale", transform),)


def _resnet(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *_norm(f"{source}.norm1", f"{target}/norm1"),
        *conv3d(f"{source}.conv1", f"{target}/conv1"),
        *_norm(f"{source}.norm2", f"{target}/norm2"),
        *conv3d(f"{source}.conv2", f"{target}/conv2"),
        *conv3d(f"{source}.conv_shortcut", f"{target}/conv_shortcut"),
    )


def _ends(name: str) -> tuple[Rule, ...]:
    """What encoder and decoder have in common: first and last convolution and the middle block."""
    source, target = f"{name}.mid_block.attentions.0", f"{name}/mid/attention"
    return (
        *conv3d(f"{name}.conv_in", f"{name}/conv_in"),
        *_resnet(f"{name}.mid_block.resnets.{{r}}", f"{name}/mid/resnet_{{r}}"),
        *_norm(f"{source}.norm", f"{target}/norm", IMAGE_SCALE),
        *conv(f"{source}.to_qkv", f"{target}/to_qkv"),
        *conv(f"{source}.proj", f"{target}/proj"),
        *_norm(f"{name}.norm_out", f"{name}/norm_out"),
        *conv3d(f"{name}.conv_out", f"{name}/conv_out"),
    )


TABLE = Table(
    rules=(
        *_ends("encoder"),
        *_resnet("encoder.down_blocks.{b}", "encoder/down_{b}_resnet"),
        *conv("encoder.down_blocks.{b}.resample.1", "encoder/down_{b}_downsample"),
        *conv3d("quant_conv", "quant_conv"),
        *conv3d("post_quant_conv", "post_quant_conv"),
        *_ends("decoder"),
        *_resnet("decoder.up_blocks.{b}.resnets.{r}", "decoder/up_{b}_resnet_{r}"),
        *conv("decoder.up_blocks.{b}.upsamplers.0.resample.1", "decoder/up_{b}_upsample"),
    ),
    # Convolutions between the frames of a video.
    ignored=("encoder.down_blocks.{b}.time_conv.*", "decoder.up_blocks.{b}.upsamplers.0.time_conv.*"),
)

COMPONENT = Component(qwen_vae.Config.from_json, qwen_vae.init, lambda config: TABLE)
