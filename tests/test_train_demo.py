"""The demo's training, at toy sizes: every stage takes what the one before it leaves, down to the checkpoint.

The loop and the losses are those of `train_demo2`, whose tests run them.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from ses_jax.loading import folder
from ses_jax.pipelines.registry import FAMILIES

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import demo_models
import demo_training
import scenes
import train_demo

STAGES = ("vae", "decoder", "clip", "dit")


def traced(optimizer, loss, average_decay):
    """Steps that look at what they are given and leave the weights as they are."""

    def update(state, batch, key, scale):
        value, _ = jax.eval_shape(loss, state.params, batch, key)
        assert value.shape == ()
        return state._replace(step=state.step + 1), {"loss": scale}

    return update


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> train_demo.Arguments:
    """All stages without a stop."""
    args = train_demo.Arguments(work=tmp_path_factory.mktemp("straight"), steps=2, sizes="tiny")
    with mock.patch.object(demo_training, "_updater", traced):
        train_demo.main(args)
    return args


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_logged(straight, stage):
    rows = [json.loads(line) for line in (straight.work / stage / "losses.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2
    assert np.isfinite(rows[-1]["loss"])


def test_the_export_is_a_checkpoint_that_loads(straight):
    out = straight.work / "export"
    parts = folder.components(out, FAMILIES)
    assert set(parts) == {"transformer", "vae", "text_encoder", "clip"}
    for name, part in parts.items():
        config, _ = folder.network.load(out / name, part)[1:3]
        assert config == part.from_json(json.loads((out / name / "config.json").read_text()))


def test_a_stage_without_its_predecessor_says_so(tmp_path):
    demo_models.train_tokenizers(tmp_path, ["a red circle on a white background"])
    args = train_demo.Arguments(work=tmp_path, stage="dit", sizes="tiny")
    with pytest.raises(FileNotFoundError, match="train this stage first"):
        train_demo.main(args)


def test_prompts_fit_and_any_text_can_be_encoded(straight):
    prompt_tokenizer, clip_tokenizer = demo_models.load_tokenizers(straight.work)
    rng = np.random.default_rng(0)
    captions = [scenes.caption(rng, scenes.sample(rng)) for _ in range(500)]
    _, lengths = demo_models.tokenize_prompts(prompt_tokenizer, captions, length=100)
    assert lengths.max() <= demo_models.PROMPT_LENGTH
    assert (np.array([len(ids) for ids in clip_tokenizer(captions)["input_ids"]]) <= demo_models.PROMPT_LENGTH).all()
    text = "ein blauer würfel 🟦 über 三角"
    for tokenizer in (prompt_tokenizer, clip_tokenizer):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_the_end_token_of_clip_is_the_largest_id(straight):
    _, tokenizer = demo_models.load_tokenizers(straight.work)
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer("a red circle")["input_ids"][-1] == tokenizer.eos_token_id
