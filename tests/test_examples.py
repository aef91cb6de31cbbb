"""The example of each family, on a tiny random checkpoint of it with a tiny random reward."""

import importlib.util
import json
from pathlib import Path

import oracle
import oracle_qwen_image
import pytest
import tyro
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
SETTINGS = {"height": 32, "width": 32, "level": 1, "steps": 2}
FAMILIES = {
    "z_image_turbo": lambda: oracle.z_image_pipeline(oracle.ZImageSizes(layers=1, refiner_layers=1)),
    "qwen_image": lambda: oracle_qwen_image.pipeline(oracle_qwen_image.Sizes(layers=1)),
}


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer")
    oracle.save_clip(folder, oracle.clip())
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_example(name, scorer, tmp_path, capsys):
    FAMILIES[name]().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "ses_jax.json").write_text(json.dumps(SETTINGS))
    example = load(name)
    options = ["--model", tmp_path / "model", "--scorer", scorer, "--budget", 3, "--out", tmp_path / "out"]
    example.main(tyro.cli(example.Arguments, args=[str(option) for option in options]))
    saved = json.loads((tmp_path / "out" / "result.json").read_text())
    assert saved["prompt"] == example.PROMPT
    assert saved["config"]["budget"] == 3
    assert Image.open(tmp_path / "out" / "best.png").size == (32, 32)
    assert f"-> {saved['final_score']:.4f}" in capsys.readouterr().out
