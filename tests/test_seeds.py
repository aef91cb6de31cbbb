"""Several seeds in one call: each result is what a call with that seed alone gives."""

import numpy as np
import pytest
from batch_runs import PIPELINE, PROMPTS, REWARD, SETTINGS

import ses_jax
from ses_jax import cli


def search(prompt, **settings):
    return ses_jax.search(prompt, **{"model": PIPELINE, "reward": REWARD, "progress": False} | SETTINGS | settings)


@pytest.mark.parametrize("seeds", [[3, 0], (3, 0), np.array([3, 0]), range(3, -1, -3)])
def test_seeds_of_a_prompt_give_a_result_each(tmp_path, seeds, capsys):
    found = search(PROMPTS[0], seed=seeds, index=2, out=tmp_path)
    assert [result.prompt for result in found] == [PROMPTS[0]] * 2
    assert [result.config["seed"] for result in found] == [3, 0]
    if isinstance(seeds, list):
        for result in found:
            assert result.history == search(PROMPTS[0], seed=result.config["seed"], index=2).history
    assert {path.name for path in tmp_path.iterdir()} == {"000", "001"}
    assert ses_jax.SearchResult.load(tmp_path / "001").config["seed"] == 0
    with pytest.raises(FileNotFoundError, match="holds 2 results, each in a folder of its own; give one: 000, 001"):
        ses_jax.SearchResult.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds 2 results, each in a folder of its own; give one: 000, 001"):
        search(PROMPTS[0], base_noise=tmp_path)
    for command in (["show", str(tmp_path)], ["export", str(tmp_path), "--to", "diffusers"]):
        assert cli.main(command) == 2
        assert "holds 2 results, each in a folder of its own; give one: 000, 001" in capsys.readouterr().err
    again = search(PROMPTS[0], seed=seeds, index=2, out=tmp_path, resume=True)
    assert [result.history for result in again] == [result.history for result in found]
    with pytest.raises(ValueError, match=r"finished search with other settings \(seed 0 -> 1\)"):
        search(PROMPTS[0], seed=[3, 1], index=2, out=tmp_path, resume=True)


def test_as_many_prompts_as_seeds_are_pairs():
    found = search(PROMPTS[:2], seed=[5, 1], prompts_at_once=2)
    assert [(result.config["seed"], result.config["prompt_index"]) for result in found] == [(5, 0), (1, 1)]
    for place, result in enumerate(found):
        assert result.history == search(PROMPTS[place], seed=[5, 1][place], index=place).history
    (alone,) = search(PROMPTS[0], seed=[5])
    assert alone.history == found[0].history


def test_one_noise_stands_for_all_seeds():
    noise = search(PROMPTS[0]).noise
    found = search(PROMPTS[0], seed=[0, 1], base_noise=noise)
    assert found[0].baseline_score == found[1].baseline_score
    assert found[0].history[1] != found[1].history[1]


@pytest.mark.parametrize(
    ("prompt", "seeds", "message"),
    [
        ("a", [], r"seed=\[\] holds no seed"),
        ("a", [0, -1], "seed=-1 must be at least 0"),
        ("a", [[0], [1, 2]], r"seed=\[0\] is not a whole number"),
        ("a", ["0"], "seed='0' is not a whole number"),
        ("a", np.zeros((1, 1), int), "seed=array"),
        ("a", "01", "seed='01' is not a whole number"),
        (["a"], [0, 1], "1 prompts and 2 seeds: give a seed a prompt, or several seeds of one prompt"),
        (["a", "b", "c"], [0, 1], "3 prompts and 2 seeds"),
    ],
)
def test_what_cannot_be_paired_is_refused(prompt, seeds, message):
    with pytest.raises(ValueError, match=message):
        search(prompt, seed=seeds)


@pytest.mark.parametrize(("prompt", "index"), [("a", 2**32), (["a", "b"], 2**32 - 1), (["a"], 2**64)])
def test_a_number_that_chooses_no_draws_is_refused(prompt, index):
    bound = 2**32 + 1 - len(prompt)
    with pytest.raises(ValueError, match=f"must be less than {bound}$"):
        search(prompt, index=index)
    assert search("a", index=2**32 - 1).config["prompt_index"] == 2**32 - 1


def test_only_a_search_takes_several():
    with pytest.raises(ValueError, match=r"seed=\[0, 1\] is not a whole number"):
        ses_jax.generate(PIPELINE, "a", seed=[0, 1])
    with pytest.raises(ValueError, match=r"seed=\[0, 1\] is not a whole number"):
        ses_jax.SearchConfig(seed=[0, 1])


def test_the_shell_takes_them_too(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(ses_jax, "search", lambda prompt, **how: asked.append((prompt, how["seed"])) or [])
    for words in (["a"], ["a", "b"]):
        cli.main(["search", *words, "--seed", "9", "--seeds", "4", "5", "--out", str(tmp_path)])
    assert asked == [("a", [4, 5]), (["a", "b"], [4, 5])]
    assert cli.main(["search", "a", "--model", "a/b", "--seeds", "4", "5", "--dry-run"]) == 0
    assert "with 2 seeds: 4, 5" in capsys.readouterr().out
    assert cli.main(["search", "a", "b", "--seeds", "4", "--dry-run"]) == 2
    assert "2 prompts and 1 seeds" in capsys.readouterr().err
