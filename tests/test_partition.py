"""Meshes: rules that cover every leaf, shares of bytes, the same results, and the right collectives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toy
from jax.sharding import Mesh, PartitionSpec

import ses_jax
from ses_jax.cli import convert as main
from ses_jax.engine import generation, tasks
from ses_jax.loading import hub, partition
from ses_jax.pipelines.registry import FAMILIES, abstract_pipeline

PROMPTS = ["a cat", "two blue squares above a hill"]
MESHES = ["data=8", "model=8", "data=2,model=4"]
PUBLISHED = sorted(p.source for family in set(FAMILIES.values()) for p in family.PUBLISHED if p.configs)


def family_of(source):
    return next(f for f in FAMILIES.values() if any(p.source == source for p in f.PUBLISHED))


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("data=4,model=2", (4, 2)),
        ("model=8", (1, 8)),
        ("data=8", (8, 1)),
        (" model = 2 , data=4", (4, 2)),
        ("data=-1,model=2", (4, 2)),
    ],
)
def test_a_mesh_is_read(text, shape):
    mesh = partition.parse_mesh(text)
    assert mesh.axis_names == ("data", "model")
    assert mesh.devices.shape == shape
    assert partition.parse_mesh(mesh) is mesh


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("data=3", "does not use all 8 devices"),
        ("data=0", "expected sizes of the axes data and model"),
        ("rows=8", "expected sizes of the axes data and model"),
        ("8", "expected sizes"),
        ("data=-1,model=-1", "does not use all 8"),
        ("data=-1,model=3", "does not use all 8"),
        (Mesh(np.array(jax.devices()[:1]), ("x",)), "mesh has axes"),
    ],
)
def test_a_bad_mesh_is_refused(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        partition.parse_mesh(text)


def test_the_first_rule_that_matches_the_whole_path_counts():
    mesh = partition.abstract_mesh("data=2,model=4")
    rules = (("a/kernel", PartitionSpec(None, "model")), (".*/kernel", PartitionSpec("model")), ("a", PartitionSpec()))
    assert partition.sharding(mesh, rules, "a/kernel", (3, 8)).spec == PartitionSpec(None, "model")
    assert partition.sharding(mesh, rules, "b/a/kernel", (8, 3)).spec == PartitionSpec("model")
    with pytest.raises(ValueError, match=r"no partition rule matches a/bias \[3\]"):
        partition.sharding(mesh, rules, "a/bias", (3,))
    with pytest.raises(ValueError, match=r"a/kernel \[3, 6\]: 6 does not divide over model=4"):
        partition.sharding(mesh, rules, "a/kernel", (3, 6))


@pytest.mark.parametrize("source", PUBLISHED)
def test_rules_cover_every_published_network_and_split_its_bulk(source):
    params, components = abstract_pipeline(source).params, family_of(source).COMPONENTS
    one, eight = (
        sum(
            partition.bytes_per_device(partition.abstract_mesh(mesh), components[n].partition, params[n])
            for n in params
        )
        for mesh in ("model=1", "model=8")
    )
    assert one == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    assert eight < one * (1 / 8 + 0.03)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sizes that divide over eight devices; faint norms would hide in a sum over shards."""
    sizes = {"dim": 96, "heads": 8, "axes_dims": (4, 4, 4), "text_heads": 8, "text_kv_heads": 8}
    sizes = oracle.ZImageSizes(**sizes, vae_layers=1, vae_widths=(8, 16))
    folder = tmp_path_factory.mktemp("partition")
    oracle.z_image_pipeline(sizes, seed=3).save_pretrained(folder)
    oracle.save_clip(folder / "clip", oracle.clip(seed=1))
    return folder


@pytest.fixture(scope="module")
def load(folder):
    """Our pipeline, by mesh."""
    return functools.cache(lambda mesh: ses_jax.load_pipeline(str(folder), mesh=mesh))


FINAL = {"height": 16, "width": 32, "steps": 2}


def run(pipeline, **settings):
    settings |= {"budget": 7, "population": 5, "elites": 2, "preview_steps": 2, "level": 1, "reward": "clip"}
    return ses_jax.search(PROMPTS, model=pipeline, progress=False, **FINAL, **settings)


@pytest.fixture(scope="module")
def alone(load):
    """The results without a mesh."""
    return run(load(None))


def test_a_mesh_changes_no_result(load, alone):
    """Candidates alone are spread by the toy below, heads alone in the images after this."""
    found = run(load("data=2,model=4"), prompts_at_once=2)
    for ours, expected in zip(found, alone, strict=True):
        scores = [[row["score"] for row in result.history] for result in (ours, expected)]
        # As in the images below, a pixel may be rounded to eight bits the other way, and a score feels it.
        np.testing.assert_allclose(*scores, atol=1e-3)
        assert np.isclose(*scores, rtol=1e-4, atol=1e-4).sum() >= len(scores[0]) - 1
        np.testing.assert_allclose(ours.noise, expected.noise, atol=1e-5)
        difference = np.abs(np.asarray(ours.image, np.int32) - np.asarray(expected.image, np.int32))
        assert difference.max() <= 1


def test_heads_alone_along_a_mesh_change_no_image(load, alone):
    images = ses_jax.generate(load("model=8"), PROMPTS, noise=np.stack([result.noise for result in alone]), **FINAL)
    expected = np.stack([np.asarray(result.image) for result in alone])
    np.testing.assert_allclose(np.asarray(images) * 255, expected, atol=0.51)


