"""The comparison of searchers goes on where it was interrupted."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import searchers


def compared(folder):
    searchers.main(
        searchers.Arguments(
            methods=("zero-order",), against="zero-order", nfe=(2, 4), prompts=2, seeds=(0,), at_once=1,
            preview_steps=1, steps=1, out=folder,
        )
    )  # fmt: skip
    return json.loads((folder / "searchers_hard.json").read_text())["rows"]


def test_an_interrupted_comparison_goes_on(tmp_path, monkeypatch):
    measured, measures = [], searchers.measures

    def interrupted(*args):
        measured.append(args)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measures(*args)

    whole = compared(tmp_path / "whole")
    assert all(row["nfe"] == [2, 4] for row in whole["zero-order"]["0"])
    monkeypatch.setattr(searchers, "measures", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compared(tmp_path / "cut")
    (begun,) = (tmp_path / "cut" / "begun").iterdir()
    assert {path.name for path in begun.iterdir()} == {"2.json", "searches"}
    assert compared(tmp_path / "cut") == whole
    assert len(measured) == 3 + 2  # of the second budget alone
    assert not begun.exists()
    assert compared(tmp_path / "cut") == whole
    assert len(measured) == 3 + 2
