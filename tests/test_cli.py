"""The shell commands, on the packaged demo checkpoint."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import ses_jax
from ses_jax import cli
from ses_jax.shell import options

PROMPT = "a red circle on a white background"
SIZE = ["--height", "64", "--width", "64"]
FAST = ["--budget", "4", "--population", "2", "--elites", "1", "--preview-steps", "2", "--steps", "2", "--no-progress"]
FAST += SIZE


def test_search_writes_the_result_folder(tmp_path, capsys):
    assert cli.main(["search", PROMPT, *FAST, "--out", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["prompt"] == PROMPT
    assert saved["config"]["budget"] == 4
    assert Image.open(tmp_path / "best.png").size == (64, 64)
    printed = capsys.readouterr().out
    assert f"-> {saved['score']:.4f}" in printed
    assert str(tmp_path / "best.png") in printed


def test_shell_and_python_give_the_same(tmp_path):
    cli.main(["search", PROMPT, *FAST, "--seed", "3", "--out", str(tmp_path)])
    settings = {"budget": 4, "population": 2, "elites": 1, "preview_steps": 2, "steps": 2, "height": 64, "width": 64}
    result = ses_jax.search(PROMPT, **settings, seed=3, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in result.history], rel=1e-5)


def test_several_prompts_go_to_numbered_folders(tmp_path):
    assert cli.main(["search", PROMPT, "a blue square", *FAST, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "001" / "result.json").read_text())["prompt"] == "a blue square"


def test_like_repeats_a_search_and_options_stand_on_top(tmp_path, monkeypatch, capsys):
    first, again = tmp_path / "first", tmp_path / "again"
    assert cli.main(["search", PROMPT, *FAST, "--seed", "5", "--index", "3", "--out", str(first)]) == 0
    picture = str(first / "best.png")
    assert cli.main(["search", "--like", picture, "--no-progress", "--out", str(again)]) == 0
    np.testing.assert_array_equal(np.load(again / "noise.npy"), np.load(first / "noise.npy"))
    np.testing.assert_array_equal(Image.open(again / "best.png"), Image.open(picture))
    capsys.readouterr()
    assert cli.main(["show", picture]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{PROMPT}\nSteps: 2, Sampler: Euler")
    assert f"ses-jax search '{PROMPT}' --model demo --reward clip --index 3" in printed
    assert cli.main(["export", str(again), "--to", "diffusers", "--out", str(tmp_path / "d")]) == 0
    exported = load_file(tmp_path / "d" / "noise.safetensors")["latents"]
    np.testing.assert_array_equal(exported[0], np.load(again / "noise.npy"))

    seen = {}

    def spy(prompts, **settings):
        seen.update(settings, prompts=prompts)
        raise ValueError

    monkeypatch.setattr(ses_jax, "search", spy)
    assert cli.main(["search", "a cat", f"--like={picture}", "--seed", "6", "--nfe", "30"]) == 2
    assert (seen["prompts"], seen["seed"], seen["nfe"], seen["budget"]) == ("a cat", 6, 30, None)
    assert (seen["index"], seen["steps"]) == (0, 2)  # another prompt is another's draw
    assert cli.main(["search", "a cat", f"--like={picture}", "--index", "4"]) == 2
    assert (seen["prompts"], seen["index"]) == ("a cat", 4)
    file = tmp_path / "more.txt"
    file.write_text("a dog\na fox\n")
    assert cli.main(["search", "--like", picture, "--prompt-file", str(file)]) == 2
    assert (seen["prompts"], seen["index"]) == (["a dog", "a fox"], 0)


def test_generate_writes_one_image_a_prompt(tmp_path):
    assert cli.main(["generate", PROMPT, "a blue square", "--steps", "2", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"000.png", "001.png"}
    assert Image.open(tmp_path / "000.png").size == (128, 128)


def test_models_lists_every_model_and_reward(capsys):
    assert cli.main(["models"]) == 0
    printed = capsys.readouterr().out
    for name in ("demo", "Tongyi-MAI/Z-Image-Turbo", "--reward pick", "verified:"):
        assert name in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search"], "no prompts"),
        (["search", "x", "--budget", "0"], "budget=0 must be at least 1"),
        (["search", "x", "--model", "no_such"], "unknown model 'no_such'"),
        (["search", "x", "--reward", "nice"], "unknown reward 'nice'"),
        (["search", "x", "--reward", "pick=1,hps"], "weights such as pick=1,hps=0.5"),
        (["search", "x", "--reward", "no_such_module:judge"], "reward 'no_such_module:judge': No module named"),
        (["search", "x", "--report", "nice"], "unknown reward 'nice'"),
        (["search", "x", "--height", "60"], "height=60 must be a multiple of 16"),
        (["search", "x", "--level", "7"], "level=7 does not fit a latent of 16 x 16"),
        (["search", "x", "--reward", "clip=1,clip=2"], "--reward clip=1,clip=2: a name is there twice"),
        (["search", "x", "--reward", "clip=0"], "every weight of the reward is 0"),
        (["search", "x", "--reward", "clip=nan"], "reward: the weight nan of 'clip' is not a number"),
        (["search", "half \udcff"], r"the text 'half \udcff' is not Unicode"),
        (["search", "x", "--budget", str(10**30)], "must be less than 2147483648"),
        (["generate", "x", "--steps", "0"], "steps=0 must be at least 1"),
        (["generate", "x", "--noise", "none.npy"], "none.npy: no such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_two(tmp_path, capsys, arguments, message):
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "-5"], "tokens=-5 must be at least 1 and at most"),
        (["--tokens", "100000"], "tokens=100000 must be at least 1 and at most"),
        (["--utilization", "nan"], "utilization=nan must lie in"),
        (["--mesh", "data=0"], "mesh 'data=0'"),
    ],
)
def test_bad_plans_are_one_line(capsys, arguments, message):
    assert cli.main(["plan", "Tongyi-MAI/Z-Image-Turbo", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_module_of_the_user_that_fails_shows_where(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_broken.py").write_text("def judge(images, prompts):\n    return undefined\n\n\n1 / 0\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["search", "x", "--reward", "my_broken:judge"]) == 1
    error = capsys.readouterr().err
    assert 'my_broken.py", line 5' in error
    assert error.splitlines()[-1].startswith("ses-jax: raised by the reward 'my_broken:judge': ZeroDivisionError")


def test_rewards_are_parsed(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def red(images, prompts):\n    return images[..., 0].mean(axis=(1, 2))\n")
    monkeypatch.chdir(tmp_path)
    assert options.parse_reward("pick") == "pick"
    assert options.parse_reward("pick=1, clip=0.5") == {"pick": 1.0, "clip": 0.5}
    mixed = options.parse_reward("clip=1,my_rewards:red=-2")
    assert [getattr(name, "__name__", name) for name in mixed] == ["clip", "red"]
    assert list(mixed.values()) == [1.0, -2.0]
    assert str(tmp_path) not in sys.path


def test_guidance_and_options_are_read():
    def guidance(text):
        return options.arguments(options.RenderOptions(guidance=text))["guidance"]

    assert guidance(None) is None
    assert guidance("3.5") == 3.5
    assert (
        guidance("scale=3.5, true_cfg=4")
        == guidance('{"scale": 3.5, "true_cfg": 4}')
        == {"scale": 3.5, "true_cfg": 4.0}
    )
    assert options.parse_options(["band=unpacked", "max_tokens=256"]) == {"band": "unpacked", "max_tokens": 256}
    for text in ("high", "scale=x", "scale=1=2", "nan"):
        with pytest.raises(ValueError, match=f"guidance='?{text}'? is not a number, or options such as scale=3.5"):
            guidance(text)
    with pytest.raises(ValueError, match="expected NAME=VALUE"):
        options.parse_options(["band"])


def test_a_bad_option_is_one_line(tmp_path, capsys):
    assert cli.main(["generate", PROMPT, "--option", "band=unpacked", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip() == "ses-jax: demo: unknown options ['band']; this family takes: none"


def test_weights_on_the_host_give_the_same_image(tmp_path):
    for name, more in (("plain", []), ("offloaded", ["--offload-text-encoder", "--guidance", "scale=0"])):
        arguments = ["generate", PROMPT, "--steps", "2", *SIZE, *more, "--out", str(tmp_path / name)]
        assert cli.main(arguments) == 0
    plain, offloaded = (Image.open(tmp_path / name / "000.png") for name in ("plain", "offloaded"))
    np.testing.assert_array_equal(plain, offloaded)


def test_a_search_by_a_users_function_with_a_report(tmp_path, monkeypatch):
    (tmp_path / "my_judge.py").write_text("def red(images, prompts):\n    return images[..., 0].mean(axis=(1, 2))\n")
    monkeypatch.chdir(tmp_path)
    arguments = ["search", PROMPT, *FAST, "--reward", "my_judge:red", "--report", "clip", "--out", "out"]
    assert cli.main(arguments) == 0
    saved = json.loads((tmp_path / "out" / "result.json").read_text())
    assert saved["config"]["reward"] == "red"
    assert set(saved["components"]) == {"red", "clip"}


WITHOUT_TORCH = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in ("torch", "diffusers")
        return None if hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from ses_jax import cli
status = cli.main(sys.argv[1:])
assert not {"torch", "diffusers"} & set(sys.modules)
sys.exit(status)
"""


def test_a_search_runs_without_torch_and_keeps_its_compiled_programs(tmp_path):
    """In a process of its own, which finds those of the searches above, all but one, where it would keep them."""
    home = tmp_path / "cache"
    kept = home / "ses_jax" / "xla"
    shutil.copytree(jax.config.jax_compilation_cache_dir, kept, ignore=shutil.ignore_patterns("jit_render-*"))
    environment = {k: v for k, v in os.environ.items() if "CACHE" not in k} | {"XDG_CACHE_HOME": str(home)}
    arguments = ["search", PROMPT, *FAST, "--out", str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], check=True, env=environment, cwd=tmp_path)
    assert (tmp_path / "out" / "result.json").exists()
    assert any(kept.glob("jit_render-*"))


def test_the_module_is_the_command(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "ses_jax", "search", "--budget", "0", "x"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 2
    assert run.stderr.strip() == "ses-jax: budget=0 must be at least 1"
