"""CLIP's towers against transformers."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_flux1
import pytest
import torch
import transformers

from ses_jax.convert.clip import COMPONENT, TEXT_COMPONENT
from ses_jax.loading import hub
from ses_jax.loading.tokenizers import load_tokenizer
from ses_jax.models import clip, layers, target

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
# Of the stand-in tokenizer, the end token is id 257, which is also the largest.
CONFIGS = {
    "OpenAI": {"act": "quick_gelu", "eos_token_id": 2},
    "LAION": {"act": "gelu", "eos_token_id": 2, "vision": {"patch_size": 8, "image_size": 40}},
    "explicit end token": {"act": "gelu", "eos_token_id": 257},
    "end token that is not the largest": {"act": "quick_gelu", "eos_token_id": 7},
    "faint": {"act": "gelu", "gain": 0.1},
}
PROMPTS = ["a red circle", "", "añ 漢字 and much more text, " * 9]  # the last one is cut at 77 tokens
embed_text = jax.jit(clip.embed_text, static_argnums=1)
embed_image = jax.jit(clip.embed_image, static_argnums=1)


@pytest.fixture(scope="module", params=CONFIGS)
def networks(request, tmp_path_factory):
    reference = oracle.clip(**CONFIGS[request.param])
    folder = tmp_path_factory.mktemp("clip")
    oracle.save_clip(folder, reference)
    return reference, load_tokenizer(folder), *hub.load_component(folder, COMPONENT, dtype=jnp.float32)


def draw_images(size):
    """Three images that differ in more than their noise."""
    rng = np.random.default_rng(0)
    return (rng.standard_normal((3, size, size, 3)) + rng.standard_normal((3, 1, 1, 3))).astype(np.float32)


def test_text_equals_the_reference(networks):
    reference, tokenizer, config, params = networks
    ids = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="np")["input_ids"]
    if config.eos_token_id == 7:
        ids = np.where(ids == 257, 7, ids)
    with torch.no_grad():
        expected = reference.get_text_features(torch.from_numpy(ids)).pooler_output
        expected = torch.nn.functional.normalize(expected, dim=-1).numpy()
    assert np.abs(expected[0] - expected[1]).max() > 2e-3
    np.testing.assert_allclose(embed_text(params, config, ids.astype(np.int32)), expected, **TOLERANCE)


def test_text_may_be_shorter(networks):
    _, _, config, params = networks
    end = {2: 257}.get(config.eos_token_id, config.eos_token_id)
    ids = np.full((3, 77), end, np.int32)
    ids[:, 0], ids[:, 1:4] = 256, np.arange(20, 29).reshape(3, 3)
    np.testing.assert_allclose(embed_text(params, config, ids[:, :8]), embed_text(params, config, ids), atol=2e-6)


def test_images_equal_the_reference(networks):
    reference, _, config, params = networks
    pixels = draw_images(config.image_size)
    with torch.no_grad():
        expected = reference.get_image_features(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).pooler_output
        expected = torch.nn.functional.normalize(expected, dim=-1).numpy()
    assert np.abs(expected[0] - expected[1]).max() > 2e-3
    np.testing.assert_allclose(embed_image(params, config, pixels), expected, **TOLERANCE)


def test_tokens_that_only_fill_up_change_nothing(networks, monkeypatch):
    _, _, config, params = networks
    images = jnp.asarray(draw_images(config.image_size))
    count = 1 + (config.image_size // config.patch_size) ** 2
    expected = embed_image(params, config, images)
    monkeypatch.setattr(layers, "takes_eights", lambda tokens: True)
    padded = jax.make_jaxpr(lambda images: clip.embed_image(params, config, images))(images)
    assert f"[3,{count + -count % 8}," in str(padded)
    np.testing.assert_allclose(clip.embed_image(params, config, images), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("platform", "dtype", "count", "filled"),
    [
        *(("gpu", "bfloat16", 257, 264), ("gpu", "bfloat16", 256, None), ("gpu", "float32", 257, None)),
        *(("tpu", "bfloat16", 257, None), ("cpu", "bfloat16", 257, None)),
    ],
)
def test_tokens_are_filled_up_where_products_would_be(platform, dtype, count, filled):
    device = types.SimpleNamespace(platform=platform, compute_capability="9.0")
    tokens = jnp.ones((2, count, 4), dtype)
    with target.compiled_for(device):
        found, lengths = layers.in_eights(tokens)
    np.testing.assert_array_equal(found[:, :count], tokens)
    if filled is None:
        assert found.shape == tokens.shape
        assert lengths is None
    else:
        assert found.shape == (2, filled, 4)
        assert not found[:, count:].any()
        assert lengths.tolist() == [count, count]


def test_similarity_equals_the_reference(networks):
    reference, tokenizer, config, params = networks
    ids = tokenizer(["a", "bb", ""], padding="max_length", max_length=77, return_tensors="np")["input_ids"]
    pixels = draw_images(config.image_size)
    if config.eos_token_id == 7:
        ids = np.where(ids == 257, 7, ids)
    with torch.no_grad():
        output = reference(torch.from_numpy(ids), torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
    text, images = embed_text(params, config, ids.astype(np.int32)), embed_image(params, config, pixels)
    ours = clip.logit_scale(params) * images @ text.T
    np.testing.assert_allclose(ours, output.logits_per_image.numpy(), rtol=1e-4, atol=2e-5 * clip.logit_scale(params))


@pytest.mark.parametrize("gain", [1.0, 0.1])
@pytest.mark.parametrize(("act", "eos_token_id"), [("quick_gelu", 2), ("gelu", 257)])
def test_the_text_tower_alone_equals_the_reference(act, eos_token_id, gain, tmp_path):
    sizes = oracle_flux1.Flux1Sizes(clip_layers=3, gain=gain)
    reference = oracle_flux1.clip_text(sizes, act=act, eos_token_id=eos_token_id)
    reference.save_pretrained(tmp_path)
    config, params = hub.load_component(tmp_path, TEXT_COMPONENT, dtype=jnp.float32)
    tokenizer = oracle.clip_tokenizer()
    ids = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="np")["input_ids"]
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)).pooler_output.numpy()
    assert np.abs(expected[0] - expected[1]).max() > 2e-3
    scale = min(1.0, expected.std())
    ours = jax.jit(clip.text_state, static_argnums=1)(params, config, ids.astype(np.int32))
    np.testing.assert_allclose(ours / scale, expected / scale, **TOLERANCE)


def test_unknown_activation_is_refused():
    config = oracle.clip(act="relu").config.to_dict()
    with pytest.raises(ValueError, match="activation 'relu' is not supported; known: quick_gelu, gelu"):
        clip.Config.from_json(config)


CONFIG_STYLES = {
    "what is a default is left out": {
        "projection_dim": 768,
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "vision_config": {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14},
    },
    "nothing but defaults": {"text_config": {}, "vision_config": None},
    "said twice": {
        "text_config": {"hidden_size": 64, "num_attention_heads": 2, "hidden_act": "gelu", "eos_token_id": 2},
        "text_config_dict": {"hidden_size": 96, "num_attention_heads": 3},
        "vision_config": {"patch_size": 14, "hidden_act": "gelu", "image_size": 336},
        "vision_config_dict": {"patch_size": 16, "hidden_act": "gelu"},
    },
    "the older entries alone": {
        "text_config": None,
        "text_config_dict": {"hidden_size": 64},
        "vision_config_dict": {"patch_size": 14},
    },
    "the older entries as null": {"text_config": {"hidden_size": 64}, "text_config_dict": None, "vision_config": {}},
}


@pytest.mark.parametrize("style", CONFIG_STYLES)
def test_configs_of_any_style_say_what_transformers_reads(style):
    """Releases of transformers leave out what is a default, or say it under two names."""
    config = CONFIG_STYLES[style]
    whole = transformers.CLIPConfig(**config).to_dict()
    assert clip.Config.from_json(config) == clip.Config.from_json(whole)
    assert "text_config_dict" not in whole
    assert whole["text_config"].keys() > clip.SIZES["text"].keys()


def test_the_text_tower_of_a_whole_clip(tmp_path):
    """Of its file and its config: FLUX.1 is often given another CLIP."""
    whole = oracle.clip()
    oracle.save_clip(tmp_path / "whole", whole)
    text = transformers.CLIPTextModel(whole.config.text_config)
    text.load_state_dict(
        {n.removeprefix("text_model."): x for n, x in whole.state_dict().items() if n.startswith("text_model.")}
    )
    text.save_pretrained(tmp_path / "text")
    (config, params), expected = (
        hub.load_component(tmp_path / name, TEXT_COMPONENT, dtype=jnp.float32) for name in ("whole", "text")
    )
    assert config == expected[0]
    jax.tree.map(np.testing.assert_array_equal, params, expected[1])


def test_another_kind_of_model_is_named():
    config = {"model_type": "siglip", "text_config": {}, "vision_config": {}}
    with pytest.raises(ValueError, match="model type 'siglip' is not supported; expected 'clip'"):
        clip.Config.from_json(config)
