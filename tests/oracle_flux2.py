"""Tiny random FLUX.2 networks of diffusers and transformers, of the published structure."""

import dataclasses
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from oracle import QWEN_SPECIALS, byte_tokenizer, qwen_tokenizer, seeded
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

MISTRAL_SPECIALS = ("<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]")
# The part of Mistral-Small's chat template that FLUX.2 uses; contents are lists of parts.
MISTRAL_TEMPLATE = (
    "<s>{% for m in messages %}{% if m['role'] == 'system' %}[SYSTEM_PROMPT]{{ m['content'][0]['text'] }}"
    "[/SYSTEM_PROMPT]{% else %}[INST]{{ m['content'][0]['text'] }}[/INST]{% endif %}{% endfor %}"
)
SCHEDULER = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a tiny FLUX.2 pipeline."""

    layers: int = 2
    single_layers: int = 2
    heads: int = 4
    axes_dims: tuple[int, ...] = (4, 4, 4, 4)
    guidance_embeds: bool = True
    mlp_ratio: float = 3.0
    context: int = 48
    text_width: int = 16
    text_layers: int = 4
    text_heads: int = 4
    text_kv_heads: int = 2
    text_head_dim: int = 8  # times heads differs from the width
    vae_widths: tuple[int, ...] = (8, 16, 32, 32)
    decoder_widths: tuple[int, ...] | None = None
    vae_layers: int = 2
    vae_groups: int = 4
    # Of all weights, of the matrices alone, and of those of queries and keys; faint ones bring epsilons to light.
    gain: float = 1.0
    matrix_gain: float = 1.0
    query_gain: float = 1.0


def transformer(sizes: Sizes = Sizes(), seed: int = 0) -> Flux2Transformer2DModel:
    """The diffusion transformer."""
    network = seeded(
        lambda: Flux2Transformer2DModel(
            in_channels=128,
            num_layers=sizes.layers,
            num_single_layers=sizes.single_layers,
            attention_head_dim=sum(sizes.axes_dims),
            num_attention_heads=sizes.heads,
            joint_attention_dim=sizes.context,
            mlp_ratio=sizes.mlp_ratio,
            axes_dims_rope=sizes.axes_dims,
            guidance_embeds=sizes.guidance_embeds,
        ),
        seed,
        sizes.gain,
        sizes.matrix_gain,
    )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if any(part in name for part in ("to_q.", "to_k.", "add_q_proj.", "add_k_proj.")):
                parameter.mul_(sizes.query_gain)
            if "to_qkv_mlp_proj." in name:
                parameter[: 2 * network.inner_dim].mul_(sizes.query_gain)
    return network


def vae(sizes: Sizes = Sizes(), seed: int = 0) -> AutoencoderKLFlux2:
    """The autoencoder, with statistics that are neither zeros nor ones; `gain` makes their variances small."""
    network = seeded(
        lambda: AutoencoderKLFlux2(
            block_out_channels=sizes.vae_widths,
            decoder_block_out_channels=sizes.decoder_widths,
            down_block_types=("DownEncoderBlock2D",) * len(sizes.vae_widths),
            up_block_types=("UpDecoderBlock2D",) * len(sizes.vae_widths),
            layers_per_block=sizes.vae_layers,
            norm_num_groups=sizes.vae_groups,
            sample_size=64,
        ),
        seed,
        sizes.gain,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        network.bn.running_mean.copy_(0.5 * torch.randn(128, generator=generator))
        network.bn.running_var.copy_(sizes.gain**2 * (torch.rand(128, generator=generator) + 0.5))
        network.bn.num_batches_tracked.fill_(7)
    return network


def mistral3(sizes: Sizes = Sizes(), seed: int = 0) -> Mistral3ForConditionalGeneration:
    """The text encoder of dev, with its vision tower."""
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": 256 + len(MISTRAL_SPECIALS),
            "hidden_size": sizes.text_width,
            "intermediate_size": 3 * sizes.text_width,
            "num_hidden_layers": sizes.text_layers,
            "num_attention_heads": sizes.text_heads,
            "num_key_value_heads": sizes.text_kv_heads,
            "head_dim": sizes.text_head_dim,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000000.0,
            "sliding_window": None,
            "max_position_embeddings": 1024,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "image_size": 28,
            "patch_size": 14,
            "num_channels": 3,
            "head_dim": 8,
        },
        image_token_index=10,
        spatial_merge_size=2,
        vision_feature_layer=-1,
        multimodal_projector_bias=False,
    )
    return seeded(lambda: Mistral3ForConditionalGeneration(config), seed, sizes.gain)


def qwen3(sizes: Sizes = Sizes(), seed: int = 0) -> Qwen3ForCausalLM:
    """The text encoder of klein."""
    config = Qwen3Config(
        vocab_size=256 + len(QWEN_SPECIALS),
        hidden_size=sizes.text_width,
        intermediate_size=2 * sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_heads,
        num_key_value_heads=sizes.text_kv_heads,
        head_dim=sizes.text_head_dim,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        max_position_embeddings=1024,
        attention_bias=False,
        tie_word_embeddings=True,
    )
    return seeded(lambda: Qwen3ForCausalLM(config), seed, sizes.gain)


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level stand-in with Mistral's special tokens; pads on the left."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(MISTRAL_SPECIALS),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )
    tokenizer.chat_template = MISTRAL_TEMPLATE
    return tokenizer


def dev_pipeline(sizes: Sizes = Sizes(), seed: int = 0) -> Flux2Pipeline:
    """A whole tiny dev pipeline; `save_pretrained(folder)` writes the published layout."""
    return Flux2Pipeline(text_encoder=mistral3(sizes, seed), tokenizer=mistral_tokenizer(), **_shared(sizes, seed))


def klein_pipeline(sizes: Sizes, seed: int = 0, *, distilled: bool = True) -> Flux2KleinPipeline:
    """A whole tiny klein pipeline, distilled or base."""
    return Flux2KleinPipeline(
        text_encoder=qwen3(sizes, seed), tokenizer=qwen_tokenizer(), is_distilled=distilled, **_shared(sizes, seed)
    )


def _shared(sizes: Sizes, seed: int) -> dict[str, Any]:
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        "vae": vae(sizes, seed),
        "transformer": transformer(sizes, seed),
    }
