"""Table of the 8x autoencoder with BatchNorm statistics (published as diffusers `AutoencoderKLFlux2`)."""

from ses_jax.convert import autoencoder_kl as plain
from ses_jax.convert.table import Component, Rule, Table
from ses_jax.models import autoencoder_kl_bn

TABLE = Table(
    rules=(
        *plain.TABLE.rules,
        Rule("bn.running_mean", "bn/mean"),
        Rule("bn.running_var", "bn/variance"),
    ),
    ignored=("bn.num_batches_tracked",),
)

COMPONENT = Component(autoencoder_kl_bn.Config.from_json, autoencoder_kl_bn.init, lambda config: TABLE)
