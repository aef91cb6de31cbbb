"""Damaged and hostile files, and disks that are full: named, nothing finished is lost, and the same command goes on."""

import dataclasses
import errno
import json
import os
import shutil

import batch_runs
import numpy as np
import pytest
from batch_runs import PIPELINE, PROMPTS, REWARD, SETTINGS

import ses_jax
from ses_jax.batch import prompts as prompt_files
from ses_jax.batch.run_folder import Run
from ses_jax.convert import autoencoder_kl, clip, decoder_lm, files, score_head, z_image
from ses_jax.convert.engine import ConversionError
from ses_jax.engine import resume
from ses_jax.engine.program import Scored, State
from ses_jax.loading import hub, network
from ses_jax.loading.tokenizers import load_tokenizer
from ses_jax.models.config import check
from ses_jax.pipelines.base import in_chat_template
from ses_jax.pipelines.registry import load_pipeline

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
DEEP = "[" * 100_000
ZEROS = "\0" * 50


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    batch_runs.run(PROMPTS[:2], out)
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run that may be damaged, and its rows."""
    shutil.copytree(finished, tmp_path / "run")
    return Run(tmp_path / "run", prompt_files.read_rows(PROMPTS[:2]))


def changed(file, **entries):
    content = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({name: value for name, value in content.items() if value != "gone"}))


@pytest.mark.parametrize(
    "damage",
    [
        *(
            lambda file, text=text: file.write_text(text)
            for text in ("", ZEROS, DEEP, "[]", "null", "{}", '{"score": 1')
        ),
        *(lambda file, name=name: changed(file, **{name: "gone"}) for name in ("score", "timings", "interrupted")),
        *(
            lambda file, name=name: changed(file, **{name: [1]})
            for name in ("score", "timings", "components", "scored")
        ),
        lambda file: changed(file, timings={"encode": 1, "search": 0, "render": 1, "images_per_second": 1}),
        lambda file: changed(file, components={"red": {"score": 1}}),
        lambda file: (file.unlink(), file.mkdir()),
        lambda file: (shutil.rmtree(file.parent), file.parent.write_text("a file of that name")),
    ],
)
def test_a_damaged_result_counts_as_none(run, damage):
    damage(run.folder / "00001" / "result.json")
    assert [run.finished(row) is not None for row in run.rows] == [True, False]
    assert run.outcomes()[1] is None


def test_a_file_in_the_place_of_a_rows_folder_fails_that_row_alone(run):
    shutil.rmtree(run.folder / "00001")
    (run.folder / "00001").write_text("a file")
    summary = batch_runs.run(PROMPTS[:2], run.folder)
    assert (summary["finished"], summary["failed"]) == (1, 1)
    error = batch_runs.lines(run.folder / "results.jsonl")[1]["error"]
    assert "00001 is a file, and this row's folder has that name" in error


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        *(("run.json", text, r"run\.json is damaged") for text in ("", ZEROS, DEEP, "[]", "{}", '{"settings": [1]}')),
        ("prompts.jsonl", None, r"prompts\.jsonl is damaged or gone"),
        ("prompts.jsonl", ZEROS, "was started with 0 prompts|other prompts"),
    ],
)
def test_a_damaged_run_is_named(run, name, text, message):
    (run.folder / name).unlink()
    if text is not None:
        (run.folder / name).write_text(text)
    if text == ZEROS and name == "prompts.jsonl":
        (run.folder / name).write_text(ZEROS + "\n")
    with pytest.raises(ValueError, match=message):
        run.check({"budget": 5})


def test_journals_may_hold_anything(run):
    lines = ["null", "3", "[]", '{"error": 3}', '{"error": "x"}', '{"error": "mine", "id": "00001"}', DEEP, "\0"]
    (run.folder / "results-7.jsonl").write_text("\n".join(lines))
    (run.folder / "00001" / "result.json").unlink()
    assert run.outcomes()[1] == {"id": "00001", "index": 1, "prompt": PROMPTS[1], "metadata": {}, "error": "mine"}


def test_a_result_that_is_read_again_names_what_is_damaged(run):
    folder = run.folder / "00000"
    assert ses_jax.SearchResult.load(folder).prompt == PROMPTS[0]
    for name, text in (("best.png", "no image"), ("noise.npy", ZEROS), ("history.jsonl", "3\n"), ("result.json", "{}")):
        kept = (folder / name).read_bytes()
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            ses_jax.SearchResult.load(folder)
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
            ses_jax.SearchResult.load(folder)
        (folder / name).write_bytes(kept)


STATE = State(np.ones((1, 3), np.float32), np.ones((1,), np.int32), None)
SCORED = Scored(np.zeros((1, 4, 1), np.float32), np.zeros((1, 4), np.float32))


@pytest.mark.parametrize(
    ("name", "text"),
    [("search.json", ZEROS), ("search.json", "[]"), ("000002/_METADATA", ""), ("000002/_METADATA", "[]")],
)
def test_a_damaged_state_is_begun_anew(tmp_path, caplog, name, text):
    folder, identity = tmp_path / "state", {"prompts": ["a"]}
    resume.begin(folder, identity)
    resume.save(folder, 2, STATE, [SCORED])
    assert resume.load(folder, STATE)[0] == 2
    (folder / name).write_text(text)
    resume.begin(folder, identity)
    done, state, parts = resume.load(folder, STATE)
    assert (done, parts) == (0, [])
    assert state is STATE
    assert "the search begins anew" in caplog.text
    resume.save(folder, 1, STATE, [SCORED])
    assert resume.load(folder, STATE)[0] == 1


def test_what_is_said_of_settings_of_any_length_is_short(tmp_path, run):
    """Of a search under way, a finished one and a run; of many settings, and of one with a long name or value."""
    long = "[" * 100_000
    for place, saved in enumerate(({long: 1}, {"prompt": long}, {str(i): i for i in range(10_000)})):
        resume.begin(tmp_path / str(place), saved)
        with pytest.raises(ValueError, match=r"an unfinished search with other settings .*\.\.\.") as caught:
            resume.begin(tmp_path / str(place), {"seed": 1})
        assert len(str(caught.value)) < 3000
    changed = json.loads((run.folder / "00000" / "result.json").read_text())
    changed["config"]["wavelet"] = long
    (run.folder / "00000" / "result.json").write_text(json.dumps(changed))
    settings = json.loads((run.folder / "run.json").read_text())
    settings["settings"]["wavelet"] = long
    (run.folder / "run.json").write_text(json.dumps(settings))
    again = {"model": PIPELINE, "reward": REWARD, "resume": True, **SETTINGS}
    for call in (
        lambda: ses_jax.search(PROMPTS[0], out=run.folder / "00000", **again),
        lambda: run.check({"wavelet": "db1"}),
    ):
        with pytest.raises(ValueError, match=r"wavelet.*\.\.\.") as caught:
            call()
        assert len(str(caught.value)) < 3000


def test_the_state_of_another_search_is_begun_anew(tmp_path, caplog):
    resume.begin(tmp_path / "state", {})
    resume.save(tmp_path / "state", 2, STATE, [SCORED])
    other = STATE._replace(searcher=np.zeros((1, 4), np.float32))
    assert resume.load(tmp_path / "state", other)[0] == 0
    assert "the saved state is that of another search; the search begins anew" in caplog.text


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 2


@dataclasses.dataclass(frozen=True)
class Outer:
    number: float = 1
    count: int | None = None
    layers: int = 3
    name: str = "x"
    on: bool = False
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, float] = (1, 0.5)
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("number", "x", "a number"),
        ("number", float("inf"), "a number"),
        ("number", True, "a number"),
        ("count", 1.5, "a whole number or null"),
        ("count", -1, "a whole number or null"),
        ("layers", {}, "a whole number"),
        ("layers", 1024, "less than 1024"),
        ("name", 3, "text"),
        ("on", 1, "true or false"),
        ("sizes", [1], "a list of numbers"),
        ("sizes", (1, "a"), "a list of numbers"),
        ("sizes", (1,) * 2000, "a list of numbers"),
        ("sizes", (2**31,), "less than 2147483648"),
        ("pair", (1,), "a list of numbers"),
        ("inner", Inner("x"), "a whole number"),
    ],
)
def test_fields_of_configs_have_types(field, value, kind):
    assert check(Outer()) == Outer()
    with pytest.raises(ValueError, match=f"{field if field != 'inner' else 'width'}=.* must be {kind}"):
        check(dataclasses.replace(Outer(), **{field: value}))


COMPONENTS = {
    "vae": autoencoder_kl.COMPONENT,
    "clip": clip.COMPONENT,
    "transformer": z_image.COMPONENT,
    "text_encoder": decoder_lm.component(-2),
}


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("vae", {"latent_channels": {"a": 1}}, "latent_channels"),
        ("vae", {"scaling_factor": "x"}, "scaling_factor"),
        ("vae", {"scaling_factor": float("nan")}, "scaling_factor=nan must be a number"),
        ("vae", {"block_out_channels": [16, "a"]}, "block_out_channels"),
        ("vae", {"layers_per_block": 10**9}, "layers_per_block=1000000000 must be less than 1024"),
        ("vae", {"norm_num_groups": -1}, "norm_num_groups=-1 must be a whole number"),
        ("vae", {"norm_num_groups": 5}, "makes no network"),
        ("clip", {"text_config": "x"}, "makes no network"),
        ("clip", {"vision_config": [1]}, "makes no network"),
        ("transformer", {"n_layers": "many"}, "layers"),
        ("transformer", {"n_layers": 10**9}, "must be less than 1024"),
        ("text_encoder", {"num_hidden_layers": "x"}, "makes no network"),
        ("text_encoder", {"num_attention_heads": 0, "head_dim": None}, "makes no network"),
    ],
)
def test_configs_of_another_kind_are_named(tmp_path, name, entries, message):
    config = json.loads((hub.DEMO / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | entries))
    for weights in (hub.DEMO / name).glob("*.safetensors"):
        (tmp_path / weights.name).symlink_to(weights)
    with pytest.raises(ValueError, match=rf"(?s)config\.json: .*({message})"):
        network.load(tmp_path, COMPONENTS[name])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model_index.json", {"_class_name": {"a": 1}}, "pipeline class .* is not supported"),
        ("model_index.json", DEEP, "nested too deep"),
        ("scheduler/scheduler_config.json", {"shift": "x"}, "could not convert string to float: 'x'"),
        ("scheduler/scheduler_config.json", {"shift": float("nan")}, "noise levels that are not finite"),
        ("ses_jax.json", {"steps": "x"}, r"(?s)make no pipeline.*steps|ses_jax\.json: steps"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": {"a": 1}}, "the tokenizer in .* cannot be read"),
        ("tokenizer/tokenizer_config.json", {"padding_side": "[" * 9999}, "the tokenizer in .* cannot be read.{,205}$"),
        ("tokenizer/tokenizer.json", POINTER, r"tokenizer\.json is not the file itself but a pointer of Git LFS"),
        ("vae/diffusion_pytorch_model.safetensors", POINTER, r"vae/.*\.safetensors is not the file itself but a point"),
    ],
)
def test_a_checkpoints_small_files_are_named(tmp_path, name, content, message):
    for path in hub.DEMO.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(hub.DEMO)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(hub.DEMO)).symlink_to(path)
    file = tmp_path / name
    text = content if isinstance(content, str) else json.dumps(json.loads(file.read_text()) | content)
    file.unlink()
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/passwd", "..", "", 3, None])
def test_an_index_leads_nowhere_else(tmp_path, place):
    index = tmp_path / f"{score_head.COMPONENT.stem}{files.INDEX}"
    index.write_text(json.dumps({"weight_map": {"layers.0.weight": place}}))
    with pytest.raises(ConversionError, match="has no weight_map of names of files beside it"):
        files.open_weights(tmp_path, score_head.COMPONENT.stem)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no') }}", "{{ nothing.at.all }}", "{{ ''.__class__.__mro__ }}", "{% bad", "{{ 1 // 0 }}"],
)
def test_a_chat_template_that_fails_is_named(template):
    tokenizer = load_tokenizer(hub.DEMO / "tokenizer")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=r"the chat template of the tokenizer in .*demo/tokenizer fails"):
        in_chat_template(tokenizer, [{"role": "user", "content": "a"}], add_generation_prompt=True)


def failing_at(monkeypatch, moment, name):
    """`os.<name>` says that the disk is full, in its call of this number and ever after."""
    calls, original = [], getattr(os, name)

    def full(*args):
        calls.append(args)
        if len(calls) > moment:
            raise OSError(errno.ENOSPC, "No space left on device", "a temporary file")
        return original(*args)

    monkeypatch.setattr(os, name, full)
    return calls


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path, name):
    out, settings = tmp_path / "out", {"model": PIPELINE, "reward": REWARD, "progress": False} | SETTINGS
    ses_jax.search(PROMPTS[0], out=out, **settings)
    before = contents(out)
    for moment in range(7):
        with pytest.MonkeyPatch.context() as patch:
            failing_at(patch, moment, name)
            with pytest.raises(OSError, match=f"cannot write: No space left on device: '{out}") as caught:
                ses_jax.search(PROMPTS[1], out=out, overwrite=True, **settings)
        assert caught.value.filename.startswith(str(out))
        now = contents(out)
        if name == "fsync":  # the disk was full before anything was renamed
            assert {path: now[path] for path in before} == before
        assert not list(out.rglob("*.tmp"))
    ses_jax.search(PROMPTS[1], out=out, overwrite=True, **settings)
    assert {path.name for path in contents(out)} == {path.name for path in before}
    assert ses_jax.SearchResult.load(out).prompt == PROMPTS[1]


def test_a_batch_run_on_a_full_disk_ends_and_goes_on(tmp_path, finished, monkeypatch):
    out, moment = tmp_path / "out", 0
    while True:
        with monkeypatch.context() as patch:
            failing_at(patch, moment, "fsync")
            try:
                batch_runs.run(PROMPTS[:2], out)
                break
            except OSError as error:
                said = str(error)
        assert f"cannot write: No space left on device: '{out}" in said
        known = batch_runs.finished(out)
        moment += 3
    assert moment > 9
    assert known.items() <= batch_runs.finished(out).items()
    assert batch_runs.stable_files(out) == batch_runs.stable_files(finished)
    assert not list(out.rglob("*.tmp"))
