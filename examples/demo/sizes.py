"""Architectures, batches and amounts of data of the demo."""

import dataclasses

from demo.tokenizers import CLIP_LENGTH, VOCABULARY
from ses_jax.models import autoencoder_kl, clip, decoder_lm, z_image


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Pictures of one height and width: their share of the steps, pictures a step, and scenes in the pool."""

    height: int
    width: int
    share: float
    batch: int
    pool: int = 0

    @property
    def name(self) -> str:
        return f"{self.height}x{self.width}"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Architectures, batch sizes and the amount of data.

    Attributes:
      captions: that the tokenizers learn from.
      pictures: of the autoencoder's training.
      buckets: of the transformer's training.
      families: scenes with siblings in a batch of CLIP, three of four drawn and the others from the pool.
      rebuilt: families in that pool, as the autoencoder rebuilds them.
      shard: scenes or families in a file of a pool.
      probe: scenes or prompts of each kind that an evaluation judges.
    """

    vae: autoencoder_kl.Config
    reward: clip.Config
    text: decoder_lm.Config
    dit: z_image.Config
    captions: int
    pictures: tuple[Bucket, ...]
    buckets: tuple[Bucket, ...]
    families: int
    rebuilt: int
    shard: int
    probe: int


DEMO = Sizes(
    vae=autoencoder_kl.Config(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8),
    reward=clip.Config(
        text=clip.Tower(128, 256, layers=2, heads=4),
        vision=clip.Tower(128, 256, layers=4, heads=4),
        projection_dim=96,
        vocab_size=VOCABULARY,
        max_length=CLIP_LENGTH,
        image_size=128,
        patch_size=16,
    ),
    text=decoder_lm.Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, taps=(2,), heads=4, kv_heads=2, head_dim=32
    ),
    dit=z_image.Config(dim=192, n_layers=5, n_refiner_layers=1, n_heads=6, cap_feat_dim=128, axes_dims=(8, 12, 12)),
    captions=20_000,
    pictures=(Bucket(64, 64, 0.4, 16), Bucket(96, 96, 0.2, 8), Bucket(128, 128, 0.4, 4)),
    buckets=(
        Bucket(128, 128, 0.46, 32, 14_000),
        Bucket(96, 96, 0.14, 32, 7000),
        Bucket(64, 64, 0.14, 32, 7000),
        Bucket(96, 128, 0.08, 32, 4000),
        Bucket(128, 96, 0.08, 32, 4000),
        Bucket(48, 64, 0.05, 32, 3000),
        Bucket(64, 48, 0.05, 32, 3000),
    ),
    families=16,
    rebuilt=600,
    shard=250,
    probe=50,
)
TINY = Sizes(
    vae=autoencoder_kl.Config(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4),
    reward=clip.Config(
        text=clip.Tower(16, 32, layers=1, heads=2),
        vision=clip.Tower(16, 32, layers=1, heads=2),
        projection_dim=16,
        vocab_size=VOCABULARY,
        max_length=CLIP_LENGTH,
        image_size=32,
        patch_size=16,
    ),
    text=decoder_lm.Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, taps=(1,), heads=2, kv_heads=1, head_dim=8
    ),
    dit=z_image.Config(dim=48, n_layers=1, n_refiner_layers=1, n_heads=3, cap_feat_dim=16, axes_dims=(4, 6, 6)),
    captions=500,
    pictures=(Bucket(16, 16, 1.0, 2),),
    buckets=(Bucket(16, 16, 1.0, 4, 12), Bucket(8, 16, 0.0, 4, 12)),  # of the second a pool but no program
    families=2,
    rebuilt=4,
    shard=4,
    probe=2,
)
SIZES = {"demo": DEMO, "tiny": TINY}
