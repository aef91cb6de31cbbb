"""BLIP's towers and the score head against torch, and their tables."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch

from ses_jax.convert import blip as tables
from ses_jax.convert import engine, matching, score_head
from ses_jax.convert.engine import ConversionError, Header, Weights
from ses_jax.loading import network
from ses_jax.models import blip, layers
from ses_jax.models import score_head as heads

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
# What `ImageReward.pt` is made of: BERT base with BLIP's two tokens, and ViT-L/16.
PUBLISHED = {
    "hidden_act": "gelu",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}
encode = jax.jit(blip.encode, static_argnums=1)
embed_image = jax.jit(blip.embed_image, static_argnums=1)


def weights_of(module):
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    headers = {name: Header(array.shape, "F32", "file") for name, array in state.items()}
    return state, Weights(headers, state.__getitem__)


@pytest.fixture(scope="module", params=[1.0, 0.1], ids=["plain", "faint"])
def networks(request):
    reference = oracle.image_reward(seed=1, gain=request.param)
    loaded = network.read(weights_of(reference)[1], tables.COMPONENT, oracle.MED_CONFIG, dtype=jnp.float32)
    return reference, loaded.config, loaded.params


def draw(count, config):
    rng = np.random.default_rng(0)
    size = config.image_size
    pixels = rng.standard_normal((count, size, size, 3)) + rng.standard_normal((count, 1, 1, 3))
    lengths = np.array([3, 35, 12, 2])[:count, None]
    ids = rng.integers(5, config.text.vocab_size, (count, 35))
    mask = np.arange(35) < lengths
    return pixels.astype(np.float32), blip.Tokens(np.where(mask, ids, 0).astype(np.int32), mask)


def torch_inputs(pixels, tokens):
    ids, mask = torch.from_numpy(tokens.ids).long(), torch.from_numpy(tokens.mask).long()
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2)), ids, mask


def test_image_states_equal_the_reference(networks):
    reference, config, params = networks
    pixels, tokens = draw(3, config)
    with torch.no_grad():
        expected = reference.blip.visual_encoder(torch_inputs(pixels, tokens)[0]).numpy()
    assert np.abs(expected[0] - expected[1]).max() > 2e-3
    np.testing.assert_allclose(embed_image(params, config, pixels), expected, **TOLERANCE)


def test_tokens_that_only_fill_up_change_nothing(networks, monkeypatch):
    _, config, params = networks
    pixels = jnp.asarray(draw(3, config)[0])
    expected = embed_image(params, config, pixels)
    assert expected.shape[1] % 8
    monkeypatch.setattr(layers, "takes_eights", lambda tokens: True)
    np.testing.assert_allclose(blip.embed_image(params, config, pixels), expected, **TOLERANCE)


def test_text_that_looks_at_images_equals_the_reference(networks):
    reference, config, params = networks
    pixels, tokens = draw(4, config)
    with torch.no_grad():
        expected = reference.states(*torch_inputs(pixels, tokens)).numpy()
    assert np.abs(expected[0] - expected[1]).max() > 2e-3
    np.testing.assert_allclose(encode(params, config, pixels, tokens), expected, **TOLERANCE)


def test_one_text_may_serve_many_images(networks):
    _, config, params = networks
    pixels, tokens = draw(3, config)
    one = blip.Tokens(tokens.ids[1:2], tokens.mask[1:2])
    many = blip.Tokens(*(np.repeat(x, 3, axis=0) for x in one))
    np.testing.assert_allclose(
        encode(params, config, pixels, one), encode(params, config, pixels, many), atol=2e-6, rtol=2e-6
    )


def test_padding_is_not_seen(networks):
    _, config, params = networks
    pixels, tokens = draw(1, config)
    other = blip.Tokens(np.where(tokens.mask, tokens.ids, 77).astype(np.int32), tokens.mask)
    states = encode(params, config, pixels, tokens)
    np.testing.assert_allclose(encode(params, config, pixels, other), states, atol=1e-6)


def test_the_head_equals_the_reference():
    reference = oracle.score_head(20)
    params = network.read(weights_of(reference)[1], score_head.COMPONENT, {"input_size": 20}).params
    x = np.random.default_rng(0).standard_normal((7, 20)).astype(np.float32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(x))[:, 0].numpy()
    np.testing.assert_allclose(heads.score(params, jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("component", [tables.COMPONENT, score_head.COMPONENT], ids=["blip", "head"])
def test_weights_round_trip(component):
    state, weights = weights_of(oracle.image_reward())
    json = oracle.MED_CONFIG | {"input_size": oracle.MED_CONFIG["hidden_size"]}
    loaded = network.read(weights, component, json)
    exported = dict(engine.export(component.table(json), loaded.params, loaded.prefix))
    assert sorted([*exported, *loaded.unused.headers]) == sorted(state)
    for name, array in exported.items():
        np.testing.assert_array_equal(array, state[name])


def test_the_tables_cover_the_whole_published_network():
    """Names and shapes of the network that its authors' code builds, against ours of full size, both abstract."""
    with torch.device("meta"):
        vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224}
        network_ = oracle.ImageReward(PUBLISHED | {"vision_config": vision | {"patch_size": 16}})
    headers = {name: Header(tuple(t.shape), "F32", "file") for name, t in network_.state_dict().items()}
    headers["blip.text_encoder.embeddings.position_ids"] = Header((1, 512), "I64", "file")
    used = set()
    for component, json in ((tables.COMPONENT, PUBLISHED), (score_head.COMPONENT, {"input_size": 768})):
        plan = matching.plan(component.table(json), component.abstract(component.from_json(json)), headers)
        names = {slot.name for group in plan.slots.values() for slot in group}
        assert not used & names
        used |= names
    rest = {name.split(".")[1] for name in headers.keys() - used}
    assert rest == {"vision_proj", "text_proj", "text_encoder"}
    assert len(headers.keys() - used) == 5
    del headers["blip.visual_encoder.blocks.3.attn.qkv.bias"]
    with pytest.raises(ConversionError, match=r"missing: blip.visual_encoder.blocks.3.attn.qkv.bias \[3072\], for"):
        network.read(Weights(headers, headers.__getitem__), tables.COMPONENT, PUBLISHED)


def test_the_published_size_runs_in_the_dtype_of_its_weights():
    config = blip.Config.from_json(PUBLISHED)
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), tables.COMPONENT.abstract(config)
    )
    pixels = jax.ShapeDtypeStruct((10, 224, 224, 3), jnp.float32)
    tokens = blip.Tokens(jax.ShapeDtypeStruct((1, 35), jnp.int32), jax.ShapeDtypeStruct((1, 35), bool))
    lowered = jax.jit(blip.encode, static_argnums=1).lower(params, config, pixels, tokens)
    assert lowered.out_info == jax.ShapeDtypeStruct((10, 768), jnp.float32)
    operands = re.findall(r"dot_general .* : \((.*)\) ->", lowered.as_text())
    assert len(operands) > 20
    assert not [types for types in operands if "f32" in types]


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation 'relu' is not supported; known: gelu"):
        blip.Config.from_json(PUBLISHED | {"hidden_act": "relu"})
