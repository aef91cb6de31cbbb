"""The example of each family, on a tiny random checkpoint of it with a tiny random reward."""

import importlib.util
import json
from pathlib import Path

import oracle
import oracle_flux1
import oracle_flux2
import oracle_qwen_image
import pytest
import torch
import tyro
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
SETTINGS = {"height": 32, "width": 32, "level": 1, "steps": 2, "preview_steps": 2}
FAMILIES = {
    "z_image_turbo": lambda: oracle.z_image_pipeline(oracle.ZImageSizes(layers=1, refiner_layers=1, vae_layers=1)),
    "qwen_image": lambda: oracle_qwen_image.pipeline(oracle_qwen_image.Sizes(layers=1, vae_blocks=1)),
    "flux1_dev": lambda: oracle_flux1.flux1_pipeline(oracle_flux1.Flux1Sizes(layers=1, single_layers=1, vae_layers=1)),
    "flux2": lambda: oracle_flux2.dev_pipeline(oracle_flux2.Sizes(layers=1, single_layers=1, vae_layers=1)),
}


def run(name, folder, *budget):
    """Runs an example as the shell does; the scorer's folder holds the weights of either kind."""
    FAMILIES[name]().save_pretrained(folder / "model")
    (folder / "model" / "ses_jax.json").write_text(json.dumps(SETTINGS))
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    options = ["--model", folder / "model", "--scorer", folder / "scorer", "--out", folder / "out", *budget]
    example.main(tyro.cli(example.Arguments, args=[str(option) for option in options]))
    return example


def saved(folder, example, budget):
    result = json.loads((folder / "result.json").read_text())
    assert result["prompt"] == example.PROMPT
    assert result["config"]["budget"] == budget
    assert Image.open(folder / "best.png").size == (32, 32)
    return result


@pytest.mark.parametrize("name", ["z_image_turbo", "qwen_image", "flux2"])
def test_example(name, tmp_path, capsys):
    oracle.save_clip(tmp_path / "scorer", oracle.clip())
    example = run(name, tmp_path, "--budget", 3)
    result = saved(tmp_path / "out", example, 3)
    assert f"-> {result['final_score']:.4f}" in capsys.readouterr().out


def test_example_of_several_budgets(tmp_path, capsys):
    scorer = tmp_path / "scorer"
    scorer.mkdir()
    torch.save({"epoch": 1, "state_dict": oracle.open_clip().state_dict()}, scorer / "HPS_v2.1_compressed.pt")
    (scorer / "open_clip_config.json").write_text(json.dumps(oracle.OPEN_CLIP))
    oracle.clip_tokenizer().save_pretrained(scorer)
    example = run("flux1_dev", tmp_path, "--budgets", 2, 3)
    printed = capsys.readouterr().out
    assert "budget 0: HPSv2 " in printed
    results = [saved(tmp_path / "out" / f"{budget:03d}", example, budget) for budget in (2, 3)]
    for result in results:
        assert f"-> {result['final_score']:.4f}" in printed
    assert results[0]["baseline_final_score"] == pytest.approx(results[1]["baseline_final_score"], rel=1e-4)
