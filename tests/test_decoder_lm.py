"""The decoder-only text encoders, against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch

from ses_jax.convert import decoder_lm as table
from ses_jax.convert import engine, matching
from ses_jax.loading import hub
from ses_jax.models import decoder_lm

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
SIZES = {
    "two queries a key": oracle.ZImageSizes(),
    "one query a key": oracle.ZImageSizes(text_heads=3, text_kv_heads=3, text_head_dim=8, text_layers=2),
    "all queries one key": oracle.ZImageSizes(text_heads=4, text_kv_heads=1, text_head_dim=32, text_width=64),
    "deep": oracle.ZImageSizes(text_heads=6, text_kv_heads=2, text_head_dim=12, text_width=24, text_layers=7),
    "faint": oracle.ZImageSizes(gain=0.02),
}
run = jax.jit(decoder_lm.hidden_state, static_argnums=1)


def save(sizes, folder):
    reference = oracle.qwen3(sizes, seed=sizes.text_layers)
    reference.save_pretrained(folder)
    return reference


def prompts(lengths, seed=0):
    """Random ids, padded on the right with the pad token, and their mask."""
    ids = np.random.default_rng(seed).integers(0, 256, (len(lengths), max(lengths)))
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    return np.where(mask, ids, 256).astype(np.int32), mask


def reference_states(reference, ids, mask):
    with torch.no_grad():
        output = reference(torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True)
    return [state.numpy() for state in output.hidden_states]


@pytest.mark.parametrize("name", SIZES)
def test_hidden_state_equals_the_reference(name, tmp_path):
    reference = save(SIZES[name], tmp_path)
    config, params = hub.load_component(tmp_path, table.component(-2), dtype=jnp.float32)
    ids, mask = prompts((50, 3, 32))
    expected = reference_states(reference, ids, mask)[-2]
    scale = min(1.0, expected[mask].std())
    ours = np.asarray(run(params, config, ids))
    np.testing.assert_allclose(ours[mask] / scale, expected[mask] / scale, **TOLERANCE)


@pytest.mark.parametrize("wanted", [1, 2, -1, -2, -4])
def test_any_hidden_state(wanted, tmp_path):
    reference = save(oracle.ZImageSizes(), tmp_path)
    config, params = hub.load_component(tmp_path, table.component(wanted), dtype=jnp.float32)
    ids, mask = prompts((20, 9))
    expected = reference_states(reference, ids, mask)[wanted]
    np.testing.assert_allclose(np.asarray(run(params, config, ids))[mask], expected[mask], **TOLERANCE)


KINDS = {
    "qwen3": (oracle.qwen3, (1, 2, 3)),
    "mistral, left padding": (oracle.mistral3, (1, 2, 3)),
    "qwen2.5": (oracle.qwen2_5_vl, (-1,)),
    "qwen2.5, from the embedding on": (oracle.qwen2_5_vl, (0, 3)),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("gain", [1.0, 0.05])
def test_masked_states_equal_the_reference_in_every_row(name, gain, tmp_path):
    """Rows of padding reach some transformers, so they count; on the left they see nothing at all."""
    build, wanted = KINDS[name]
    reference = build(oracle.ZImageSizes(gain=gain), seed=1)
    reference.save_pretrained(tmp_path)
    config, params = hub.load_component(tmp_path, table.component(*wanted), dtype=jnp.float32)
    ids, mask = prompts((50, 3, 32))
    if "left" in name:
        ids, mask = ids[:, ::-1].copy(), mask[:, ::-1].copy()
    states = reference_states(reference, ids, mask)
    expected = np.concatenate([states[index] for index in wanted], axis=-1)
    ours = np.asarray(run(params, config, ids, mask))
    scale = min(1.0, expected.std())
    np.testing.assert_allclose(ours / scale, expected / scale, **TOLERANCE)


@pytest.mark.parametrize(
    ("build", "published"),
    [(oracle.mistral3, "language_model.model."), (oracle.qwen2_5_vl, "model.")],
)
def test_old_and_new_layouts_of_vision_language_models(build, published):
    """Older releases of transformers, which the published files come from, name the text side otherwise."""
    reference = build()
    new = {name: engine.Header(tuple(x.shape), "F32", "new") for name, x in reference.state_dict().items()}
    old = {name.replace("model.language_model.", published): header for name, header in new.items()}
    json = reference.config.to_dict()
    component = table.component(1, 3)
    abstract = component.abstract(component.from_json(json))
    plans = [matching.plan(component.table(json), abstract, headers) for headers in (new, old)]
    assert [plan.prefix for plan in plans] == ["model.language_model.", published]
    assert component.table(json).prefixes[0] == published
    assert any("vision" in name or "visual" in name for name in plans[1].unused)
    assert len(plans[0].unused) == len(plans[1].unused)


def test_padding_does_not_matter(tmp_path):
    save(oracle.ZImageSizes(), tmp_path)
    config, params = hub.load_component(tmp_path, table.component(-2), dtype=jnp.float32)
    ids, _ = prompts((20,))
    longer = np.pad(ids, ((0, 0), (0, 44)), constant_values=256)
    np.testing.assert_allclose(run(params, config, longer)[:, :20], run(params, config, ids), atol=5e-6)


@pytest.mark.parametrize(
    ("change", "hidden_states", "complaint"),
    [
        ({"model_type": "gpt2"}, (-2,), "'gpt2' is not supported; known: qwen3"),
        ({"attention_bias": True}, (-2,), "attention_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, (-2,), "rope type 'yarn'"),
        ({}, (5,), r"hidden states \(5,\) are not those of a text encoder of 4 layers"),
        ({}, (2, 1), r"hidden states \(2, 1\)"),
    ],
)
def test_unsupported_options_are_refused(change, hidden_states, complaint):
    config = oracle.qwen3().config.to_dict() | change
    with pytest.raises(ValueError, match=complaint):
        decoder_lm.Config.from_json(config, hidden_states=hidden_states)


def test_both_spellings_of_rope_are_read():
    """transformers 4 writes `rope_theta` at the top, transformers 5 inside `rope_parameters`."""
    new = oracle.qwen3().config.to_dict()
    assert "rope_theta" not in new
    old = {key: value for key, value in new.items() if key != "rope_parameters"} | {"rope_theta": 1000000.0}
    assert decoder_lm.Config.from_json(new) == decoder_lm.Config.from_json(old)
    assert decoder_lm.Config.from_json(new).rope_theta == 1e6
