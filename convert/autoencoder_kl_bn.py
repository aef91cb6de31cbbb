"""Tables of the 8x autoencoder with BatchNorm statistics: as diffusers `AutoencoderKLFlux2`, and as a single file.

In the single file the 1x1 convolutions around the latents belong to the encoder and the decoder.
"""

from collections.abc import Mapping
from typing import Any

from ses_jax.convert import autoencoder_kl as plain
from ses_jax.convert.matching import Header
from ses_jax.convert.table import Component, Rule, SingleFile, Table, conv
from ses_jax.models import autoencoder_kl_bn

STATISTICS = (Rule("bn.running_mean", "bn/mean"), Rule("bn.running_var", "bn/variance"))
COUNTER = ("bn.num_batches_tracked",)
TABLE = Table((*plain.TABLE.rules, *STATISTICS), ignored=COUNTER)


def original_table(config: Mapping[str, Any]) -> Table:
    """The table of the single file for a `config.json`."""
    around = (*conv("encoder.quant_conv", "quant_conv"), *conv("decoder.post_quant_conv", "post_quant_conv"))
    return Table((*plain.original_table(config).rules, *around, *STATISTICS), ignored=COUNTER)


def original_config(headers: Mapping[str, Header]) -> dict[str, Any]:
    """The `config.json` of a single file, from the shapes of its tensors; groups and epsilon are the published ones.

    Raises:
      ValueError: if the widths can't be normalised in the published number of groups.
    """
    shaped = ("block_out_channels", "down_block_types", "up_block_types", "latent_channels", "layers_per_block")
    sizes = plain.original_config(headers)
    return {name: sizes[name] for name in shaped}


COMPONENT = Component(
    autoencoder_kl_bn.Config.from_json,
    autoencoder_kl_bn.init,
    lambda config: TABLE,
    single_file=SingleFile(("ae.safetensors",), original_table, original_config),
)
