"""Table of the five-layer head (`sac+logos+ava1-l14-linearMSE.pth`, and inside `ImageReward.pt`)."""

from ses_jax.convert.table import Component, Table, linear
from ses_jax.models import score_head

# Numbers of the linear layers in the published `Sequential`, which counts dropouts as well.
PUBLISHED_LAYERS = (0, 2, 4, 6, 7)

TABLE = Table(
    rules=tuple(rule for i, n in enumerate(PUBLISHED_LAYERS) for rule in linear(f"layers.{n}", f"layer_{i}")),
    ignored=("blip.*",),
    prefixes=("", "mlp."),
)

COMPONENT = Component(score_head.Config.from_json, score_head.init, lambda config: TABLE)
