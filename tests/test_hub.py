"""Where weights come from, and what is said when they don't come."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import ses_jax
from ses_jax.convert import autoencoder_kl, files
from ses_jax.loading import hub, network
from ses_jax.models import layers

SIZES = oracle.ZImageSizes(vae_widths=(4, 8), vae_layers=1)


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    oracle.vae(SIZES).save_pretrained(folder)
    return folder


def test_demo_is_the_packaged_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "DEMO", tmp_path)
    assert hub.resolve("demo") == tmp_path
    monkeypatch.setattr(hub, "DEMO", tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="the demo checkpoint is not part of this installation"):
        hub.resolve("demo")


def test_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("downloads"))
    assert hub.resolve("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/org") == tmp_path / "org"


@pytest.mark.parametrize("source", ["./absent", "/absent/folder", "../a/b", "~/nowhere", Path("absent")])
def test_path_that_is_not_there(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint folder: .*(absent|a/b|nowhere)"):
        hub.resolve(source)


@pytest.mark.parametrize("source", ["demos", "a/b/c", "", "what is this"])
def test_source_that_is_nothing_of_the_three(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=f"unknown model '{source}': expected 'demo', an existing folder, or a Hugging"
    ):
        hub.resolve(source)


def test_a_file_stands_for_the_folder_of_its_checkpoint(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ValueError, match=r"is a file without a model_index.json or config.json beside it"):
        hub.resolve(file)
    (tmp_path / "config.json").write_text("{}")
    assert hub.resolve(str(file)) == tmp_path
    assert hub.resolve(tmp_path / "config.json") == tmp_path
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert hub.resolve(tmp_path / "model-00001-of-00002.safetensors") == tmp_path


@pytest.mark.parametrize("name", ["mine.safetensors", "model.fp16.safetensors", "flux1-dev-Q8_0.gguf", "model.bin"])
def test_a_file_that_its_folder_would_not_read_does_not_stand_for_it(tmp_path, name):
    """Others beside it would be loaded in its place."""
    for file in ("model_index.json", "model.safetensors", name):
        (tmp_path / file).touch()
    with pytest.raises(ValueError, match=rf"{name} is not what would be read.* as in transformer={name}"):
        hub.resolve(tmp_path / name)


@pytest.mark.parametrize("dtype", ["float12", "int8", 3.5, jnp.float64])
def test_a_dtype_that_weights_cant_have_is_named(dtype):
    for load in (
        ses_jax.load_pipeline,
        lambda dtype: ses_jax.load_reward("clip", source=hub.DEMO / "clip", dtype=dtype),
    ):
        with pytest.raises(ValueError, match="is no dtype of weights; choose bfloat16, float16, float32"):
            load(dtype=dtype)


THREADS = """
import sys
import threading
import ses_jax
failures = []

def load():
    try:
        ses_jax.load_pipeline("demo")
    except BaseException as error:
        failures.append(error)

threads = [threading.Thread(target=load) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failures, failures
assert "torch" not in sys.modules
"""


def test_threads_of_a_fresh_process_may_load_at_once(tmp_path):
    subprocess.run([sys.executable, "-c", THREADS], check=True, cwd=tmp_path)


def test_threads_that_trace_networks_stack_blocks_one_after_the_other(monkeypatch):
    """Flax takes fields out of the bases of a class while it makes one, where another thread looks for them."""
    making = threading.Semaphore(1)

    def scan(block, **_):
        assert making.acquire(blocking=False), "two at once"
        time.sleep(0.01)
        making.release()
        return block

    monkeypatch.setattr(layers.nn, "scan", scan)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda length: layers.stack(layers.RMSNorm, length), range(8))) == [layers.RMSNorm] * 8


def remote(tmp_path, *names):
    """A stand-in for the hub: the files of a repository, copied by pattern as snapshot_download does it."""
    wanted = []

    def snapshot_download(repo_id, *, allow_patterns, ignore_patterns):
        for name in huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            wanted.append(name)
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("{}")
        return str(tmp_path)

    return snapshot_download, wanted


def test_pipeline_comes_without_its_duplicates(monkeypatch, tmp_path):
    fetched = [
        "model_index.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/chat_template.jinja",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    left = ["flux1-dev.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors", "vae/model.bin", "image.png"]
    snapshot_download, got = remote(tmp_path, *fetched, *left)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.resolve("org/pipeline") == tmp_path
    assert sorted(got) == sorted(fetched)


def test_single_network_comes_from_the_root(monkeypatch, tmp_path):
    fetched = ["config.json", "model.safetensors", "tokenizer.json"]
    left = ["pytorch_model.bin", "open_clip_pytorch_model.safetensors", "model.fp16.safetensors"]
    snapshot_download, got = remote(tmp_path, *fetched, *left)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    hub.resolve("org/clip")
    assert sorted(got) == sorted(fetched)


def test_offline_and_unknown_id_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'no/such' is neither a folder nor could it be fetched .*HF_HUB_OFFLINE"):
        hub.resolve("no/such")


def test_component_in_the_dtype_of_the_machine(vae_folder):
    config, params = hub.load_component(vae_folder, autoencoder_kl.COMPONENT)
    assert config.block_out_channels == (4, 8)
    default = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(default)}
    _, params = hub.load_component(vae_folder, autoencoder_kl.COMPONENT, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_converted_component_is_the_same(vae_folder, tmp_path):
    network.save_converted(tmp_path, network.load(vae_folder, autoencoder_kl.COMPONENT))
    config, params = hub.load_component(vae_folder, autoencoder_kl.COMPONENT)
    converted_config, converted = hub.load_component(tmp_path, autoencoder_kl.COMPONENT)
    assert converted_config == config
    jax.tree.map(np.testing.assert_array_equal, converted, params)


def test_broken_component_is_named(vae_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        hub.load_component(tmp_path, autoencoder_kl.COMPONENT)
    config = files.read_json(vae_folder / "config.json")
    files.write_json(tmp_path / "config.json", config)
    with pytest.raises(FileNotFoundError, match=r"no weights in .*expected diffusion_pytorch_model\.safetensors"):
        hub.load_component(tmp_path, autoencoder_kl.COMPONENT)


@pytest.mark.parametrize(
    ("content", "complaint"), [("{", "is not valid JSON"), ("[1]", "must hold a JSON object, not li")]
)
def test_broken_json_is_named(tmp_path, content, complaint):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=f"x.json {complaint}"):
        hub.read_json(tmp_path / "x.json")


def test_settings_are_optional(tmp_path):
    assert hub.settings(tmp_path) == {}
    (tmp_path / "ses_jax.json").write_text(json.dumps({"level": 2}))
    assert hub.settings(tmp_path) == {"level": 2}
