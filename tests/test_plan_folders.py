"""Plans of the demo and of local folders: what they say is of the very model, and no weights are read for it."""

import json
import shutil

import jax
import pytest

import ses_jax
from ses_jax import cli
from ses_jax.convert import clip
from ses_jax.loading import hub, network
from ses_jax.pipelines.registry import FAMILIES, abstract_pipeline
from ses_jax.planner.workload import scorer_of


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The demo without a single weight, and without what tokenizers need."""
    folder = tmp_path_factory.mktemp("plans") / "my-checkpoint"
    ignored = shutil.ignore_patterns("*.safetensors", "tokenizer*", "*.jinja")
    shutil.copytree(hub.DEMO, folder, ignore=ignored)
    return folder


def sizes(tree):
    return {
        jax.tree_util.keystr(path): (leaf.shape, str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_a_folder_as_shapes_is_what_would_be_loaded(configs):
    shapes = abstract_pipeline(str(configs))
    parts = FAMILIES[shapes.family].COMPONENTS
    assert sizes(shapes.params) == sizes({name: loaded(name, part) for name, part in parts.items()})
    assert sizes(scorer_of(shapes).params) == sizes(loaded("clip", clip.COMPONENT))
    assert (shapes.defaults.height, shapes.defaults.level, shapes.defaults.steps) == (128, 2, 20)


def loaded(name, part):
    return hub.load_component(hub.DEMO / name, part, dtype="bfloat16", sharding=hub.on_host)[1]


def test_the_shell_plans_a_folder(configs, capsys):
    assert cli.main(["plan", str(configs), "--device", "4090", "--budget", "20", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["model"], plan["fits"], plan["chunk"]) == (str(configs), True, 10)
    assert (plan["settings"]["height"], plan["settings"]["preview_steps"], plan["settings"]["budget"]) == (128, 10, 20)
    demo = abstract_pipeline("demo")
    assert plan["weights"] == {
        name: sum(leaf.size * (2 if leaf.shape else 4) for leaf in jax.tree.leaves(tree))  # the logit scale has none
        for name, tree in [*demo.params.items(), ("reward", scorer_of(demo).params)]
    }


def test_eight_bits_of_a_converted_folder_are_seen(configs, tmp_path):
    shutil.copytree(configs, tmp_path / "eight")
    facts = {"prefix": "", "dropped": [], "quantize": "int8"}
    (tmp_path / "eight" / "transformer" / network.CONVERSION).write_text(json.dumps(facts))
    asked, found = (
        abstract_pipeline(str(folder), quantize=kind).params["transformer"]
        for folder, kind in ((configs, "int8"), (tmp_path / "eight", None))
    )
    assert sizes(found) == sizes(asked)
    with pytest.raises(ValueError, match=r"is quantised already \(int8\); quantize='fp8' takes its original"):
        abstract_pipeline(str(tmp_path / "eight"), quantize="fp8")


def test_what_is_no_model_is_named(configs, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_snapshot", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder: nothing"):
        ses_jax.plan("./nothing")
    with pytest.raises(ValueError, match=r"some/model: no published model of that name, and no folder; known: .* demo"):
        ses_jax.plan("some/model")
    shutil.copytree(configs, tmp_path / "broken")
    (tmp_path / "broken" / "vae" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"vae/config\.json"):
        ses_jax.plan(str(tmp_path / "broken"))
    (tmp_path / "broken" / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"vae/config\.json"):
        ses_jax.plan(str(tmp_path / "broken"))
