"""Every script of `benchmarks/` and `examples/` starts, on its smallest settings."""

import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from ses_jax.planner import tables

ROOT = Path(__file__).parents[1]
STEPS = ("--preview-steps", "1", "--steps", "1")
SCRIPTS = {
    "benchmarks/effect.py": ["--prompts", "1", "--budgets", "0"],
    "benchmarks/fidelities.py": [
        *("--prompts", "1", "--noises", "3", "--preview-steps", "2", "--looks", "half1", "early1"),
    ],
    "benchmarks/loops.py": ["--calls", "2", "--forms", "generate", "--growth", "1e9", "--maps", "10000"],
    "benchmarks/quantized.py": ["--kinds", "int8", "--prompts", "2", "--budget", "1", "--at-once", "2", *STEPS],
    "benchmarks/reward_share.py": ["--population", "2", "--repeats", "1", "--preview-steps", "1"],
    "benchmarks/searchers.py": [
        *("--methods", "zero-order", "--nfe", "2", "--seeds", "0", "--prompts", "2", "--at-once", "2", *STEPS),
    ],
    "benchmarks/sizes.py": ["--searches", "4", "--sizes", "2", "--model", "toy", "--growth", "1"],
    "benchmarks/search_vs_torch.py": ["--budget", "2", "--repeats", "1", "--threads", "1"],
}
# These are run by tests of their own.
ELSEWHERE = {
    "benchmarks/compiled.py": "test_compilation",
    "benchmarks/fuzz.py": "test_fuzz",
    "benchmarks/kills.py": "test_kills",
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


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_starts(script, tmp_path, monkeypatch, capsys):
    path = ROOT / script
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [str(path), *SCRIPTS[script], "--out", str(tmp_path)])
    if script == "benchmarks/loops.py":  # its processes import it by name
        loops = importlib.import_module("loops")
        loops.main(loops.tyro.cli(loops.Arguments))
    else:
        runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out
    for file in tmp_path.glob("*.json"):
        assert json.loads(file.read_text())["environment"]["platform"] == "cpu"
    assert any(tmp_path.glob("*.json"))


def test_what_a_gpu_is_asked_for_are_scripts_with_options_that_exist(monkeypatch):
    path = ROOT / "benchmarks" / "on_gpu.sh"
    subprocess.run(["bash", "-n", path], check=True)
    commands = re.findall(r"^within (\d+) python (\w+)\.py (.*)$", path.read_text(), re.MULTILINE)
    assert sum(int(minutes) for minutes, _, _ in commands) < 40
    monkeypatch.syspath_prepend(str(path.parent))
    for _, script, options in commands:
        asked = tyro.cli(importlib.import_module(script).Arguments, args=options.split())
        assert asked.model in tables.published()
