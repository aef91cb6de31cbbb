"""The demo's networks: sizes, tokenizers and optimisers."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import scenes
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ses_jax.models import autoencoder_kl, clip, decoder_lm, z_image

VOCABULARY = 512
PROMPT_LENGTH = 32  # tokens of a prompt in its chat template, padded
CLIP_LENGTH = 40
CLIP_MEAN = np.float32([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.float32([0.26862954, 0.26130258, 0.27577711])
PAD, USER, END, THINK, UNTHINK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"
START = "<|startoftext|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Architectures, batch sizes and the amount of data.

    Attributes:
      captions: that the tokenizers learn from.
      pool: encoded scenes for the transformer.
      rebuilt: families of scenes for the reward, as the autoencoder rebuilds them.
    """

    vae: autoencoder_kl.Config
    reward: clip.Config
    text: decoder_lm.Config
    dit: z_image.Config
    captions: int
    vae_batch: int
    clip_families: int
    dit_batch: int
    pool: int
    rebuilt: int


DEMO = Sizes(
    vae=autoencoder_kl.Config(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8),
    reward=clip.Config(
        text=clip.Tower(128, 512, layers=3, heads=4),
        vision=clip.Tower(128, 512, layers=4, heads=4),
        projection_dim=128,
        vocab_size=VOCABULARY,
        max_length=CLIP_LENGTH,
        image_size=scenes.SIZE,
        patch_size=8,
    ),
    text=decoder_lm.Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, taps=(3,), heads=4, kv_heads=2, head_dim=32
    ),
    dit=z_image.Config(dim=192, n_layers=5, n_refiner_layers=1, n_heads=6, cap_feat_dim=128, axes_dims=(8, 12, 12)),
    captions=20_000,
    vae_batch=32,
    clip_families=48,
    dit_batch=32,
    pool=32_000,
    rebuilt=2000,
)
TINY = Sizes(
    vae=autoencoder_kl.Config(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4),
    reward=clip.Config(
        text=clip.Tower(16, 32, layers=1, heads=2),
        vision=clip.Tower(16, 32, layers=1, heads=2),
        projection_dim=16,
        vocab_size=VOCABULARY,
        max_length=CLIP_LENGTH,
        image_size=scenes.SIZE,
        patch_size=16,
    ),
    text=decoder_lm.Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, taps=(1,), heads=2, kv_heads=1, head_dim=8
    ),
    dit=z_image.Config(dim=48, n_layers=1, n_refiner_layers=1, n_heads=3, cap_feat_dim=16, axes_dims=(4, 6, 6)),
    captions=500,
    vae_batch=2,
    clip_families=2,
    dit_batch=4,
    pool=16,
    rebuilt=8,
)
SIZES = {"demo": DEMO, "tiny": TINY}


def train_tokenizers(folder: Path, captions: list[str]) -> None:
    """Trains and saves both byte-level tokenizers; every common word becomes one token, any text can be encoded."""
    qwen = PreTrainedTokenizerFast(
        tokenizer_object=_byte_bpe(captions, [PAD, USER, END, THINK, UNTHINK]),
        pad_token=PAD,
        eos_token=END,
        padding_side="right",
        model_max_length=512,
    )
    qwen.chat_template = CHAT_TEMPLATE
    qwen.save_pretrained(folder / "tokenizer")

    bpe = _byte_bpe(captions, [START, PAD])  # pooling finds the end token as the largest id
    ends = [(token, bpe.token_to_id(token)) for token in (START, PAD)]
    bpe.post_processor = processors.TemplateProcessing(single=f"{START} $A {PAD}", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=START,
        eos_token=PAD,
        padding_side="right",
        model_max_length=CLIP_LENGTH,
    ).save_pretrained(folder / "clip")


def load_tokenizers(folder: Path) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """The tokenizers of the text encoder and of CLIP."""
    return tuple(PreTrainedTokenizerFast.from_pretrained(folder / name) for name in ("tokenizer", "clip"))


def tokenize_prompts(tokenizer: Any, prompts: list[str], length: int = PROMPT_LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Prompts in their chat template: right-padded ids `[B, length]` and lengths `[B]`."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        for p in prompts
    ]
    encoded = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="np")
    return encoded["input_ids"].astype(np.int32), encoded["attention_mask"].sum(1).astype(np.int32)


def tokenize_clip(tokenizer: Any, prompts: list[str], length: int = PROMPT_LENGTH) -> np.ndarray:
    """Ids `[B, length]` with start and end tokens."""
    encoded = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="np")
    return encoded["input_ids"].astype(np.int32)


def adamw(learning_rate: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, b2=0.99, weight_decay=1e-4))


def muon(learning_rate: float, adam_learning_rate: float) -> optax.GradientTransformation:
    """Muon for the matrices of stacked layers, Adam for everything else."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            learning_rate,
            adam_learning_rate=adam_learning_rate,
            adam_b2=0.99,
            weight_decay=0.01,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_matrices,
        ),
    )


def _matrices(params: Any) -> Any:
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)  # axis 0 counts the layers
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: axes if leaf.ndim == 3 and path[-1].key == "kernel" else None, params
    )


def _byte_bpe(captions: list[str], specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*captions, *["user\n assistant\n"] * 100], trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return tokenizer
