"""Tiny random torch networks with the structure of the published ones: the reference that parity is measured against.

Widths and depths are small; block types, rotary axes, packing, templates and file layout are the published ones.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import nn
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    CLIPConfig,
    CLIPModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
)
from transformers.models.blip.modeling_blip_text import BlipTextModel

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
    return seeded(
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
    return seeded(lambda: Qwen3Model(config), seed, sizes.gain)


def mistral3(sizes: ZImageSizes = ZImageSizes(), seed: int = 0) -> Mistral3ForConditionalGeneration:
    """Mistral with its vision tower."""
    text = {
        "model_type": "mistral",
        "vocab_size": VOCABULARY,
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
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 28,
        "patch_size": 14,
        "num_channels": 3,
        "head_dim": 8,
    }
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=10, spatial_merge_size=2)
    return seeded(lambda: Mistral3ForConditionalGeneration(config), seed, sizes.gain)


def qwen2_5_vl(sizes: ZImageSizes = ZImageSizes(), seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5 with its vision tower."""
    width = sizes.text_heads * sizes.text_head_dim
    sections = [sizes.text_head_dim // 4, sizes.text_head_dim // 8, sizes.text_head_dim // 8]
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": sizes.text_layers,
        "num_attention_heads": sizes.text_heads,
        "num_key_value_heads": sizes.text_kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 2048,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": sections},
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0],
    }
    specials = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        **dict.fromkeys(specials, VOCABULARY - 1),
    )
    return seeded(lambda: Qwen2_5_VLForConditionalGeneration(config), seed, sizes.gain)


def vae(sizes: ZImageSizes = ZImageSizes(), seed: int = 0) -> AutoencoderKL:
    """The autoencoder."""
    blocks = len(sizes.vae_widths)
    return seeded(
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
    return seeded(lambda: CLIPModel(config), seed, gain)


def save_clip(folder: Path, model: CLIPModel) -> None:
    """Writes a CLIP checkpoint with its tokenizer."""
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)


OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 20,
        "vision_cfg": {"image_size": 56, "layers": 3, "width": 32, "head_width": 8, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 258, "width": 24, "heads": 2, "layers": 2},
    }
}
MED_CONFIG = {
    "hidden_act": "gelu",
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 72,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "vocab_size": 134,
    "encoder_width": 768,  # not the ViT's, as published
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 16,
    },
}


def open_clip(seed: int = 0, gain: float = 1.0) -> nn.Module:
    """CLIP in open_clip's layout, of the sizes in `OPEN_CLIP`."""
    return seeded(lambda: OpenCLIP(OPEN_CLIP["model_cfg"]), seed, gain)


def image_reward(seed: int = 0, gain: float = 1.0) -> nn.Module:
    """ImageReward in its authors' layout, of the sizes in `MED_CONFIG`."""
    return seeded(lambda: ImageReward(MED_CONFIG), seed, gain)


def score_head(width: int, seed: int = 0) -> nn.Module:
    """The five-layer head."""
    return seeded(lambda: ScoreHead(width), seed)


class OpenCLIP(nn.Module):
    """Rewritten from the structure of open_clip's `CLIP` (tgxs002/HPSv2)."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        text, dim = config["text_cfg"], config["embed_dim"]
        self.visual = OpenCLIPVision(config["vision_cfg"], dim)
        self.token_embedding = nn.Embedding(text["vocab_size"], text["width"])
        self.positional_embedding = nn.Parameter(torch.zeros(text["context_length"], text["width"]))
        self.transformer = OpenCLIPBlocks(text["width"], text["layers"], text["heads"])
        self.ln_final = nn.LayerNorm(text["width"])
        self.text_projection = nn.Parameter(torch.zeros(text["width"], dim))
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """L2-normalised."""
        mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding, mask)
        x = self.ln_final(x)[torch.arange(len(x)), ids.argmax(dim=-1)]
        return nn.functional.normalize(x @ self.text_projection, dim=-1)

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """L2-normalised."""
        return nn.functional.normalize(self.visual(pixels), dim=-1)


class OpenCLIPVision(nn.Module):
    def __init__(self, config: dict[str, Any], dim: int):
        super().__init__()
        width, patch = config["width"], config["patch_size"]
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((config["image_size"] // patch) ** 2 + 1, width))
        self.proj = nn.Parameter(torch.zeros(width, dim))
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = OpenCLIPBlocks(width, config["layers"], width // config["head_width"])
        self.ln_post = nn.LayerNorm(width)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenCLIPBlocks(nn.Module):
    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList([OpenCLIPBlock(width, heads) for _ in range(layers)])

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenCLIPBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class ImageReward(nn.Module):
    """Rewritten from the structure of THUDM/ImageReward; the text encoder is the descendant in transformers."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        vision, width = config["vision_config"], config["hidden_size"]
        self.blip = nn.Module()
        self.blip.visual_encoder = TimmViT(vision)
        text = {name: value for name, value in config.items() if name not in ("vision_config", "encoder_width")}
        self.blip.text_encoder = BlipTextModel(
            BlipTextConfig(**text, encoder_hidden_size=vision["hidden_size"]), add_pooling_layer=False
        )
        self.blip.vision_proj = nn.Linear(vision["hidden_size"], 16)
        self.blip.text_proj = nn.Linear(width, 16)
        self.mlp = ScoreHead(width)

    def states(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The first token's final state."""
        image = self.blip.visual_encoder(pixels)
        seen = torch.ones(image.shape[:-1], dtype=torch.long)
        out = self.blip.text_encoder(
            ids, attention_mask=mask, encoder_hidden_states=image, encoder_attention_mask=seen, is_decoder=False
        )
        return out.last_hidden_state[:, 0]

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (self.mlp(self.states(pixels, ids, mask))[:, 0] - 0.16717362830052426) / 1.0333394966054072


class TimmViT(nn.Module):
    """BLIP's ViT under timm's names."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, patch = config["hidden_size"], config["patch_size"]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (config["image_size"] // patch) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList(
            [TimmBlock(width, config["num_attention_heads"]) for _ in range(config["num_hidden_layers"])]
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class TimmBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        x = x + self.attn["proj"]((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class ScoreHead(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        sizes = (width, 1024, 128, 64, 16, 1)
        linear = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.layers = nn.Sequential(
            linear[0], nn.Dropout(0.2), linear[1], nn.Dropout(0.2), linear[2], nn.Dropout(0.1), *linear[3:]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def bert_tokenizer(folder: Path) -> BertTokenizer:
    """WordPiece over letters, saved into a folder; BLIP's two tokens are not in it, as in the published one."""
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    pieces = [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"[:54]]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *pieces][:132]
    words += [f"[unused{i}]" for i in range(132 - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), do_lower_case=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level stand-in with Qwen's special tokens; pads on the right."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(QWEN_SPECIALS),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="right",
    )
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level stand-in with CLIP's special tokens; the end token is the largest id, as in the published one."""
    tokenizer = byte_tokenizer((CLIP_START, CLIP_END))
    ends = [(token, tokenizer.token_to_id(token)) for token in (CLIP_START, CLIP_END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{CLIP_START} $A {CLIP_END}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=CLIP_END,
        bos_token=CLIP_START,
        eos_token=CLIP_END,
        model_max_length=77,
    )


def byte_tokenizer(specials: tuple[str, ...]) -> Tokenizer:
    """One token a byte, then the special tokens."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return tokenizer


def seeded(build: Any, seed: int, gain: float = 1.0, matrix_gain: float = 1.0) -> Any:
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
