"""Tiny random torch networks with the structure of Qwen-Image."""

import dataclasses

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from oracle import ZImageSizes, qwen2_5_vl, qwen_tokenizer, seeded
from transformers import Qwen2_5_VLForConditionalGeneration

SCHEDULER = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a tiny Qwen-Image pipeline."""

    layers: int = 2
    heads: int = 4
    axes_dims: tuple[int, int, int] = (4, 6, 6)  # sums to the width of a head
    text_width: int = 32
    text_layers: int = 3
    text_heads: int = 4
    text_kv_heads: int = 2
    vae_width: int = 8
    vae_mult: tuple[int, ...] = (1, 2, 4, 4)
    vae_blocks: int = 2
    # Of all weights, and of the matrices alone; faint ones bring the norms' epsilons to light.
    gain: float = 1.0
    matrix_gain: float = 1.0


def pipeline(sizes: Sizes = Sizes(), seed: int = 0) -> QwenImagePipeline:
    """A whole tiny pipeline; `save_pretrained(folder)` writes the published layout."""
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae(sizes, seed),
        text_encoder=text_encoder(sizes, seed),
        tokenizer=qwen_tokenizer(),
        transformer=transformer(sizes, seed),
    )


def transformer(sizes: Sizes = Sizes(), seed: int = 0) -> QwenImageTransformer2DModel:
    """The diffusion transformer."""
    return seeded(
        lambda: QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=64,
            out_channels=16,
            num_layers=sizes.layers,
            attention_head_dim=sum(sizes.axes_dims),
            num_attention_heads=sizes.heads,
            joint_attention_dim=sizes.text_width,
            axes_dims_rope=sizes.axes_dims,
        ),
        seed,
        sizes.gain,
        sizes.matrix_gain,
    )


def text_encoder(sizes: Sizes = Sizes(), seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """The text encoder, with the parts that see."""
    return qwen2_5_vl(
        ZImageSizes(
            text_layers=sizes.text_layers,
            text_heads=sizes.text_heads,
            text_kv_heads=sizes.text_kv_heads,
            text_head_dim=sizes.text_width // sizes.text_heads,
            gain=sizes.gain,
        ),
        seed,
    )


def vae(sizes: Sizes = Sizes(), seed: int = 0) -> AutoencoderKLQwenImage:
    """The autoencoder, with the published scale of its latents."""
    return seeded(
        lambda: AutoencoderKLQwenImage(
            base_dim=sizes.vae_width,
            z_dim=16,
            dim_mult=list(sizes.vae_mult),
            num_res_blocks=sizes.vae_blocks,
            attn_scales=[],
            temperal_downsample=[False, True, True, True][: len(sizes.vae_mult) - 1],
        ),
        seed,
        sizes.gain,
    )
