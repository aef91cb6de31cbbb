"""Tiny random torch networks with the structure of the published ones: the reference that parity is measured against.

Widths and depths are small; block types, rotary axes, packing, templates and file layout are the published ones.
"""

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

diffusers.utils.logging.set_verbosity_error()
transformers.logging.set_verbosity_error()

QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
# The part of Qwen3's chat template that text-to-image pipelines use.
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = 256 + len(QWEN_SPECIALS)


@dataclasses.dataclass(frozen=True)
class ZImageSizes:
    """Sizes of a tiny Z-Image pipeline."""

    dim: int = 48  # divisible by 3 keeps the feed-forward width exact
    heads: int = 3
    axes_dims: tuple[int, int, int] = (4, 6, 6)  # sums to dim / heads
    layers: int = 2
    refiner_layers: int = 2
    text_width: int = 32
    text_layers: int = 4
    text_heads: int = 4
    text_kv_heads: int = 2
    text_head_dim: int = 16  # times heads differs from the width, as in Qwen3-4B
    vae_widths: tuple[int, ...] = (8, 16, 32, 32)
    vae_layers: int = 2
    vae_groups: int = 4
    quant_convs: bool = False
    shift: float = 3.0
    # Of all weights, and of the matrices alone; faint ones bring the norms' epsilons to light.
    gain: float = 1.0
    matrix_gain: float = 1.0


def z_image_pipeline(sizes: ZImageSizes = ZImageSizes(), seed: int = 0) -> ZImagePipeline:
    """A whole tiny pipeline; `save_pretrained(folder)` writes the published layout."""
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000, use_dynamic_shifting=False, shift=sizes.shift
        ),
        vae=vae(sizes, seed),
        text_encoder=qwen3(sizes, seed),
        tokenizer=qwen_tokenizer(),
        transformer=z_image(sizes, seed),
    )


def z_image(sizes: ZImageSizes = ZImageSizes(), seed: int = 0) -> ZImageTransformer2DModel:
    """The diffusion transformer."""
    return _seeded(
        lambda: ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=16,
            dim=sizes.dim,
            n_layers=sizes.layers,
            n_refiner_layers=sizes.refiner_layers,
            n_heads=sizes.heads,
            n_kv_heads=sizes.heads,
            norm_eps=1e-5,
            qk_norm=True,
            cap_feat_dim=sizes.text_width,
            rope_theta=256.0,
            t_scale=1000.0,
            axes_dims=list(sizes.axes_dims),
            axes_lens=[1536, 512, 512],
        ),
        seed,
        sizes.gain,
        sizes.matrix_gain,
    )


def qwen3(sizes: ZImageSizes = ZImageSizes(), seed: int = 0) -> Qwen3Model:
    """The text encoder."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
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
    return _seeded(lambda: Qwen3Model(config), seed, sizes.gain)


def vae(sizes: ZImageSizes = ZImageSizes(), seed: int = 0) -> AutoencoderKL:
    """The autoencoder."""
    blocks = len(sizes.vae_widths)
    return _seeded(
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=sizes.vae_widths,
            layers_per_block=sizes.vae_layers,
            latent_channels=16,
            norm_num_groups=sizes.vae_groups,
            sample_size=64,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=sizes.quant_convs,
            use_post_quant_conv=sizes.quant_convs,
            force_upcast=True,
            mid_block_add_attention=True,
        ),
        seed,
        sizes.gain,
    )


def clip(
    act: str = "quick_gelu", eos_token_id: int = 2, seed: int = 0, gain: float = 1.0, **overrides: Any
) -> CLIPModel:
    """Both towers, of different sizes; `overrides` by tower, e.g. `vision={"patch_size": 16}`."""
    text = {
        "vocab_size": 258,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "bos_token_id": 256,
        "pad_token_id": 1,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    }
    config = CLIPConfig(
        projection_dim=20,
        text_config=text | {"hidden_act": act, "eos_token_id": eos_token_id} | overrides.get("text", {}),
        vision_config=vision | {"hidden_act": act} | overrides.get("vision", {}),
    )
    return _seeded(lambda: CLIPModel(config), seed, gain)


def save_clip(folder: Path, model: CLIPModel) -> None:
    """Writes a CLIP checkpoint with its tokenizer."""
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level stand-in with Qwen's special tokens; pads on the right."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_tokenizer(QWEN_SPECIALS),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="right",
    )
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level stand-in with CLIP's special tokens; the end token is the largest id, as in the published one."""
    tokenizer = _byte_tokenizer((CLIP_START, CLIP_END))
    ends = [(token, tokenizer.token_to_id(token)) for token in (CLIP_START, CLIP_END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{CLIP_START} $A {CLIP_END}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=CLIP_END,
        bos_token=CLIP_START,
        eos_token=CLIP_END,
        model_max_length=77,
    )


def _byte_tokenizer(specials: tuple[str, ...]) -> Tokenizer:
    """One token a byte, then the special tokens."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return tokenizer


def _seeded(build: Any, seed: int, gain: float = 1.0, matrix_gain: float = 1.0) -> Any:
    """Builds a network with weights of a size that makes every part of it count.

    Library defaults hide bugs: norms of ones and biases of zeros a swapped norm or a dropped bias, and the small
    matrices of transformers everything about attention.
    """
    torch.manual_seed(seed)
    network = build()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim <= 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(matrix_gain * noise * parameter[0].numel() ** -0.5)  # fan-in
            parameter.mul_(gain)
    return network.eval()
