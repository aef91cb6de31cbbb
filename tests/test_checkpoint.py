"""Params through Orbax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ses_jax.loading import checkpoint

pytestmark = pytest.mark.quick


@pytest.fixture
def params():
    return {
        "a": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)},
        "scale": jnp.float32(2.5),
    }


def shapes(params):
    return jax.eval_shape(lambda: params)


def test_restores_what_was_saved(tmp_path, params):
    checkpoint.save(tmp_path / "params", params)
    restored = checkpoint.restore(tmp_path / "params", shapes(params))
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert [path.name for path in tmp_path.iterdir()] == ["params"]


def test_nothing_is_compressed(tmp_path):
    checkpoint.save(tmp_path / "params", {"zeros": jnp.zeros(1 << 20)})
    assert sum(file.stat().st_size for file in (tmp_path / "params").rglob("*") if file.is_file()) > 4 << 20


@pytest.mark.parametrize("largest", [3, 10**9, 7 * 10**9])
def test_what_is_on_its_way_at_a_time_is_little_more_than_the_largest_leaf(largest):
    tree = [jax.ShapeDtypeStruct((size,), jnp.bfloat16) for size in (1, largest, largest // 2)]
    assert 4 * largest < checkpoint._at_once(tree) * 10**9 <= 4 * largest + 2 * 10**9


def test_saving_again_replaces(tmp_path, params):
    checkpoint.save(tmp_path / "params", params)
    checkpoint.save(tmp_path / "params", {"only": jnp.zeros(1)})
    assert checkpoint.restore(tmp_path / "params", {"only": jax.ShapeDtypeStruct((1,), np.float32)}).keys() == {"only"}


def test_casts_and_places(tmp_path, params):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    seen = {}

    def sharding(path, shape):
        seen[path] = shape
        return replicated

    checkpoint.save(tmp_path / "params", params)
    restored = checkpoint.restore(tmp_path / "params", shapes(params), dtype=jnp.bfloat16, sharding=sharding)
    assert {leaf.dtype for leaf in jax.tree.leaves(restored) if leaf.shape} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(restored) if not leaf.shape} == {jnp.dtype(jnp.float32)}
    assert {leaf.sharding for leaf in jax.tree.leaves(restored)} == {replicated}
    assert seen == {"a/kernel": (2, 3), "a/bias": (3,), "scale": ()}


def test_the_default_device_is_where_params_go(tmp_path, params):
    checkpoint.save(tmp_path / "params", params)
    with jax.default_device(jax.devices()[3]):
        restored = checkpoint.restore(tmp_path / "params", shapes(params))
    assert all(leaf.devices() == {jax.devices()[3]} for leaf in jax.tree.leaves(restored))


def test_other_params_are_reported(tmp_path, params):
    checkpoint.save(tmp_path / "params", params)
    wanted = shapes(params)
    wanted["a"]["kernel"] = jax.ShapeDtypeStruct((2, 4), np.float32)
    wanted["b"] = wanted["a"].pop("bias")
    with pytest.raises(ValueError, match="holds other params") as error:
        checkpoint.restore(tmp_path / "params", wanted)
    for line in (
        "a/kernel: expected [2, 4], found [2, 3]",
        "a/bias: expected nothing, found [3]",
        "b: expected [3], found nothing",
    ):
        assert line in str(error.value)


def test_absent_and_broken_folders_are_named(tmp_path, params):
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        checkpoint.restore(tmp_path / "nothing", shapes(params))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is not a complete checkpoint"):
        checkpoint.restore(tmp_path / "empty", shapes(params))
    checkpoint.save(tmp_path / "params", params)
    (tmp_path / "params" / "_METADATA").unlink()
    with pytest.raises(ValueError, match="params is not a complete checkpoint"):
        checkpoint.restore(tmp_path / "params", shapes(params))


def test_truncated_data_is_an_error(tmp_path, params):
    checkpoint.save(tmp_path / "params", params)
    for data in (tmp_path / "params").rglob("d/*"):
        data.write_bytes(data.read_bytes()[:-8])
    with pytest.raises(ValueError, match="params is not a complete checkpoint"):
        checkpoint.restore(tmp_path / "params", shapes(params))
