"""A sample of the fuzz campaign; and that the campaign would notice."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fuzz

# Cheap ones more often.
CHEAP = {"settings": 65, "prompts": 50, "pickles": 55, "safetensors": 50, "quantised": 30, "adapters": 20}
SAMPLE = CHEAP | {"runs": 15, "tokenizers": 5, "configs": 3, "states": 3, "shell": 4}


def test_a_sample_has_no_failure():
    assert SAMPLE.keys() == fuzz.AREAS.keys()
    assert sum(SAMPLE.values()) == 300
    assert fuzz.run([(area, number) for area, count in SAMPLE.items() for number in range(count)]) == {}


def ends_in(act, monkeypatch):
    monkeypatch.setitem(fuzz.AREAS, "settings", lambda rng, folder: act())
    return fuzz.outcome("settings", 0)


def test_what_ends_otherwise_is_a_failure(monkeypatch):
    def on_purpose():
        raise ValueError("budget=0 must be at least 1")

    def started():
        raise fuzz.StartedError

    for act in (lambda: None, on_purpose, started, lambda: Path("/no/such/file").read_text()):
        assert ends_in(act, monkeypatch) is None
    for act, what in (
        (lambda: {}["settings"], "KeyError"),
        (lambda: int("x"), "ValueError"),
        (lambda: [].x, "AttributeError"),
        (lambda: 1 + "", "TypeError"),
    ):
        assert ends_in(act, monkeypatch).what.startswith(what)
    monkeypatch.setattr(fuzz, "BYTES", -1)
    assert ends_in(lambda: None, monkeypatch).what.startswith("more than")


def test_cases_are_the_same_again():
    values = [[repr(fuzz.fuzz_values.text(random.Random(f"shell:{i}"))) for i in range(20)] for _ in range(2)]
    assert values[0] == values[1]
    assert len(set(values[0])) > 5


def test_the_script_runs_areas_and_fails_where_a_case_does(tmp_path, monkeypatch, capsys):
    fuzz.main(fuzz.Arguments(cases=10, areas=("pickles", "safetensors"), out=tmp_path))
    assert "10 cases of 2 areas" in capsys.readouterr().out
    monkeypatch.setitem(fuzz.AREAS, "pickles", lambda rng, folder: {}["x"])
    with pytest.raises(AssertionError, match="1 distinct failures"):
        fuzz.main(fuzz.Arguments(cases=3, areas=("pickles",), out=tmp_path))
    assert "3 cases, such as --only pickles:0" in capsys.readouterr().out
