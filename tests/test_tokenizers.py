"""Tokenizers of checkpoints: of the class that transformers finds for itself, without what it imports on the way."""

import json

import oracle
import oracle_flux2
import pytest
from transformers import AutoTokenizer, CLIPTokenizer, T5Tokenizer

from ses_jax.loading import hub
from ses_jax.loading.tokenizers import load_tokenizer

pytestmark = pytest.mark.quick


def test_tokenizer(tmp_path):
    oracle.qwen_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("añ<|im_end|>")["input_ids"][-1] == 258
    assert tokenizer.pad_token == "<|endoftext|>"
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*absent: expected tokenizer\.json"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read"):
        load_tokenizer(tmp_path)


def clip_tokenizer():
    letters = [*"abcdeirtñ", *(f"{c}</w>" for c in "acdet7,"), "at</w>", "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(letters)}, merges=[("a", "t</w>")])


def t5_tokenizer():
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", "\u2581a", *"abcdeirt", "\u2581cat"]
    return T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


TOKENIZERS = {
    "CLIPTokenizer": clip_tokenizer,
    "CLIPTokenizerFast": clip_tokenizer,
    "LlamaTokenizerFast": oracle_flux2.mistral_tokenizer,
    "PreTrainedTokenizerFast": oracle.qwen_tokenizer,
    "Qwen2Tokenizer": oracle.qwen_tokenizer,
    "Qwen2TokenizerFast": oracle.qwen_tokenizer,
    "T5Tokenizer": t5_tokenizer,
    "T5TokenizerFast": t5_tokenizer,
    "TokenizersBackend": oracle.qwen_tokenizer,
    "of another library": oracle.qwen_tokenizer,
}


@pytest.mark.parametrize("model_type", [None, "clip", "qwen2", "t5"])
@pytest.mark.parametrize("declared", TOKENIZERS)
def test_it_is_the_one_that_transformers_finds(tmp_path, declared, model_type):
    TOKENIZERS[declared]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": declared}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    equal(load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer", "clip", "held_out_clip"])
def test_those_of_the_demo(name):
    equal(load_tokenizer(hub.DEMO / name), AutoTokenizer.from_pretrained(hub.DEMO / name))


def equal(tokenizer, expected):
    texts = ["a cat", "A  red\ncircle, 7", "añ<|im_end|>", ""]
    assert type(tokenizer) is type(expected)
    assert tokenizer(texts)["input_ids"] == expected(texts)["input_ids"]
    assert tokenizer.special_tokens_map == expected.special_tokens_map
    assert (tokenizer.padding_side, tokenizer.model_max_length) == (expected.padding_side, expected.model_max_length)
