"""Published checkpoints with their networks made tiny, as shapes: few layers, widths and heads, all else is theirs."""

import dataclasses

from ses_jax.models import clip
from ses_jax.pipelines import registry

_LM = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "heads": 2, "kv_heads": 1}
_VAE = {"block_out_channels": (32,), "layers_per_block": 1}
_FLUX2 = {
    "transformer": {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 768},
    "text_encoder": _LM | {"taps": (1, 2, 3)},
    "vae": _VAE | {"decoder_block_out_channels": None},
}
# Those of one checkpoint a program.
TINY = {
    "Tongyi-MAI/Z-Image-Turbo": {
        "transformer": {"dim": 256, "n_heads": 2, "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 256},
        "text_encoder": _LM | {"taps": (2,)},
        "vae": _VAE,
    },
    "black-forest-labs/FLUX.1-dev": {
        "transformer": {
            "num_layers": 1,
            "num_single_layers": 2,
            "num_attention_heads": 2,
            "joint_attention_dim": 256,
            "pooled_projection_dim": 64,
        },
        "text_encoder": {"text": clip.Tower(64, 128, 2, 2, "quick_gelu"), "vocab_size": 512},
        "text_encoder_2": {"vocab_size": 512, "d_model": 256, "d_ff": 256, "num_layers": 2, "num_heads": 2},
        "vae": _VAE,
    },
    "black-forest-labs/FLUX.2-dev": _FLUX2,
    "black-forest-labs/FLUX.2-klein-base-4B": _FLUX2,
    "Qwen/Qwen-Image": {
        "transformer": {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 256},
        "text_encoder": _LM | {"taps": (2,)},
        "vae": {"base_dim": 16, "dim_mult": (1,), "num_res_blocks": 1},
    },
}


def publish(monkeypatch, source):
    """Until the end of the test, the checkpoint of that name is a tiny one."""
    family = next(f for f in registry.FAMILIES.values() if any(p.source == source for p in f.PUBLISHED))
    published = next(p for p in family.PUBLISHED if p.source == source)
    configs = {name: dataclasses.replace(published.configs[name], **sizes) for name, sizes in TINY[source].items()}
    monkeypatch.setattr(family, "PUBLISHED", (published._replace(configs=configs),))
