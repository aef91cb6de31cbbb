"""A few kills of the campaign; and that it would notice harm."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import kills


def test_a_few_kills_do_no_harm(tmp_path):
    """Real ones, at random moments, of one process and of two that share a run."""
    kills.main(kills.Arguments(kills=2, processes=(1, 2), prompts=4, out=tmp_path))
    saved = json.loads((tmp_path / "kills.json").read_text())
    assert saved["campaigns"].keys() == {"1", "2"}


def run_folder(out):
    """What a finished run of two prompts looks like."""
    for index, name in enumerate(("00000", "00001")):
        (out / name).mkdir(parents=True)
        for picture in ("best.png", "baseline.png"):
            Image.new("RGB", (4, 4), (index, 0, 0)).save(out / name / picture)
        np.save(out / name / "noise.npy", np.full((3, 4, 4), index))
        (out / name / "history.jsonl").write_text('{"index": 0}\n')
        (out / name / "report.html").write_text("<html></html>\n")
        (out / name / "result.json").write_text("{}")
    rows = "".join(json.dumps({"id": name}) + "\n" for name in ("00000", "00001"))
    (out / "results.jsonl").write_text(rows)
    (out / "results-0.jsonl").write_text(rows + '{"id": "000')
    (out / "summary.json").write_text('{"finished": 2}')
    return out


def test_a_good_run_is_fine(tmp_path):
    out = run_folder(tmp_path)
    assert kills.check(out, kills.check(out, {})).keys() == {"00000", "00001"}
    kills.check_end(out, kills.stable_files(out))
    assert len(kills.stable_files(out)) == 8


@pytest.mark.parametrize("name", ["best.png", "noise.npy", "history.jsonl", "report.html", "result.json"])
def test_a_torn_file_is_noticed(tmp_path, name):
    path = run_folder(tmp_path) / "00001" / name
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 2])
    with pytest.raises(AssertionError, match=rf"00001/{name} is torn"):
        kills.check(tmp_path, {})


def test_what_is_lost_or_done_twice_is_noticed(tmp_path):
    out = run_folder(tmp_path)
    known, whole = kills.check(out, {}), kills.stable_files(out)
    journal = out / "results-1.jsonl"
    journal.write_text('{"id": "00001"}\n')
    with pytest.raises(AssertionError, match="a prompt was done twice"):
        kills.check_end(out, whole)
    journal.unlink()
    os.utime(out / "00000" / "result.json", ns=(1, 1))
    with pytest.raises(AssertionError, match="lost or done again: 00000"):
        kills.check(out, known)
    (out / "00001" / "result.json").unlink()
    with pytest.raises(AssertionError, match="lost or done again: 00000, 00001"):
        kills.check(out, known)
    (out / "00000" / ".best.png.1.tmp").touch()
    with pytest.raises(AssertionError, match="half a file was left"):
        kills.check_end(out, whole)
    (out / "00001" / "noise.npy").write_bytes(b"other")
    with pytest.raises(AssertionError, match=r"not what an undisturbed run writes: 00001/noise\.npy"):
        kills.check_end(out, whole)
    (out / "summary.json").write_text('{"finished": 1}')
    with pytest.raises(AssertionError, match="the summary is not of all prompts"):
        kills.check_end(out, whole)
    (out / "results.jsonl").write_text('{"id": "00000"}\n')
    with pytest.raises(AssertionError, match=r"results.jsonl is not of all prompts"):
        kills.check_end(out, whole)
