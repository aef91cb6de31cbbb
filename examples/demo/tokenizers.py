"""The demo's tokenizers: byte-level, trained on its captions, in the layouts of Qwen's and of CLIP's."""

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 512
PROMPT_LENGTH = 32  # tokens of a prompt in its chat template, padded
CLIP_LENGTH = 40
PAD, USER, END, THINK, UNTHINK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"
START = "<|startoftext|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


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
