"""T5's encoder against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle_flux1
import pytest
import torch
from oracle_flux1 import Flux1Sizes
from transformers import T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from ses_jax.convert.t5 import COMPONENT
from ses_jax.loading import hub
from ses_jax.models import t5

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
SIZES = {
    "default": Flux1Sizes(),
    "one layer, few buckets": Flux1Sizes(t5_layers=1, t5_heads=3, t5_buckets=8, t5_distance=20),
    "deep": Flux1Sizes(t5_layers=6, t5_width=24, t5_heads=2, t5_head_dim=16, t5_hidden=40),
    "faint": Flux1Sizes(gain=0.02),
}
encode = jax.jit(t5.encode, static_argnums=1)


def load(sizes, folder):
    reference = oracle_flux1.t5(sizes, seed=sizes.t5_layers)
    reference.save_pretrained(folder)
    return reference, *hub.load_component(folder, COMPONENT, dtype=jnp.float32)


def draw(batch, length):
    """Random ids of which some rows end in padding."""
    rng = np.random.default_rng(length)
    ids = rng.integers(0, 256, (batch, length))
    ends = rng.integers(1, length + 1, (batch, 1))
    return np.where(np.arange(length) < ends, ids, 256).astype(np.int32)


@pytest.mark.parametrize("length", [1, 40, 300])
@pytest.mark.parametrize("name", SIZES)
def test_states_equal_the_reference(name, length, tmp_path):
    reference, config, params = load(SIZES[name], tmp_path)
    ids = draw(3, length)
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)).last_hidden_state.numpy()
    scale = min(1.0, expected.std())
    np.testing.assert_allclose(encode(params, config, ids) / scale, expected / scale, **TOLERANCE)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (32, 64), (8, 20), (64, 1000), (4, 16)])
def test_buckets_equal_the_reference(buckets, distance):
    config = t5.Config(relative_attention_num_buckets=buckets, relative_attention_max_distance=distance)
    offset = torch.arange(600)[None, :] - torch.arange(600)[:, None]
    expected = T5Attention._relative_position_bucket(offset, num_buckets=buckets, max_distance=distance)
    np.testing.assert_array_equal(t5.relative_buckets(config, 600), expected.numpy())


def test_padding_is_attended_to(tmp_path):
    """As in the reference pipelines, which pass no mask: what a prompt is padded to matters."""
    _, config, params = load(Flux1Sizes(), tmp_path)
    ids = draw(1, 12)
    longer = np.pad(ids, ((0, 0), (0, 20)), constant_values=256)
    assert np.abs(encode(params, config, longer)[:, :12] - encode(params, config, ids)).max() > 0.01


def test_a_batch_equals_its_members(tmp_path):
    _, config, params = load(Flux1Sizes(), tmp_path)
    ids = draw(3, 20)
    together = encode(params, config, ids)
    for i in range(3):
        np.testing.assert_allclose(encode(params, config, ids[i : i + 1])[0], together[i], atol=2e-5)


def test_bfloat16_stays_close(tmp_path):
    _, config, params = load(Flux1Sizes(), tmp_path)
    rough = encode(jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), params), config, draw(2, 30))
    exact = np.asarray(encode(params, config, draw(2, 30)))
    assert rough.dtype == jnp.bfloat16
    assert np.linalg.norm(rough.astype(np.float32) - exact) < 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "mt5"}, "'mt5' is not supported; expected 't5'"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu' is not supported; expected 'gated-gelu'"),
    ],
)
def test_unsupported_options_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        t5.Config.from_json(oracle_flux1.t5().config.to_dict() | change)


def test_float16_has_room_for_what_large_models_add_up(tmp_path):
    """The reference computes the last product of each feed-forward in float32 and adds up there from then on."""
    sizes = Flux1Sizes()
    reference = oracle_flux1.t5(sizes, seed=3)
    with torch.no_grad():
        last = reference.encoder.block[0].layer[1].DenseReluDense.wo.weight
        last *= 6e4 / last.abs().max()
    reference.save_pretrained(tmp_path)
    ids = draw(3, 40)
    with torch.no_grad():
        states = T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float16)(
            torch.from_numpy(ids), output_hidden_states=True
        )
    assert states.hidden_states[1].abs().max() > np.finfo(np.float16).max
    config, params = hub.load_component(tmp_path, COMPONENT, dtype=jnp.float16)
    ours = encode(params, config, ids)
    assert ours.dtype == jnp.float16
    np.testing.assert_allclose(ours.astype(np.float32), states.last_hidden_state.float().numpy(), atol=0.02)
