"""Every script of `benchmarks/` and `examples/` starts, on its smallest settings."""

import importlib
import json
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import tyro

from ses_jax.loading import hub
from ses_jax.planner import tables

ROOT = Path(__file__).parents[1]
# The demo at settings of its own, see `quick_demo`; the same ones and the same prompts at once everywhere, so that
# scripts share compiled programs.
QUICK = ("--model", "QUICK")
SCRIPTS = {
    "benchmarks/effect.py": [*QUICK, "--prompts", "1", "--budgets", "2"],
    "benchmarks/fidelities.py": [
        *(*QUICK, "--prompts", "1", "--noises", "3", "--preview-steps", "2", "--looks", "half1", "early1"),
    ],
    "benchmarks/loops.py": ["--calls", "2", "--forms", "generate", "--growth", "1e9", "--maps", "10000"],
    "benchmarks/quantized.py": [*QUICK, "--kinds", "int8", "--prompts", "2", "--budget", "2", "--at-once", "1"],
    "benchmarks/reward_share.py": [
        *("--population", "2", "--repeats", "1", "--preview-steps", "1", "--height", "64", "--width", "64"),
    ],
    "benchmarks/searchers.py": [
        *(*QUICK, "--methods", "zero-order", "--nfe", "2", "--seeds", "0", "--prompts", "2", "--at-once", "1"),
    ],
    "benchmarks/sizes.py": ["--searches", "2", "--sizes", "1", "--model", "toy", "--growth", "1"],
    "benchmarks/search_vs_torch.py": [*QUICK, "--budget", "2", "--repeats", "1", "--threads", "1"],
}
# These are run by tests of their own.
ELSEWHERE = {
    "benchmarks/compiled.py": "test_compilation",
    "benchmarks/decoding.py": "test_compilation",
    "benchmarks/fuzz.py": "test_fuzz",
    "benchmarks/kills.py": "test_kills",
    "benchmarks/loading.py": "test_throughput",
    "benchmarks/real_search.py": "test_throughput",
    "benchmarks/soak.py": "test_soak",
    "benchmarks/throughput.py": "test_throughput",
    "examples/flux1_dev.py": "test_examples",
    "examples/flux2.py": "test_examples",
    "examples/measure_demo.py": "test_train_demo",
    "examples/qwen_image.py": "test_examples",
    "examples/train_demo.py": "test_train_demo",
    "examples/z_image_turbo.py": "test_examples",
}


def test_no_script_is_forgotten():
    found = {
        str(path.relative_to(ROOT))
        for folder in ("benchmarks", "examples")
        for path in (ROOT / folder).glob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    assert found == SCRIPTS.keys() | ELSEWHERE.keys()
    for script, test in ELSEWHERE.items():
        assert Path(script).stem.removesuffix("_dev") in (ROOT / "tests" / f"{test}.py").read_text()


@pytest.fixture(scope="module")
def quick_demo(tmp_path_factory):
    """Folder of the demo's weights, with pictures of 64 x 64 after one step."""
    folder = tmp_path_factory.mktemp("quick_demo")
    for part in hub.DEMO.iterdir():
        (folder / part.name).symlink_to(part)
    settings = json.loads((folder / "ses_jax.json").read_text())
    (folder / "ses_jax.json").unlink()
    settings |= {"height": 64, "width": 64, "level": 1, "steps": 1, "preview_steps": 1}
    (folder / "ses_jax.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_starts(script, quick_demo, tmp_path, monkeypatch, capsys):
    path = ROOT / script
    options = [quick_demo if option == "QUICK" else option for option in SCRIPTS[script]]
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [str(path), *options, "--out", str(tmp_path)])
    if script == "benchmarks/loops.py":  # its processes import it by name
        loops = importlib.import_module("loops")
        loops.main(loops.tyro.cli(loops.Arguments))
    else:
        runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out
    for file in tmp_path.glob("*.json"):
        assert json.loads(file.read_text())["environment"]["platform"] == "cpu"
    assert any(tmp_path.glob("*.json"))


def test_an_effect_without_a_budget_is_of_the_first_candidate(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    effect = importlib.import_module("effect")
    found = types.SimpleNamespace(image=None, score=1.0)
    with mock.patch.object(effect.ses_jax, "search", return_value=found) as search:
        list(effect.images(None, "a prompt", effect.Arguments(budgets=(0, 3))))
    assert [call.kwargs["budget"] for call in search.call_args_list] == [1, 3]


def test_what_a_gpu_is_asked_for_are_scripts_with_options_that_exist(monkeypatch):
    path = ROOT / "benchmarks" / "on_gpu.sh"
    subprocess.run(["bash", "-n", path], check=True)
    commands = re.findall(r"^within (\d+) python (\w+)\.py (.*)$", path.read_text(), re.MULTILINE)
    assert sum(int(minutes) for minutes, _, _ in commands) < 40
    monkeypatch.syspath_prepend(str(path.parent))
    for _, script, options in commands:
        asked = tyro.cli(importlib.import_module(script).Arguments, args=options.split())
        assert asked.model in tables.published()
