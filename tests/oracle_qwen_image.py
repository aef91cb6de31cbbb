"""Tiny random torch networks with the structure of Qwen-Image."""

import dataclasses

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from oracle import VOCABULARY, qwen_tokenizer, seeded
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

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
    head_dim = sizes.text_width // sizes.text_heads
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": sizes.text_width,
            "intermediate_size": 2 * sizes.text_width,
            "num_hidden_layers": sizes.text_layers,
            "num_attention_heads": sizes.text_heads,
            "num_key_value_heads": sizes.text_kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 2048,
            "rope_scaling": {
                "type": "default",
                "rope_type": "default",
                "mrope_section": [head_dim // 8, head_dim // 8, head_dim // 4],
            },
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": sizes.text_width,
            "fullatt_block_indexes": [0],
        },
        image_token_id=0,
        video_token_id=1,
        vision_start_token_id=2,
        vision_end_token_id=3,
        tie_word_embeddings=False,
    )
    return seeded(lambda: Qwen2_5_VLForConditionalGeneration(config), seed, sizes.gain)


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
