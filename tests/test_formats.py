"""Kernels that lie the other way round in a TPU's memory, tried out in that of a CPU, which can hold them so too."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny

import ses_jax
from ses_jax.engine import generation, outline
from ses_jax.loading import checkpoint, formats
from ses_jax.pipelines.registry import abstract_pipeline
from ses_jax.planner import topologies

MESHES = [None, "data=2,model=4"]
SETTINGS = {"budget": 4, "population": 2, "elites": 1, "preview_steps": 2, "level": 1, "reward": "clip"}
FINAL = {"height": 16, "width": 16, "steps": 3, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"dim": 96, "heads": 8, "axes_dims": (4, 4, 4), "text_heads": 8, "text_kv_heads": 8}
    folder = tmp_path_factory.mktemp("formats")
    oracle.z_image_pipeline(oracle.ZImageSizes(**sizes, vae_layers=1, vae_widths=(8, 16)), seed=3).save_pretrained(
        folder
    )
    oracle.save_clip(folder / "clip", oracle.clip(seed=1))
    return folder


@pytest.fixture
def turning(monkeypatch):
    """What a TPU gains from, done on a CPU."""
    monkeypatch.setattr(formats, "_turns", lambda sharding: True)


def kernels(params):
    """Leaves by path, those that are to be turned and the others."""
    leaves = {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(params)
    }
    names = {
        path for path in leaves if path.rpartition("/attention/")[2] in ("to_q/kernel", "to_k/kernel", "to_v/kernel")
    }
    return {p: leaves[p] for p in names if "transformer/" in p}, {p: leaves[p] for p in leaves.keys() - names}


def order(leaf):
    return leaf.format.layout.major_to_minor


@pytest.mark.parametrize("mesh", MESHES)
def test_kernels_of_heads_lie_with_their_inputs_innermost(folder, mesh, monkeypatch):
    plain = ses_jax.load_pipeline(str(folder), mesh=mesh)
    assert {order(leaf) for leaf in kernels(plain.params)[0].values()} == {(0, 1, 2)}
    monkeypatch.setattr(formats, "_turns", lambda sharding: True)
    turned = ses_jax.load_pipeline(str(folder), mesh=mesh)
    ours, others = kernels(turned.params)
    assert len(ours) == 3 * 3  # stacks of blocks
    assert {order(leaf) for leaf in ours.values()} == {(0, 2, 1)}
    assert all(order(leaf) == tuple(range(leaf.ndim)) for leaf in others.values())
    for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(turned.params), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_search_takes_them_as_they_lie(folder, mesh, monkeypatch):
    """To the same scores, by programs that ask for them so; nothing is moved, or compiled again."""
    plain = ses_jax.load_pipeline(str(folder), mesh=mesh)
    expected = ses_jax.search("a cat", model=plain, **SETTINGS, **FINAL)
    monkeypatch.setattr(formats, "_turns", lambda sharding: True)
    turned = ses_jax.load_pipeline(str(folder), mesh=mesh)
    for a, b in zip(*(jax.tree.leaves(params) for params in (turned.params, turned.place(turned.params))), strict=True):
        assert a is b
    generation.generation_step.clear()
    found = ses_jax.search("a cat", model=turned, **SETTINGS, **FINAL)
    assert generation.generation_step.cache_size() == 1
    scores = ([row["score"] for row in result.history] for result in (found, expected))
    np.testing.assert_allclose(*scores, atol=1e-3)


@pytest.mark.parametrize("mesh", MESHES)
def test_programs_lowered_from_shapes_ask_for_them_so(folder, mesh, turning):
    pipeline = ses_jax.load_pipeline(str(folder), mesh=mesh)
    config = ses_jax.SearchConfig(**{k: v for k, v in (SETTINGS | FINAL).items() if k not in ("reward", "progress")})
    tokens = pipeline.tokenize(["a cat"], guidance=0.0)
    task = outline.outline(
        pipeline, ses_jax.load_reward("clip", source=folder / "clip"), config.resolve(pipeline), tokens
    )
    compiled = outline.lower_render(task, 2).compile()
    ours, _ = kernels(compiled.input_formats[0][0])
    # Of what it does not read a program says nothing.
    assert {each.layout.major_to_minor for each in ours.values() if each.layout} == {(0, 2, 1)}


def test_params_that_are_turned_are_saved_as_they_are(folder, turning, tmp_path):
    params = ses_jax.load_pipeline(str(folder)).params["transformer"]
    checkpoint.save(tmp_path / "saved", params)
    found = checkpoint.restore(tmp_path / "saved", jax.eval_shape(lambda: params))
    jax.tree.map(np.testing.assert_array_equal, params, found)


def test_only_arrays_of_devices_are_turned_and_given_up(turning):
    def kernel():
        return jnp.arange(24.0).reshape(2, 3, 4)

    host, other = np.zeros((2, 3, 4), np.float32), kernel()
    params = {"a": {"kernel": kernel()}, "b": {"kernel": host}, "c": {"kernel": other}}
    found = formats.arranged((r"[ab]/kernel",), params, give_up=True)
    assert params["a"]["kernel"].is_deleted()
    assert order(found["a"]["kernel"]) == (0, 2, 1)
    np.testing.assert_array_equal(found["a"]["kernel"], kernel())
    assert found["b"]["kernel"] is host
    assert found["c"]["kernel"] is other


def test_what_a_runtime_cannot_turn_stays_as_it_lies(turning, monkeypatch, caplog):
    def refuses(array, wanted):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: layouts")

    kernel = jnp.arange(24.0).reshape(2, 3, 4)
    monkeypatch.setattr(jax, "device_put", refuses)
    assert formats.arranged(("kernel",), {"kernel": kernel}, give_up=True)["kernel"] is kernel
    assert not kernel.is_deleted()
    assert "UNIMPLEMENTED: layouts" in caplog.text


@pytest.mark.parametrize("source", tiny.TINY)
def test_every_family_turns_those_that_become_heads(source):
    """Of all kernels those of queries, keys and values, and nothing else, on a device that need not be there."""
    if not topologies.available("v6e"):
        pytest.skip("libtpu is not installed")
    mesh = topologies.target_mesh("v6e", "data=1,model=2")
    pipeline = abstract_pipeline(source, mesh=mesh)
    placed = pipeline.place(pipeline.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(placed):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        word = name.split("/")[-2]
        heads = name.startswith("transformer/") and word in {f"to_{n}" for n in "qkv"} | {
            f"add_{n}_proj" for n in "qkv"
        }
        turned = (
            leaf.format is not None
            and leaf.format.layout is not None
            and leaf.format.layout.major_to_minor == (0, 2, 1)
        )
        assert turned == (heads and name.endswith("kernel")), name