@pytest.mark.parametrize("mesh", ["data=8", "data=4,model=2"])
def test_generate_and_mixtures_on_a_mesh(mesh):
    pipeline = toy.pipeline()
    on_mesh = toy.pipeline(mesh=partition.parse_mesh(mesh))
    settings = {"reward": toy.mixture(red=1.0, blue=-1.0), "budget": 9, "population": 3, "elites": 2, "progress": False}
    ours, alone = (ses_jax.search(PROMPTS, model=p, chunk=2, **settings) for p in (on_mesh, pipeline))
    for a, b in zip(ours, alone, strict=True):
        np.testing.assert_allclose([r["score"] for r in a.history], [r["score"] for r in b.history], atol=1e-4)
    images = [ses_jax.generate(p, PROMPTS, seed=1) for p in (on_mesh, pipeline)]
    np.testing.assert_allclose(*images, atol=1e-6)


def test_host_rewards_on_a_mesh():
    def judge(images, prompts):
        return np.asarray(images).mean(axis=(1, 2, 3)) + np.array([len(prompt) for prompt in prompts])

    results = [
        ses_jax.search(
            PROMPTS,
            model=toy.pipeline(mesh=mesh),
            reward=judge,
            budget=6,
            population=3,
            elites=1,
            progress=False,
            prompts_at_once=n,
        )
        for mesh, n in ((None, 1), (partition.parse_mesh("data=8"), 2))
    ]
    for alone, ours in zip(*results, strict=True):
        np.testing.assert_allclose([r["score"] for r in ours.history], [r["score"] for r in alone.history], atol=1e-5)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_device_holds_its_share_and_no_more(load, mesh):
    pipeline = load(mesh)
    components = FAMILIES[pipeline.family].COMPONENTS
    for name, params in pipeline.params.items():
        expected = partition.bytes_per_device(pipeline.mesh, components[name].partition, params)
        held = dict.fromkeys(jax.devices(), 0)
        for leaf in jax.tree.leaves(params):
            for shard in leaf.addressable_shards:
                held[shard.device] += shard.data.nbytes
        assert set(held.values()) == {expected}


def test_a_converted_checkpoint_goes_into_the_same_shards(folder, load, tmp_path):
    main(str(folder), tmp_path / "converted")
    mesh = "data=4,model=2"
    published, converted = load(mesh), ses_jax.load_pipeline(str(tmp_path / "converted"), mesh=mesh)
    for a, b in zip(jax.tree.leaves(published.params), jax.tree.leaves(converted.params), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)


def test_a_converted_checkpoint_on_one_device_compiles_nothing_twice(folder, tmp_path):
    """Its params lie there for good, and so does a generation's state after the first one: as it has to before."""
    main(str(folder), tmp_path / "converted")
    pipelines = [ses_jax.load_pipeline(str(each)) for each in (folder, tmp_path / "converted")]
    for pipeline in pipelines:
        assert {leaf.sharding.mesh for leaf in jax.tree.leaves(pipeline.params)} == {partition.alone()}
        assert "on Mesh" not in repr(pipeline)
    generation.generation_step.clear()
    for pipeline in pipelines:  # they share all programs
        run(pipeline, prompts_at_once=2)
    assert generation.generation_step.cache_size() == 1


def compiled(folder, pipeline, **settings):
    """The text of a generation's program after partitioning."""
    settings = {"budget": 8, "population": 8, "height": 16, "width": 16, "preview_steps": 2, "level": 1} | settings
    config = ses_jax.SearchConfig(**settings).resolve(pipeline)
    reward = ses_jax.load_reward("clip", source=folder / "clip")
    task = tasks.prepare(pipeline, reward, config, PROMPTS[:1], [0])
    arguments = task.program, task.params, task.inputs, jnp.int32(0), tasks.initial_state(task)
    return generation.generation_step.lower(*arguments).compile().as_text()


def gathered(program):
    """Elements of every all-gather's result."""
    shapes = re.findall(r"= \w+\[([\d,]*)\][^=]* all-gather", program)
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]


@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_candidates_along_data_need_no_sums(folder, load, guidance):
    """Nor do the two branches of guidance move rows from device to device."""
    program = compiled(folder, load("data=8"), guidance=guidance)
    for collective in ("all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program
    # Scores, and nothing the size of an image or a layer.
    assert max(gathered(program)) <= 64


def test_heads_along_model_need_two_sums_a_block_and_nothing_else(folder, load):
    """One sum of tokens after attention and one after the feed-forward; a block's small modulation is summed too."""
    program = compiled(folder, load("model=8"))
    ranks = [len(shape.split(",")) for shape in re.findall(r"= \w+\[([\d,]*)\]\S* all-reduce", program)]
    kinds = 2  # of modulated blocks, each the body of one loop
    assert ranks.count(3) == 2 * kinds
    assert set(ranks) == {2, 3}
    assert "all-to-all" not in program
    assert "collective-permute" not in program
    assert max(gathered(program)) <= 64


def test_a_pipeline_on_other_devices_is_refused(load):
    pipeline = load("data=8")
    with pytest.raises(ValueError, match="load it with load_pipeline"):
        ses_jax.search("a", model=pipeline, mesh="model=8")


def test_sharding_of_a_whole_component(folder):
    component = FAMILIES["ZImagePipeline"].COMPONENTS["transformer"]
    mesh = partition.parse_mesh("model=8")
    _, params = hub.load_component(
        folder / "transformer", component, sharding=partition.loader(mesh, component.partition)
    )
    assert params["layers"]["attention"]["to_q"]["kernel"].sharding.spec == PartitionSpec(None, None, "model")
