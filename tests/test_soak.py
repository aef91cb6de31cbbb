"""A few prompts of the soak, with its own assertions; and that these can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import sizes
import soak


def test_prompts_grow_nothing_and_compile_nothing(tmp_path):
    """In a process of its own, whose memory and compilations are the run's alone."""
    options = ["--prompts", "4", "--parts", "2", "--warm-up", "2", "--side", "64", "--out", tmp_path]
    command = [sys.executable, soak.__file__, *options]
    # With threads as users have them: each one's allocator keeps some memory.
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "soak.json").read_text())
    assert [mark["prompts"] for mark in result["marks"]] == [4, 6, 8]  # two token lengths
    assert result["compilations"][0] > 10
    assert "memory" in run.stdout
    assert "0 afterwards" in run.stdout


def numbers(**changed):
    return {"compilations": [9, 9], "live_array_bytes": [100, 100], "resident_bytes": [10**9, 10**9 + 10**7]} | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"compilations": [9, 11]}, "2 compilations after the first prompt of each token length"),
        ({"live_array_bytes": [100, 104]}, "live arrays grew"),
        ({"resident_bytes": [10**9, 10**9 + 59 * 10**6]}, "memory grew by 59000000 bytes, more than 58000000"),
    ],
)
def test_growth_is_noticed(changed, message):
    soak.check(soak.Arguments(), numbers())
    with pytest.raises(AssertionError, match=message):
        soak.check(soak.Arguments(), numbers(**changed))


@pytest.mark.parametrize("name", ["resident_bytes", "memory_maps"])
def test_growth_over_sizes_is_noticed(name):
    marks = [{"searches": n, "resident_bytes": 1000 - n, "memory_maps": 500} for n in (1, 2, 3, 4)]
    sizes.check(marks, sizes.Arguments(sizes=1))
    with pytest.raises(AssertionError, match=rf"{name} grew from"):
        sizes.check([*marks, marks[1] | {name: marks[1][name] * 1.03}], sizes.Arguments(sizes=1))


def test_compilations_and_live_arrays_are_counted():
    compilations = soak.count_compilations()
    function = jax.jit(lambda x: x * 3 + 1)
    before = soak.mark(0, compilations, 0.0)
    kept = [function(jnp.ones(1000)), function(jnp.ones(2000))]
    after = soak.mark(2, compilations, 0.0)
    assert after["compilations"] - before["compilations"] >= 2
    assert after["live_array_bytes"] - before["live_array_bytes"] == 4 * 3000
    function(kept[0])
    assert soak.mark(3, compilations, 0.0)["compilations"] == after["compilations"]
    assert 10**7 < after["resident_bytes"] < 10**12


def test_prompts_are_different_and_always_the_same():
    prompts = soak.demo_prompts(1010)
    assert len(set(prompts)) == 1010
    assert prompts == soak.demo_prompts(1010)
