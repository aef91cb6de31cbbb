"""Tables of the 8x autoencoder: as diffusers `AutoencoderKL`, and as its authors' single file, `ae.safetensors`.

The single file counts the decoder's levels from the image inwards, ours and the reference's from the latents outwards.
"""

from collections.abc import Mapping
from typing import Any

from ses_jax.convert.matching import Header
from ses_jax.convert.table import Component, Rule, SingleFile, Table, conv, linear, norm, pointwise
from ses_jax.models import autoencoder_kl


def _resnet(source: str, target: str, shortcut: str = "conv_shortcut") -> tuple[Rule, ...]:
    return (
        *norm(f"{source}.norm1", f"{target}/norm1", bias=True),
        *conv(f"{source}.conv1", f"{target}/conv1"),
        *norm(f"{source}.norm2", f"{target}/norm2", bias=True),
        *conv(f"{source}.conv2", f"{target}/conv2"),
        *conv(f"{source}.{shortcut}", f"{target}/conv_shortcut"),
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


def original_table(config: Mapping[str, Any]) -> Table:
    """The table of the single file for a `config.json`."""
    levels = len(autoencoder_kl.Config.from_json(config).block_out_channels)
    return Table(
        (
            *_original_ends("encoder"),
            *_resnet("encoder.down.{b}.block.{r}", "encoder/down_{b}_resnet_{r}", "nin_shortcut"),
            *conv("encoder.down.{b}.downsample.conv", "encoder/down_{b}_downsample"),
            *_original_ends("decoder"),
            *(rule for level in range(levels) for rule in _original_up(level, levels - 1 - level)),
        )
    )


def original_config(headers: Mapping[str, Header]) -> dict[str, Any]:
    """The `config.json` of a single file, from the shapes of its tensors; groups and scaling are the published ones.

    Raises:
      ValueError: if the widths can't be normalised in the published number of groups.
    """
    published = autoencoder_kl.Config()
    levels = sorted({int(name.split(".")[2]) for name in headers if name.startswith("encoder.down.")})
    widths = [headers[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in levels]
    if any(width % published.norm_num_groups for width in widths):
        raise ValueError(f"widths {widths} do not divide into {published.norm_num_groups} groups; add vae/config.json")
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "latent_channels": headers["decoder.conv_in.weight"].shape[1],
        "layers_per_block": len({n.split(".")[4] for n in headers if n.startswith("encoder.down.0.block.")}),
        "norm_num_groups": published.norm_num_groups,
        "scaling_factor": published.scaling_factor,
        "shift_factor": published.shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def _original_ends(name: str) -> tuple[Rule, ...]:
    """`_ends` in the single file."""
    source, target = f"{name}.mid.attn_1", f"{name}/mid/attention"
    return (
        *conv(f"{name}.conv_in", f"{name}/conv_in"),
        *_resnet(f"{name}.mid.block_1", f"{name}/mid/resnet_0", "nin_shortcut"),
        *_resnet(f"{name}.mid.block_2", f"{name}/mid/resnet_1", "nin_shortcut"),
        *norm(f"{source}.norm", f"{target}/norm", bias=True),
        *(rule for n in "qkv" for rule in pointwise(f"{source}.{n}", f"{target}/to_{n}")),
        *pointwise(f"{source}.proj_out", f"{target}/to_out"),
        *norm(f"{name}.norm_out", f"{name}/norm_out", bias=True),
        *conv(f"{name}.conv_out", f"{name}/conv_out"),
    )


def _original_up(level: int, ours: int) -> tuple[Rule, ...]:
    """One level of the decoder, under its number there and here."""
    source, target = f"decoder.up.{level}", f"decoder/up_{ours}"
    return (
        *_resnet(f"{source}.block.{{r}}", f"{target}_resnet_{{r}}", "nin_shortcut"),
        *conv(f"{source}.upsample.conv", f"{target}_upsample"),
    )


COMPONENT = Component(
    autoencoder_kl.Config.from_json,
    autoencoder_kl.init,
    lambda config: TABLE,
    single_file=SingleFile(("ae.safetensors",), original_table, original_config),
)
