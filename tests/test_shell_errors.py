"""An error is told once: threads that still read a damaged checkpoint when it is refused say nothing more."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np

from ses_jax.loading import checkpoint
from ses_jax.shell import errors

WRITER = """
import sys
from ses_jax import cli

sys.argv = ["ses-jax", "--version"]
cli.main()
print("\\u56f3")
"""

READER = """
import gc, pathlib, sys, time
import jax, numpy as np
from ses_jax import cli
from ses_jax.loading import checkpoint

folder = pathlib.Path(sys.argv[1])
sys.argv = ["ses-jax", "--version"]
if not (folder / "loud").exists():
    cli.main()
abstract = {f"leaf {i}": jax.ShapeDtypeStruct((100, 100), np.float32) for i in range(60)}
for _ in range(8):
    try:
        checkpoint.restore(folder / "params", abstract)
    except ValueError as error:
        print("refused" if "is not a complete checkpoint" in str(error) else error)
time.sleep(0.3)
gc.collect()
"""


def test_a_damaged_checkpoint_is_told_once(tmp_path):
    """Of files that are gone, the first read fails while others go on."""
    params = {f"leaf {i}": np.zeros((100, 100), np.float32) + i for i in range(60)}
    checkpoint.save(tmp_path / "params", params)
    for path in (tmp_path / "params").glob("d/*"):
        path.unlink()
    run = subprocess.run(
        [sys.executable, "-c", READER, tmp_path], capture_output=True, text=True, check=True, timeout=300
    )
    assert run.stdout.splitlines()[1:] == ["refused"] * 8
    assert "Traceback" not in run.stderr


def test_other_errors_of_threads_are_still_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "__unraisablehook__", shown.append)
    told = [SimpleNamespace(exc_value=RuntimeError(text)) for text in (errors.LATE, "another")]
    for each in told:
        errors._unraisable(each)
    assert shown == told[1:]
    record = logging.LogRecord("asyncio", logging.ERROR, "", 0, "slow callback", (), None)
    assert errors._told_already(record)


def test_a_letter_that_a_pipe_lacks_is_no_error():
    """As of a prompt, which is printed once its search is saved."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = subprocess.run([sys.executable, "-c", WRITER], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "?"
